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


# Streams ---------------------------------------------------------------------------

LARGE = {
    "a": jnp.zeros(3),
    "b": jnp.zeros((7, 9)),
    "c": jnp.zeros(()),
    "d": jnp.zeros((5, 8)),  # as large as "e"
    "e": jnp.zeros(40),
}
BATCH_SIZES = (1, 3, 1000)


def emit(shared, inputs):
    return shared * jnp.square(inputs)


@pytest.mark.parametrize("chunk_size", [4, 9, 200])
def test_streams_are_what_is_assembled_at_once(chunk_size):
    chunks = layout.flat(LARGE, chunk_size)
    rng = np.random.default_rng(0)
    shape = (chunks.num_chunks, chunk_size)
    # Small integers: sums are exact in any order.
    inputs = np.float32(rng.integers(-9, 9, shape))
    cotangent = jax.tree.map(lambda x: np.float32(rng.integers(-9, 9, x.shape)), LARGE)

    @jax.jit
    def results(cotangent):
        def pulled(generate):
            target, pull_back = jax.vjp(generate, jnp.float32(3), inputs)
            return target, pull_back(cotangent)

        streams = [
            pulled(lambda s, x, size=size: chunks.stream(emit, s, x, size))
            for size in BATCH_SIZES
        ]
        return pulled(lambda s, x: chunks.assemble(emit(s, x))), streams

    at_once, streams = results(cotangent)
    for stream in streams:
        chex.assert_trees_all_equal(stream, at_once)


def test_streams_within_transformations():
    chunks = layout.flat({name: LARGE[name] for name in "ab"}, 8)
    inputs = jnp.arange(chunks.num_chunks * 8.0).reshape(-1, 8) / 100

    def trained(generate):
        def loss(inputs, shared):
            return sum(
                jnp.vdot(x, x) for x in jax.tree.leaves(generate(shared, inputs))
            )

        def descend(inputs, shared):
            step = lambda x, _: (x - 1e-3 * jax.grad(loss)(x, shared), None)  # noqa: E731
            return jax.lax.scan(step, inputs, None, length=3)[0]

        descend = jax.checkpoint(jax.vmap(descend, (None, 0)))
        return jax.jit(jax.grad(lambda s: jnp.sum(descend(inputs, s))))

    shared = jnp.array([0.5, 1.0])
    found, expected = (
        trained(generate)(shared)
        for generate in (
            lambda s, x: chunks.stream(emit, s, x, 2),
            lambda s, x: chunks.assemble(emit(s, x)),
        )
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [8, 64])
def test_streams_hold_one_batch_beside_the_target(batch_size):
    template = {name: jnp.zeros((255, 257)) for name in "abcd"}
    chunks = layout.flat(template, 100)

    def emit(shared, inputs):
        return shared * jnp.broadcast_to(inputs, (len(inputs), 100))

    def generate(shared, inputs):
        return chunks.stream(emit, shared, inputs, batch_size)

    def pull_back(shared, inputs, cotangent):
        return jax.vjp(generate, shared, inputs)[1](cotangent)

    given = jnp.float32(1), jnp.zeros((chunks.num_chunks, 1))
    # Far below one leaf, 262 KB: a few batches, and copies of the inputs (10 KB).
    bound = 4 * (4 * 100 * (batch_size + 1)) + 5 * given[1].nbytes
    for fn, arguments in ((generate, given), (pull_back, (*given, template))):
        memory = jax.jit(fn).lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < bound


# Templates and mistakes ------------------------------------------------------------


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
