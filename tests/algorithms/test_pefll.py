"""PeFLL and ODPFL-HN: a round is one gradient, and what a newcomer's network is of."""

import functools

import chex
import federated
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import NUM_CLASSES, NUM_CLIENTS, tiny

from hyperjax import training, tree
from hyperjax.algorithms.odpfl_hn import odpfl_hn
from hyperjax.algorithms.pefll import _embedder, _masked, pefll
from hyperjax.data import clients
from hyperjax.engine import comm, deploy, schedule
from hyperjax.hypernets import heads
from hyperjax.hypernets.embedding import mean_embedding
from hyperjax.models import memory
from hyperjax.types import ClientData

ROOT = jax.random.key(1)
SMALL = dict(
    num_clients=NUM_CLIENTS,
    embedding_size=3,
    extractor="mlp",
    extractor_size=4,
    hidden_size=8,
    num_hidden=1,
    embed_batch=0,
    server_opt=optax.sgd(0.1),
)
# A step on all samples: what a client sends does not depend on a draw.
ONCE = training.Local(optax.sgd(0.5), 16, phases=(training.Phase(steps=1),))
LABELLED = dict(embed_labels=True, mask_absent="none")


@functools.cache
def built(name, **options):
    factory = {"pefll": pefll, "odpfl_hn": odpfl_hn}[name]
    return factory(tiny().model, local=ONCE, **SMALL, **options)


@functools.cache
def trained(name, rounds):
    sim = schedule.simulator(
        built(name, **(LABELLED if name == "pefll" else {})),
        tiny().table,
        tiny().pool,
        weight=np.ones(NUM_CLIENTS),
        cohort_size=NUM_CLIENTS,
    )
    start = sim.init(ROOT)
    return jax.device_get(sim.run(ROOT, start, 0, rounds)[0] if rounds else start)


def test_a_round_is_one_gradient_through_both_networks():
    server = trained("pefll", 0).server
    model, template = tiny().model, jax.eval_shape(tiny().model.init, ROOT)
    theta = tree.by_path({"params": template["params"]})
    net = heads.per_tensor(theta, condition_size=3, hidden_size=8, num_hidden=1)
    embed = _embedder(model, 3, "mlp", 4, True)
    data = ClientData(*map(jnp.asarray, tiny().table), tiny().pool)
    whole = tree.splitter({"params": template["params"]}, ".*").merge

    @jax.jit
    def expected(psi, phi):
        def raw(psi, rows, size):
            own = ClientData(rows, size, data.pool)
            batch = clients.take(own, jnp.arange(len(rows)), 0, len(rows))
            return mean_embedding(embed.features(psi, batch), batch.mask)

        e = jax.vmap(lambda rows, size: raw(psi, rows, size))(data.rows, data.size)
        mean, deviation = jnp.mean(e), jnp.std(e) + 1e-6

        def network(weights, rows, size):
            psi, phi = weights
            return net.generate(phi, (raw(psi, rows, size) - mean) / deviation)

        def loss(theta, rows, size):
            own = ClientData(rows, size, data.pool)
            batch = clients.take(own, jnp.arange(len(rows)), 0, len(rows))
            variables = {**whole(theta, {}), "stats": {}}
            return model.loss(ROOT, variables, batch, ())[0]

        def pulled(rows, size):
            theta, pull = jax.vjp(lambda w: network(w, rows, size), (psi, phi))
            change = tree.scale(jax.grad(loss)(theta, rows, size), 0.1 * 0.5)
            return pull(change)[0]

        every = jax.vmap(pulled)(data.rows, data.size)
        return jax.tree.map(lambda x: x.mean(0), every)

    of_psi, of_phi = expected(server.psi, server.phi)
    after = trained("pefll", 1).server
    close = dict(rtol=2e-4, atol=2e-6)
    chex.assert_trees_all_close(after.phi, tree.sub(server.phi, of_phi), **close)
    chex.assert_trees_all_close(after.psi, tree.sub(server.psi, of_psi), **close)
    assert tree.norm(of_psi) > 1e-5


def test_three_exchanges_are_counted():
    alg = built("pefll", **LABELLED)
    psi = (16 * (1 + NUM_CLASSES) + 1) * 4 + 5 * 3
    network = tree.count(jax.eval_shape(tiny().model.init, ROOT)["params"])
    costs = comm.cost(comm.describe(alg))
    # E and e's gradient once more, in the third.
    assert costs.down_numbers == psi + network + (psi + 3)
    assert costs.up_numbers == 3 + network + psi
    assert comm.cost(comm.describe(built("odpfl_hn"))).up_numbers < costs.up_numbers


@functools.cache
def networks(name, with_labels):
    """Those of three newcomers on samples of clients 3, 4 and 3."""
    inputs = ClientData(*(x[[3, 4, 3]] for x in tiny().table), tiny().pool)
    alg = built(name, **(LABELLED if name == "pefll" else {}))
    give = deploy.deployer(alg, batch_size=4)
    ids = NUM_CLIENTS + np.arange(3)
    train = inputs if with_labels else None
    rounds = int(name == "pefll")
    found = give(ROOT, trained(name, rounds), rounds, ids, inputs, train)
    return [tree.by_path(each.network["params"]) for each in found]


@pytest.mark.parametrize(
    ("name", "with_labels"), [("pefll", True), ("odpfl_hn", False)]
)
def test_a_newcomer_gets_the_network_of_its_samples(name, with_labels):
    first, second, again = networks(name, with_labels)
    chex.assert_trees_all_close(first, again, rtol=1e-5)
    assert tree.norm(tree.sub(first, second)) > 1e-4


def test_pefll_knows_nothing_of_who_has_no_labels():
    first, second, _ = networks("pefll", False)
    chex.assert_trees_all_equal(first, second)


def test_classes_that_a_client_has_none_of_are_masked():
    plain = tiny().model.init(ROOT)
    x = jnp.ones((2, *tiny().model.sample_shape))
    logits = np.asarray(tiny().model.predict(plain, x))
    for mask, instead in (("zero", 0.0), ("out", -1e9)):
        model = _masked(tiny().model, mask)
        told = memory.put(plain, "present", jnp.array([0.5, 0.0, 0.5]))
        found = np.asarray(model.predict(told, x))
        np.testing.assert_array_equal(found[:, [0, 2]], logits[:, [0, 2]])
        np.testing.assert_array_equal(found[:, 1], instead)
        np.testing.assert_array_equal(model.predict(plain, x), logits)
    assert _masked(tiny().model, "none") is tiny().model


def test_bad_options_are_refused():
    for options, message in (
        (dict(mask_absent="zeros"), "mask_absent='zeros' is unknown; did you mean"),
        (dict(extractor="cnn"), "extractor='cnn' is unknown"),
        (dict(embed_batch=-1), "embed_batch=-1"),
        (dict(clip_norm=0), "clip_norm=0"),
    ):
        with pytest.raises(ValueError, match=message):
            pefll(tiny().model, local=ONCE, **{**SMALL, **options})
    with pytest.raises(ValueError, match="bn_stats"):
        local = federated.make_local()
        odpfl_hn(federated.normed(), local=local, **{**SMALL, "bn_stats": "average"})
