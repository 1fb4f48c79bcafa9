"""Local training of the hypernetwork methods, written plainly in PyTorch.

python hypernet_torch.py '{"method": "hyperfedzero", "batch": 128, "steps": 20, ...}'
"""

import json
import sys
import time

import numpy as np
from workload import CLASSES, LEARNING_RATE, keep_to_one_core

keep_to_one_core()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

torch.set_num_threads(1)
torch.manual_seed(0)
given = json.loads(sys.argv[1])


class HyperFedZero(nn.Module):
    """An extractor, and a chunked hypernetwork that emits an MLP from its embedding."""

    layers = ((200, 784), (200,), (200, 200), (200,), (CLASSES, 200), (CLASSES,))

    def __init__(self, size=16, chunk=576, hidden=220):
        super().__init__()
        convs = []
        for channels, features in ((1, 8), (8, 16), (16, 32)):
            convs += [nn.Conv2d(channels, features, 3, 2, 1), nn.ReLU()]
        self.trunk = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head, self.noise = nn.Linear(32, size), nn.Linear(32, size)
        numbers = sum(int(np.prod(shape)) for shape in self.layers)
        self.chunks = nn.Parameter(torch.randn(-(-numbers // chunk), 16))
        self.mlp = nn.Sequential(
            *(nn.Linear(size + 16, hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, chunk),
        )

    def forward(self, x, y):
        features = self.trunk(x)
        logits = self.head(features)
        noise = F.softplus(self.noise(features))
        e = torch.softmax(logits + torch.randn_like(logits) * noise, -1)
        mean = e.mean(0)
        scaled = len(mean) * mean
        spread = scaled.var(correction=0) / scaled.mean()
        uncertainty = -(e * torch.log(e + 1e-12)).sum(-1).mean()
        condition = mean.expand(len(self.chunks), -1)
        numbers = self.mlp(torch.cat([condition, self.chunks], 1)).flatten()
        at, x = 0, x.flatten(1)
        for kernel, bias in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = F.relu(x) if at else x
            end = at + kernel[0] * kernel[1]
            weight = numbers[at:end].view(kernel)
            at = end + bias[0]
            x = F.linear(x, weight, numbers[end:at])
        return F.cross_entropy(x, y) + 0.1 * spread + 0.01 * uncertainty


class HyperFedNet(nn.Module):
    """A ResNet-8 with batch-norm whose 3x3 kernels are tiles that a generator emits."""

    def __init__(self, n=128, tile=16):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.norms, self.shortcuts = nn.ModuleList(), nn.ModuleList()
        self.norms.append(nn.BatchNorm2d(16))
        self.embeddings = nn.ParameterList()
        channels = 16
        for features in (16, 32, 64):
            for inputs in (channels, features):
                grid = inputs // tile, features // tile
                drawn = torch.randn(*grid, n) * (2 / (9 * inputs)) ** 0.5
                self.embeddings.append(nn.Parameter(drawn))
                self.norms.append(nn.BatchNorm2d(features))
            if channels != features:
                conv = nn.Conv2d(channels, features, 1, 2, bias=False)
                self.shortcuts.append(conv)
            channels = features
        self.first = nn.Parameter(torch.randn(tile, n, n) * n**-0.5)
        self.first_bias = nn.Parameter(torch.zeros(tile, n))
        self.second = nn.Linear(n, 9 * tile)
        self.head = nn.Linear(64, CLASSES)
        self.tile = tile

    def kernels(self):
        grids = [e.shape[:2] for e in self.embeddings]
        vectors = torch.cat([e.flatten(0, 1) for e in self.embeddings])
        hidden = torch.einsum("tn,cdn->tcd", vectors, self.first) + self.first_bias
        tiles = self.second(hidden)
        tile, at = self.tile, 0
        for rows, columns in grids:
            part = tiles[at : at + rows * columns]
            at += rows * columns
            part = part.view(rows, columns, tile, 3, 3, tile)
            part = part.permute(1, 5, 0, 2, 3, 4)  # column, o, row, i, k, k
            yield part.reshape(columns * tile, rows * tile, 3, 3)

    def forward(self, x, y):
        norms, kernels = iter(self.norms), self.kernels()
        shortcuts = iter(self.shortcuts)
        x = F.relu(next(norms)(self.stem(x)))
        for stride in (1, 2, 2):
            z = F.relu(next(norms)(F.conv2d(x, next(kernels), None, stride, 1)))
            z = next(norms)(F.conv2d(z, next(kernels), None, 1, 1))
            x = F.relu(z + (x if stride == 1 else next(shortcuts)(x)))
        return F.cross_entropy(self.head(x.mean((2, 3))), y)


class PFedHN(nn.Module):
    """The network that a client is sent."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(800, 120), nn.ReLU()),
            *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES)),
        )

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y)


METHODS = {"hyperfedzero": HyperFedZero, "hyperfednet": HyperFedNet, "pfedhn": PFedHN}
net = METHODS[given["method"]]()
height, width, channels = given["shape"]
samples = given["batch"] * given["steps"]
random = np.random.default_rng(0)
x = random.normal(size=(samples, channels, height, width)).astype(np.float32)
x, y = torch.from_numpy(x), torch.from_numpy(random.integers(0, CLASSES, samples))
momentum, decay, clip = (given[name] for name in ("momentum", "decay", "clip"))


def epoch():
    optimizer = torch.optim.SGD(
        net.parameters(), LEARNING_RATE, momentum=momentum, weight_decay=decay
    )
    for rows in torch.randperm(samples).split(given["batch"]):
        optimizer.zero_grad()
        net(x[rows], y[rows]).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()


seconds = []
for _ in range(given["repeats"] + 1):
    began = time.process_time()
    epoch()
    seconds.append((time.process_time() - began) / given["steps"])
record = {
    "milliseconds": 1000 * min(seconds[1:]),
    "parameters": sum(p.numel() for p in net.parameters()),
    "version": torch.__version__,
}
print(json.dumps(record), flush=True)
