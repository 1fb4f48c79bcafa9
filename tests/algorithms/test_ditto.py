"""Ditto on quadratics."""

import numpy as np
import pytest
import quadratics as q

from hyperjax.algorithms.ditto import ditto
from hyperjax.algorithms.local_only import local_only
from hyperjax.engine import comm


def personal(state):
    return q.vector(state.rows.kept, "params/personal")


def test_exchanges_equal_the_algorithm():
    lam = 0.7
    alg = ditto(q.model(), local=q.training(q.DECAYING), lam=lam)
    theta, own, seen = q.START, np.zeros((q.N, 2)), set()
    for number, cohort in enumerate(q.PARTIAL):
        alive, trained = [k for k in cohort if k >= 0], []
        for k in alive:
            before, count = own[k] if k in seen else theta, q.SIZES[k]
            # The anchor is what was received, not what training makes of it.
            own[k] = q.descend(
                k, before, count, term=lambda v, w=theta: lam * (v - w), **q.DRIFT
            )
            trained.append(q.descend(k, theta, count, **q.DRIFT))
            seen.add(k)
        theta = np.mean(trained, 0)
        state = q.play(alg, *q.PARTIAL[: number + 1])
        np.testing.assert_allclose(personal(state), own, **q.CLOSE)
        np.testing.assert_allclose(q.vector(state.server.theta), theta, **q.CLOSE)
    np.testing.assert_allclose(q.deployed(alg, state, 1), own[1], **q.CLOSE)
    # The global model cannot tell that there is another one.
    plain = q.play(q.averaged(q.training(q.DECAYING)), *q.PARTIAL)
    np.testing.assert_allclose(
        q.vector(state.server.theta), q.vector(plain.server.theta), rtol=1e-6
    )


def test_lambda_zero_is_local_training():
    # Of clients that were there from the start: others begin at what they receive.
    train, cohorts = q.training(q.DECAYING), (q.EVERYONE, (1, 2), (3, 1, 0))
    ours = q.play(ditto(q.model(), local=train, lam=0.0), *cohorts)
    alone = q.play(local_only(q.model(), local=train), *cohorts)
    np.testing.assert_allclose(personal(ours), q.vector(alone.rows.kept), rtol=1e-6)


def test_large_lambda_pulls_to_the_received_model():
    # At the solution lambda |v - w| = |grad F(v)| <= |grad F(w)|.
    gaps = []
    for lam in (1.0, 6.0):  # steps of LR (lambda + 3.42) are stable below 2
        alg = ditto(q.model(), local=q.steps(100), lam=lam)
        found = personal(q.play(alg, q.EVERYONE))
        for k in q.EVERYONE:
            solution = q.proximal(k, q.START, lam)
            np.testing.assert_allclose(found[k], solution, **q.CLOSE)
        gaps.append(np.linalg.norm(found - q.START, axis=1))
        slopes = [np.linalg.norm(q.gradient(k, q.START)) for k in q.EVERYONE]
        assert np.all(gaps[-1] <= np.array(slopes) / lam)
    assert np.all(gaps[1] < gaps[0] / 2)


def test_finetuning_a_part_moves_that_part_of_the_personal_model():
    lam = 0.7
    alg = ditto(q.model(), local=q.training(q.DECAYING), lam=lam, finetune=q.HEAD)
    found = q.tuned(alg, client=2, size=3, epochs=2)
    expected = q.descend(
        *(2, q.START, 6), term=lambda v: lam * (v - q.START), **q.DRIFT, train=(0, 1)
    )
    np.testing.assert_allclose(found, expected, **q.CLOSE)
    assert found[0] == np.float32(q.START[0])


def test_personal_models_stay_off_the_wire():
    costs = comm.cost(comm.describe(ditto(q.model(), local=q.training())))
    assert costs.up_numbers == costs.down_numbers == 2


def test_lambda_is_not_negative():
    with pytest.raises(ValueError, match=r"lam=-1\.0 must be at least 0"):
        ditto(q.model(), local=q.training(), lam=-1.0)
