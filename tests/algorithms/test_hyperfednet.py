"""HyperFedNet: what is sent and what stays, and training against hand-made steps."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import NUM_CLASSES, normed, tiny

from hyperjax import models, rng, training, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.fedbn import normalisation
from hyperjax.algorithms.hyperfednet import KEEP, hyperfednet
from hyperjax.data import clients
from hyperjax.data.sources import load
from hyperjax.engine import comm, exchange, stores
from hyperjax.hypernets.hypernetworked import hypernetworked
from hyperjax.hypernets.tiles import tile_net
from hyperjax.types import AdaptData, Batch, ClientData, Cohort, Downlink

N, LR, BATCH, WIDTH = 4, 0.1, 4, 8
# Full batches of 4, so that 1 to 4 samples are one step and up to 8 are two.
PARTS = (range(0, 4), range(4, 12), range(12, 14), range(14, 19))
TRAIN = training.Local(optimizer=optax.sgd(LR), batch_size=BATCH)
SMALL = dict(tile=2, embedding_size=4)
# Tiles 3x3x2x2: in w [2, 4, 4], b [2, 4]; out w [18, 4], b [18].
PHI = {"in/w": 32, "in/b": 8, "out/w": 72, "out/b": 18}
NUM_PHI = 130
# The network: stem 3x3x1x2, its norm 2 + 2, conv 3x3x2x4 (two tiles), norm 4 + 4,
# classifier 4 x 3 + 3; statistics 2 (2 + 4); embeddings 2 x 4.
STEM, NORMS, HEAD, STATS, EMBED = 18, 12, 15, 12, 8
CLOSE = dict(rtol=1e-5, atol=1e-6)
HYPER = r"params/hyper/.*"


@functools.cache
def method(**options):
    """HyperFedNet on the tiny network; cached, so that its programs are too.

    Clients draw their own embeddings, so that no test passes because they are alike.
    """
    options.setdefault("embedding_init", "own")
    mu = options.pop("mu", None)
    if mu is not None:
        options["base"] = f"{options['base']}({mu=})"
    return hyperfednet(normed(), local=TRAIN, **SMALL, **options)


@functools.cache
def whole(**options):
    """The hypernetworked model itself."""
    template = jax.eval_shape(normed().init, jax.random.key(0))["params"]
    return hypernetworked(normed(), tile_net(template, **SMALL), **options)


class State(NamedTuple):
    """A federation after an exchange, and what was sent in it."""

    server: Any
    rows: Any  # [N, ...]
    seen: Any
    uplink: Any = None  # [N, ...] in the order of the cohort


@functools.cache
def program(alg):
    def update(key, server, uplink, cohort):
        server, info = alg.server.update(key, server, uplink, cohort)
        return server, {**info, "uplink": uplink}

    shown = alg._replace(server=alg.server._replace(update=update))
    run = exchange.make_exchange(shown, "vmap")

    def one(server, rows, seen, data, cohort):
        got, were = stores.gather(rows, seen, cohort.ids)
        server, new, info = run(jax.random.key(0), server, got, were, data, cohort)
        rows, seen = stores.scatter(rows, seen, cohort.ids, new, cohort.active > 0)
        return State(server, rows, seen, info["uplink"])

    return jax.jit(one)


@functools.cache
def start(alg) -> State:
    server = alg.server.init(rng.stream(jax.random.key(0), "common_init"))
    return State(server, *stores.zeros(comm.describe(alg).client, N))


def data_of(samples) -> ClientData:
    rows = np.zeros((len(samples), WIDTH), np.int32)
    for row, part in zip(rows, samples, strict=True):
        row[: len(part)] = part
    sizes = np.array([len(part) for part in samples], np.int32)
    return ClientData(jnp.asarray(rows), jnp.asarray(sizes), tiny().pool)


def play(alg, *cohorts, state=None, parts=PARTS) -> State:
    """Runs one exchange per cohort of ids, weighted by samples."""
    state = state or start(alg)
    for number, ids in enumerate(cohorts):
        ids = np.pad(np.array(ids, np.int32), (0, N - len(ids)), constant_values=N)
        samples = [parts[min(i, N - 1)] for i in ids]
        cohort = Cohort(
            jnp.asarray(ids),
            jnp.asarray(ids < N, jnp.float32),
            jnp.array([len(part) for part in samples], jnp.float32),
            jnp.int32(number),
            jnp.float32(N),
        )
        state = program(alg)(*state[:3], data_of(samples), cohort)
    return jax.device_get(state)


def row_of(rows, client):
    return jax.tree.map(lambda x: x[client], rows)


@functools.cache
def first_visits(alg):
    """The states of all clients before their first visit, [N, ...] by path."""
    down = Downlink((start(alg).server.theta, ()), round=jnp.int32(0))
    run = jax.jit(exchange.first_visit, static_argnums=0)
    return jax.device_get(run(alg, jax.random.key(0), down, jnp.arange(N)).kept)


def beginning(alg, client):
    """All variables that a client's first visit starts with, by path."""
    return {**row_of(first_visits(alg), client), **start(alg).server.theta}


@functools.cache
def centralised():
    """One step of gradient descent, without clients, keys, masks or loops."""
    model = whole()
    template = jax.eval_shape(model.init, jax.random.key(0))
    cut = tree.splitter(template, None)

    @jax.jit
    def step(variables, samples, train_hyper):
        pool = tiny().pool
        x = (pool.x[samples] / 255.0 - pool.mean) / pool.std
        batch = Batch(x, pool.y[samples], jnp.ones(len(samples)))
        nested = cut.merge({}, variables)

        def loss(params):
            together = {**nested, "params": params}
            return model.loss(jax.random.key(0), together, batch, ())

        grads, trained = jax.grad(loss, has_aux=True)(nested["params"])
        rate = {"hyper": LR * train_hyper, "embed": LR, "network": LR}
        params = {
            name: jax.tree.map(lambda w, g, r=rate[name]: w - r * g, part, grads[name])
            for name, part in nested["params"].items()
        }
        return cut.split({"params": params, "stats": trained.stats})[1]

    return step


# On the wire -----------------------------------------------------------------------


def test_uplink_is_the_four_arrays_of_the_generator():
    sent = comm.describe(method()).uplink
    assert {k: x.size for k, x in sent.delta.items()} == {
        f"params/hyper/{k}": size for k, size in PHI.items()
    }
    assert tree.count(sent) == NUM_PHI


@pytest.mark.parametrize(
    "options, sent, home",
    [
        (dict(), 0, EMBED + STEM + NORMS + HEAD + STATS),
        (dict(bn_stats="average"), STATS, EMBED + STEM + NORMS + HEAD),
        (dict(share_aux="convs"), STEM, EMBED + NORMS + HEAD + STATS),
        (dict(share_aux="convs_and_bn"), STEM + NORMS, EMBED + HEAD + STATS),
        (
            dict(share_aux="convs_and_bn", bn_stats="average"),
            STEM + NORMS + STATS,
            EMBED + HEAD,
        ),
        # The kernels of the listing are the client's, and never sent.
        (dict(regenerate="per_round"), 0, EMBED + STEM + NORMS + HEAD + STATS + 72),
    ],
)
def test_what_is_shared_beside_the_generator(options, sent, home):
    messages = comm.describe(method(**options))
    cost = comm.cost(messages)
    assert cost.down_numbers == cost.up_numbers == NUM_PHI + sent
    assert tree.count(messages.client) == home


def test_what_fedbn_keeps_is_at_home_already():
    alg = method()
    patterns = normalisation(jax.eval_shape(whole().init, jax.random.key(0)))
    with_fedbn = fedavg(
        whole(), local=TRAIN, keep=(KEEP["none"], *patterns), bn_stats="local"
    )
    # One splitter decides all, so equal messages and states are equal methods.
    chex.assert_trees_all_equal(comm.describe(with_fedbn), comm.describe(alg))
    # With convolutions shared, all that FedBN would share is, but for the classifier.
    kept = comm.describe(method(share_aux="convs")).client.kept
    network = {p for p in kept if p.startswith("params/network/")}
    assert {p.removeprefix("params/network/") for p in network} == {
        *(f"{name}/{x}" for name in ("stem_norm", "norm") for x in ("bias", "scale")),
        "head/bias",
        "head/kernel",
    }


# One exchange ----------------------------------------------------------------------


def test_one_participant_is_copied():
    alg = method()
    after = play(alg, (1,))
    change = tree.sub(after.server.theta, start(alg).server.theta)
    sent = jax.tree.map(lambda x: x[0], after.uplink.delta)
    chex.assert_trees_all_close(change, sent, rtol=0, atol=1e-6)
    assert tree.norm(sent) > 0.01


def test_order_of_participants_does_not_matter():
    first, second = play(method(), (0, 2, 1)), play(method(), (1, 0, 2))
    chex.assert_trees_all_close(first[:3], second[:3], **CLOSE)


def test_twice_the_data_is_twice_the_weight():
    # In one full batch the doubled client 2 takes the step it took before.
    alg = method()
    once = play(alg, (0, 2)).uplink.delta
    twice = [*PARTS[:2], [*PARTS[2], *PARTS[2]], PARTS[3]]
    after = play(alg, (0, 2), parts=twice)
    chex.assert_trees_all_close(after.uplink.delta, once, **CLOSE)
    mean = jax.tree.map(lambda x: (4 * x[0] + 4 * x[1]) / 8, once)
    change = tree.sub(after.server.theta, start(alg).server.theta)
    chex.assert_trees_all_close(change, mean, **CLOSE)


def test_absent_clients_keep_what_is_private():
    alg = method()
    before = play(alg, range(N))
    after = play(alg, (0, 3), state=before)
    for client, stays in enumerate((False, True, True, False)):
        old, new = (row_of(state.rows.kept, client) for state in (before, after))
        # Embeddings, everything else that is trained, and statistics.
        same = {path: np.array_equal(old[path], new[path]) for path in old}
        assert all(same.values()) if stays else not any(same.values())
    assert {path.split("/")[0] for path in old} == {"params", "stats"}
    assert {path.split("/")[1] for path in old} == {"embed", "network", "batch_stats"}


def test_one_client_is_centralised_training():
    alg, samples = method(), np.array(PARTS[0])
    expected = beginning(alg, 0)
    for _ in range(3):
        expected = centralised()(expected, samples, 1.0)
    after = play(alg, (0,), (0,), (0,))
    found = {**row_of(after.rows.kept, 0), **after.server.theta}
    chex.assert_trees_all_close(found, expected, **CLOSE)


@pytest.mark.slow
def test_a_frozen_generator_leaves_local_training():
    frozen = TRAIN._replace(freeze=HYPER)
    alg = hyperfednet(normed(), local=frozen, embedding_init="own", **SMALL)
    after = play(alg, (0, 2), (2, 0))
    chex.assert_trees_all_equal(
        after.server.theta, jax.device_get(start(alg).server.theta)
    )
    for client in (0, 2):
        expected = beginning(alg, client)
        for _ in range(2):
            expected = centralised()(expected, np.array(PARTS[client]), 0.0)
        found = row_of(after.rows.kept, client)
        expected = {path: expected[path] for path in found}
        chex.assert_trees_all_close(found, expected, **CLOSE)


def test_clients_start_alike_but_for_embeddings_of_their_own():
    for embedding_init, expected in (
        ("own", {"params/embed/conv/kernel"}),
        ("common", set()),
    ):
        kept = first_visits(method(embedding_init=embedding_init))
        differ = {path for path, x in kept.items() if not np.array_equal(x[0], x[1])}
        assert differ == expected


# Derivatives -----------------------------------------------------------------------


@functools.cache
def derivatives(regenerate):
    """Variables, gradients, and those of the network and the generator apart."""
    model = whole(regenerate=regenerate)
    pool = tiny().pool
    x = (pool.x[:5] / 255.0 - pool.mean) / pool.std
    batch = Batch(x, pool.y[:5], jnp.ones(5))
    template = jax.eval_shape(normed().init, jax.random.key(0))["params"]
    net = tile_net(template, **SMALL)

    def loss_of(model):
        return lambda params, stats: model.loss(
            jax.random.key(0), {"params": params, "stats": stats}, batch, ()
        )[0]

    @jax.jit
    def run(key):
        variables = model.init(key)
        params, stats = variables["params"], variables["stats"]
        if (
            regenerate == "per_round"
        ):  # after some steps they are not h(v; phi) any more
            params["generated"] = jax.tree.map(lambda x: x + 0.1, params["generated"])
        found = jax.grad(loss_of(model))(params, stats)
        kernels, pull_back = jax.vjp(net.generate, params["hyper"], params["embed"])
        kernels = params.get("generated", kernels)
        plain = {path: x for path, x in params["network"].items()} | kernels
        nested = tree.splitter(template, None).merge({}, plain)
        apart = jax.grad(loss_of(normed()))(nested, stats)
        paths = tree.paths(apart)
        apart = dict(zip(paths, jax.tree.leaves(apart), strict=True))
        cotangent = {path: apart[path] for path in net.targets}
        return found, apart, cotangent, pull_back(cotangent)

    return run(jax.random.key(0))


@pytest.mark.parametrize("regenerate", ["every_step", "per_round"])
def test_gradients_are_those_of_the_kernels_pulled_back(regenerate):
    found, apart, cotangent, (hyper, embed) = derivatives(regenerate)
    chex.assert_trees_all_close(found["hyper"], hyper, **CLOSE)
    chex.assert_trees_all_close(found["embed"], embed, **CLOSE)
    expected = {path: apart[path] for path in found["network"]}
    chex.assert_trees_all_close(found["network"], expected, **CLOSE)
    # The listing's kernels have the gradient that the network gives them.
    assert ("generated" in found) == (regenerate == "per_round")
    if "generated" in found:
        chex.assert_trees_all_close(found["generated"], cotangent, **CLOSE)
    assert tree.norm(hyper) > 1e-3 and tree.norm(embed) > 1e-3


@pytest.mark.slow
def test_listing_and_default_agree_for_one_step_only():
    both = [
        play(method(regenerate=r), (0, 1)).uplink.delta
        for r in ("every_step", "per_round")
    ]
    one = [row_of(delta, 0) for delta in both]
    two = [row_of(delta, 1) for delta in both]
    chex.assert_trees_all_close(*one, **CLOSE)
    assert tree.norm(tree.sub(*two)) > 1e-3 * tree.norm(two[0])


def test_predictions_are_those_of_the_exported_network():
    model = whole()
    variables = jax.jit(model.init)(jax.random.key(0))
    exported = model.serve.export(variables)
    expected = jax.eval_shape(normed().init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(exported, expected)
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype(np.float32)
    np.testing.assert_allclose(
        model.predict(variables, x), normed().predict(exported, x), rtol=1e-6
    )


# Fusions ---------------------------------------------------------------------------


@pytest.mark.slow  # what mu = 0 is: tests/algorithms/test_fedprox.py
def test_fedprox_without_a_pull_is_hyperfednet():
    plain = play(method(), range(N), (1, 3))
    fused = play(method(base="fedprox", mu=0.0), range(N), (1, 3))
    chex.assert_trees_all_close(fused.server.theta, plain.server.theta, **CLOSE)
    chex.assert_trees_all_close(fused.rows.kept, plain.rows.kept, **CLOSE)


def test_fedprox_pulls_the_generator_and_nothing_else():
    plain = play(method(), (0, 1)).uplink.delta
    fused = play(method(base="fedprox", mu=0.5), (0, 1)).uplink.delta
    # At the first of its steps a client is where it started: nothing pulls.
    chex.assert_trees_all_close(row_of(fused, 0), row_of(plain, 0), **CLOSE)
    moved = tree.norm(row_of(plain, 1))
    assert tree.norm(row_of(fused, 1)) < 0.999 * moved
    assert comm.cost(comm.describe(method(base="fedprox", mu=0.5))) == comm.cost(
        comm.describe(method())
    )


def test_feddyn_remembers_the_generators_gradients():
    alg = method(base="feddyn")  # alpha = 0.01
    messages = comm.describe(alg)
    assert comm.cost(messages) == comm.cost(comm.describe(method()))
    assert messages.client.correction.keys() == messages.uplink.delta.keys()
    assert tree.count(messages.client.correction) == NUM_PHI
    after = play(alg, (0, 2, 3))
    delta = after.uplink.delta
    expected = jax.tree.map(lambda x: -0.01 * x, row_of(delta, 0))
    chex.assert_trees_all_close(row_of(after.rows.correction, 0), expected, **CLOSE)
    # theta = theta_0 + weighted mean - h / alpha, with h / alpha minus the sum of all
    # changes over N.
    change = jax.tree.map(
        lambda d: (4 * d[0] + 2 * d[1] + 5 * d[2]) / 11 + d.sum(0) / N, delta
    )
    found = tree.sub(after.server.theta, start(alg).server.theta)
    chex.assert_trees_all_close(found, change, **CLOSE)


def test_scaffold_sends_control_variates_of_the_generator():
    alg = method(base="scaffold")
    messages = comm.describe(alg)
    cost = comm.cost(messages)
    assert (cost.down_numbers, cost.up_numbers) == (2 * NUM_PHI, 2 * NUM_PHI)
    assert tree.count(messages.client.correction) == NUM_PHI
    after = play(alg, (0, 1))
    # c_k = -change / (steps x rate), from c = 0; client 1 took two steps.
    for client, steps in ((0, 1), (1, 2)):
        change = row_of(after.uplink.delta, client)
        expected = jax.tree.map(lambda x, s=steps: -x / (s * LR), change)
        chex.assert_trees_all_close(
            row_of(after.rows.correction, client), expected, **CLOSE
        )
    mean = jax.tree.map(lambda x: x[:2].sum(0) / N, after.rows.correction)
    chex.assert_trees_all_close(after.server.correction, mean, **CLOSE)


def test_ditto_keeps_a_second_model_with_its_own_generator():
    messages = comm.describe(method(base="ditto"))
    plain = comm.describe(method())
    assert comm.cost(messages) == comm.cost(plain)
    assert messages.uplink.delta.keys() == plain.uplink.delta.keys()
    extra = tree.count(messages.client) - tree.count(plain.client)
    assert extra == NUM_PHI + EMBED + STEM + NORMS + HEAD + STATS


# Deployment ------------------------------------------------------------------------


def test_tuning_leaves_what_is_stored():
    alg = method()
    state = play(alg, range(N))
    before = tree.sha256(state)
    data = jax.tree.map(lambda x: x[0], data_of(PARTS[:1])._replace(pool=()))
    data = data._replace(pool=tiny().pool)
    adapt = AdaptData(data, clients.withhold_labels(data))
    down = Downlink((state.server.theta, ()), round=jnp.int32(0))

    @jax.jit
    def run(down, row, adapt, epochs):
        key = jax.random.key(3)
        adapted = alg.client.adapt(key, down, row, adapt)
        variables = alg.client.deploy(down, adapted)
        return variables, alg.client.tune(key, variables, adapt, down.round, epochs)

    row = row_of(state.rows, 0)
    deployed, tuned = run(down, row, adapt, jnp.int32(4))
    assert tree.sha256(state) == before
    # By default all moves: generator, embeddings, network.
    for name in ("hyper", "embed", "network"):
        gap = tree.sub(deployed["params"][name], tuned["params"][name])
        assert tree.norm(gap) > 1e-4, name
    deployed, tuned = run(down, row, adapt, jnp.int32(0))
    chex.assert_trees_all_equal(tuned, deployed)


def overfit(model, source, num, epochs, **options) -> float:
    """Trains one client on all samples; returns the loss on them afterwards."""
    pool = clients.make_pool(source.x, source.y, np.arange(num))
    train = training.Local(
        optimizer=optax.adam(0.01),
        batch_size=num,
        phases=(training.Phase(epochs=epochs),),
    )
    alg = hyperfednet(model, local=train, **options)
    data = ClientData(jnp.arange(num), jnp.int32(num), pool)

    @jax.jit
    def run(key):
        server = alg.server.init(key)
        down = Downlink((server.theta, ()), round=jnp.int32(0))
        row = alg.client.init(key, key, down)
        uplink, row, _ = alg.client.update(key, down, row, data)
        theta = tree.add(server.theta, uplink.delta)
        variables = alg.client.deploy(Downlink((theta, ())), row)
        x = (pool.x / 255.0 - pool.mean) / pool.std
        batch = Batch(x, pool.y, jnp.ones(num))
        return alg.client.model.loss(key, variables, batch, ())[0]

    return float(run(jax.random.key(0)))


@pytest.mark.parametrize(
    "regenerate", ["every_step", pytest.param("per_round", marks=pytest.mark.slow)]
)
def test_a_client_overfits(regenerate):
    source = load("synthetic", num_samples=12, num_classes=NUM_CLASSES, shape=(4, 4, 1))
    options = dict(SMALL, regenerate=regenerate)
    assert overfit(normed(), source, 12, 400, **options) < 0.05


@pytest.mark.slow
def test_a_client_overfits_64_images_with_tiles_of_16():
    source = load("synthetic", num_samples=64, num_classes=10, shape=(32, 32, 3))
    model = models.from_linen(models.ZOO["resnet8"](num_classes=10), (32, 32, 3), 10)
    assert overfit(model, source, 64, 60) < 0.05
