"""How equal chunks of numbers become a parameter tree."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import tree
from hyperjax.errors import check_at_least
from hyperjax.types import PyTree, in_one_line


class Layout(NamedTuple):
    """Translates chunks [num_chunks, chunk_size] into a tree, and back."""

    num_chunks: int
    chunk_size: int
    num_parameters: int
    assemble: Callable  # (chunks) -> tree
    stream: Callable  # (emit, shared, inputs, batch_size) -> tree
    cut: Callable  # (tree) -> chunks, surplus filled with zeros

    def __repr__(self) -> str:
        return in_one_line(self)


def flat(template: PyTree, chunk_size: int) -> Layout:
    """Chunks run through the flattened tree, crossing tensor borders freely.

    The order is that of `jax.tree.leaves`: paths sorted name by name, each leaf in row
    major order. The surplus of the last chunk is discarded.

    `stream` is `assemble(emit(shared, inputs))`, where a row of `inputs` gives a chunk,
    but makes `batch_size` chunks and one more at a time and writes them where they
    belong: beside the target it holds one batch, and `inputs` once more. The derivative
    (reverse mode only) emits again rather than keep what happened inside `emit`.

    Args:
      template: the target's parameters, concrete or abstract, float32.
      chunk_size: S.

    Raises:
      ValueError: chunk_size is below 1.
    """
    check_at_least(1, chunk_size=chunk_size)
    leaves, structure = jax.tree.flatten(template)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    total = tree.count(template)
    num_chunks = -(-total // chunk_size)

    def as_leaves(vector, run):
        parts, start = [], 0
        for leaf, size in zip(leaves[run], sizes[run], strict=True):
            part = jax.lax.slice_in_dim(vector, start, start + size)
            parts.append(part.reshape(leaf.shape).astype(leaf.dtype))
            start += size
        return parts

    def assemble(chunks):
        parts = as_leaves(chunks.reshape(-1), slice(None))
        return jax.tree.unflatten(structure, parts)

    def stream(emit, shared, inputs, batch_size):
        parts, start = [], 0
        for run in _runs(sizes, batch_size * chunk_size):
            size = sum(sizes[run])
            # Equal windows, each made of the chunks from its first number's onwards;
            # the last may begin earlier and write some numbers a second time.
            count = max(1, -(-size // (batch_size * chunk_size)))
            window = -(-size // count)
            to = np.minimum(window * np.arange(count), size - window)
            first, skip = np.divmod(start + to, chunk_size)
            reach = np.arange(-(-window // chunk_size) + 1)
            rows = np.minimum(first[:, None] + reach, num_chunks - 1)
            write = _writer(emit, size, window, skip, to)
            parts += as_leaves(write(shared, inputs[rows]), run)
            start += size
        return jax.tree.unflatten(structure, parts)

    def cut(target):
        vector = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(target)])
        surplus = num_chunks * chunk_size - total
        return jnp.pad(vector, (0, surplus)).reshape(num_chunks, chunk_size)

    return Layout(num_chunks, chunk_size, total, assemble, stream, cut)


def _writer(
    emit: Callable, size: int, window: int, skip: np.ndarray, to: np.ndarray
) -> Callable:
    """Returns `(shared, inputs [windows, chunks, ...]) -> vector [size]`.

    Window i is cut from its chunks after `skip[i]` numbers, and written to `to[i]`.
    """
    again = window * np.arange(len(to)) - to  # numbers also in the window before
    places = tuple(x.astype(np.int32) for x in (skip, to, again))

    def numbers(shared, own, skip):
        chunks = emit(shared, own).reshape(-1)
        return jax.lax.dynamic_slice_in_dim(chunks, skip, window)

    @jax.custom_vjp
    def write(shared, inputs):
        def step(vector, batch):
            own, (skip, to, _) = batch
            made = numbers(shared, own, skip)
            return jax.lax.dynamic_update_slice_in_dim(vector, made, to, 0), None

        # To be overwritten. A constant would be shared by vectors of equal size, and
        # so be kept and copied.
        blank = jnp.broadcast_to(inputs.reshape(-1)[0], size)
        return jax.lax.scan(step, blank, (inputs, places))[0]

    # The derivative of a loop that writes into an array would copy it in every step.
    def backward(given, cotangent):
        shared, inputs = given

        def step(total, batch):
            own, (skip, to, again) = batch
            wanted = jax.lax.dynamic_slice_in_dim(cotangent, to, window)
            wanted = jnp.where(jnp.arange(window) < again, 0, wanted)
            pull = jax.vjp(lambda s, x: numbers(s, x, skip), shared, own)[1]
            grads, own_grads = pull(wanted)
            return tree.add(total, grads), own_grads

        return jax.lax.scan(step, tree.zeros_like(shared), (inputs, places))

    write.defvjp(lambda *given: (write(*given), given), backward)
    return write


def _runs(sizes: list[int], at_most: int) -> list[slice]:
    """Cuts a list into runs with a sum of `at_most`, or of one larger element."""
    runs, first, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > at_most:
            runs.append(slice(first, i))
            first, total = i, 0
        total += size
    return runs + [slice(first, len(sizes))]
