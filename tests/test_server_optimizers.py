"""The FedOpt family against the identities and update rules of its papers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax import server_optimizers
from hyperjax.server_optimizers import FEDOPT, fedadagrad, fedadam, fedavgm, fedyogi

THETA = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(3.0)}
CHANGE = {"w": jnp.array([0.2, -0.4, 0.0]), "b": jnp.array(-0.1)}  # D


def steps(optimizer, changes, theta=THETA):
    """Feeds minus the mean change, as a server does; returns (theta, state)."""
    state = optimizer.init(theta)
    for change in changes:
        updates, state = optimizer.update(
            jax.tree.map(jnp.negative, change), state, theta
        )
        theta = optax.apply_updates(theta, updates)
    return theta, state


def moved(optimizer, *changes):
    """Returns how far the parameters moved."""
    theta, _ = steps(optimizer, changes)
    return jax.tree.map(jnp.subtract, theta, THETA)


def test_fedavgm_without_momentum_adds_the_mean_change():
    chex.assert_trees_all_close(moved(fedavgm(1.0, beta=0.0), CHANGE), CHANGE)


def test_fedavgm_remembers():
    # m1 = D, m2 = beta D + D: two steps move by (2 + beta) D.
    expected = jax.tree.map(lambda d: 0.5 * (2 + 0.9) * d, CHANGE)
    chex.assert_trees_all_close(
        moved(fedavgm(0.5, beta=0.9), CHANGE, CHANGE), expected, atol=1e-6
    )


def test_nesterov_looks_ahead():
    # The first step of the Nesterov form is D + beta m with m = D.
    expected = jax.tree.map(lambda d: (1 + 0.9) * d, CHANGE)
    found = moved(fedavgm(1.0, beta=0.9, nesterov=True), CHANGE)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", FEDOPT)
def test_all_move_along_the_mean_change(name):
    found = moved(FEDOPT[name](learning_rate=0.1), CHANGE)
    chex.assert_trees_all_equal(
        jax.tree.map(jnp.sign, found), jax.tree.map(jnp.sign, CHANGE)
    )


@pytest.mark.parametrize("optimizer", [fedadam, fedyogi])
def test_without_memory_the_step_is_the_change_over_its_size(optimizer):
    # b1 = b2 = 0: Adam's v is D^2, and so is Yogi's as long as v0 < D^2:
    # v0 - D^2 sign(v0 - D^2) = v0 + D^2.
    tau, rate = 0.05, 0.3
    found = moved(optimizer(rate, b1=0.0, b2=0.0, tau=tau, v0=0.0), CHANGE)
    expected = jax.tree.map(lambda d: rate * d / (jnp.abs(d) + tau), CHANGE)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_tau_is_outside_the_root_and_nothing_corrects_the_bias():
    # From v0 = tau^2, D = 1: m = 0.1, v = 0.99 0.25 + 0.01 = 0.2575.
    change = {"w": jnp.array(1.0)}
    theta, state = steps(fedadam(0.1, tau=0.5), [change], {"w": jnp.array(0.0)})
    np.testing.assert_allclose(state.m["w"], -0.1, rtol=1e-6)  # of what it is fed
    np.testing.assert_allclose(state.v["w"], 0.2575, rtol=1e-6)
    np.testing.assert_allclose(theta["w"], 0.1 * 0.1 / (0.2575**0.5 + 0.5), rtol=1e-6)


@pytest.mark.parametrize("optimizer", [fedadam, fedyogi, fedadagrad])
def test_a_large_tau_tends_to_fedavg(optimizer):
    for tau in (1e2, 1e4):
        found = moved(optimizer(tau, b1=0.0, tau=tau, v0=0.0), CHANGE)
        # Relative error |D| / tau, and float32's own at parameters of size 3.
        chex.assert_trees_all_close(found, CHANGE, rtol=0.5 / tau, atol=5e-7)


def test_adagrad_sums_squares():
    _, state = steps(fedadagrad(0.1, v0=0.0), [CHANGE] * 3)
    expected = jax.tree.map(lambda d: 3 * d**2, CHANGE)
    chex.assert_trees_all_close(state.v, expected, rtol=1e-6)


def test_second_moments_of_a_constant_change():
    b2 = 0.9
    square = jax.tree.map(jnp.square, CHANGE)
    _, adam = steps(fedadam(0.01, b2=b2), [CHANGE] * 200)
    chex.assert_trees_all_close(adam.v, square, rtol=1e-4, atol=1e-9)
    chex.assert_trees_all_close(adam.m, jax.tree.map(jnp.negative, CHANGE), rtol=1e-4)
    _, yogi = steps(fedyogi(0.01, b2=b2), [CHANGE] * 200)
    for found, d2 in zip(jax.tree.leaves(yogi.v), jax.tree.leaves(square), strict=True):
        assert np.all(np.abs(found - d2) <= (1 - b2) * d2 + 1e-6)


@pytest.mark.parametrize(
    ("v0", "v1"),
    [
        (0.01, 0.05),  # below D^2 = 0.04: 0.01 + 0.04
        (0.09, 0.05),  # above: 0.09 - 0.04
        (0.04, 0.04),  # equal: sign 0
    ],
)
def test_yogi_by_hand(v0, v1):
    # b1 = 0.5, b2 = 0, tau = 0.1, D = 0.2: m = 0.1, theta = 1 + 0.3 m / (sqrt v + 0.1).
    # 0.2 squared in float32 must equal v0 where the case needs it.
    change = {"w": jnp.array(0.2)}
    v0 = float(jnp.square(change["w"])) if v0 == 0.04 else v0
    optimizer = fedyogi(0.3, b1=0.5, b2=0.0, tau=0.1, v0=v0)
    theta, state = steps(optimizer, [change], {"w": jnp.array(1.0)})
    np.testing.assert_allclose(state.v["w"], v1, rtol=1e-5)
    np.testing.assert_allclose(theta["w"], 1 + 0.3 * 0.1 / (v1**0.5 + 0.1), rtol=1e-6)


def test_yogi_scales_its_step_by_one_minus_b2():
    # v - (1 - b2) D^2 sign(v - D^2) = 0.01 + 0.25 0.04
    optimizer = fedyogi(0.1, b2=0.75, v0=0.01)
    _, state = steps(optimizer, [{"w": jnp.array(0.2)}], {"w": jnp.array(0.0)})
    np.testing.assert_allclose(state.v["w"], 0.02, rtol=1e-5)


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
def test_second_moments_start_at_tau_squared(name):
    state = FEDOPT[name](tau=0.03).init(THETA)
    assert isinstance(state, server_optimizers.FedOptState)
    for v, m in zip(jax.tree.leaves(state.v), jax.tree.leaves(state.m), strict=True):
        np.testing.assert_allclose(v, 9e-4, rtol=1e-6)
        np.testing.assert_array_equal(m, 0)
