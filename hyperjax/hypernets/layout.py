"""How equal chunks of numbers become a parameter tree."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.errors import check_at_least
from hyperjax.types import PyTree


class Layout(NamedTuple):
    """Translates chunks [num_chunks, chunk_size] into a tree, and back."""

    num_chunks: int
    chunk_size: int
    num_parameters: int
    assemble: Callable  # (chunks) -> tree
    cut: Callable  # (tree) -> chunks, surplus filled with zeros


def flat(template: PyTree, chunk_size: int) -> Layout:
    """Chunks run through the flattened tree, crossing tensor borders freely.

    The order is that of `jax.tree.leaves`: paths sorted name by name, each leaf in row
    major order. The surplus of the last chunk is discarded.

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

    def assemble(chunks):
        vector = chunks.reshape(-1)
        parts, start = [], 0
        for leaf, size in zip(leaves, sizes, strict=True):
            part = jax.lax.slice_in_dim(vector, start, start + size)
            parts.append(part.reshape(leaf.shape).astype(leaf.dtype))
            start += size
        return jax.tree.unflatten(structure, parts)

    def cut(target):
        vector = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(target)])
        surplus = num_chunks * chunk_size - total
        return jnp.pad(vector, (0, surplus)).reshape(num_chunks, chunk_size)

    return Layout(num_chunks, chunk_size, total, assemble, cut)
