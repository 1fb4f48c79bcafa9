"""APFL on quadratics."""

import functools

import numpy as np
import optax
import pytest
import quadratics as q

from hyperjax.algorithms.apfl import apfl
from hyperjax.algorithms.local_only import local_only
from hyperjax.engine import comm

RATE = 0.02


def personal(state):
    return q.vector(state.rows.kept, "params/personal")


def mix(state):
    return state.rows.kept["params/mix"]


@functools.cache
def fixed(alpha):
    train = q.training(q.DECAYING)
    return apfl(q.model(), local=train, alpha=alpha, adaptive=False)


@pytest.mark.parametrize(
    ("alpha", "adaptive"), [(0.4, True), (1.0, True), (0.4, False)]
)
def test_exchanges_equal_the_algorithm(alpha, adaptive):
    train = q.training(optax.sgd(RATE))
    alg = apfl(q.model(), local=train, alpha=alpha, adaptive=adaptive)
    theta, own, shares = q.START, np.zeros((q.N, 2)), np.full(q.N, alpha)
    seen = set()
    for number, cohort in enumerate(q.PARTIAL):
        alive, trained = [k for k in cohort if k >= 0], []
        for k in alive:
            w, v, a = theta, own[k] if k in seen else theta, shares[k]
            for _ in range(q.SIZES[k]):
                share = np.clip(a, 0, 1)
                slope = q.gradient(k, share * v + (1 - share) * w)
                # Equation 10: d F(a v + (1 - a) w) / da = <v - w, grad F>.
                a = a - RATE * adaptive * (v - w) @ slope
                v = v - RATE * share * slope
                w = w - RATE * q.gradient(k, w)
            trained.append(w)
            own[k], shares[k] = v, np.clip(a, 0, 1)
            seen.add(k)
        theta = np.mean(trained, 0)
        state = q.play(alg, *q.PARTIAL[: number + 1])
        np.testing.assert_allclose(personal(state), own, **q.CLOSE)
        visited = sorted(seen)
        np.testing.assert_allclose(mix(state)[visited], shares[visited], **q.CLOSE)
        np.testing.assert_allclose(q.vector(state.server.theta), theta, **q.CLOSE)
    expected = shares[3] * own[3] + (1 - shares[3]) * theta
    np.testing.assert_allclose(q.deployed(alg, state, 3), expected, **q.CLOSE)
    assert np.any(np.abs(shares - alpha) > 1e-2) == adaptive


def test_share_stays_between_zero_and_one():
    # Large steps throw it out on both sides; it comes back at the end of a visit.
    alg = apfl(q.model(), local=q.training(optax.sgd(0.1)), alpha=0.5)
    state, found = None, []
    for _ in range(6):
        state = q.play(alg, q.EVERYONE, state=state)
        found.append(mix(state))
    assert np.min(found) == 0.0 and np.max(found) == 1.0


def test_share_zero_predicts_with_the_global_model():
    state = q.play(fixed(0.0), *q.PARTIAL)
    for k in q.EVERYONE:
        np.testing.assert_array_equal(
            q.deployed(fixed(0.0), state, k), q.vector(state.server.theta)
        )
    plain = q.play(q.averaged(q.training(q.DECAYING)), *q.PARTIAL)
    np.testing.assert_allclose(
        q.vector(state.server.theta), q.vector(plain.server.theta), rtol=1e-6
    )


def test_share_one_is_local_training():
    cohorts = (q.EVERYONE, (1, 2), (3, 1, 0))  # all there from the start
    state = q.play(fixed(1.0), *cohorts)
    alone = local_only(q.model(), local=q.training(q.DECAYING))
    expected = q.play(alone, *cohorts)
    np.testing.assert_allclose(personal(state), q.vector(expected.rows.kept), rtol=1e-6)
    np.testing.assert_array_equal(q.deployed(fixed(1.0), state, 2), personal(state)[2])


def test_finetuning_a_part_moves_that_part_of_both_models():
    alg = apfl(q.model(), local=q.training(q.DECAYING), alpha=1.0, finetune=q.HEAD)
    found = q.tuned(alg, client=2, size=3, epochs=2)
    expected = q.descend(2, q.START, 6, **q.DRIFT, train=(0, 1))
    np.testing.assert_allclose(found, expected, **q.CLOSE)
    assert found[0] == np.float32(q.START[0])


def test_personal_models_stay_off_the_wire():
    costs = comm.cost(comm.describe(apfl(q.model(), local=q.training())))
    assert costs.up_numbers == costs.down_numbers == 2


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_a_share(alpha):
    with pytest.raises(
        ValueError, match=rf"alpha={alpha} must be.* at least 0 and at most 1"
    ):
        apfl(q.model(), local=q.training(), alpha=alpha)
