"""Convolutions by several rules, which differ in their derivatives and their speed.

On the CPU XLA's own derivative of a convolution is tens of times slower inside the
loops of local training than outside. "scan" has a derivative of ordinary forward
convolutions and products, which loops do not slow down; "patches" and "stripes" are a
product with copies of the input, and their derivative is products and pads. "onednn"
are calls of that library where it was built, see `native`.

"auto" is what was measured to be the fastest: on the CPU by `benchmarks.conv_rules` for
kernels of that shape, on a GPU by `benchmarks.gpu` for clients that are trained side by
side. Elsewhere it is "xla".
"""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp

from hyperjax import native
from hyperjax.types import Array

RULES = ("auto", "xla", "scan", "patches", "stripes", "onednn")
WIDE = 64  # features with which a product is fast that is not several side by side
# "SAME", "VALID", or ((low, high), (low, high)) for height and width. SAME is not
# PyTorch's padding 1 of a 3x3 kernel where the stride is 2: it pads (0, 1).
Padding: TypeAlias = str | tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: Array, kernel: Array, stride: int, padding: Padding, rule: str
) -> Array:
    """Convolves [B, H, W, c] with [k, k, c, f] by one of `RULES`.

    Returns:
      [B, H', W', f].

    Raises:
      ValueError: the rule is "onednn", which is not built or not for this backend.
    """
    if rule == "onednn":
        check_rule(rule)
        if jax.default_backend() != "cpu":
            backend = jax.default_backend()
            raise ValueError(f"conv_rule='onednn' is for the CPU, not for {backend}")
        rule = rule if _is_for_onednn(x, kernel) else "auto"
    if rule == "auto":
        backend = jax.default_backend()
        if backend == "cpu":
            native_too = bool(native.version()) and _is_for_onednn(x, kernel)
            rule = cpu_rule(kernel.shape, native_too)
        else:
            rule = gpu_rule(kernel.shape) if backend == "gpu" else "xla"
    if rule == "onednn":
        pads = _explicit(padding, x, kernel.shape[0], stride)
        return native.convolve(x, kernel, stride, tuple(map(tuple, pads)))
    if rule == "patches":
        windows = patches(x, kernel.shape[0], stride, padding)
        return _product(windows, kernel.reshape(-1, kernel.shape[-1]))
    if rule == "stripes":
        return stripes(x, kernel, stride, padding)
    return (_scan_conv if rule == "scan" else _xla_conv)(x, kernel, stride, padding)


def check_rule(rule: str, name: str = "conv_rule") -> None:
    """Raises ValueError if a rule, of `RULES`, needs what is not built."""
    if rule == "onednn" and not native.version():
        raise ValueError(
            f"{name}='onednn' is not built: pip install 'hyperjax[native]', then "
            "python -m hyperjax.native.build"
        )


def in_plan(rule: str) -> str:
    """Returns a rule as a plan has it: what may come from oneDNN says so."""
    takes_it = rule in ("auto", "onednn") and jax.default_backend() == "cpu"
    return (
        f"{rule}, oneDNN {native.version()}" if takes_it and native.version() else rule
    )


def _is_for_onednn(x: Array, kernel: Array) -> bool:
    """Whether arrays are float32 of known sizes: what is exported stays portable."""
    known = all(isinstance(size, int) and size for size in (*x.shape, *kernel.shape))
    return known and x.dtype == kernel.dtype == jnp.float32


def cpu_rule(shape: tuple[int, ...], native_too: bool = False) -> str:
    """Returns the fastest rule inside a loop on the CPU for a kernel's shape.

    Measured by `benchmarks/conv_rules.py`; "onednn" only with `native_too`.

    Stripes win where there are few channels, so that their copies are cheap and the
    product is what was too narrow before; with more of them copies cost more than they
    give, those of patches earlier than those of stripes for 5x5, later for 3x3. The
    library's own code is for eights of channels, and for three.
    """
    size, _, channels, features = shape
    eights = channels == 3 or (channels >= 16 and channels % 8 == 0)
    if native_too and eights and features % 8 == 0:
        return "onednn"
    if channels <= (20 if size >= 5 else 3):
        return "stripes"
    return "patches" if size <= 3 and channels < 16 else "scan"


def gpu_rule(shape: tuple[int, ...]) -> str:
    """Returns the fastest rule on a GPU under vmap over clients, for a kernel's shape.

    There XLA's convolutions become grouped, and products with patches a batch of
    products: 8 times faster with LeNet's one and 6 channels, 2.5 times with 3x3 kernels
    of 3 to 64 (`benchmarks/gpu.py`, an H100). Patches are 9 or 25 times the input, so
    that beyond what was measured memory comes first.
    """
    return "patches" if shape[2] <= 64 else "xla"


def _product(x: Array, matrix: Array) -> Array:
    """[..., p] @ [p, q], as a product of two matrices.

    The derivative of one with more axes contracts several at once, which XLA transposes
    first: two to three times slower.
    """
    flat = x.reshape(-1, x.shape[-1]) @ matrix
    return flat.reshape(*x.shape[:-1], matrix.shape[-1])


def stripes(
    x: Array, kernel: Array, stride: int, padding: Padding, block: int | None = None
) -> Array:
    """A convolution as one product of stripes of x with a banded matrix.

    A stripe is what `block` neighbouring outputs of a row see: size rows of
    (block - 1) * stride + size columns. It is copied once for all of them, where
    patches copy a window for each.
    """
    size, _, channels, features = kernel.shape
    block = block or block_of(size, features)
    pads = _explicit(padding, x, size, stride)
    height, width = (
        (length + low + high - size) // stride + 1
        for length, (low, high) in zip(x.shape[1:3], pads, strict=True)
    )
    blocks, step = -(-width // block), block * stride
    columns = step - stride + size  # of a stripe
    # Columns in whole blocks, as many as the last stripe reaches.
    parts = blocks + -(-(columns - step) // step)
    (low, _), rows = pads[1], pads[0]
    fill = parts * step - x.shape[2] - low  # negative: columns that no output sees
    zero = jnp.zeros((), x.dtype)
    x = jax.lax.pad(x, zero, [(0, 0, 0), (*rows, 0), (low, fill, 0), (0, 0, 0)])
    x = x.reshape(*x.shape[:2], parts, step * channels)
    pieces = [x[:, :, i : i + blocks] for i in range(parts - blocks + 1)]
    x = jnp.concatenate(pieces, -1)[..., : columns * channels]
    end = (height - 1) * stride + 1
    x = jnp.concatenate([x[:, i : i + end : stride] for i in range(size)], -1)
    y = _product(x, _band(kernel, stride, block, columns))
    return y.reshape(x.shape[0], height, blocks * block, features)[:, :, :width]


def block_of(size: int, features: int) -> int:
    """Returns how many outputs share a stripe: enough for a product that is fast.

    More would be zeros of the band.
    """
    return 4 if size >= 5 and features <= 10 else 2


def _band(kernel: Array, stride: int, block: int, columns: int) -> Array:
    """The matrix of `stripes`: output j of a block has the kernel, moved by j strides.

    Returns:
      [size * columns * c, block * f], in which a row is (row, column, channel).
    """
    size, _, channels, features = kernel.shape
    # Copies one after another in a line whose period is `stride` more than the length
    # of what is read: each is found that much further on, behind zeros.
    period = columns + stride
    line = jnp.pad(kernel, ((0, 0), (0, period - size), (0, 0), (0, 0)))
    line = jnp.broadcast_to(line[:, None], (size, block, *line.shape[1:]))
    line = line.reshape(size, block * period, channels, features)
    moved = line[:, : block * columns].reshape(size, block, columns, channels, features)
    return moved.transpose(0, 2, 3, 1, 4).reshape(-1, block * features)


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
    """For stride 1 products of column shifts of x with the cotangent of other rows.

    A cotangent of few features is copied for each row, so that one product is wide
    enough; one of `WIDE` or more has a product a row, and no copies.
    """
    size, _, channels, features = kernel.shape
    if stride > 1 or size == 1:
        windows = patches(x, size, stride, pads).reshape(-1, size * size * channels)
        return (windows.T @ cotangent.reshape(-1, features)).reshape(kernel.shape)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = cotangent.shape[1:3]
    columns = jnp.concatenate([x[:, :, j : j + width] for j in range(size)], -1)
    wide = size * channels
    if features >= WIDE:
        right = cotangent.reshape(-1, features).T
        rows = [columns[:, i : i + height].reshape(-1, wide) for i in range(size)]
        product = jnp.stack([right @ left for left in rows])
        product = product.reshape(size, features, size, channels)
        return product.transpose(0, 2, 3, 1)  # from [row, f, column, c]
    moved = [
        jnp.pad(cotangent, ((0, 0), (i, size - 1 - i), (0, 0), (0, 0)))
        for i in range(size)
    ]
    right = jnp.concatenate(moved, -1).reshape(-1, size * features)
    product = (columns.reshape(-1, wide).T @ right).reshape(
        size, channels, size, features
    )
    return product.transpose(2, 0, 1, 3)  # from [column, c, row, f]


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
