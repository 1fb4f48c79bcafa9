"""FedPer on quadratics, with momentum and decay on."""

import functools

import chex
import numpy as np
import quadratics as q

from hyperjax.algorithms.fedper import fedper
from hyperjax.algorithms.local_only import local_only
from hyperjax.engine import comm

WEIGHT = (1, 2, 3, 4)


@functools.cache
def ours():
    return fedper(q.model(), local=q.training(q.DECAYING))


def test_bodies_are_averaged_and_heads_wait_for_their_client():
    theta, own = q.federate(
        q.PARTIAL,
        lambda k, theta: q.descend(k, theta, q.SIZES[k], **q.DRIFT),
        shared=(True, False),
        weight=WEIGHT,
    )
    state = q.play(ours(), *q.PARTIAL, weight=WEIGHT)
    assert set(state.server.theta) == {"params/body/w"}
    np.testing.assert_allclose(state.server.theta["params/body/w"], theta[0], **q.CLOSE)
    np.testing.assert_allclose(state.rows.kept["params/head/w"], own[:, 1], **q.CLOSE)
    # A client predicts with the newest body and the head of its own last visit.
    np.testing.assert_allclose(
        q.deployed(ours(), state, 0), [theta[0], own[0, 1]], **q.CLOSE
    )


def test_heads_stay_off_the_wire():
    costs = comm.cost(comm.describe(ours()))
    assert costs.up_numbers == costs.down_numbers == 1


def test_a_head_that_is_everything_is_local_training():
    train = q.training(q.DECAYING)
    all_home = q.play(fedper(q.model(), local=train, head=(q.BODY, q.HEAD)), *q.PARTIAL)
    alone = q.play(local_only(q.model(), local=train), *q.PARTIAL)
    chex.assert_trees_all_equal(all_home.rows.kept, alone.rows.kept)
