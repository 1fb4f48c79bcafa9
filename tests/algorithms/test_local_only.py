"""Training without collaboration."""

import functools

import chex
import numpy as np
import quadratics as q
from test_lg_fedavg import FAMILY_SIZES, NETWORKS, joint, whole

from hyperjax.algorithms.local_only import local_only
from hyperjax.engine import comm


@functools.cache
def alone():
    return local_only(q.model(), local=q.training(q.DECAYING))


def test_clients_follow_their_own_gradients_when_sampled():
    state = q.play(alone(), *q.PARTIAL)
    _, own = q.federate(
        q.PARTIAL,
        lambda k, theta: q.descend(k, theta, q.SIZES[k], **q.DRIFT),
        shared=(False, False),
    )
    np.testing.assert_allclose(q.vector(state.rows.kept), own, **q.CLOSE)
    np.testing.assert_allclose(q.deployed(alone(), state, 3), own[3], **q.CLOSE)


def test_nothing_is_sent():
    costs = comm.cost(comm.describe(alone()))
    assert costs.up_numbers == costs.down_numbers == 0
    assert q.start(alone()).server.theta == {}


def test_families_train_apart_too():
    alg = local_only(NETWORKS, local=q.training(q.DECAYING), family_sizes=FAMILY_SIZES)
    state = joint(alg).play(*q.PARTIAL)
    expected = q.play(alone(), *q.PARTIAL)
    kept = {name: rows.kept for name, rows in state.rows.items()}
    chex.assert_trees_all_close(whole(kept), expected.rows.kept, **q.CLOSE)
    assert state.server.theta == {}
    assert all(up.delta == {} for up in state.uplink.values())
