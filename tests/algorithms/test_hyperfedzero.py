"""HyperFedZero and its controls: wire truth, training identities, zero-shot use."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax import rng, training, tree
from hyperjax.algorithms.constant_embedding import constant_embedding
from hyperjax.algorithms.hyperfedzero import hyperfedzero
from hyperjax.algorithms.opt1 import opt1
from hyperjax.data import clients
from hyperjax.models import MLP, from_linen, memory
from hyperjax.types import AdaptData, ClientData, Cohort, Downlink

SHAPE, K, LR = (4, 4, 1), 3, 0.1
MODEL = from_linen(MLP(K, hidden=(4,)), SHAPE, K)
SMALL = dict(embedding_size=4, chunk_size=20, chunk_embedding_size=2, hidden=(6,))
PASSES = 3
FULL = training.Local(
    optimizer=optax.sgd(LR),
    batch_size=8,
    phases=(training.Phase(epochs=PASSES),),
)


@functools.cache
def pool():
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (20, *SHAPE), np.uint8)
    return clients.make_pool(x, draw.integers(0, K, 20), np.arange(20))


def client(rows, padding=0):
    padded = np.r_[rows, np.zeros(padding, int)].astype(np.int32)
    return ClientData(jnp.asarray(padded), jnp.int32(len(rows)), pool())


# Wire truth ------------------------------------------------------------------------


@functools.cache
def published():
    model = from_linen(MLP(10), (28, 28, 1), 10)
    return model._replace(init=jax.jit(model.init))


def wire(method, **options):
    """Numbers (down, up) of one client at the published sizes, without computing."""
    alg = method(published(), local=FULL, **options)
    key = jax.random.key(0)
    data = ClientData(
        jnp.zeros(4, jnp.int32),
        jnp.int32(4),
        pool()._replace(x=jnp.zeros((4, 28, 28, 1), jnp.uint8)),
    )

    def visit(key):
        server = alg.server.init(key)
        cohort = Cohort(*jnp.ones((3, 1)), jnp.int32(0), jnp.float32(1))
        down = alg.server.downlink(key, server, cohort)
        state = alg.client.init(key, key, down)
        uplink, _, _ = alg.client.update(
            key, down._replace(round=jnp.int32(0)), state, data
        )
        return down, uplink

    down, uplink = jax.eval_shape(visit, key)
    assert tree.num_bytes(uplink) == 4 * tree.count(uplink)
    return tree.count(down), tree.count(uplink)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        # |theta_f| + |theta_h|: extractor with noise head 6,944, hypernetwork 188,712.
        (hyperfedzero, dict(hidden=(220, 220)), 6_944 + 188_712),
        (hyperfedzero, dict(hidden=(200, 200)), 6_944 + 168_112),
        # Without NoisyEmbed the noise head, 32 * 16 + 16, is not sent either.
        (hyperfedzero, dict(hidden=(200, 200), noise=False), 6_944 - 528 + 168_112),
        (constant_embedding, dict(hidden=(200, 200)), 168_112),
        # 16 more inputs to 200 units.
        (opt1, {}, 6_944 + 199_210 + 3_200),
    ],
)
def test_numbers_per_round_trip(method, options, expected):
    assert wire(method, **options) == (expected, expected)


# Initialisation --------------------------------------------------------------------


@pytest.mark.slow
def test_initial_loss():
    # With uniform labels, logits of deviation s cost between ln C and about
    # ln C + s^2 / 2. Generated entries of 0.08 in every layer are larger than
    # PyTorch's in wide ones, so s is 1 to 2; with "fan_in" they are PyTorch's.
    base = published()
    x = np.random.default_rng(0).normal(size=(64, 28, 28, 1)).astype(np.float32)
    condition = np.full(16, 1 / 16, np.float32)
    models = [
        hyperfedzero(base, local=FULL, hidden=(200, 200), out_scale=scale).client.model
        for scale in ("none", "fan_in")
    ]
    init, *predict = map(jax.jit, (models[0].init, *(m.predict for m in models)))
    for seed in range(3):
        variables = memory.put(init(jax.random.key(seed)), "condition", condition)
        plain, scaled = (np.asarray(f(variables, x)) for f in predict)
        loss, loss_scaled = (
            np.mean(np.log(np.exp(logits).sum(1)) - logits.mean(1))
            for logits in (plain, scaled)
        )
        assert np.log(10) <= loss < np.log(10) + 0.55 * plain.std() ** 2
        assert plain.std() < 2.5
        assert np.log(10) <= loss_scaled < np.log(10) + 0.1


# One round -------------------------------------------------------------------------


@functools.cache
def build(method=hyperfedzero, train=FULL, **options):
    return method(MODEL, local=train, **(SMALL | options))


@functools.cache
def filled(alg):
    """A server state with larger variables than at the start, so that inputs differ."""
    draw = np.random.default_rng(0)
    spec = jax.eval_shape(alg.server.init, jax.random.key(0))
    return jax.tree.map(
        lambda x: np.float32(draw.normal(scale=0.5, size=x.shape)), spec
    )


@functools.cache
def exchange(alg):
    """One exchange without an engine, as a compiled function."""
    axes = ClientData(0, 0, None)

    def run(server, cohort, data):
        key = jax.random.key(1)
        down = alg.server.downlink(key, server, cohort)._replace(round=cohort.round)
        keys = rng.client_keys(key, cohort.ids)
        every = jax.vmap(alg.client.init, in_axes=(0, None, None))
        states = every(keys, key, down)
        update = jax.vmap(alg.client.update, in_axes=(0, None, 0, axes))
        uplink, _, info = update(keys, down, states, data)
        return alg.server.update(key, server, uplink, cohort)[0], uplink, info

    return jax.jit(run)


def round_of(alg, rows):
    rows = np.asarray(rows)
    c, n = rows.shape
    cohort = Cohort(
        jnp.arange(c), jnp.ones(c), jnp.ones(c), jnp.int32(0), jnp.float32(c)
    )
    data = ClientData(jnp.asarray(rows, jnp.int32), jnp.full(c, n, jnp.int32), pool())
    server = filled(alg)
    return server, *exchange(alg)(server, cohort, data)


def variables_of(alg, theta):
    spec = jax.eval_shape(alg.client.model.init, jax.random.key(0))
    return tree.splitter(spec, None).merge({}, theta)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (constant_embedding, {}),
        (hyperfedzero, dict(noise=False, alpha=0.5, beta=0.1)),
    ],
)
def test_identical_clients_train_as_one_centralised(method, options):
    # Full batches and no noise: every client takes the same deterministic steps.
    alg = build(method, **options)
    server, after, uplink, info = round_of(alg, [np.arange(8)] * 3)

    @jax.jit
    def centralised(theta):
        batch = clients.gather(pool(), np.arange(8), np.ones(8, np.float32))

        def step(i, params):
            def loss(params):
                variables = {"params": params, "stats": {}}
                return alg.client.model.loss(jax.random.key(i), variables, batch, ())[0]

            grads = jax.grad(loss)(params)
            return jax.tree.map(lambda w, g: w - LR * g, params, grads)

        variables = variables_of(alg, theta)
        params = jax.lax.fori_loop(0, PASSES, step, variables["params"])
        return {"params": params, "stats": {}}

    expected = centralised(server.theta)
    result = variables_of(alg, after.theta)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)
    assert info["steps"].tolist() == [PASSES] * 3
    # Everything learns: chunk embeddings, generator and, if there is one, extractor.
    parts = {path.split("/")[1] for path in server.theta}
    assert parts == (
        {"hyper"} if method is constant_embedding else {"hyper", "extractor"}
    )
    for path in server.theta:
        assert float(jnp.max(jnp.abs(uplink.delta[path]))) > 0, path


def test_logged_quantities():
    alg = build()
    cohort = Cohort(
        jnp.arange(2), jnp.ones(2), jnp.ones(2), jnp.int32(0), jnp.float32(2)
    )
    data = ClientData(jnp.zeros((2, 8), jnp.int32), jnp.full(2, 8, jnp.int32), pool())
    *_, info = jax.eval_shape(exchange(alg), filled(alg), cohort, data)
    names = {"loss", "dispersion", "entropy", "noise_scale", "steps", "samples"}
    assert set(info) == names
    assert all(x.shape == (2,) for x in info.values())


# Zero-shot deployment --------------------------------------------------------------


@functools.cache
def deployment(alg):
    """(theta, AdaptData) -> (condition, logits on all samples), for a new client."""

    def run(theta, data):
        key = jax.random.key(5)
        down = Downlink(shared=(theta, ()), round=jnp.int32(0))
        state = alg.client.init(key, key, down)
        adapted = alg.client.adapt(key, down, state, data)
        variables = alg.client.deploy(down, adapted)
        x = clients.gather(pool(), jnp.arange(20), jnp.ones(20)).x
        return adapted.condition, alg.client.model.predict(variables, x)

    return jax.jit(run)


def test_labels_of_deployment_inputs_do_not_matter():
    alg = build()
    inputs = client(range(10), padding=2)
    theta, run = filled(alg).theta, deployment(alg)
    shuffled = inputs._replace(pool=pool()._replace(y=pool().y[::-1]))
    first = run(theta, AdaptData(client([], padding=2), inputs))
    for other in (shuffled, clients.withhold_labels(inputs)):
        again = run(theta, AdaptData(client([], padding=2), other))
        chex.assert_trees_all_equal(first, again)


def test_inputs_of_deployment_do_matter():
    alg = build()
    theta, run = filled(alg).theta, deployment(alg)
    none = client([], padding=2)
    first, second = (
        run(theta, AdaptData(none, client(rows))) for rows in (range(10), range(10, 20))
    )
    assert np.abs(np.asarray(first[0] - second[0])).max() > 1e-3
    assert np.abs(np.asarray(first[1] - second[1])).max() > 1e-3
    assert float(jnp.sum(first[0])) == pytest.approx(1, abs=1e-6)


def test_source_of_the_condition():
    by_inputs, by_training = build(), build(condition_source="local_train_inputs")
    theta = filled(by_inputs).theta
    train, inputs, none = client(range(7)), client(range(10, 20)), client([], padding=7)

    def condition(alg, train):
        return np.asarray(deployment(alg)(theta, AdaptData(train, inputs))[0])

    np.testing.assert_array_equal(
        condition(by_inputs, train), condition(by_inputs, none)
    )
    # Without training samples, as for a novel client, the inputs have to do.
    np.testing.assert_allclose(
        condition(by_training, none), condition(by_inputs, none), atol=1e-7
    )
    own = deployment(by_inputs)(theta, AdaptData(none, train))[0]
    np.testing.assert_allclose(condition(by_training, train), own, atol=1e-7)
    assert np.abs(condition(by_training, train) - condition(by_inputs, train)).max() > (
        1e-3
    )


def test_constant_embedding_serves_everyone_alike():
    alg = build(constant_embedding)
    theta, run = filled(alg).theta, deployment(alg)
    none = client([], padding=2)
    first, second = (
        run(theta, AdaptData(none, client(rows))) for rows in (range(10), range(10, 20))
    )
    np.testing.assert_allclose(first[0], np.full(4, 0.25), atol=1e-7)
    np.testing.assert_allclose(first[1], second[1], rtol=1e-5, atol=1e-6)


# Errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (hyperfedzero, dict(enter="center"), r"enter='center'.*'centred'"),
        (hyperfedzero, dict(cv_mode="per_samples"), r"did you mean 'per_sample'"),
        (hyperfedzero, dict(out_scale="fan-in"), r"did you mean 'fan_in'"),
        (hyperfedzero, dict(condition_source="inputs"), r"accepted: 'eval_inputs'"),
        (hyperfedzero, dict(chunk_size=0), "chunk_size=0 must be at least 1"),
        (opt1, dict(embed_granularity="batches"), r"did you mean 'batch'"),
        (constant_embedding, dict(embedding_size=0), "embedding_size=0"),
    ],
)
def test_bad_arguments(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(MODEL, local=FULL, **options)
