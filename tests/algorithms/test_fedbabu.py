"""FedBABU on quadratics, with momentum and decay on to move what is not frozen."""

import functools

import numpy as np
import quadratics as q

from hyperjax.algorithms.fedbabu import fedbabu
from hyperjax.engine import comm

WEIGHT = (1, 2, 3, 4)


@functools.cache
def ours():
    return fedbabu(q.model(), local=q.training(q.DECAYING))


def test_body_trains_under_a_head_that_keeps_its_bits():
    theta, own = q.federate(
        q.PARTIAL,
        lambda k, theta: q.descend(k, theta, q.SIZES[k], **q.DRIFT, train=(1, 0)),
        weight=WEIGHT,
    )
    state = q.play(ours(), *q.PARTIAL, weight=WEIGHT)
    np.testing.assert_allclose(state.server.theta["params/body/w"], theta[0], **q.CLOSE)
    assert np.all(state.rows.kept["params/head/w"] == np.float32(q.START[1]))
    assert np.all(own[:, 1] == q.START[1])


def test_finetuning_moves_the_whole_network():
    expected = q.descend(2, q.START, 2 * 3, **q.DRIFT)
    found = q.tuned(ours(), client=2, size=3, epochs=2)
    np.testing.assert_allclose(found, expected, **q.CLOSE)


def test_head_stays_off_the_wire():
    costs = comm.cost(comm.describe(ours()))
    assert costs.up_numbers == costs.down_numbers == 1
