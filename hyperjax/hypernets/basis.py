"""Residual hypernetworks: what they emit is added to a network that is there already.

Both emit zeros at the start, so that training begins as that of the network alone, and
both let the condition e [E] in by a bounded factor (tanh), not as one more input:

    directions:  sum_k a_k Delta_k,             a = tanh(e R + r) / sqrt(K)
    gated:       (c_j * tanh(e R + r)) O / sqrt(W)   for chunk j of the flat network

The factor is not 0 at e = 0, since r is drawn: Delta and O have a gradient from the
first step on. Delta_k of a matrix has rank r, A_k B_k with B_k = 0, where that has a
quarter of its numbers or less; a convolution is the matrix [k k C_in, C_out].
"""

import math

import jax
import jax.numpy as jnp

from hyperjax import rng, tree
from hyperjax.errors import check_at_least
from hyperjax.hypernets import layout
from hyperjax.types import Array, HyperNet, Key, PyTree

_WORTH = 4  # a direction of low rank has at most the 4th part of a matrix's numbers


def directions(
    template: PyTree, *, condition_size: int, num_directions: int = 8, rank: int = 4
) -> HyperNet:
    """Returns the mixture of K directions in the space of a network's parameters.

    Its parameters are {"mixing": {"kernel": [E, K], "bias": [K]}, "directions": {path:
    [K, ...] or {"left": [K, m, r], "right": [K, r, n]}}}.

    Args:
      template: the network's parameters, abstract or concrete.
      condition_size: E.
      num_directions: K.
      rank: r; 0 for directions of full rank.

    Raises:
      ValueError: a size is out of range.
    """
    check_at_least(1, condition_size=condition_size, num_directions=num_directions)
    check_at_least(0, rank=rank)
    leaves = dict(zip(tree.paths(template), jax.tree.leaves(template), strict=True))
    low = {path for path, leaf in leaves.items() if _is_low(leaf.shape, rank)}

    def init(key):
        own: PyTree = {}
        for path, leaf in leaves.items():
            if path in low:
                rows, columns = _matrix(leaf.shape)
                left = (num_directions, rows, rank)
                draw = jax.random.normal(rng.stream(key, path), left)
                right = jnp.zeros((num_directions, rank, columns))
                own[path] = {"left": draw / math.sqrt(rows), "right": right}
            else:
                own[path] = jnp.zeros((num_directions, *leaf.shape))
        return {
            "mixing": _mixing(
                rng.stream(key, "mixing"), condition_size, num_directions
            ),
            "directions": own,
        }

    def generate(phi, condition):
        a = _gate(phi["mixing"], condition) / math.sqrt(num_directions)

        def one(path, leaf):
            own = phi["directions"][path]
            if path not in low:
                return jnp.tensordot(a, own, 1)
            # sum_k a_k A_k B_k as one product of [m, K r] and [K r, n].
            rows, columns = _matrix(leaf.shape)
            left = own["left"].transpose(1, 0, 2).reshape(rows, -1)
            right = (a[:, None, None] * own["right"]).reshape(-1, columns)
            return (left @ right).reshape(leaf.shape)

        found = [one(path, leaf) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(template), found)

    return HyperNet(init, generate)


def gated(
    template: PyTree,
    *,
    condition_size: int,
    chunk_size: int = 512,
    width: int = 64,
    chunk_batch_size: int = 0,
) -> HyperNet:
    """Returns a chunked hypernetwork whose chunk embeddings the condition gates.

    Its parameters are {"mixing": {"kernel": [E, W], "bias": [W]}, "chunks": [n_ch, W],
    "out": [W, S]}, for targets of any size.

    Args:
      template: the network's parameters, abstract or concrete.
      condition_size: E.
      chunk_size: S.
      width: W, of a chunk's embedding.
      chunk_batch_size: chunks generated at a time, see `mlp.chunked_mlp`; 0: all.

    Raises:
      ValueError: a size is out of range.
    """
    check_at_least(1, condition_size=condition_size, width=width)
    check_at_least(0, chunk_batch_size=chunk_batch_size)
    chunks = layout.flat(template, chunk_size)

    def init(key):
        embeddings = jax.random.normal(
            rng.stream(key, "chunks"), (chunks.num_chunks, width)
        )
        return {
            "mixing": _mixing(rng.stream(key, "mixing"), condition_size, width),
            "chunks": embeddings,
            "out": jnp.zeros((width, chunk_size)),
        }

    def emit(shared, embeddings):
        out, gate = shared
        return (embeddings * gate) @ out / math.sqrt(width)

    def generate(phi, condition):
        shared = phi["out"], _gate(phi["mixing"], condition)
        if chunk_batch_size == 0:
            return chunks.assemble(emit(shared, phi["chunks"]))
        return chunks.stream(emit, shared, phi["chunks"], chunk_batch_size)

    return HyperNet(init, generate)


def _mixing(key: Key, condition_size: int, size: int) -> PyTree:
    """R ~ N(0, 1 / E) and r ~ N(0, 1 / 4)."""
    key_kernel, key_bias = jax.random.split(key)
    kernel = jax.random.normal(key_kernel, (condition_size, size))
    return {
        "kernel": kernel / math.sqrt(condition_size),
        "bias": 0.5 * jax.random.normal(key_bias, (size,)),
    }


def _gate(mixing: PyTree, condition: Array) -> Array:
    return jnp.tanh(condition @ mixing["kernel"] + mixing["bias"])


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a kernel."""
    return math.prod(shape[:-1]), shape[-1]


def _is_low(shape: tuple[int, ...], rank: int) -> bool:
    if rank == 0 or len(shape) < 2:
        return False
    rows, columns = _matrix(shape)
    return _WORTH * rank * (rows + columns) <= rows * columns
