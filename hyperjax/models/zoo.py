"""Target networks with the published sizes; the last linear layer is always "head".

MLP 784-200-200-C: 199,210 parameters at C = 10. LeNet-S, LeNet, ZenkeNet and ResNet-20
are those of the hypernetwork library that HyperFedZero's budget points to
(arXiv:2508.12673; sizes 21,840, 431,080, 1,250,858 and 270,410 at C = 10). The ResNets
of HyperFedNet (arXiv:2402.18445) are in `resnet`. AttackLeNet is the network of the
reference attacks by gradient inversion (arXiv:1906.08935, arXiv:2001.02610).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.models import layers, resnet
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
        return layers.Dense(self.num_classes, name="head")(x)


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
        return layers.Dense(self.num_classes, name="head")(x)


class LeNetS(LeNet):
    """The small LeNet: 10 and 20 channels, 50 hidden units."""

    channels: tuple[int, ...] = (10, 20)
    hidden: tuple[int, ...] = (50,)


class ZenkeNet(nn.Module):
    """Four convolutions, two linear layers: [B, 32, 32, 3] -> [B, K].

    Each pair of 3x3 convolutions ends in a pool and `dropout`; the hidden layer drops
    twice as much. From Zenke et al. 2017 (arXiv:1703.04200).
    """

    num_classes: int
    dropout: float = 0.25
    conv_rule: str = "auto"

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def conv(features, padding, name):
            return layers.Conv(
                features, 3, padding=padding, rule=self.conv_rule, name=name
            )

        for pair, features in enumerate((32, 64)):
            x = nn.relu(conv(features, "SAME", f"conv{2 * pair + 1}")(x))
            x = nn.relu(conv(features, "VALID", f"conv{2 * pair + 2}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(layers.max_pool(x))
        x = nn.relu(layers.Dense(512, name="hidden")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(2 * self.dropout, deterministic=not train)(x)
        return layers.Dense(self.num_classes, name="head")(x)


class AttackLeNet(nn.Module):
    """Three 5x5 convolutions with sigmoids, one linear layer: [B, H, W, c] -> [B, K].

    Everything starts uniform on [-0.5, 0.5], and sigmoids have the second derivatives
    that gradient inversion needs.
    """

    num_classes: int
    channels: int = 12
    conv_rule: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def init(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -0.5, 0.5)

        for i, stride in enumerate((2, 2, 1), start=1):
            conv = layers.Conv(
                self.channels,
                5,
                stride,
                padding=((2, 2), (2, 2)),
                rule=self.conv_rule,
                kernel_init=init,
                bias_init=init,
                name=f"conv{i}",
            )
            x = nn.sigmoid(conv(x))
        x = x.reshape(x.shape[0], -1)
        return layers.Dense(self.num_classes, init, init, name="head")(x)


# Name in a config -> linen module taking `num_classes`.
ZOO: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "lenet": LeNet,
    "lenet_s": LeNetS,
    "zenkenet": ZenkeNet,
    "attack_lenet": AttackLeNet,
    "resnet8": resnet.ResNet8,
    "resnet38": resnet.ResNet,
    "resnet38x2": resnet.ResNet38x2,
    "resnet20": resnet.ResNet20,
}
