"""FedProx on quadratics."""

import numpy as np
import pytest
import quadratics as q

from hyperjax.algorithms.fedprox import fedprox


@pytest.mark.parametrize("mu", [0.5, 4.0])
def test_exchanges_of_exact_solutions(mu):
    # (A + mu I)^-1 (A b + mu theta_t): squared norm, half of it, round's own anchor.
    alg = fedprox(q.model(), local=q.steps(200), mu=mu)
    anchors = [q.START]
    for number in range(3):
        state = q.play(alg, *[q.EVERYONE] * (number + 1))
        solved = [q.proximal(k, anchors[-1], mu) for k in q.EVERYONE]
        anchors.append(np.mean(solved, 0))
        np.testing.assert_allclose(q.vector(state.server.theta), anchors[-1], **q.CLOSE)


def test_one_step_is_fedavg_for_any_mu():
    plain = q.play(q.averaged(q.steps(1)), *q.PARTIAL)
    ours = q.play(fedprox(q.model(), local=q.steps(1), mu=7.0), *q.PARTIAL)
    np.testing.assert_allclose(
        q.vector(ours.server.theta), q.vector(plain.server.theta), rtol=1e-6
    )


def test_rate_times_mu_of_one_restarts_every_step_at_the_anchor():
    # theta - eta (grad + (theta - anchor) / eta) = anchor - eta grad.
    alg = fedprox(q.model(), local=q.training(), mu=1 / q.LR)
    state = q.play(alg, q.EVERYONE)
    for k, count in enumerate(q.SIZES):
        theta = q.START
        for _ in range(count):
            theta = q.START - q.LR * q.gradient(k, theta)
        sent = q.vector(state.uplink.delta)[k]
        np.testing.assert_allclose(q.START + sent, theta, **q.CLOSE)


def test_mu_is_not_negative():
    with pytest.raises(ValueError, match=r"mu=-0\.1 must be at least 0"):
        fedprox(q.model(), local=q.training(), mu=-0.1)
