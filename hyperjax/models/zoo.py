"""Target networks with the published sizes.

MLP 784-200-200-C: 199,210 parameters at C = 10. LeNet-S and LeNet are the small and
large MNIST networks of the hypernetwork library that HyperFedZero's budget points to
(arXiv:2508.12673; sizes 21,840 and 431,080 at C = 10).
"""

import flax.linen as nn

from hyperjax.models import layers
from hyperjax.types import Array


class MLP(nn.Module):
    """Flattens, then fully connected layers with ReLU between: [B, ...] -> [B, K]."""

    num_classes: int
    hidden: tuple[int, ...] = (200, 200)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden:
            x = nn.relu(layers.Dense(size)(x))
        return layers.Dense(self.num_classes)(x)


class LeNet(nn.Module):
    """conv5x5, pool, conv5x5, pool, two linear layers: [B, 28, 28, 1] -> [B, K].

    The defaults are the large network: 20 and 50 channels, 500 hidden units.
    """

    num_classes: int
    channels: tuple[int, ...] = (20, 50)
    hidden: tuple[int, ...] = (500,)
    conv_rule: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for features in self.channels:
            x = layers.Conv(features, 5, rule=self.conv_rule)(x)
            x = nn.relu(layers.max_pool(x))
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden:
            x = nn.relu(layers.Dense(size)(x))
        return layers.Dense(self.num_classes)(x)


class LeNetS(LeNet):
    """The small LeNet: 10 and 20 channels, 50 hidden units."""

    channels: tuple[int, ...] = (10, 20)
    hidden: tuple[int, ...] = (50,)


# Name in a config -> linen module taking `num_classes`.
ZOO: dict[str, type[nn.Module]] = {"mlp": MLP, "lenet": LeNet, "lenet_s": LeNetS}
