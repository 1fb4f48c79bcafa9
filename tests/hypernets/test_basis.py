"""Residual hypernetworks: zeros at the start, and by hand afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.hypernets import basis

E = 3
TEMPLATE = {
    "conv": {"kernel": jnp.zeros((3, 3, 4, 40)), "bias": jnp.zeros(40)},
    "head": {"kernel": jnp.zeros((5, 2)), "bias": jnp.zeros(2)},
}
CONDITION = jnp.array([0.5, -1.0, 2.0])
NETS = {
    "low": basis.directions(TEMPLATE, condition_size=E, num_directions=2, rank=3),
    "full": basis.directions(TEMPLATE, condition_size=E, num_directions=2, rank=0),
    "gated": basis.gated(TEMPLATE, condition_size=E, chunk_size=70, width=4),
}


def filled(net, seed=0):
    """Its parameters, none of them 0."""
    leaves, structure = jax.tree.flatten(net.init(jax.random.key(seed)))
    draw = np.random.default_rng(seed)
    drawn = [draw.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(structure, drawn)


def factor(phi):
    mixing = phi["mixing"]
    return np.tanh(np.asarray(CONDITION) @ mixing["kernel"] + mixing["bias"])


@pytest.mark.parametrize("name", NETS)
def test_what_is_emitted_at_the_start_is_zero_and_of_the_networks_shapes(name):
    net = NETS[name]
    phi = net.init(jax.random.key(1))
    emitted = net.generate(phi, CONDITION)
    jax.tree.map(np.testing.assert_array_equal, emitted, TEMPLATE)
    # Not for want of a gradient.
    grads = jax.grad(
        lambda phi: sum(x.sum() for x in jax.tree.leaves(net.generate(phi, CONDITION)))
    )(phi)
    zero = {k: not np.any(x) for k, x in tree.by_path(grads).items()}
    assert not all(zero.values())
    assert zero["mixing/kernel"] and zero["mixing/bias"]


def test_directions_of_low_rank_by_hand():
    phi = filled(NETS["low"])
    a, own = factor(phi) / np.sqrt(2), phi["directions"]
    found = NETS["low"].generate(phi, CONDITION)
    pair = own["conv/kernel"]
    assert pair["left"].shape == (2, 36, 3) and pair["right"].shape == (2, 3, 40)
    expected = sum(a[k] * pair["left"][k] @ pair["right"][k] for k in range(2))
    np.testing.assert_allclose(
        found["conv"]["kernel"], expected.reshape(3, 3, 4, 40), rtol=1e-4, atol=1e-5
    )
    # A small matrix, and what is none, has directions of its own shape.
    assert own["head/kernel"].shape == (2, 5, 2)
    expected = a[0] * own["conv/bias"][0] + a[1] * own["conv/bias"][1]
    np.testing.assert_allclose(found["conv"]["bias"], expected, rtol=1e-5, atol=1e-6)


def test_full_directions_by_hand():
    phi = filled(NETS["full"])
    a, own = factor(phi) / np.sqrt(2), phi["directions"]["conv/kernel"]
    found = NETS["full"].generate(phi, CONDITION)["conv"]["kernel"]
    expected = a[0] * own[0] + a[1] * own[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_gated_chunks_by_hand():
    net, phi = NETS["gated"], filled(NETS["gated"])
    chunks = (phi["chunks"] * factor(phi)) @ phi["out"] / np.sqrt(4)
    leaves = jax.tree.leaves(net.generate(phi, CONDITION))
    found = np.concatenate([np.ravel(x) for x in leaves])
    np.testing.assert_allclose(found, np.ravel(chunks)[: len(found)], rtol=1e-4)
    some = basis.gated(
        TEMPLATE, condition_size=E, chunk_size=70, width=4, chunk_batch_size=5
    )
    again = jax.tree.leaves(some.generate(phi, CONDITION))
    for x, y in zip(leaves, again, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
