"""Residual networks for small images, after He et al. 2016 (arXiv:1512.03385).

Three published variants share the code. HyperFedNet's (arXiv:2402.18445) has no biases
in its convolutions and a 1x1 convolution on the shortcut where the shape changes:
77,562 parameters with one block a group, 563,642 with six (28x28x1, 10 classes),
563,930 for 32x32x3. HyperFedZero's ResNet-20 (arXiv:2508.12673) has biases, and
shortcuts without parameters: 282,760 for 200 classes. MH-pFedHN's (arXiv:2507.22330)
have biases in all convolutions and groups of unequal length, and are called by their
number of blocks, not of layers: 347,178, 523,242 and 565,386 parameters with 10, 12 and
18 blocks (32x32x3, 10 classes).

Paths: stem_conv, stem_norm, group<1-3>_block<i>/{conv1,norm1,conv2,norm2,shortcut},
head.
"""

import flax.linen as nn
import jax.numpy as jnp

from hyperjax.errors import check_choice
from hyperjax.models import layers
from hyperjax.types import Array

SHORTCUTS = ("conv", "pad")


class Block(nn.Module):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x)).

    Maps [B, H, W, c] to [B, ceil(H / stride), ceil(W / stride), features].
    """

    features: int
    stride: int
    shortcut: str
    conv_bias: bool
    conv_rule: str

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        channels = x.shape[-1]
        y = conv3x3(self, self.features, self.stride, "conv1")(x)
        y = nn.relu(layers.BatchNorm(name="norm1")(y, train, mask))
        y = conv3x3(self, self.features, 1, "conv2")(y)
        y = layers.BatchNorm(name="norm2")(y, train, mask)
        if self.stride == 1 and channels == self.features:
            return nn.relu(y + x)
        if self.shortcut == "pad":
            new = self.features - channels
            pads = ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2))
            return nn.relu(y + jnp.pad(x[:, :: self.stride, :: self.stride], pads))
        shortcut = layers.Conv(
            self.features,
            1,
            self.stride,
            rule=self.conv_rule,
            use_bias=self.conv_bias,
            kernel_init=layers.he_normal,
            name="shortcut",
        )
        return nn.relu(y + shortcut(x))


class ResNet(nn.Module):
    """Stem, three groups of basic blocks, global average: [B, H, W, c] -> [B, K].

    The groups have `width`, 2 and 4 times `width` channels; the second and the third
    start with stride 2. Kernels are drawn from N(0, 2 / fan_in).

    Attributes:
      blocks: basic blocks in every group, or in each of the three; 2 layers for each
        block and 2 more count as the depth.
      shortcut: where a block changes the shape: "conv", a 1x1 convolution without
        normalisation; "pad", subsampling, with zeros as the new channels.
      conv_bias: whether the convolutions have biases.

    Raises:
      ValueError: an unknown shortcut.
    """

    num_classes: int
    width: int = 16
    blocks: int | tuple[int, int, int] = 6
    shortcut: str = "conv"
    conv_bias: bool = False
    conv_rule: str = "auto"

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        check_choice("shortcut", self.shortcut, SHORTCUTS)
        x = conv3x3(self, self.width, 1, "stem_conv")(x)
        x = nn.relu(layers.BatchNorm(name="stem_norm")(x, train, mask))
        blocks = (self.blocks,) * 3 if isinstance(self.blocks, int) else self.blocks
        for group, length in enumerate(blocks, start=1):
            for i in range(length):
                block = Block(
                    features=2 ** (group - 1) * self.width,
                    stride=2 if group > 1 and i == 0 else 1,
                    shortcut=self.shortcut,
                    conv_bias=self.conv_bias,
                    conv_rule=self.conv_rule,
                    name=f"group{group}_block{i}",
                )
                x = block(x, train, mask)
        return layers.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


class ResNet8(ResNet):
    """HyperFedNet's network for MNIST."""

    blocks: int | tuple[int, int, int] = 1


class ResNet38x2(ResNet):
    """HyperFedNet's network for CIFAR-100, twice as wide."""

    width: int = 32


class ResNet20(ResNet):
    """HyperFedZero's network for CIFAR-100 and Tiny-ImageNet."""

    blocks: int | tuple[int, int, int] = 3
    shortcut: str = "pad"
    conv_bias: bool = True


class MHResNet18(ResNet):
    """MH-pFedHN's network of 18 blocks."""

    conv_bias: bool = True


class MHResNet12(MHResNet18):
    """MH-pFedHN's network of 12 blocks: the last two groups hold nearly all."""

    blocks: int | tuple[int, int, int] = (1, 5, 6)


class MHResNet10(MHResNet18):
    """MH-pFedHN's network of 10 blocks."""

    blocks: int | tuple[int, int, int] = (3, 3, 4)


def conv3x3(net: ResNet | Block, features: int, stride: int, name: str) -> layers.Conv:
    """Returns a convolution with PyTorch's padding 1, as the network sets it up."""
    return layers.Conv(
        features,
        3,
        stride,
        padding=((1, 1), (1, 1)),
        rule=net.conv_rule,
        use_bias=net.conv_bias,
        kernel_init=layers.he_normal,
        name=name,
    )
