"""Convolutions of oneDNN as foreign functions of XLA, on the CPU, where they are built.

    pip install 'hyperjax[native]'
    python -m hyperjax.native.build

Nothing needs them: convolutions that have 16 channels or more take half the time with
them, and their programs are compiled sooner. Sums come in another order, so that
results differ by rounding from those without.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.types import Array

LIBRARY = Path(__file__).with_name("onednn.library")  # .so would make it a module
FUNCTIONS = ("Forward", "InputGradient", "KernelGradient")


class Geometry(NamedTuple):
    """What a convolution's arrays do not say together."""

    x: tuple[int, ...]  # [B, H, W, c]
    kernel: tuple[int, ...]  # [k, k, c, f]
    stride: int
    pads: tuple[tuple[int, int], tuple[int, int]]  # of height and width

    @property
    def y(self) -> tuple[int, ...]:
        """[B, H', W', f]."""
        rows, columns = (
            (length + sum(pads) - size) // self.stride + 1
            for length, pads, size in zip(
                self.x[1:3], self.pads, self.kernel[:2], strict=True
            )
        )
        return (self.x[0], rows, columns, self.kernel[3])


@functools.cache
def version() -> str:
    """Returns the version of oneDNN that is built in; "" if there is none."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # it was not built, or what it was built with is gone
        return ""
    for name in FUNCTIONS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(_target(name), handler, platform="cpu")
    library.Version.restype = ctypes.POINTER(ctypes.c_int * 3)
    return ".".join(map(str, library.Version().contents))


def convolve(x: Array, kernel: Array, stride: int, pads: Any) -> Array:
    """Convolves [B, H, W, c] with [k, k, c, f], float32; `version` must not be "".

    Derivatives are of any order, in reverse mode; under `vmap` convolutions follow one
    another.

    Returns:
      [B, H', W', f].
    """
    return _forward(Geometry(x.shape, kernel.shape, stride, pads), x, kernel)


def _target(name: str) -> str:
    return f"hyperjax_onednn_{name}"


# Function -> the places of x, kernel and y among its two arguments and its result.
_ROLES = {"Forward": (0, 1, 2), "InputGradient": (2, 1, 0), "KernelGradient": (0, 2, 1)}


def is_convolution(target: str) -> bool:
    """Whether a foreign function is one of these."""
    return target in map(_target, _ROLES)


def roles(target: str, *of: Any) -> tuple[Any, Any, Any]:
    """Returns what is x, kernel and y among arguments and result of a function."""
    x, kernel, y = _ROLES[target.removeprefix(_target(""))]
    return of[x], of[kernel], of[y]


def _call(name: str, shape: tuple[int, ...], geometry: Geometry, *of: Array) -> Array:
    numbers = (geometry.stride, *geometry.pads[0], *geometry.pads[1])
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    function = jax.ffi.ffi_call(_target(name), result, vmap_method="sequential")
    return function(*of, geometry=np.array(numbers, np.int64))


# <y', f(x, kernel)> is linear in each of three arrays. All three functions below are
# its derivatives, and each one's derivatives are the other two.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(geometry, x, kernel):
    return _call("Forward", geometry.y, geometry, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _input_gradient(geometry, y, kernel):
    return _call("InputGradient", geometry.x, geometry, y, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_gradient(geometry, x, y):
    return _call("KernelGradient", geometry.kernel, geometry, x, y)


def _with_inputs(function):
    return lambda geometry, *of: (function(geometry, *of), of)


_forward.defvjp(
    _with_inputs(_forward),
    lambda geometry, of, y: (
        _input_gradient(geometry, y, of[1]),
        _kernel_gradient(geometry, of[0], y),
    ),
)
_input_gradient.defvjp(
    _with_inputs(_input_gradient),
    lambda geometry, of, x: (
        _forward(geometry, x, of[1]),
        _kernel_gradient(geometry, x, of[0]),
    ),
)
_kernel_gradient.defvjp(
    _with_inputs(_kernel_gradient),
    lambda geometry, of, kernel: (
        _input_gradient(geometry, of[1], kernel),
        _forward(geometry, of[0], kernel),
    ),
)
