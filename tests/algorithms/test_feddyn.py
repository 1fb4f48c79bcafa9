"""FedDyn on quadratics, where its local problems have solutions in closed form."""

import functools

import numpy as np
import pytest
import quadratics as q

from hyperjax.algorithms.feddyn import feddyn
from hyperjax.engine import comm

ALPHA = 1.0
EXACT = q.steps(200)  # each step leaves at most 1 - 0.58 / 8 = 0.93 of the gap


@functools.cache
def exact():
    return feddyn(q.model(), local=EXACT, alpha=ALPHA)


def duals(state):
    return q.vector(state.rows.correction)


def test_exchanges_equal_the_algorithm_with_exact_solutions():
    theta, h, g = q.START, np.zeros(2), np.zeros((q.N, 2))
    for number, cohort in enumerate(q.PARTIAL):
        alive = [k for k in cohort if k >= 0]
        moved = {k: q.proximal(k, theta, ALPHA, g[k]) - theta for k in alive}
        for k, change in moved.items():
            g[k] -= ALPHA * change
        # All clients are counted, not the participants.
        h = h - ALPHA / q.N * sum(moved.values())
        theta = theta + np.mean(list(moved.values()), 0) - h / ALPHA
        state = q.play(exact(), *q.PARTIAL[: number + 1])
        np.testing.assert_allclose(q.vector(state.server.theta), theta, **q.CLOSE)
        np.testing.assert_allclose(duals(state), g, **q.CLOSE)
        np.testing.assert_allclose(q.vector(state.server.correction), h, **q.CLOSE)


@pytest.mark.parametrize("alpha", [1.0, 1e-3])
def test_server_keeps_the_mean_of_all_duals(alpha):
    # Whatever the solutions are: here one, two, three and five steps with momentum.
    # The weights of the mean do not matter to the correction.
    alg = feddyn(q.model(), local=q.training(q.DECAYING), alpha=alpha)
    state = None
    for cohort in q.PARTIAL:
        before = q.vector(state.server.theta) if state else q.START
        duals_before = duals(state) if state else np.zeros((q.N, 2))
        state = q.play(alg, cohort, state=state)
        h = q.vector(state.server.correction)
        np.testing.assert_allclose(h, duals(state).mean(0), rtol=2e-5, atol=2e-6)
        for place, k in enumerate(cohort):
            client = max(k, -1 - k)  # a drop-out's change is zero
            change = q.vector(state.uplink.delta)[place]
            expected = duals_before[client] - alpha * change
            np.testing.assert_allclose(duals(state)[client], expected, **q.CLOSE)
        mean = q.vector(state.uplink.delta).sum(0) / sum(k >= 0 for k in cohort)
        np.testing.assert_allclose(
            q.vector(state.server.theta), before + mean - h / alpha, rtol=1e-4
        )


def test_first_exchange_goes_further_than_fedavg_for_any_alpha():
    # theta_1 = mean of theta_k + m/K mean of the changes: h / alpha has no alpha.
    for alg in (exact(), feddyn(q.model(), local=EXACT, alpha=1e-6)):
        state = q.play(alg, (3, 1, 0))
        change = q.vector(state.uplink.delta)[:3].mean(0)
        expected = q.START + change + 3 / 4 * change
        np.testing.assert_allclose(q.vector(state.server.theta), expected, **q.CLOSE)
    # Only the clients' solutions tend to those of FedAvg.
    plain = q.play(q.averaged(EXACT), (3, 1, 0))
    np.testing.assert_allclose(
        q.vector(state.uplink.delta), q.vector(plain.uplink.delta), **q.CLOSE
    )


def test_duals_are_gradients_at_exact_solutions():
    state = q.play(exact(), *q.PARTIAL[:2])
    again = q.play(exact(), (3, 0, 1), state=state)
    theta = q.vector(state.server.theta)
    for place, k in enumerate((3, 0, 1)):
        found = theta + q.vector(again.uplink.delta)[place]
        np.testing.assert_allclose(duals(again)[k], q.gradient(k, found), **q.CLOSE)


def test_converges_to_the_optimum_where_fedavg_does_not():
    draw = np.random.default_rng(0)
    cohorts = [draw.permutation(q.N)[:2] for _ in range(300)]
    state = q.play(exact(), *cohorts)
    np.testing.assert_allclose(
        q.vector(state.server.theta), q.optimum(), rtol=1e-4, atol=1e-4
    )
    plain = q.play(q.averaged(EXACT), *[q.EVERYONE] * 20)
    # Its fixed point is the mean of the clients' optima.
    found = q.vector(plain.server.theta)
    np.testing.assert_allclose(found, q.B.mean(0), **q.CLOSE)
    assert np.linalg.norm(found - q.optimum()) > 0.5


def test_duals_are_never_sent():
    ours, plain = (comm.cost(comm.describe(a)) for a in (exact(), q.averaged(EXACT)))
    assert ours == plain and ours.up_numbers == ours.down_numbers == 2


@pytest.mark.parametrize("alpha", [0.0, -0.5, float("nan")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha} must be.* positive"):
        feddyn(q.model(), local=EXACT, alpha=alpha)
