"""The networks in PyTorch, [B, c, H, W] inside."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)


class Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm, and a 1x1 one where the shape changes."""

    def __init__(self, channels, features, stride):
        super().__init__()
        self.one = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.norm_one, self.norm_two = (nn.GroupNorm(8, features) for _ in range(2))
        self.shortcut = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Conv2d(channels, features, 1, 2, bias=False)

    def forward(self, x):
        y = F.relu(self.norm_one(self.one(x)))
        return F.relu(self.norm_two(self.two(y)) + self.shortcut(x))


def network(name):
    """Returns a network of a workload."""
    torch.manual_seed(0)
    if name == "mlp":
        parts = [nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200)]
        return nn.Sequential(*parts, nn.ReLU(), nn.Linear(200, 10))
    if name == "lenet":
        return nn.Sequential(
            *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 120), nn.ReLU()),
            *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        )
    if name == "cnn":
        return nn.Sequential(
            *(nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(4096, 512), nn.ReLU(), nn.Linear(512, 10)),
        )
    parts = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU()]
    channels = 16
    for group, features in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if group and not block else 1
            parts.append(Residual(channels, features, stride))
            channels = features
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*parts)


def tensors(x, y):
    """Returns images, channels first, and labels."""
    first = np.ascontiguousarray(np.moveaxis(x, -1, -3))
    return torch.from_numpy(first), torch.from_numpy(y.astype(np.int64))


def loss_of(net, x, y):
    """Returns the mean cross-entropy of a network."""
    with torch.no_grad():
        return F.cross_entropy(net(x), y).item()
