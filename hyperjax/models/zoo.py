"""Target networks with the published sizes; the last linear layer is always "head".

MLP 784-200-200-C: 199,210 parameters at C = 10. LeNet-S, LeNet, ZenkeNet and ResNet-20
are those of the hypernetwork library that HyperFedZero's budget points to
(arXiv:2508.12673; sizes 21,840, 431,080, 1,250,858 and 270,410 at C = 10). The ResNets
of HyperFedNet (arXiv:2402.18445) are in `resnet`. AttackLeNet is the network of the
reference attacks by gradient inversion (arXiv:1906.08935, arXiv:2001.02610).
PFedHNCNN is pFedHN's target (arXiv:2103.04628); MHCNN, VGG8, MHMLP, the MHResNets in
`resnet` and the networks in `squeezenet` are those of MH-pFedHN (arXiv:2507.22330), for
32x32 images. GRU reads tokens (Cho et al. 2014, arXiv:1406.1078).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.models import layers, resnet, squeezenet
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


class MLPBN(nn.Module):
    """The MLP with batch-norm before every ReLU: [B, ...] -> [B, K]."""

    num_classes: int
    hidden: tuple[int, ...] = (200, 200)

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden:
            x = nn.relu(layers.BatchNorm()(layers.Dense(size)(x), train, mask))
        return layers.Dense(self.num_classes, name="head")(x)


class MHMLP(MLP):
    """MH-pFedHN's network for clients that come later: 408,100 parameters, C = 100."""

    hidden: tuple[int, ...] = (128, 64)


class LeNet(nn.Module):
    """Convolutions, each with a pool, and linear layers: [B, H, W, c] -> [B, K].

    The defaults are the large network, for 28x28x1: 20 and 50 channels, 500 hidden
    units.

    Attributes:
      size: of the kernels.
      padding: of the convolutions.
    """

    num_classes: int
    channels: tuple[int, ...] = (20, 50)
    hidden: tuple[int, ...] = (500,)
    size: int = 5
    padding: layers.Padding = "VALID"
    conv_rule: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for features in self.channels:
            conv = layers.Conv(
                features, self.size, padding=self.padding, rule=self.conv_rule
            )
            x = nn.relu(layers.max_pool(conv(x)))
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden:
            x = nn.relu(layers.Dense(size)(x))
        return layers.Dense(self.num_classes, name="head")(x)


class LeNetS(LeNet):
    """The small LeNet: 10 and 20 channels, 50 hidden units."""

    channels: tuple[int, ...] = (10, 20)
    hidden: tuple[int, ...] = (50,)


class PFedHNCNN(LeNet):
    """pFedHN's target: 121,182 parameters for 32x32x3 and C = 10, 850 in the head."""

    channels: tuple[int, ...] = (16, 32)
    hidden: tuple[int, ...] = (120, 84)


class MHCNN(LeNet):
    """MH-pFedHN's small network: 234,006 parameters for 32x32x3 and C = 10."""

    channels: tuple[int, ...] = (16, 32)
    hidden: tuple[int, ...] = (108, 64)
    size: int = 3
    padding: layers.Padding = "SAME"


class VGG8(nn.Module):
    """Three pairs of 3x3 convolutions, three linear layers: [B, 32, 32, c] -> [B, K].

    ReLU after every layer but the last, a pool after each pair, `dropout` before the
    last two layers. 268,814 parameters for 32x32x3 and C = 10.
    """

    num_classes: int
    channels: tuple[int, ...] = (16, 32, 64)
    hidden: tuple[int, ...] = (180, 64)
    dropout: float = 0.5
    conv_rule: str = "auto"

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for features in self.channels:
            for _ in range(2):
                conv = layers.Conv(features, 3, padding="SAME", rule=self.conv_rule)
                x = nn.relu(conv(x))
            x = layers.max_pool(x)
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden:
            x = nn.relu(layers.Dense(size)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return layers.Dense(self.num_classes, name="head")(x)


class CNNBN(nn.Module):
    """Three 3x3 convolutions, two linear layers: [B, H, W, c] -> [B, K].

    Batch-norm before every ReLU and a pool after those of convolutions, which have no
    bias; ATP's shallow network (arXiv:2310.18816) as far as that is described. 122,858
    parameters for 32x32x3 and C = 10.
    """

    num_classes: int
    channels: tuple[int, ...] = (32, 64, 64)
    hidden: tuple[int, ...] = (64,)
    conv_rule: str = "auto"

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        conv = functools.partial(
            layers.Conv, size=3, padding="SAME", rule=self.conv_rule, use_bias=False
        )
        for features in self.channels:
            x = conv(features)(x)
            x = layers.max_pool(nn.relu(layers.BatchNorm()(x, train, mask)))
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden:
            x = nn.relu(layers.BatchNorm()(layers.Dense(size)(x), train, mask))
        return layers.Dense(self.num_classes, name="head")(x)


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


class GRU(nn.Module):
    """Embeds tokens and reads them in order: [B, L] int32 -> [B, K].

    A token that is not below `vocabulary` is embedded as zeros.

    Attributes:
      vocabulary: how many different tokens there are; 256 for bytes.
      embedding: numbers that stand for a token.
      units: of the recurrent state, of which the last is classified.
    """

    num_classes: int
    vocabulary: int = 256
    embedding: int = 16
    units: int = 64

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # A product in place of a lookup: clients' own tables under vmap, any backend.
        x = jax.nn.one_hot(x, self.vocabulary)
        x = layers.Dense(self.embedding, name="embedding")(x)
        states: Any = nn.RNN(nn.GRUCell(self.units), name="rnn")(x)
        return layers.Dense(self.num_classes, name="head")(states[:, -1])


# Name in a config -> linen module taking `num_classes`.
ZOO: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "mlp_bn": MLPBN,
    "lenet": LeNet,
    "lenet_s": LeNetS,
    "zenkenet": ZenkeNet,
    "attack_lenet": AttackLeNet,
    "resnet8": resnet.ResNet8,
    "resnet38": resnet.ResNet,
    "resnet38x2": resnet.ResNet38x2,
    "resnet20": resnet.ResNet20,
    "pfedhn_cnn": PFedHNCNN,
    "mh_cnn": MHCNN,
    "vgg8": VGG8,
    "cnn_bn": CNNBN,
    "mh_resnet10": resnet.MHResNet10,
    "mh_resnet12": resnet.MHResNet12,
    "mh_resnet18": resnet.MHResNet18,
    "mh_mlp": MHMLP,
    "gru": GRU,
    "squeezenet1_0": squeezenet.SqueezeNet,
    "squeezenet1_1": squeezenet.SqueezeNet11,
}
