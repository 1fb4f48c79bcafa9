"""FedAvg and FedOpt against identities that hold for any network."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratics as q

from hyperjax import corrections, rng, training, tree
from hyperjax.algorithms.fedavg import Uplink, fedavg
from hyperjax.data import clients
from hyperjax.models import MLP, from_linen
from hyperjax.types import AdaptData, ClientData, Cohort, Downlink

SHAPE, K, LR = (2, 2, 1), 3, 0.2
MODEL = from_linen(MLP(K, hidden=(4,)), SHAPE, K)
HEAD = r"params/head/.*"
FULL = training.Local(optimizer=optax.sgd(LR), batch_size=8)
BATCHES = training.Local(optimizer=optax.sgd(LR, 0.9), batch_size=3)
# 20 samples of 4 clients.
PARTS = [np.arange(0, 4), np.arange(4, 12), np.arange(12, 18), np.arange(18, 20)]


@functools.cache
def pool():
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (20, *SHAPE), np.uint8)
    return clients.make_pool(x, draw.integers(0, K, 20), np.arange(20))


def stacked(parts):
    rows, size = clients.table([*parts, np.arange(8)])  # all tables 8 wide
    return ClientData(jnp.asarray(rows[:-1]), jnp.asarray(size[:-1]), pool())


def cohort_of(ids, weight, active=None):
    active = np.ones(len(ids)) if active is None else active
    return Cohort(
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(active, jnp.float32),
        jnp.asarray(weight, jnp.float32),
        jnp.int32(0),
        jnp.float32(len(PARTS)),
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
        uplink, states, info = update(keys, down, states, data)
        server, _ = alg.server.update(key, server, uplink, cohort)
        return server, uplink, states, info

    return jax.jit(run)


def one_round(alg, parts, ids=None, weight=None, start=None):
    ids = range(len(parts)) if ids is None else ids
    weight = [len(part) for part in parts] if weight is None else weight
    start = start or alg.server.init(jax.random.key(0))
    after = exchange(alg)(start, cohort_of(ids, weight), stacked(parts))
    return start, *after


@functools.cache
def plain(train=FULL):
    return fedavg(MODEL, local=train)


@functools.cache
def initial(seed=0):
    return plain().server.init(jax.random.key(seed))


def nest(theta):
    """From paths to the model's variables."""
    return tree.splitter(jax.eval_shape(MODEL.init, jax.random.key(0)), None).merge(
        {}, theta
    )


# Identities of one round -----------------------------------------------------------


def test_one_client_is_copied():
    start, server, uplink, _, _ = one_round(plain(), PARTS[1:2])
    # theta + (theta_k - theta) = theta_k; no more is sent than the change.
    after = jax.tree.map(lambda a, d: a + d[0], start.theta, uplink.delta)
    chex.assert_trees_all_close(server.theta, after, rtol=0, atol=1e-7)
    assert float(tree.norm(tree.sub(server.theta, start.theta))) > 0.01


def test_rate_zero_is_a_fixed_point():
    still = BATCHES._replace(optimizer=optax.sgd(0.0, 0.9))
    start, server, _, _, info = one_round(fedavg(MODEL, local=still), PARTS)
    chex.assert_trees_all_equal(server.theta, start.theta)
    assert info["steps"].tolist() == [2, 3, 2, 1]


@jax.jit
def centralised_step(theta):
    """A gradient step on all 20 samples, without masks, keys or clients."""

    def loss(variables):
        x = (pool().x / 255.0 - pool().mean) / pool().std
        logits = jax.nn.log_softmax(MODEL.predict(variables, x))
        return -jnp.mean(logits[jnp.arange(20), pool().y])

    grads = jax.grad(loss)(nest(theta))
    return {
        path: w - LR * g
        for (path, w), g in zip(theta.items(), jax.tree.leaves(grads), strict=True)
    }


def test_full_batches_of_all_clients_are_a_centralised_step():
    # sum n_i / n (theta - lr grad F_i) = theta - lr grad F, for unequal n_i.
    start, server, _, _, _ = one_round(plain(), PARTS)
    expected = centralised_step(start.theta)
    chex.assert_trees_all_close(server.theta, expected, rtol=1e-5, atol=1e-7)


def test_splitting_a_client_in_halves_changes_nothing():
    _, whole, _, _, _ = one_round(plain(), PARTS)
    halves = [PARTS[0], PARTS[1][:4], PARTS[1][4:], *PARTS[2:]]
    _, split, _, _, _ = one_round(plain(), halves)
    chex.assert_trees_all_close(whole.theta, split.theta, rtol=1e-5, atol=1e-7)


def test_identical_clients_are_one_client():
    _, one, _, _, _ = one_round(plain(), [PARTS[1]])
    _, four, _, _, _ = one_round(plain(), [PARTS[1]] * 4, weight=[1, 5, 2, 2])
    chex.assert_trees_all_close(one.theta, four.theta, rtol=1e-5, atol=1e-7)


def test_order_of_the_cohort_does_not_matter():
    # Batches of 3 are drawn by client id, so a client's path moves with its id.
    _, first, uplink, _, _ = one_round(plain(BATCHES), PARTS)
    order = [2, 0, 3, 1]
    _, second, moved, _, _ = one_round(
        plain(BATCHES), [PARTS[i] for i in order], ids=order
    )
    chex.assert_trees_all_close(first.theta, second.theta, rtol=1e-6, atol=1e-7)
    expected = jax.tree.map(lambda x: x[np.array(order)], uplink)
    chex.assert_trees_all_close(moved, expected, rtol=1e-6, atol=1e-7)


def test_ids_draw_different_batches():
    _, _, uplink, _, _ = one_round(plain(BATCHES), [PARTS[1]] * 4)
    assert float(tree.norm(jax.tree.map(lambda x: x[0] - x[1], uplink))) > 1e-4


# The server alone ------------------------------------------------------------------


def uplinks(seed, theta, n=3):
    draw = np.random.default_rng(seed)
    delta = {k: np.float32(draw.normal(size=(n, *v.shape))) for k, v in theta.items()}
    return Uplink(delta, ())


def absorb(alg, server, uplink, weight, active=None):
    cohort = cohort_of(range(len(weight)), weight, active)
    update = jax.jit(alg.server.update)
    return update(jax.random.key(0), server, uplink, cohort)[0]


def mean(uplink, weight):
    weight = np.float32(weight) / np.sum(weight)
    return {k: np.tensordot(weight, v, 1) for k, v in uplink.delta.items()}


def with_optimizer(optimizer, model=MODEL):
    alg = fedavg(model, local=FULL, server_opt=optimizer)
    return alg, alg.server.init(jax.random.key(0))


def test_mean_is_weighted_by_active_clients():
    alg, server = plain(), initial()
    up = uplinks(0, server.theta)
    after = absorb(alg, server, up, [1, 5, 3], active=[1, 0, 1])
    expected = {k: server.theta[k] + d for k, d in mean(up, [1, 0, 3]).items()}
    chex.assert_trees_all_close(after.theta, expected, rtol=1e-6, atol=1e-6)


def test_momentum_zero_is_fedavg():
    alg, server = with_optimizer(optax.sgd(1.0, momentum=0.0))
    ours = initial()
    up, weight = uplinks(0, server.theta), [1, 2, 3]
    chex.assert_trees_all_equal(
        absorb(alg, server, up, weight).theta, absorb(plain(), ours, up, weight).theta
    )


def test_momentum_by_hand():
    # m1 = D1, m2 = 0.5 D1 + D2: theta2 = theta0 + 1.5 D1 + D2.
    alg, server = with_optimizer(optax.sgd(1.0, momentum=0.5))
    first, second = uplinks(1, server.theta), uplinks(2, server.theta)
    weight = [1, 2, 1]
    after = absorb(alg, absorb(alg, server, first, weight), second, weight)
    d1, d2 = mean(first, weight), mean(second, weight)
    expected = {k: server.theta[k] + 1.5 * d1[k] + d2[k] for k in server.theta}
    chex.assert_trees_all_close(after.theta, expected, rtol=1e-5, atol=1e-6)


def test_adaptive_step_without_memory():
    # b1 = b2 = 0: theta += eta D / (|D| + tau).
    eta, tau = 0.1, 0.5
    alg, server = with_optimizer(optax.adam(eta, b1=0.0, b2=0.0, eps=tau))
    up = uplinks(3, server.theta)
    after = absorb(alg, server, up, [1, 1, 2])
    expected = {
        k: server.theta[k] + eta * d / (np.abs(d) + tau)
        for k, d in mean(up, [1, 1, 2]).items()
    }
    chex.assert_trees_all_close(after.theta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "active"), [([1, 2, 3], [0, 0, 0]), ([0, 0, 0], [1, 1, 1])]
)
def test_nobody_took_part(weight, active):
    alg, server = with_optimizer(optax.adam(0.1))
    # Momentum is warm after a first exchange, and would move theta.
    warm = absorb(alg, server, uplinks(0, server.theta), [1, 2, 3])
    nothing = jax.tree.map(np.zeros_like, uplinks(0, server.theta))
    after = absorb(alg, warm, nothing, weight, active)
    chex.assert_trees_all_equal(after.theta, warm.theta)
    chex.assert_trees_all_equal(after.opt, warm.opt)
    moved = absorb(alg, warm, nothing, [1, 2, 3])
    assert float(tree.norm(tree.sub(moved.theta, warm.theta))) > 1e-3


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Dense(2)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(K)(x)


def test_statistics_are_averaged_whatever_the_optimizer():
    model = from_linen(Normalised(), SHAPE, K)
    alg, server = with_optimizer(optax.sgd(0.5), model)
    stats = {k for k in server.theta if k.startswith("stats/")}
    assert stats == {f"stats/batch_stats/BatchNorm_0/{n}" for n in ("mean", "var")}
    up = uplinks(0, server.theta)
    after = absorb(alg, server, up, [1, 1, 2])
    for path, d in mean(up, [1, 1, 2]).items():
        step = d if path in stats else 0.5 * d
        np.testing.assert_allclose(
            after.theta[path], server.theta[path] + step, rtol=1e-5, atol=1e-6
        )


# Parts that stay home --------------------------------------------------------------


@functools.cache
def keeping():
    return fedavg(MODEL, local=FULL, keep=HEAD)


def test_kept_parts_stay_home():
    start, server, uplink, states, _ = one_round(keeping(), PARTS)
    body = {"params/Dense_0/kernel", "params/Dense_0/bias"}
    head = {"params/head/kernel", "params/head/bias"}
    assert set(server.theta) == set(uplink.delta) == body
    assert set(states.kept) == head
    # 4 * 4 + 4 numbers travel, 4 * 3 + 3 per client do not.
    one = jax.tree.map(lambda x: x[0], (uplink, states))
    assert tree.count(one[0]) == 20 and tree.num_bytes(one[0]) == 80
    assert tree.count(one[1]) == 15
    cohort = cohort_of(range(4), [1] * 4)
    down = keeping().server.downlink(jax.random.key(0), server, cohort)
    assert tree.count(down) == 20 and down.own == ()
    # Heads have trained, each on its own data.
    kernels = states.kept["params/head/kernel"]
    assert len(np.unique(np.asarray(kernels)[:, 0, 0])) == 4
    assert float(tree.norm(tree.sub(server.theta, start.theta))) > 1e-3


def test_kept_part_of_one_client_trains_as_if_alone():
    # From the same start, one client cannot tell whether its head is federated.
    start, _, _, states, _ = one_round(keeping(), PARTS[1:2])
    # On a first visit the head is made from the exchange's common key, which is 1.
    server = initial(1)
    server = server._replace(theta={**server.theta, **start.theta})
    _, after, _, _, _ = one_round(plain(), PARTS[1:2], start=server)
    for path, kept in states.kept.items():
        np.testing.assert_allclose(kept[0], after.theta[path], rtol=1e-5, atol=1e-6)


def test_keep_without_match():
    with pytest.raises(ValueError, match=r"params/top.*paths are.*Dense_0"):
        fedavg(MODEL, local=FULL, keep="params/top/.*")


@pytest.mark.parametrize("name", ["server_opt", "correction", "aggregator"])
def test_a_factory_is_not_what_it_makes(name):
    with pytest.raises(ValueError, match=rf"^{name}=factory must be made, such as "):

        def factory():
            raise AssertionError

        fedavg(MODEL, local=FULL, **{name: factory})


def test_fine_tuning_without_match():
    with pytest.raises(ValueError, match=r"params/haed.*paths are.*Dense_0"):
        fedavg(MODEL, local=FULL, finetune=("params/haed/.*",))


def test_optimizers_of_kept_parts_go_on_with_their_counters():
    # Adam for the head remembers its moments and how many steps they are of; that of
    # the body is new at every visit.
    adam = optax.adam(0.3)
    alg = fedavg(
        q.model(), local=q.training(adam), keep=q.HEAD, persist_optimizer="kept"
    )
    state = q.play(alg, (3,), (3,), (2,), (3,))
    theta, heads = np.float32(q.START), {}
    for k in (3, 3, 2, 3):
        head, of_head = heads.get(k, (jnp.float32(q.START[1]), None))
        body, of_body = jnp.float32(theta[0]), adam.init(jnp.float32(0))
        of_head = of_head or adam.init(jnp.float32(0))
        for _ in range(q.SIZES[k]):
            slope = jnp.float32(q.gradient(k, np.array([body, head])))
            moved, of_body = adam.update(slope[0], of_body)
            body += moved
            moved, of_head = adam.update(slope[1], of_head)
            head += moved
        theta, heads[k] = (body, head), (head, of_head)
    np.testing.assert_allclose(state.server.theta["params/body/w"], theta[0], rtol=1e-4)
    for k, (head, of_head) in heads.items():
        kept = jax.tree.map(lambda x, k=k: x[k], state.rows.kept)
        np.testing.assert_allclose(kept["params/head/w"], head, rtol=1e-4)
        # Of the head alone: two moments, and the count of all its steps.
        opt = {
            path: x for path, x in kept.items() if path.startswith("memory/optimizer/")
        }
        assert len(opt) == 3
        assert [int(x) for x in opt.values() if x.dtype == jnp.int32] == [
            int(of_head[0].count)
        ]


# Corrections -----------------------------------------------------------------------


def pull(mu):
    """A proximal term that also sums participation on the server."""

    def adjust(grads, theta, anchor, sent, c):
        # Gradients hold shared leaves only, though a head may be trained too.
        assert set(grads) == set(anchor) <= set(theta)
        return {k: g + mu * (theta[k] - anchor[k]) + sent for k, g in grads.items()}

    return corrections.none()._replace(
        init_server=lambda theta: (jnp.float32(0), jnp.zeros(100)),
        send=lambda s: s[0],
        adjust=adjust,
        finish=lambda theta, anchor, sent, c, info: (c, info["steps"]),
        absorb=lambda s, theta, means: (
            (s[0] + means.participation, s[1] + means.extra),
            theta,
        ),
    )


def test_correction_is_sent_applied_and_absorbed():
    alg = fedavg(MODEL, local=FULL, keep=HEAD, correction=pull(0.5))
    start, server, uplink, _, _ = one_round(alg, PARTS)
    # The server's second entry is its own business: it is not counted as sent.
    down = alg.server.downlink(jax.random.key(0), start, cohort_of([0], [1]))
    assert tree.count(down) == 20 + 1
    # One step from the anchor: the term is mu * 0, so equal to no correction.
    _, same, _, _, _ = one_round(keeping(), PARTS)
    chex.assert_trees_all_close(server.theta, same.theta, rtol=1e-6, atol=1e-7)
    assert uplink.extra.tolist() == [1, 1, 1, 1]
    assert float(server.correction[0]) == 1  # all clients took part
    np.testing.assert_allclose(server.correction[1], np.ones(100), rtol=1e-6)
    # What was sent is added to every shared gradient, so theta falls by lr times it.
    pushed = start._replace(correction=(jnp.float32(0.1), start.correction[1]))
    _, moved, _, _, _ = one_round(alg, PARTS, start=pushed)
    difference = tree.sub(moved.theta, server.theta)
    for x in jax.tree.leaves(difference):
        np.testing.assert_allclose(x, np.full(x.shape, -LR * 0.1), atol=1e-6)


# Deployment ------------------------------------------------------------------------


def test_deployed_model_is_the_servers():
    alg, server = plain(), initial()
    down = Downlink(shared=(server.theta, ()), round=jnp.int32(0))
    data = stacked(PARTS)
    one = ClientData(data.rows[0], data.size[0], data.pool)
    state = alg.client.init(jax.random.key(0), jax.random.key(0), down)
    assert tree.count(state) == 0
    inputs = clients.withhold_labels(one)
    adapted = alg.client.adapt(jax.random.key(0), down, state, AdaptData(one, inputs))
    variables = alg.client.deploy(down, adapted)
    assert "memory" not in variables
    x = np.ones((2, *SHAPE), np.float32)
    predict = jax.jit(alg.client.model.predict)
    np.testing.assert_array_equal(
        predict(variables, x), jax.jit(MODEL.predict)(nest(server.theta), x)
    )
