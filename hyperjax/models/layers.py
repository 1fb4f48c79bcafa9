"""Layers every network shares: linear, convolution, batch normalisation, pooling.

XLA's derivative of a convolution is slow on the CPU inside the loops of local training
(tens of times slower than outside a loop), so `convolve` has a derivative rule of its
own made of ordinary forward convolutions and products, which loops do not slow down.
"""

import functools
import math
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.types import Array

CONV_RULES = ("auto", "xla", "scan", "patches")
# "SAME", "VALID", or ((low, high), (low, high)) for height and width. SAME is not
# PyTorch's padding 1 of a 3x3 kernel where the stride is 2: it pads (0, 1).
Padding: TypeAlias = str | tuple[tuple[int, int], tuple[int, int]]


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

    `rule` is one of `CONV_RULES`; "auto" is "scan" or "patches" on the CPU, whichever
    is faster for the kernel's shape, and "xla" elsewhere. Parameters start as PyTorch's
    where no initialiser is given.
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
            return (x - running_mean.value) * multiplier + bias
        mask = jnp.ones(len(x)) if mask is None else mask
        real = mask.reshape(-1, *[1] * (x.ndim - 1)) > 0
        axes = tuple(range(x.ndim - 1))
        count = jnp.sum(real) * (x[0].size // x.shape[-1])
        divisor = jnp.maximum(count, 1)
        x = jnp.where(real, x, 0.0)  # first: 0 * nan is nan
        mean = jnp.sum(x, axes) / divisor
        centred = x - mean  # two passes, so that the variance cannot cancel
        var = jnp.sum(jnp.where(real, jnp.square(centred), 0.0), axes) / divisor
        if not self.is_initializing():
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            step = jnp.where(count > 0, 1 - self.momentum, 0.0)
            running_mean.value += step * (mean - running_mean.value)
            running_var.value += step * (unbiased - running_var.value)
        return centred * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias


def convolve(
    x: Array, kernel: Array, stride: int, padding: Padding, rule: str
) -> Array:
    """Convolves [B, H, W, c] with [k, k, c, f]; the rules differ in their derivative.

    "xla" leaves it to XLA; "scan" is fast inside loops on the CPU; "patches" is one
    product with the windows of x, whose derivative is made of products and pads.
    """
    if rule == "auto":
        rule = _cpu_rule(kernel) if jax.default_backend() == "cpu" else "xla"
    if rule == "patches":
        return patches(x, kernel.shape[0], stride, padding) @ kernel.reshape(
            -1, kernel.shape[-1]
        )
    return (_scan_conv if rule == "scan" else _xla_conv)(x, kernel, stride, padding)


def _cpu_rule(kernel: Array) -> str:
    """The faster rule inside a loop on the CPU.

    Only small windows are worth copying: HyperFedZero's extractor makes Opt.1 train 1.5
    times faster with patches. Single layers would choose them for 5x5 kernels too
    (`benchmarks/conv_rules.py`), but a whole LeNet is 1.6 times faster without, ResNets
    of 8 and 20 layers 1.5 and 2 times.
    """
    size, _, channels, _ = kernel.shape
    return "patches" if size <= 3 and channels < 16 else "scan"


def _xla_conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scan_conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return _xla_conv(x, kernel, stride, padding)


def _scan_conv_fwd(x, kernel, stride, padding):
    return _xla_conv(x, kernel, stride, padding), (x, kernel)


def _scan_conv_bwd(stride, padding, residuals, cotangent):
    x, kernel = residuals
    pads = _explicit(padding, x, kernel.shape[0], stride)
    return (
        _input_gradient(x, kernel, cotangent, stride, pads),
        _kernel_gradient(x, kernel, cotangent, stride, pads),
    )


_scan_conv.defvjp(_scan_conv_fwd, _scan_conv_bwd)


def _input_gradient(x, kernel, cotangent, stride, pads):
    """A stride-1 convolution of the spread-out cotangent with the flipped kernel."""
    size = kernel.shape[0]
    edges = [(0, 0, 0)]
    lengths = zip(pads, x.shape[1:3], cotangent.shape[1:3], strict=True)
    for (low, _), length, windows in lengths:
        spread = (windows - 1) * stride + 1
        before = size - 1 - low
        edges.append((before, length + size - 1 - spread - before, stride - 1))
    zero = jnp.zeros((), cotangent.dtype)
    spread_out = jax.lax.pad(cotangent, zero, [*edges, (0, 0, 0)])
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    # By the same rule, so that second derivatives (gradient inversion) are fast too.
    return _scan_conv(spread_out, flipped, 1, "VALID")


def _kernel_gradient(x, kernel, cotangent, stride, pads):
    """One product; for stride 1 of column shifts of x with row shifts of the cotangent.

    That takes k copies of each side where windows take k * k of one.
    """
    size, _, channels, features = kernel.shape
    if stride > 1 or size == 1:
        windows = patches(x, size, stride, pads).reshape(-1, size * size * channels)
        return (windows.T @ cotangent.reshape(-1, features)).reshape(kernel.shape)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = x.shape[1], cotangent.shape[2]
    columns = [x[:, :height, j : j + width] for j in range(size)]
    rows = [
        jnp.pad(cotangent, ((0, 0), (i, size - 1 - i), (0, 0), (0, 0)))
        for i in range(size)
    ]
    left = jnp.concatenate(columns, -1).reshape(-1, size * channels)
    right = jnp.concatenate(rows, -1).reshape(-1, size * features)
    product = (left.T @ right).reshape(size, channels, size, features)
    return product.transpose(2, 0, 1, 3)  # [column, c, row, f] -> [row, column, c, f]


def _explicit(padding: Padding, x: Array, size: int, stride: int):
    """Returns padding as ((low, high), (low, high)) for inputs x [B, H, W, c]."""
    if not isinstance(padding, str):
        return padding
    return jax.lax.padtype_to_pads(
        x.shape[1:3], (size, size), (stride, stride), padding
    )


def patches(x: Array, size: int, stride: int, padding: Padding) -> Array:
    """Returns the windows of x: [B, H, W, c] -> [B, H', W', size * size * c]."""
    pads = _explicit(padding, x, size, stride)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height = (x.shape[1] - size) // stride + 1
    width = (x.shape[2] - size) // stride + 1
    shifts = [
        x[
            :,
            i : i + (height - 1) * stride + 1 : stride,
            j : j + (width - 1) * stride + 1 : stride,
        ]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(shifts, axis=-1)


def max_pool(x: Array, size: int = 2) -> Array:
    """Non-overlapping max pooling, [B, H, W, c] -> [B, H // size, W // size, c].

    A maximum of strided slices: the derivative of `reduce_window` is slow on the CPU.
    Rows and columns that do not fill a window are dropped, as "VALID" does.
    """
    height, width = x.shape[1] // size * size, x.shape[2] // size * size
    x = x[:, :height, :width]
    out = x[:, ::size, ::size]
    for i in range(size):
        for j in range(size):
            if i or j:
                out = jnp.maximum(out, x[:, i::size, j::size])
    return out
