"""Layers every network shares: one place for convolution, pooling and initialisation.

XLA's derivative of a convolution is slow on the CPU inside the loops of local training
(tens of times slower than outside a loop), so `Conv` can also be written as patches
times a matrix, whose derivative is made of products and pads.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.types import Array

CONV_RULES = ("auto", "xla", "patches")


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

    `rule` is "xla", "patches" (same result, made of slices and one product), or
    "auto": patches on the CPU, XLA's own on accelerators.
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
        rule = self.rule
        if rule == "auto":
            rule = "patches" if jax.default_backend() == "cpu" else "xla"
        if rule == "xla":
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                self.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        else:
            y = patches(x, k, self.stride, self.padding) @ kernel.reshape(
                -1, self.features
            )
        return y + bias


def patches(x: Array, size: int, stride: int, padding: str) -> Array:
    """Returns the windows of x: [B, H, W, c] -> [B, H', W', size * size * c]."""
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
