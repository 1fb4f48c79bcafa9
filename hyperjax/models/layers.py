"""Layers every network shares: linear, convolution, batch normalisation, pooling."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.models.convolutions import Padding, convolve
from hyperjax.types import Array


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for linear and convolution layers: U(+-1/sqrt(fan_in))."""
    limit = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


# He et al. 2015 (arXiv:1502.01852), fan-in form: N(0, 2 / fan_in).
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Dense(nn.Module):
    """A linear layer with bias, [..., d] -> [..., features].

    Parameters start as PyTorch's where no initialiser is given.
    """

    features: int
    kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        default = torch_uniform(x.shape[-1])
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init or default, shape)
        bias = self.param("bias", self.bias_init or default, (self.features,))
        return x @ kernel + bias


class Conv(nn.Module):
    """A convolution, [B, H, W, c] -> [B, H', W', features].

    `rule` is one of `convolutions.RULES`. Parameters start as PyTorch's where no
    initialiser is given.
    """

    features: int
    size: int
    stride: int = 1
    padding: Padding = "VALID"
    rule: str = "auto"
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k, channels = self.size, x.shape[-1]
        default = torch_uniform(k * k * channels)
        shape = (k, k, channels, self.features)
        kernel = self.param("kernel", self.kernel_init or default, shape)
        x = convolve(x, kernel, self.stride, self.padding, self.rule)
        if not self.use_bias:
            return x
        return x + self.param("bias", self.bias_init or default, (self.features,))


class BatchNorm(nn.Module):
    """Batch normalisation over real samples, [B, H, W, c] or [B, c] -> the same.

    Training normalises by the moments of the samples whose `mask` [B] is 1 (of all
    without a mask); padding reaches neither the outputs of real samples, nor the
    statistics, nor gradients. As in PyTorch the running variance in "batch_stats" is
    moved by the unbiased estimate while normalisation uses the biased one. A batch
    without real samples leaves the statistics as they are.

    Reference: Ioffe and Szegedy 2015, algorithms 1 and 2 (arXiv:1502.03167).
    """

    momentum: float = 0.9  # what is kept at each step: PyTorch's 0.1 is the rest
    epsilon: float = 1e-5  # PyTorch's

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        if not train:
            multiplier = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            y = (x - running_mean.value) * multiplier + bias
            return y.astype(x.dtype)
        mask = jnp.ones(x.shape[0]) if mask is None else mask
        y, mean, var, count = batch_norm(x, mask > 0, scale, bias, self.epsilon)
        if not self.is_initializing():
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            step = jnp.where(count > 0, 1 - self.momentum, 0.0)
            running_mean.value += step * (mean - running_mean.value)
            running_var.value += step * (unbiased - running_var.value)
        return y


def batch_norm(
    x: Array, real: Array, scale: Array | None, bias: Array | None, epsilon: float
) -> tuple[Array, Array, Array, Array]:
    """Normalises x [B, ..., c] by the moments of samples that are `real` [B], bool.

    In one reading of x: both moments are taken about the same centre, in float32.

    Returns:
      Outputs like x, whose padding is arbitrary but finite; mean and biased variance
      [c], 0 if nothing is real; and of how many numbers a channel they are, [].
    """
    axes, dtype = tuple(range(x.ndim - 1)), x.dtype
    x = x.astype(jnp.float32)
    count = jnp.sum(real) * (x[0].size // x.shape[-1])
    mask = real.reshape(-1, *[1] * (x.ndim - 1))
    x = jnp.where(mask, x, 0.0)  # first: 0 * nan is nan
    # Near the mean, so that the variance as a difference of two moments does not
    # cancel; nothing depends on it. The mean of first pixels.
    first_pixels = x.reshape(len(x), -1, x.shape[-1])[:, 0]
    centre = jnp.sum(first_pixels, 0) / jnp.maximum(jnp.sum(real), 1)
    centre = jax.lax.stop_gradient(centre)
    x = jnp.where(mask, x - centre, 0.0)
    divisor = jnp.maximum(count, 1)
    first, second = jnp.sum(x, axes) / divisor, jnp.sum(jnp.square(x), axes) / divisor
    var = jnp.maximum(second - jnp.square(first), 0.0)
    y = _scaled(x, first, var, scale, bias, epsilon).astype(dtype)
    return y, centre + first, var, count


def _scaled(x, mean, var, scale, bias, epsilon) -> Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, as one factor and one shift."""
    factor = jax.lax.rsqrt(var + epsilon)
    if scale is not None:
        factor = factor * scale
    shift = -mean * factor
    if bias is not None:
        shift = shift + bias
    return x * factor + shift


def max_pool(x: Array, size: int = 2) -> Array:
    """Non-overlapping max pooling, [B, H, W, c] -> [B, H // size, W // size, c].

    Two maxima of views: the derivative of `reduce_window` is slow on the CPU, and that
    of a maximum of strided slices has size^2 pads. Rows and columns that do not fill a
    window are dropped, as "VALID" does. The gradient of a tie is shared.
    """
    batch, height, width, channels = x.shape
    height, width = height // size, width // size
    x = x[:, : height * size, : width * size]
    x = jnp.max(x.reshape(batch, height, size, width * size, channels), 2)
    return jnp.max(x.reshape(batch, height, width, size, channels), 3)


def group_norm(
    x: Array, groups: int, scale: Array | None, bias: Array | None, epsilon: float
) -> Array:
    """Normalises each sample by the moments of groups of channels, [B, ..., c] -> same.

    As Flax's `GroupNorm` to rounding, but in one reading of x and without an axis of
    the few channels of a group: sums over pixels first, of channels after.

    Reference: Wu and He 2018 (arXiv:1803.08494).
    """
    shape, channels = x.shape, x.shape[-1]
    x = x.reshape(shape[0], -1, channels)
    each = channels // groups

    def mean(values):  # [B, c] -> the same, of each channel's group
        of_group = values.reshape(-1, groups, each).mean(-1, keepdims=True)
        return jnp.broadcast_to(of_group, (len(values), groups, each)).reshape(
            values.shape
        )

    # A centre near the mean, on which the result does not depend, so that the variance
    # as a difference of two moments does not cancel: the first pixel's.
    centre = jax.lax.stop_gradient(mean(x[:, 0]))
    x = x - centre[:, None]
    first, second = mean(x.mean(1)), mean(jnp.square(x).mean(1))
    variance = jnp.maximum(second - jnp.square(first), 0.0)
    first, variance = first[:, None], variance[:, None]
    return _scaled(x, first, variance, scale, bias, epsilon).reshape(shape)
