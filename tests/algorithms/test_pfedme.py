"""pFedMe on quadratics, whose Moreau envelopes have closed forms."""

import functools

import numpy as np
import optax
import pytest
import quadratics as q

from hyperjax.algorithms.pfedme import pfedme
from hyperjax.engine import comm

LAM = 2.0


@functools.cache
def exact():
    # Inner steps contract by |1 - 0.25 (2 + 0.58 to 3.42)| < 0.36.
    return pfedme(
        q.model(),
        local=q.training(),
        lam=LAM,
        inner_steps=25,
        inner_learning_rate=0.25,
    )


def personal(state):
    return q.vector(state.rows.kept, "memory/personal")


def envelope_gradient(client, w):
    return np.linalg.solve(np.eye(2) + q.A[client] / LAM, q.gradient(client, w))


def test_clients_descend_on_the_envelope():
    solutions = np.zeros((q.N, 2))

    def visit(k, w):
        for _ in range(q.SIZES[k]):
            u = q.proximal(k, w, LAM)
            np.testing.assert_allclose(LAM * (w - u), envelope_gradient(k, w))
            w = w - q.LR * envelope_gradient(k, w)
        solutions[k] = u
        return w

    theta, _ = q.federate(q.PARTIAL, visit, weight=(1, 2, 3, 4))
    state = q.play(exact(), *q.PARTIAL, weight=(1, 2, 3, 4))
    np.testing.assert_allclose(q.vector(state.server.theta), theta, **q.CLOSE)
    # What a client predicts with is the last u, not w.
    np.testing.assert_allclose(personal(state), solutions, **q.CLOSE)
    np.testing.assert_allclose(q.deployed(exact(), state, 1), solutions[1], **q.CLOSE)


def test_inner_steps_are_counted_and_start_at_w():
    # u = w - r grad F(w), then u - r (grad F(u) + lambda (u - w)).
    rate = 0.1
    alg = pfedme(
        q.model(),
        local=q.training(),
        lam=LAM,
        inner_steps=2,
        inner_learning_rate=rate,
    )

    def visit(k, w):
        for _ in range(q.SIZES[k]):
            u = w - rate * q.gradient(k, w)
            u = u - rate * (q.gradient(k, u) + LAM * (u - w))
            w = w - q.LR * LAM * (w - u)
        return w

    theta, _ = q.federate(q.PARTIAL, visit)
    state = q.play(alg, *q.PARTIAL)
    np.testing.assert_allclose(q.vector(state.server.theta), theta, **q.CLOSE)


def test_beta_is_the_rate_of_the_server():
    _, trained = q.federate(
        [q.EVERYONE],
        lambda k, w: q.descend(
            k,
            w,
            q.SIZES[k],
            term=lambda w, k=k: envelope_gradient(k, w) - q.gradient(k, w),
        ),
    )
    for beta in (0.0, 2.0):
        alg = pfedme(
            q.model(),
            local=q.training(),
            lam=LAM,
            inner_steps=25,
            inner_learning_rate=0.25,
            server_opt=optax.sgd(beta),
        )
        state = q.play(alg, q.EVERYONE)
        expected = (1 - beta) * q.START + beta * trained.mean(0)
        np.testing.assert_allclose(q.vector(state.server.theta), expected, **q.CLOSE)
        if beta == 0:
            np.testing.assert_array_equal(q.vector(state.server.theta), q.START)


@pytest.mark.parametrize(("lam", "rate"), [(0.0, q.LR), (LAM, 0.0)])
def test_without_lambda_or_rate_nothing_moves(lam, rate):
    alg = pfedme(q.model(), local=q.training(optax.sgd(rate)), lam=lam)
    state = q.play(alg, *q.PARTIAL[:2])
    np.testing.assert_array_equal(q.vector(state.server.theta), q.START)
    assert np.all(personal(state)[[0, 1, 2, 3]] != q.START)  # u is solved for


def test_a_personal_model_at_w_moves_nothing():
    # Where u is w the penalty is flat; its root would have no derivative.
    alg = pfedme(q.model(), local=q.training(), inner_learning_rate=0.0)
    state = q.play(alg, *q.PARTIAL[:2])
    np.testing.assert_array_equal(q.vector(state.server.theta), q.START)


def test_personal_models_stay_off_the_wire():
    costs = comm.cost(comm.describe(exact()))
    assert costs.up_numbers == costs.down_numbers == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(inner_steps=0), "inner_steps=0 must be at least 1"),
        (dict(lam=-1.0), r"lam=-1\.0 must be at least 0"),
        (dict(lam=20.0, inner_learning_rate=0.1), r"inner_learning_rate=0\.1 times"),
        (dict(inner_learning_rate=-0.1), r"inner_learning_rate=-0\.1"),
        (dict(finetune=q.HEAD), "cannot tune a part of its personal model"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        pfedme(q.model(), local=q.training(), **options)
