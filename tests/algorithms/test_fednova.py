"""FedNova on quadratics whose clients take one to five steps."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratics as q

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.fednova import fednova, normalised_mean
from hyperjax.engine import comm

WEIGHT = (1, 2, 3, 4)


def total_weight(tau, rho, nesterov):
    """|a_k|: the weight of all gradients in the change of tau steps, over LR."""
    power = 1 + nesterov
    return (tau - rho**power * (1 - rho**tau) / (1 - rho)) / (1 - rho)


@pytest.mark.parametrize(
    ("rho", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)], ids=str
)
def test_exchange_equals_the_formula(rho, nesterov):
    optimizer = optax.sgd(q.LR, momentum=rho or None, nesterov=nesterov)
    alg = fednova(q.model(), local=q.training(optimizer))
    theta = q.START
    state = None
    for cohort in q.PARTIAL[:3]:
        state = q.play(alg, cohort, state=state, weight=WEIGHT)
        p = np.array([WEIGHT[k] for k in cohort]) / sum(WEIGHT[k] for k in cohort)
        a = np.array([total_weight(q.SIZES[k], rho, nesterov) for k in cohort])
        np.testing.assert_allclose(
            state.uplink.extra[: len(cohort)], q.LR * a, rtol=2e-6
        )
        delta = q.vector(state.uplink.delta)[: len(cohort)]
        theta = theta + (p @ a) * ((p / a) @ delta)
        np.testing.assert_allclose(q.vector(state.server.theta), theta, **q.CLOSE)


def test_equal_steps_are_fedavg_for_any_optimizer():
    train = q.training(q.DECAYING)
    plain, ours = (
        q.play(f(q.model(), local=train), *q.PARTIAL, sizes=(3,) * 4, weight=WEIGHT)
        for f in (fedavg, fednova)
    )
    np.testing.assert_allclose(
        q.vector(ours.server.theta), q.vector(plain.server.theta), **q.CLOSE
    )


def test_one_client_is_copied():
    state = q.play(fednova(q.model(), local=q.training()), (3,))
    expected = q.descend(3, q.START, q.SIZES[3])
    np.testing.assert_allclose(q.vector(state.server.theta), expected, **q.CLOSE)


@pytest.mark.slow
def test_fixed_point_is_nearer_to_the_optimum():
    # With small rates FedAvg solves for the losses weighted by their steps.
    train = q.training(optax.sgd(0.004))
    plain, ours = (
        q.vector(q.play(f(q.model(), local=train), *[q.EVERYONE] * 2000).server.theta)
        for f in (fedavg, fednova)
    )
    np.testing.assert_allclose(plain, q.optimum(np.array(q.SIZES)), atol=0.02)
    np.testing.assert_allclose(ours, q.optimum(), atol=0.02)
    far = np.linalg.norm(plain - q.optimum())
    assert np.linalg.norm(ours - q.optimum()) < far / 5


def test_statistics_are_averaged_plainly():
    # Clients of weight 1 and 3, displacements 2 and 4; tau_eff is 3.5.
    delta = {
        "params/w": jnp.array([2.0, 8.0]),
        "stats/mean": jnp.array([2.0, 8.0]),
    }
    combine = normalised_mean().combine
    weight, displacement = jnp.array([1.0, 3.0]), jnp.array([2.0, 4.0])
    (mean, _), _ = combine(None, (delta, displacement), weight, ())
    assert float(mean["stats/mean"]) == pytest.approx(0.25 * 2 + 0.75 * 8)
    assert float(mean["params/w"]) == pytest.approx(3.5 * (0.25 * 1 + 0.75 * 2))
    # A client without steps has no direction, yet its weight counts in tau_eff.
    none = {name: x.at[0].set(0.0) for name, x in delta.items()}
    (mean, _), _ = combine(None, (none, displacement.at[0].set(0.0)), weight, ())
    assert float(mean["params/w"]) == pytest.approx(3.0 * 0.75 * 2)
    (mean, _), _ = combine(None, (delta, 0 * displacement), weight, ())
    assert float(mean["params/w"]) == 0.0


def test_uplink_holds_one_number_more():
    ours, plain = (
        comm.cost(comm.describe(f(q.model(), local=q.training())))
        for f in (fednova, fedavg)
    )
    assert ours.up_numbers == plain.up_numbers + 1
    assert ours.down_numbers == plain.down_numbers
