"""SCAFFOLD on quadratics, against algorithm 1 with option II in float64."""

import functools

import chex
import numpy as np
import optax
import pytest
import quadratics as q
from test_fedavg import FULL, MODEL
from test_fedgen import play

from hyperjax import training
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.scaffold import scaffold
from hyperjax.engine import comm


@functools.cache
def ragged():
    """One to five steps, by the client's number of samples."""
    return scaffold(q.model(), local=q.training())


def controls(state):
    return q.vector(state.rows.correction)


def test_exchanges_equal_the_algorithm():
    theta, c, own = q.START, np.zeros(2), np.zeros((q.N, 2))
    for number, cohort in enumerate(q.PARTIAL):
        alive, changes, moved = [k for k in cohort if k >= 0], [], []
        for k in alive:
            count = q.SIZES[k]
            term = c - own[k]
            y = q.descend(k, theta, count, term=lambda _, term=term: term)
            new = own[k] - c + (theta - y) / (count * q.LR)
            changes.append(new - own[k])
            moved.append(y - theta)
            own[k] = new
        theta = theta + np.mean(moved, 0)
        c = c + len(alive) / q.N * np.mean(changes, 0)
        np.testing.assert_allclose(c, own.mean(0), atol=1e-12)
        state = q.play(ragged(), *q.PARTIAL[: number + 1])
        np.testing.assert_allclose(q.vector(state.server.theta), theta, **q.CLOSE)
        np.testing.assert_allclose(controls(state), own, **q.CLOSE)
        np.testing.assert_allclose(q.vector(state.server.correction), c, **q.CLOSE)


def test_server_keeps_the_mean_of_all_controls():
    # Also with momentum and decay, clients without samples, and uneven weights.
    alg = scaffold(q.model(), local=q.training(q.DECAYING))
    state = None
    for cohort in q.PARTIAL:
        sizes = (1, 0, 3, 5)
        state = q.play(alg, cohort, state=state, sizes=sizes, weight=(1, 2, 3, 4))
        np.testing.assert_allclose(
            q.vector(state.server.correction), controls(state).mean(0), **q.CLOSE
        )
        assert not controls(state)[1].any()  # it learnt nothing about its gradient


@functools.cache
def single():
    return scaffold(q.model(), local=q.steps(1))


def test_controls_after_one_step_are_gradients():
    state = q.play(single(), *q.PARTIAL[:2])
    theta = q.vector(state.server.theta)
    after = q.play(single(), (0, 1, 3), state=state)
    for k in (0, 1, 3):
        np.testing.assert_allclose(controls(after)[k], q.gradient(k, theta), **q.CLOSE)


@pytest.mark.parametrize("nesterov", [False, True])
def test_controls_are_weighted_means_of_gradients_under_momentum(nesterov):
    # The trace is unrolled: gradient j of n moves theta by LR times the sum of rho^i
    # over i < n - j, and by one term more with Nesterov, which looks a step ahead.
    rho, k, count = 0.5, 3, q.SIZES[3]
    alg = scaffold(q.model(), local=q.training(optax.sgd(q.LR, rho, nesterov)))
    state = q.play(alg, (k,))
    theta, trace, gradients = q.START, 0.0, []
    for _ in range(count):
        gradients.append(q.gradient(k, theta))
        trace = rho * trace + gradients[-1]
        theta = theta - q.LR * (gradients[-1] + rho * trace if nesterov else trace)
    left = count - np.arange(count) + nesterov
    weights = (1 - rho**left) / (1 - rho)
    np.testing.assert_allclose(
        theta, q.START - q.LR * weights @ np.array(gradients), rtol=1e-12
    )
    expected = weights @ np.array(gradients) / weights.sum()
    np.testing.assert_allclose(controls(state)[k], expected, **q.CLOSE)


def test_converges_to_the_optimum_where_fedavg_does_not():
    draw = np.random.default_rng(0)
    cohorts = [draw.permutation(q.N)[:3] for _ in range(600)]
    five = scaffold(q.model(), local=q.steps(5))
    for alg in (five, ragged()):
        theta = q.vector(q.play(alg, *cohorts).server.theta)
        np.testing.assert_allclose(theta, q.optimum(), rtol=1e-4, atol=1e-5)
    plain = q.play(q.averaged(q.steps(5)), *[q.EVERYONE] * 50)
    assert np.linalg.norm(q.vector(plain.server.theta) - q.optimum()) > 0.2


def test_sends_the_control_with_the_model_both_ways():
    ours = comm.cost(comm.describe(ragged()))
    plain = comm.cost(comm.describe(q.averaged(q.training())))
    assert ours.down_numbers == 2 * plain.down_numbers == 4
    assert ours.up_numbers == 2 * plain.up_numbers == 4


def test_identical_clients_are_fedavg_in_every_round():
    train = FULL._replace(phases=(training.Phase(epochs=3),))
    parts, cohorts = [np.arange(8)] * q.N, [tuple(range(q.N))] * 3
    corrected, plain = (
        play(method(MODEL, local=train), *cohorts, parts=parts)
        for method in (scaffold, fedavg)
    )
    chex.assert_trees_all_close(
        corrected.server.theta, plain.server.theta, rtol=1e-4, atol=1e-6
    )
    assert any(np.any(np.abs(x) > 1e-2) for x in corrected.server.correction.values())
