"""FedAMP on quadratics: the attentive mixing by hand, the pull to what was received."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q

from hyperjax.algorithms.fedamp import fedamp
from hyperjax.engine import comm
from hyperjax.mixing import State
from hyperjax.types import Cohort

BODY, HEAD = "params/body/w", "params/head/w"
# At these, models some units apart have weights of about 0.1.
ALPHA, SIGMA, LAM = 4.0, 16.0, 2.0


@functools.cache
def ours(num_clients=q.N, alpha=ALPHA, sigma=SIGMA, lam=LAM):
    return fedamp(
        q.model(),
        local=q.training(q.DECAYING),
        num_clients=num_clients,
        alpha=alpha,
        sigma=sigma,
        lam=lam,
    )


def table(models):
    """A server's state from models [N, 2]."""
    models = jnp.asarray(models, jnp.float32)
    return State({BODY: models[:, 0], HEAD: models[:, 1]})


@functools.cache
def _downlink(alg):
    return jax.jit(lambda state, who: alg.server.downlink(None, state, who).own)


def received(models, ids=None, **options):
    """What clients are sent, [C, 2], by a server that has models [N, 2]."""
    alg = ours(len(models), **options)
    ids = np.arange(len(models)) if ids is None else ids
    ids, ones = jnp.asarray(ids, jnp.int32), jnp.ones(len(ids))
    who = Cohort(ids, ones, ones, jnp.int32(0), jnp.float32(len(models)))
    return q.vector(_downlink(alg)(table(models), who))


def mixing_matrix(models, alpha=ALPHA, sigma=SIGMA):
    """All weights [N, N], in float64."""
    gap = models[:, None] - models[None]
    share = alpha / sigma * np.exp(-np.sum(gap**2, -1) / sigma)
    np.fill_diagonal(share, 0)
    return share + np.diag(1 - share.sum(1))


# Mixing -----------------------------------------------------------------------------


def test_three_clients_by_hand():
    models = np.array([[0, 0], [3, 4], [0, 5]])
    # Squared distances 25, 25 and 9 + 1; a = 4 / 16.
    far, near = 0.25 * np.exp(-25 / 16), 0.25 * np.exp(-10 / 16)
    expected = [
        far * models[1] + far * models[2],
        (1 - far - near) * models[1] + near * models[2],
        (1 - far - near) * models[2] + near * models[1],
    ]
    np.testing.assert_allclose(received(models), expected, rtol=1e-6)
    # Whatever their order, and unseen clients get the mean of all models.
    some = received(models, (2, 3, 0, 17))
    mean = [1, 3]
    np.testing.assert_allclose(some, [expected[2], mean, expected[0], mean], rtol=1e-6)


def test_weights_sum_to_one_and_none_is_negative():
    draw = np.random.default_rng(0).normal(size=(q.N, 2))
    # Where bodies are all 7, mixtures of them are 7.
    draw[:, 0] = 7
    for scale in (0.01, 1.0, 100.0):
        np.testing.assert_allclose(
            received(draw * [1, scale])[:, 0], np.full(q.N, 7), rtol=1e-6
        )
    # At the bound equal models leave nothing for one's own: (N - 1) alpha / sigma = 1.
    limit = dict(alpha=SIGMA / (q.N - 1))
    for k in range(q.N):
        models = np.zeros((q.N, 2))
        models[k] = 1e-3
        expected = np.full(q.N, 1e-3 / 3)
        expected[k] = 0
        found = received(models, **limit)[:, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
        assert np.all(found > -1e-9)


def test_equal_models_stay_what_they_are():
    models = np.tile(q.START, (q.N, 1))
    np.testing.assert_allclose(received(models), models, rtol=1e-6)


def test_nearer_models_weigh_more():
    models = np.array([[0, 0], [1, 0], [2, 0], [4, 0]])
    matrix = mixing_matrix(models)
    assert matrix[0, 1] > matrix[0, 2] > matrix[0, 3] > 0
    np.testing.assert_allclose(received(models), matrix @ models, rtol=1e-5, atol=1e-6)


# Training ---------------------------------------------------------------------------


def test_whole_runs_by_hand():
    # Absent and dropped clients keep their models, in cohorts of any order.
    models = np.tile(q.START, (q.N, 1))
    for cohort in q.PARTIAL:
        sent = mixing_matrix(models) @ models
        for k in (k for k in cohort if k >= 0):
            models[k] = q.descend(
                k,
                sent[k],
                q.SIZES[k],
                term=lambda theta, u=sent[k]: LAM / ALPHA * (theta - u),
                **q.DRIFT,
            )
    # Aggregation weights play no part.
    state = q.play(ours(), *q.PARTIAL, weight=(1, 2, 3, 4))
    np.testing.assert_allclose(q.vector(state.server.models), models, **q.CLOSE)


def test_models_far_apart_train_alone_from_their_own():
    models = q.START + 100 * np.arange(q.N)[:, None]
    state = q.start(ours())._replace(server=table(models))
    after = q.vector(q.play(ours(), (1, 3), state=state).server.models)
    for k in (1, 3):
        alone = q.descend(
            k,
            models[k],
            q.SIZES[k],
            term=lambda theta, u=models[k]: LAM / ALPHA * (theta - u),
            **q.DRIFT,
        )
        np.testing.assert_allclose(after[k], alone, rtol=1e-5)
    np.testing.assert_array_equal(after[[0, 2]], models[[0, 2]])


# The wire, and bad input ------------------------------------------------------------


def test_a_model_each_way():
    costs = comm.cost(comm.describe(ours()))
    assert costs.down_numbers == costs.up_numbers == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_clients=0), r"num_clients=0 must be at least 1"),
        (dict(alpha=0.0), r"alpha=0\.0 must be positive"),
        (dict(sigma=-1.0), r"sigma=-1\.0 must be positive"),
        (dict(lam=-0.1), r"lam=-0\.1 must be at least 0"),
        (dict(alpha=6.0), r"alpha=6\.0 is too large: .* = 1\.12 must be at most 1"),
        (dict(num_clients=10**12, alpha=1e-12), r"10{12} clients x 2 numbers"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        ours(**options)
