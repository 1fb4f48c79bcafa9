"""pFedLA on quadratics: two layers of one number each."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q
from federated import make_local, normed

from hyperjax import training, tree
from hyperjax.algorithms.fedavg import Uplink
from hyperjax.algorithms.hyperfednet import hyperfednet
from hyperjax.algorithms.local_only import local_only
from hyperjax.algorithms.pfedla import State, layer_weights, layers_of, pfedla
from hyperjax.engine import comm
from hyperjax.types import Cohort

RATE = 1e-3
SMALL = dict(num_clients=q.N, embedding_size=8, hidden_size=8)
THETA = np.array([[1, -1], [2, 3], [-2, 1.5], [0.5, 4]])


@functools.cache
def ours(train=None, sign=1, **options):
    options = dict(generator_learning_rate=RATE) | SMALL | options
    train = train or q.training(q.DECAYING)
    return pfedla(q.model(), local=train, sign=sign, **options)


def everyone(num=q.N):
    one = jnp.ones(num)
    ids = jnp.arange(num, dtype=jnp.int32)
    return Cohort(ids, one, one, jnp.int32(0), jnp.float32(q.N))


def received(alg, server, cohort=None):
    down = jax.jit(alg.server.downlink)(jax.random.key(0), server, cohort or everyone())
    return jax.device_get(down.own)


def shares(server):
    """Weights of all clients, [N, layers, N]."""
    return np.asarray(jax.vmap(layer_weights)(server.psi, jnp.arange(q.N)))


def different():
    """The first state, with a model of its own for every client."""
    state = q.start(ours())
    models = {
        f"params/{name}/w": jnp.asarray(THETA[:, i], jnp.float32)
        for i, name in enumerate(("body", "head"))
    }
    return state._replace(server=state.server._replace(models=models))


def with_heads(state, heads):
    """The same, with generators whose heads are one number and whose biases are 0."""
    psi = state.server.psi
    psi = psi | dict(
        heads=jnp.full_like(psi["heads"], heads), bias=jnp.zeros_like(psi["bias"])
    )
    return state._replace(server=state.server._replace(psi=psi))


# Weights ----------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_are_not_negative_and_sum_to_one():
    psi = different().server.psi
    # Biases that turn a part of them off.
    off = jax.random.normal(jax.random.key(3), psi["bias"].shape)
    for bias in (psi["bias"], off):
        found = shares(State((), psi | dict(bias=bias)))
        assert found.shape == (q.N, 2, q.N) and np.all(found >= 0)
        np.testing.assert_allclose(found.sum(-1), np.ones((q.N, 2)), rtol=1e-6)
    assert np.any(found == 0) and len(np.unique(found)) > q.N


def test_a_layer_without_weights_is_ones_own():
    state = with_heads(different(), 0.0)
    np.testing.assert_array_equal(shares(state.server), np.stack([np.eye(q.N)] * 2, 1))
    np.testing.assert_array_equal(
        q.vector(received(ours(), state.server)), np.float32(THETA)
    )
    # That is local training, whatever happens to the generators.
    state = with_heads(q.start(ours()), 0.0)
    psi = jax.device_get(state.server.psi)
    state = q.play(ours(), *q.PARTIAL, state=state)
    alone = q.play(local_only(q.model(), local=q.training(q.DECAYING)), *q.PARTIAL)
    chex.assert_trees_all_close(state.server.models, alone.rows.kept, **q.CLOSE)
    chex.assert_trees_all_equal(state.server.psi, psi)


def test_equal_weights_are_the_mean():
    state = with_heads(different(), 1.0)
    found = q.vector(received(ours(), state.server))
    np.testing.assert_allclose(found, [THETA.mean(0)] * q.N, rtol=1e-6)


def test_layers_are_mixed_with_their_own_weights():
    server = different().server
    share = shares(server)
    expected = np.einsum("klj,jl->kl", share, THETA)
    np.testing.assert_allclose(q.vector(received(ours(), server)), expected, rtol=1e-5)
    # Unseen clients get the mean.
    cohort = everyone(2)._replace(ids=jnp.array([4, 9]))
    found = q.vector(received(ours(), server, cohort))
    np.testing.assert_allclose(found, [THETA.mean(0)] * 2, rtol=1e-6)


# Learning ---------------------------------------------------------------------------


def losses(theta):
    gap = theta - q.B
    return np.einsum("ki,kij,kj->k", gap, q.A, gap) / 2


@pytest.mark.parametrize("sign", [1, -1])
def test_a_generator_step_descends_the_loss_of_the_mixture(sign):
    alg = ours(train=q.steps(1), sign=sign)
    before = different()
    after = q.play(alg, q.EVERYONE, state=before)
    mixed = q.vector(received(alg, before.server))
    # One step on the whole batch: d = -LR grad F.
    slope = np.stack([q.gradient(k, mixed[k]) for k in range(q.N)])
    np.testing.assert_allclose(
        q.vector(after.uplink.delta), -q.LR * slope, rtol=1e-4, atol=1e-5
    )
    again = before.server._replace(psi=after.server.psi)  # models as they were
    change = losses(q.vector(received(alg, again))) - losses(mixed)
    # With g = J' grad F the step is e = -sign RATE LR g, and the loss changes by
    # g'e = -sign |e|^2 / (RATE LR).
    squares = [
        jax.vmap(lambda a, b: jnp.sum((a - b) ** 2))(*pair)
        for pair in zip(
            jax.tree.leaves(after.server.psi),
            jax.tree.leaves(before.server.psi),
            strict=True,
        )
    ]
    expected = -sign * np.sum(squares, 0) / (RATE * q.LR)
    assert np.all(sign * expected < 0)
    np.testing.assert_allclose(change, expected, rtol=0.1)


def test_running_statistics_teach_the_generators_nothing():
    alg = pfedla(normed(), local=make_local(), **SMALL)
    server = alg.server.init(jax.random.key(0))
    delta = {
        path: jnp.full_like(x, float(path.startswith("stats/")))
        for path, x in server.models.items()
    }
    assert any(path.startswith("stats/") for path in delta)
    uplink = Uplink(delta, ())
    after, _ = jax.jit(alg.server.update)(jax.random.key(0), server, uplink, everyone())
    chex.assert_trees_all_equal(after.psi, server.psi)
    # They are mixed and stored like everything else.
    path = "stats/batch_stats/norm/mean"
    gap = after.models[path] - received(alg, server)[path]
    np.testing.assert_allclose(gap, np.ones_like(gap), rtol=1e-6)


def test_without_a_change_generators_keep_their_bits():
    alg = ours(train=q.training(phases=(training.Phase(epochs=0),)))
    before = different()
    after = q.play(alg, q.EVERYONE, state=before)
    chex.assert_trees_all_equal(after.server.psi, jax.device_get(before.server.psi))
    # What is stored is the mixture, untrained.
    mixed = received(alg, before.server)
    chex.assert_trees_all_close(after.server.models, mixed, rtol=1e-6)


def test_idle_clients_keep_their_bits():
    before = different()
    after = q.play(ours(), (3, -1 - 1), state=before)  # 1 dropped out
    for old, new in zip(
        jax.tree.leaves(jax.device_get(before.server)),
        jax.tree.leaves(after.server),
        strict=True,
    ):
        np.testing.assert_array_equal(new[:3], old[:3])
    moved = jax.tree.map(lambda x, y: np.any(x[3] != y[3]), before.server, after.server)
    assert all(jax.tree.leaves(moved.models)) and moved.psi["heads"]


def test_of_two_in_turn_the_second_mixes_what_the_first_has_stored():
    start = q.start(ours())
    first = q.descend(0, q.START, q.SIZES[0], **q.DRIFT)
    together = q.play(ours(), (0, 1))
    alone = q.descend(1, q.START, q.SIZES[1], **q.DRIFT)
    # All models are the same at first, and so is every mixture of them.
    np.testing.assert_allclose(
        q.vector(together.server.models)[:2], [first, alone], **q.CLOSE
    )
    in_turn = q.play(ours(), (0,), (1,))
    weight = shares(start.server)[1, :, 0]  # what 1 makes of 0's layers
    mixed = weight * first + (1 - weight) * q.START
    second = q.descend(1, mixed, q.SIZES[1], **q.DRIFT)
    np.testing.assert_allclose(
        q.vector(in_turn.server.models)[:2], [first, second], **q.CLOSE
    )
    assert np.all(np.abs(second - alone) > 1e-3)


# The wire, fusion, and bad input ----------------------------------------------------


def test_a_model_each_way():
    costs = comm.cost(comm.describe(ours()))
    assert costs.down_numbers == costs.up_numbers == 2


def test_with_hyperfednet_generators_are_mixed_and_nothing_else():
    alg = hyperfednet(
        normed(),
        local=q.steps(1),
        tile=2,
        embedding_size=4,
        base="pfedla(embedding_size=8, hidden_size=8)",
        num_clients=q.N,
    )
    # in: w [2, 4, 4], b [2, 4]; out: w [18, 4], b [18].
    phi = 32 + 8 + 72 + 18
    messages = comm.describe(alg)
    for theta in (messages.server.models, messages.own, messages.uplink.delta):
        assert all(path.startswith("params/hyper/") for path in theta)
    assert not any(path.startswith("params/hyper/") for path in messages.client.kept)
    assert tree.count(messages.server.models) == q.N * phi
    costs = comm.cost(messages)
    assert costs.down_numbers == costs.up_numbers == phi
    server = alg.server.init(jax.random.key(0))
    number = jnp.arange(1.0, q.N + 1)
    models = jax.tree.map(
        lambda x: jnp.broadcast_to(number.reshape(-1, *[1] * (x.ndim - 1)), x.shape),
        server.models,
    )
    # Its two linear maps, matrix and bias, are the layers.
    share = shares(server)
    assert share.shape[1] == 2
    for path, x in received(alg, server._replace(models=models)).items():
        x = x.reshape(q.N, -1)
        expected = share[:, int("/out/" in path)] @ number
        np.testing.assert_allclose(x, np.outer(expected, x[0] * 0 + 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_clients=0), r"num_clients=0 must be at least 1"),
        (dict(embedding_size=0), r"embedding_size=0 must be at least 1"),
        (dict(hidden_size=0), r"hidden_size=0 must be at least 1"),
        (dict(sign=0), r"sign=0 must be 1 or -1"),
        # 10^5 models of 2 numbers are nothing, but their generators are 1.8 10^11:
        # 8 + 3 (64 + 8) of each, 8 x 2 x 10^5 heads and 2 x 10^5 biases.
        (dict(num_clients=10**5), r"100000 clients x 1,800,226 numbers .* = 720\.1 GB"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        pfedla(q.model(), local=q.training(), **(SMALL | options))


def test_a_layer_is_its_weights_and_its_biases():
    theta = dict.fromkeys(
        [
            "params/conv/kernel",
            "params/norm/bias",
            "params/conv/bias",
            "params/norm/scale",
            "stats/batch_stats/norm/mean",
        ]
    )
    assert layers_of(theta) == [
        ["params/conv/kernel", "params/conv/bias"],
        ["params/norm/bias", "params/norm/scale", "stats/batch_stats/norm/mean"],
    ]
