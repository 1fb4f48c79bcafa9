"""Layers every network shares: one place for convolution, pooling and initialisation.

XLA's derivative of a convolution is slow on the CPU inside the loops of local training
(tens of times slower than outside a loop), so `convolve` has a derivative rule of its
own made of ordinary forward convolutions and products, which loops do not slow down.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.types import Array

CONV_RULES = ("auto", "xla", "scan", "patches")


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for linear and convolution layers: U(+-1/sqrt(fan_in))."""
    limit = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class Dense(nn.Module):
    """A linear layer with bias, [..., d] -> [..., features], PyTorch initialisation."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        return x @ kernel + self.param("bias", init, (self.features,))


class Conv(nn.Module):
    """A convolution with bias, [B, H, W, c] -> [B, H', W', features].

    `rule` is one of `CONV_RULES`; "auto" is "scan" or "patches" on the CPU, whichever
    is faster for the kernel's shape, and "xla" elsewhere.
    """

    features: int
    size: int
    stride: int = 1
    padding: str = "VALID"
    rule: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k, channels = self.size, x.shape[-1]
        init = torch_uniform(k * k * channels)
        kernel = self.param("kernel", init, (k, k, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        return convolve(x, kernel, self.stride, self.padding, self.rule) + bias


def convolve(x: Array, kernel: Array, stride: int, padding: str, rule: str) -> Array:
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
    (`benchmarks/conv_rules.py`), but a whole LeNet is 1.6 times faster without.
    """
    size, _, channels, _ = kernel.shape
    return "patches" if size <= 3 and channels < 16 else "scan"


def _xla_conv(x: Array, kernel: Array, stride: int, padding: Any) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scan_conv(x: Array, kernel: Array, stride: int, padding: str) -> Array:
    return _xla_conv(x, kernel, stride, padding)


def _scan_conv_fwd(x, kernel, stride, padding):
    return _xla_conv(x, kernel, stride, padding), (x, kernel)


def _scan_conv_bwd(stride, padding, residuals, cotangent):
    x, kernel = residuals
    pads = jax.lax.padtype_to_pads(
        x.shape[1:3], kernel.shape[:2], (stride, stride), padding
    )
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
    return _xla_conv(spread_out, flipped, 1, "VALID")


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


def patches(x: Array, size: int, stride: int, padding: Any) -> Array:
    """Returns the windows of x: [B, H, W, c] -> [B, H', W', size * size * c].

    `padding` is "SAME", "VALID", or ((low, high), (low, high)).
    """
    pads = padding
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(
            x.shape[1:3], (size, size), (stride, stride), padding
        )
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
