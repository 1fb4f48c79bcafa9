"""FedBN on a small network with batch-norm."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
from test_fedavg import PARTS, SHAPE, K, Normalised, one_round, pool

from hyperjax import training
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.fedbn import fedbn, normalisation
from hyperjax.data import clients
from hyperjax.engine import comm, schedule
from hyperjax.models import MLP, from_linen
from hyperjax.types import ALONE

NORM = "BatchNorm_0"
HOME = {f"params/{NORM}/{name}" for name in ("scale", "bias")} | {
    f"stats/batch_stats/{NORM}/{name}" for name in ("mean", "var")
}
MODEL = from_linen(Normalised(), SHAPE, K)
TRAIN = training.Local(optimizer=optax.sgd(0.2, 0.9), batch_size=3)


@functools.cache
def ours():
    return fedbn(MODEL, local=TRAIN)


def test_normalisation_is_found_by_structure():
    template = jax.eval_shape(MODEL.init, jax.random.key(0))
    assert normalisation(template) == (rf"params/{NORM}/.*",)
    plain = from_linen(MLP(K, hidden=(4,)), SHAPE, K)
    assert normalisation(jax.eval_shape(plain.init, jax.random.key(0))) == ()


def test_normalisation_stays_home():
    start, server, uplink, states, _ = one_round(ours(), PARTS)
    assert set(states.kept) == HOME
    assert not HOME & set(server.theta) and set(uplink.delta) == set(server.theta)
    # Two dense layers travel: (4 + 1) 2 + (2 + 1) 3 numbers.
    costs = comm.cost(comm.describe(ours()))
    assert costs.up_numbers == costs.down_numbers == 19
    for path in HOME:
        kept = np.asarray(states.kept[path])
        assert len(np.unique(kept[:, 0])) == len(PARTS), path
    moved = [np.abs(server.theta[k] - start.theta[k]).max() for k in server.theta]
    assert min(moved) > 0


def test_one_client_cannot_tell_it_from_fedavg():
    def final(alg):
        parts = clients.table(PARTS[1:2])
        sim = schedule.simulator(alg, parts, pool(), weight=np.ones(1), cohort_size=1)
        carry, _ = sim.run(jax.random.key(0), sim.init(jax.random.key(0)), 0, 3)
        kept = jax.tree.map(lambda x: x[0], carry.rows[ALONE].kept)
        return {**carry.server.theta, **kept}

    found, expected = final(ours()), final(fedavg(MODEL, local=TRAIN))
    assert set(found) == set(expected) > HOME
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_statistics_can_be_averaged_all_the_same():
    alg = fedbn(MODEL, local=TRAIN, bn_stats="average")
    kept = comm.describe(alg).client.kept
    assert set(kept) == {f"params/{NORM}/scale", f"params/{NORM}/bias"}
    with pytest.raises(ValueError, match="did you mean 'local'"):
        fedbn(MODEL, local=TRAIN, bn_stats="locals")
