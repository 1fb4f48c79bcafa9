"""Chunks to trees and back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.hypernets import layout

TEMPLATE = {
    "b": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(2)},
    "a": {"kernel": jnp.zeros((2, 1, 2))},
    "c": jnp.zeros(()),
}
TOTAL = 6 + 2 + 4 + 1


@pytest.mark.parametrize("chunk_size", [1, 5, 13, 20])
def test_cut_and_assemble_are_inverse(chunk_size):
    chunks = layout.flat(TEMPLATE, chunk_size)
    assert chunks.num_parameters == TOTAL and chunks.chunk_size == chunk_size
    assert chunks.num_chunks == int(np.ceil(TOTAL / chunk_size))
    rng = np.random.default_rng(0)
    target = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), TEMPLATE)
    cut, assemble = jax.jit(chunks.cut), jax.jit(chunks.assemble)
    pieces = np.asarray(cut(target))
    assert pieces.shape == (chunks.num_chunks, chunk_size)
    chex.assert_trees_all_equal(assemble(pieces), target)
    np.testing.assert_array_equal(pieces.reshape(-1)[TOTAL:], 0)
    # The other way round everything but the surplus survives.
    numbered = 1 + np.arange(pieces.size, dtype=np.float32).reshape(pieces.shape)
    again = np.asarray(cut(assemble(numbered))).reshape(-1)
    np.testing.assert_array_equal(again[:TOTAL], 1 + np.arange(TOTAL))
    np.testing.assert_array_equal(again[TOTAL:], 0)


def test_order_is_sorted_by_path_and_row_major():
    chunks = layout.flat(TEMPLATE, 5)
    target = chunks.assemble(jnp.arange(15.0).reshape(3, 5))
    expected = {
        "a": {"kernel": np.array([[[0.0, 1]], [[2, 3]]])},
        "b": {
            "bias": np.array([4.0, 5]),
            "kernel": np.array([[6.0, 7, 8], [9, 10, 11]]),
        },
        "c": np.array(12.0),
    }
    chex.assert_trees_all_equal(target, jax.tree.map(jnp.float32, expected))


def test_surplus_has_no_gradient():
    chunks = layout.flat(TEMPLATE, 5)

    def total(pieces):
        return sum(jnp.sum(x) for x in jax.tree.leaves(chunks.assemble(pieces)))

    grads = jax.jit(jax.grad(total))(jnp.ones((3, 5))).reshape(-1)
    np.testing.assert_array_equal(grads, np.arange(15) < TOTAL)


def test_abstract_templates_and_dtypes():
    spec = {
        "w": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
        "v": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    chunks = layout.flat(spec, 4)
    target = jax.eval_shape(chunks.assemble, jnp.zeros((2, 4)))
    assert target == spec


def test_chunk_size_below_one():
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        layout.flat(TEMPLATE, 0)
