"""SqueezeNet 1.0 and 1.1: Iandola et al. 2016 (arXiv:1602.07360), as in torchvision.

786,724 and 773,796 parameters for 100 classes, whatever the size of the images. The
classifier is a 1x1 convolution with ReLU, averaged over positions; as a linear layer on
channels it is called "head". `features` are its inputs: [B, 512] where one position is
left, as of 32x32 images, and [B, H', W', 512] of larger ones.

Paths: conv, fire<i>/{squeeze,expand1,expand3}, head.
"""

import flax.linen as nn
import jax.numpy as jnp

from hyperjax.models import layers
from hyperjax.types import Array

_HE_UNIFORM = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")


class Fire(nn.Module):
    """1x1 to `squeeze` channels, then 1x1 and 3x3 side by side, each with ReLU.

    Maps [B, H, W, c] to [B, H, W, 2 expand].
    """

    squeeze: int
    expand: int
    conv_rule: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(conv(self, self.squeeze, 1, 1, "squeeze")(x))
        ones = conv(self, self.expand, 1, 1, "expand1")(x)
        threes = conv(self, self.expand, 3, 1, "expand3")(x)
        return nn.relu(jnp.concatenate([ones, threes], -1))


class SqueezeNet(nn.Module):
    """A convolution of stride 2, three pools, eight fire modules, a classifier.

    Maps [B, H, W, c] to [B, K]. The defaults are SqueezeNet 1.0.

    Attributes:
      channels, size: of the first convolution.
      pools: numbers of the fire modules that a pool comes before.
      dropout: before the classifier.
    """

    num_classes: int
    channels: int = 96
    size: int = 7
    pools: tuple[int, ...] = (1, 4, 8)
    dropout: float = 0.5
    conv_rule: str = "auto"

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        first = conv(self, self.channels, self.size, 2, "conv", padding="VALID")
        x = nn.relu(first(x))
        for i, squeeze in enumerate((16, 16, 32, 32, 48, 48, 64, 64), start=1):
            x = max_pool(x) if i in self.pools else x
            fire = Fire(squeeze, 4 * squeeze, self.conv_rule, name=f"fire{i}")
            x = fire(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if x.shape[1:3] == (1, 1):
            x = x[:, 0, 0]  # what `features` shows
        head = layers.Dense(
            self.num_classes,
            nn.initializers.normal(0.01),  # as torchvision's classifier
            nn.initializers.zeros,
            name="head",
        )
        x = nn.relu(head(x))
        return x.mean(axis=tuple(range(1, x.ndim - 1)))


class SqueezeNet11(SqueezeNet):
    """SqueezeNet 1.1: a smaller first layer and earlier pools."""

    channels: int = 64
    size: int = 3
    pools: tuple[int, ...] = (1, 3, 5)


def conv(
    net: SqueezeNet | Fire,
    features: int,
    size: int,
    stride: int,
    name: str,
    padding: layers.Padding = "SAME",
) -> layers.Conv:
    """Returns a convolution as the networks set it up."""
    return layers.Conv(
        features,
        size,
        stride,
        padding=padding,
        rule=net.conv_rule,
        kernel_init=_HE_UNIFORM,
        bias_init=nn.initializers.zeros,
        name=name,
    )


def max_pool(x: Array) -> Array:
    """Pools 3x3 windows with stride 2; those at the far edges may be cut off.

    Maps [B, H, W, c] to [B, H', W', c] with H' = ceil((H - 3) / 2) + 1, at least 1. A
    maximum of strided slices: the derivative of `reduce_window` is slow on the CPU.
    """
    counts = [max((length - 2) // 2, 0) + 1 for length in x.shape[1:3]]
    pads = [
        (0, 2 * count + 1 - length)
        for count, length in zip(counts, x.shape[1:3], strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    height, width = (2 * count - 1 for count in counts)
    out = x[:, :height:2, :width:2]
    for i in range(3):
        for j in range(3):
            if i or j:
                window = x[:, i : i + height : 2, j : j + width : 2]
                out = jnp.maximum(out, window)
    return out
