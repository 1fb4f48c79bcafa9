"""One round in which other methods do what FedAvg does, and clients without samples."""

import functools
import importlib

import chex
import jax
import numpy as np
import optax
import pytest
import quadratics as q
from test_fedavg import LR, MODEL, one_round

from hyperjax import training, tree
from hyperjax.algorithms.fedavg import fedavg

# Four clients of five samples, three steps on whole batches: nothing depends on keys.
EQUAL = np.split(np.arange(20), 4)
TRAIN = training.Local(
    optimizer=optax.sgd(LR),
    batch_size=8,
    phases=(training.Phase(epochs=3),),
)

LIKE_FEDAVG = {
    "fedprox": dict(mu=0.0),
    "fedper": dict(head=()),
    "fedrep": dict(head=(), head_epochs=2, body_epochs=3),
    "fedbabu": dict(head=()),
    "lg_fedavg": dict(share=r".*"),
    "fedbn": {},  # the network has no normalisation
    "scaffold": {},  # all controls are zero
    "fednova": {},  # all clients take as many steps
    "moon": dict(mu=5.0),  # no client has a previous model
    "ditto": dict(lam=0.7),
    "apfl": dict(alpha=0.3),
    "perfedavg": dict(inner_learning_rate=0.0, draws="same", order="exact"),
}


def build(name, model=MODEL, train=TRAIN, **options):
    factory = getattr(importlib.import_module(f"hyperjax.algorithms.{name}"), name)
    return factory(model, local=train, **options)


@functools.cache
def expected():
    return one_round(fedavg(MODEL, local=TRAIN), EQUAL)


# The others have tests of their own in which nothing is kept or pulled.
QUICK = ("fedprox", "fedper", "scaffold", "ditto")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in LIKE_FEDAVG
    ],
)
def test_equals_fedavg(name):
    start, server, uplink, _, _ = one_round(build(name, **LIKE_FEDAVG[name]), EQUAL)
    start_fedavg, server_fedavg, uplink_fedavg, _, _ = expected()
    chex.assert_trees_all_equal(start.theta, start_fedavg.theta)
    close = dict(rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(server.theta, server_fedavg.theta, **close)
    chex.assert_trees_all_close(uplink.delta, uplink_fedavg.delta, **close)
    assert float(tree.norm(tree.sub(server.theta, start.theta))) > 0.01


STATEFUL = ("feddyn", "scaffold", "fednova", "ditto", "apfl", "pfedme", "moon")


@pytest.mark.parametrize("name", STATEFUL)
def test_clients_without_samples_do_no_harm(name):
    train = q.training(q.DECAYING, batch_size=4)
    alg = build(name, q.model(), train)
    first = q.play(alg, q.EVERYONE, sizes=(4, 2, 3, 5))
    empty = q.play(alg, q.EVERYONE, state=first, sizes=(0, 2, 3, 5))
    assert tree.finite(empty)
    # It sends no change, and keeps what it had.
    for delta in jax.tree.leaves(empty.uplink.delta):
        assert delta[0] == 0 and np.all(np.isfinite(delta))
    if name == "moon":  # its previous model is the one it ended with: what it received
        ended = q.vector(empty.rows.kept, "memory/previous/params")[0]
        np.testing.assert_array_equal(ended, q.vector(first.server.theta))
    else:
        for before, after in zip(
            jax.tree.leaves(first.rows), jax.tree.leaves(empty.rows), strict=True
        ):
            np.testing.assert_array_equal(before[0], after[0])
    nobody = q.play(alg, q.EVERYONE, state=first, sizes=(0, 0, 0, 0))
    assert tree.finite(nobody)
    if name != "feddyn":  # whose h goes on to act
        chex.assert_trees_all_close(nobody.server.theta, first.server.theta, rtol=1e-6)
    absent = q.play(alg, (-1, -2, -3, -4), state=first)
    chex.assert_trees_all_equal(
        (absent.server, absent.rows), (first.server, first.rows)
    )
