"""FedRep on quadratics, with momentum and decay on to move what is not frozen."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q

from hyperjax import corrections
from hyperjax.algorithms.fedbabu import fedbabu
from hyperjax.algorithms.fedrep import fedrep
from hyperjax.engine import comm

WEIGHT = (1, 2, 3, 4)


@functools.cache
def ours(head_epochs=2, body_epochs=1):
    return fedrep(
        q.model(),
        local=q.training(q.DECAYING),
        head_epochs=head_epochs,
        body_epochs=body_epochs,
    )


def test_first_the_head_then_the_body():
    def visit(k, theta):
        # Each phase has an optimizer of its own.
        theta = q.descend(k, theta, 2 * q.SIZES[k], **q.DRIFT, train=(0, 1))
        return q.descend(k, theta, q.SIZES[k], **q.DRIFT, train=(1, 0))

    theta, own = q.federate(q.PARTIAL, visit, shared=(True, False), weight=WEIGHT)
    state = q.play(ours(), *q.PARTIAL, weight=WEIGHT)
    np.testing.assert_allclose(state.server.theta["params/body/w"], theta[0], **q.CLOSE)
    np.testing.assert_allclose(state.rows.kept["params/head/w"], own[:, 1], **q.CLOSE)


def test_without_epochs_a_part_keeps_its_bits():
    still = q.play(ours(body_epochs=0), *q.PARTIAL)
    assert still.server.theta["params/body/w"] == np.float32(q.START[0])
    assert np.all(still.uplink.delta["params/body/w"] == 0)
    heads = q.play(ours(head_epochs=0), *q.PARTIAL)
    assert np.all(heads.rows.kept["params/head/w"] == np.float32(q.START[1]))
    # The body alone: what FedBABU does.
    babu = q.play(fedbabu(q.model(), local=q.training(q.DECAYING)), *q.PARTIAL)
    np.testing.assert_allclose(
        heads.server.theta["params/body/w"],
        babu.server.theta["params/body/w"],
        rtol=1e-6,
    )
    assert heads.server.theta["params/body/w"] != np.float32(q.START[0])


@pytest.mark.parametrize(
    ("finetune", "train"), [(None, (0, 1)), (q.BODY, (1, 0)), (r".*", (1, 1))]
)
def test_finetuning_moves_the_head_unless_told_otherwise(finetune, train):
    alg = fedrep(q.model(), local=q.training(q.DECAYING), finetune=finetune)
    expected = q.descend(2, q.START, 2 * 3, **q.DRIFT, train=train)
    found = q.tuned(alg, client=2, size=3, epochs=2)
    np.testing.assert_allclose(found, expected, **q.CLOSE)
    assert [bool(x) for x in jnp.float32(q.START) != found] == [bool(t) for t in train]


def test_heads_stay_off_the_wire():
    costs = comm.cost(comm.describe(ours()))
    assert costs.up_numbers == costs.down_numbers == 1


@pytest.mark.parametrize(
    "options",
    [
        dict(correction=corrections.scaffold()),
        dict(persist_optimizer="kept"),
        dict(persist_optimizer="all"),
    ],
)
def test_what_belongs_to_one_set_of_parameters_is_refused(options):
    with pytest.raises(ValueError, match="phases of the local training"):
        comm.describe(fedrep(q.model(), local=q.training(), **options))
