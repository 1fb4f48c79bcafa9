"""FedJETs: FedAvg's identity, who is sent and trains what, and numbers by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import (
    NUM_CLASSES,
    NUM_CLIENTS,
    Normed,
    Norms,
    make_local,
    tiny,
    weights,
)

from hyperjax import server_optimizers, training, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.fedjets import Uplink, fedjets
from hyperjax.data import clients
from hyperjax.engine import comm, schedule
from hyperjax.models import MLP, from_linen
from hyperjax.types import (
    AdaptData,
    Batch,
    ClientData,
    Cohort,
    Downlink,
    Outputs,
)

ROOT = jax.random.key(0)
M, HIDDEN = 4, 4
P = 16 * HIDDEN + HIDDEN + HIDDEN * NUM_CLASSES + NUM_CLASSES
GATE = HIDDEN * M + M
HEAD = ("params", "head", "bias")


@functools.cache
def ours(**options):
    options = dict(num_experts=M) | options
    options.setdefault("local", make_local())
    return fedjets(tiny().model, num_clients=NUM_CLIENTS, **options)


@functools.cache
def start(alg):
    return alg.server.init(ROOT)


def cohort_of(ids, weight=None, active=None):
    ones = np.ones(len(ids), np.float32)
    weight = ones if weight is None else np.float32(weight)
    active = ones if active is None else np.float32(active)
    ids = jnp.asarray(ids, jnp.int32)
    return Cohort(ids, active, weight, jnp.int32(0), jnp.float32(NUM_CLIENTS))


def sent_to(alg, ids, server=None):
    run = jax.jit(alg.server.downlink)
    return run(ROOT, server or start(alg), cohort_of(ids))


def message(alg, client, server):
    """The downlink as one client sees it."""
    down = sent_to(alg, [client], server)
    return Downlink(down.shared, jax.tree.map(lambda x: x[0], down.own), jnp.int32(0))


def constant_gate(server, scores):
    """A server whose gate gives all inputs these scores."""
    gate = {"kernel": jnp.zeros((HIDDEN, M)), "bias": jnp.float32(scores)}
    return server._replace(gate=gate)


def data_of(client, y=None):
    rows, size = tiny().table
    pool = tiny().pool if y is None else tiny().pool._replace(y=y)
    return ClientData(jnp.asarray(rows[client]), jnp.int32(size[client]), pool)


# FedAvg's identity ------------------------------------------------------------------


def two_rounds(alg):
    sim = schedule.simulator(
        alg,
        tiny().table,
        tiny().pool,
        weight=np.asarray(weights()),
        sampler="uniform",
        cohort_size=3,
    )
    return jax.device_get(sim.run(ROOT, sim.init(ROOT), 0, 2)[0])


@pytest.mark.parametrize(
    "network",
    [
        Normed,
        pytest.param(MLP, marks=pytest.mark.slow),
        pytest.param(Norms, marks=pytest.mark.slow),
    ],
)
def test_one_expert_is_fedavg(network):
    options = dict(num_experts=1, top_k=1)
    module = MLP(NUM_CLASSES, (4,)) if network is MLP else network()
    model = from_linen(module, (4, 4, 1), NUM_CLASSES)
    alg = fedjets(model, local=make_local(), num_clients=NUM_CLIENTS, **options)
    found = two_rounds(alg).server.experts
    leaves = [x[0] for x in jax.tree.leaves(found)]
    theta = two_rounds(fedavg(model, local=make_local())).server.theta
    expected = dict(zip(tree.paths(found), leaves, strict=True))
    # Two programs: the compiler may order a sum otherwise.
    chex.assert_trees_all_close(theta, expected, rtol=1e-5, atol=1e-7)


# The server -------------------------------------------------------------------------


def uplink_of(server, changes, trained, gates, shares):
    """Uplinks in which every number of a change is the same, [C, K] and [C]."""

    def experts(x):
        change = jnp.float32(changes)
        change = change.reshape(*change.shape, *(1,) * (x.ndim - 1))
        return jnp.broadcast_to(change, change.shape[:2] + x.shape[1:])

    def gate(x):
        change = jnp.float32(gates).reshape(-1, *(1,) * x.ndim)
        return jnp.broadcast_to(change, (len(gates), *x.shape))

    return Uplink(
        jax.tree.map(experts, server.experts),
        jax.tree.map(gate, server.gate),
        jnp.asarray(trained, jnp.int32),
        jnp.float32(shares),
    )


def test_experts_move_by_the_mean_of_those_who_trained_them():
    alg = ours()
    server = start(alg)
    told = np.random.default_rng(0).random((3, M))
    # The second client is an anchor of expert 1, the third has dropped out.
    changes, gates = [[4, 8], [1000, 16], [7, 7]], [2, 6, 1000]
    up = uplink_of(server, changes, [[0, 1], [M, 1], [2, 3]], gates, told)
    cohort = cohort_of([6, 1, 3], [1, 3, 100], [1, 1, 0])
    after, info = jax.jit(alg.server.update)(ROOT, server, up, cohort)
    # Expert 0: 4. Expert 1: (1 x 8 + 3 x 16) / 4. The gate: (1 x 2 + 3 x 6) / 4.
    for expert, by in ((0, 4.0), (1, 14.0)):
        expected = jax.tree.map(lambda x, e=expert, b=by: x[e] + b, server.experts)
        found = jax.tree.map(lambda x, e=expert: x[e], after.experts)
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
    rest = [jax.tree.map(lambda x: x[2:], s.experts) for s in (after, server)]
    chex.assert_trees_all_equal(*rest)  # to the last bit
    expected = jax.tree.map(lambda x: x + 5.0, server.gate)
    chex.assert_trees_all_close(after.gate, expected, rtol=1e-6)
    expected = np.asarray(server.shares).copy()
    expected[[6, 1]] = told[:2]
    np.testing.assert_array_equal(after.shares, expected)
    assert info["experts_trained"] == 2


def test_momentum_of_an_expert_stands_still_with_it():
    alg = ours(server_opt=server_optimizers.fedadam(0.1))
    server, shares = start(alg), np.ones((1, M))
    up = uplink_of(server, [[1, 1]], [[0, 2]], [1], shares)
    update = jax.jit(alg.server.update)
    once, _ = update(ROOT, server, up, cohort_of([6]))
    up = uplink_of(server, [[1, 1]], [[0, 3]], [1], shares)
    twice, _ = update(ROOT, once, up, cohort_of([6]))
    of = [jax.tree.map(lambda x: x[1:3], (s.experts, s.opt[0])) for s in (once, twice)]
    chex.assert_trees_all_equal(*of)
    nobody, _ = update(ROOT, twice, up, cohort_of([6], active=[0]))
    chex.assert_trees_all_equal(nobody, twice)


def test_who_is_sent_which_experts():
    alg = ours()
    server = start(alg)
    told = np.full((NUM_CLIENTS, M), 0.25, np.float32)
    told[5], told[1], told[6] = (0.1, 0.5, 0.1, 0.3), (0.1, 0.2, 0.4, 0.3), (0, 0, 0, 1)
    numbers = jax.tree.map(
        lambda x: jnp.zeros_like(x) + jnp.arange(M).reshape(-1, *(1,) * (x.ndim - 1)),
        server.experts,
    )
    server = server._replace(shares=jnp.asarray(told), experts=numbers)
    # Client 1 is expert 1's anchor, 4 is nobody's, 9 is unseen: it gets the best on
    # average, of sums 1.45, 1.95, 1.75 and 2.85.
    own = sent_to(alg, [5, 1, 9], server).own
    np.testing.assert_array_equal(own.which, [[1, 3], [1, 2], [1, 3]])
    np.testing.assert_array_equal(own.pinned, [M, 1, M])
    for leaf in jax.tree.leaves(own.experts):
        assert leaf.shape[:2] == (3, 2)
        np.testing.assert_array_equal(leaf.reshape(3, 2, -1)[..., 0], own.which)
    pool = sent_to(ours(num_sent=M), [5, 9], server).own
    np.testing.assert_array_equal(pool.which, [range(M)] * 2)


@pytest.mark.parametrize(("each", "expected"), [(0, [M] * 3), (1, [0, 3, M])])
def test_anchors(each, expected):
    alg = ours(anchors_per_expert=each)
    np.testing.assert_array_equal(sent_to(alg, [0, 3, 4]).own.pinned, expected)
    # No more of them than clients; neither padding nor the unseen are any.
    many = sent_to(ours(anchors_per_expert=3), [7, 8, 11]).own.pinned
    np.testing.assert_array_equal(many, [7 % M, M, M])


# The client -------------------------------------------------------------------------


@functools.cache
def visit(alg):
    def run(down, data):
        client = alg.client.init(ROOT, ROOT, down)
        return client, *alg.client.update(ROOT, down, client, data)[:2]

    return jax.jit(run)


def test_experts_are_chosen_by_the_gate_without_labels():
    still = make_local(phases=(training.Phase(epochs=0),))
    alg = ours(num_sent=M, local=still)
    server = constant_gate(start(alg), [0, 2, 1, -1])
    common, up, client = visit(alg)(message(alg, 5, server), data_of(5))
    np.testing.assert_array_equal(up.trained, [1, 2])
    share = np.exp([0, 2, 1, -1]) / np.sum(np.exp([0, 2, 1, -1]))
    np.testing.assert_allclose(up.shares, share, rtol=1e-5)
    chex.assert_trees_all_equal(client, common)  # the common expert is frozen
    chex.assert_trees_all_equal(common, tiny().model.init(ROOT))
    # The anchor of expert 3 trains that one, and says nothing of the other.
    _, up, _ = visit(alg)(message(alg, 3, server), data_of(3))
    np.testing.assert_array_equal(up.trained, [M, 3])
    # A gate that does see inputs ranks the same whatever the labels.
    server = start(alg)
    down = message(alg, 5, server)
    found = [
        visit(alg)(down, data_of(5, y))[1]
        for y in (tiny().pool.y, jnp.full_like(tiny().pool.y, -1))
    ]
    chex.assert_trees_all_equal(*found)


def mixture(alg, server, client, pinned=M):
    """The variables a client trains, that was sent experts 1 and 3 of constant logits.

    Expert m's logits are (m, 0, 0) for every input.
    """
    dead = jax.tree.map(jnp.zeros_like, server.experts)
    dead["params"]["head"]["bias"] = (
        jnp.zeros((M, NUM_CLASSES)).at[:, 0].set(jnp.arange(M))
    )
    shares = jnp.zeros((NUM_CLIENTS, M)).at[:, jnp.array([1, 3])].set(0.5)
    down = message(alg, client, server._replace(experts=dead, shares=shares))
    variables = alg.client.deploy(down, tiny().model.init(ROOT))
    np.testing.assert_array_equal(variables["memory"]["which"], [1, 3])
    variables["memory"]["pinned"] = jnp.int32(pinned)
    return variables


def gradient(alg, variables, batch):
    def value(params):
        new = {**variables, "params": params}
        return alg.client.model.loss(ROOT, new, batch, ())[0]

    return jax.jit(jax.value_and_grad(value))(variables["params"])


def test_the_loss_of_a_mixture_by_hand():
    alg = ours()
    server = constant_gate(start(alg), [9, 0, 9, np.log(3)])
    batch = Batch(jnp.zeros((2, 4, 4, 1)), jnp.array([1, 0]), jnp.array([1.0, 0.0]))
    # Shares of experts 1 and 3 among themselves: 1/4 and 3/4; logits (2.5, 0, 0).
    value, grads = gradient(alg, mixture(alg, server, 5), batch)
    np.testing.assert_allclose(value, np.log(np.exp(2.5) + 2), rtol=1e-6)
    p = np.exp(2.5) / (np.exp(2.5) + 2)
    # d/db_k = g_k (p - 1[y]).
    slope = grads["experts"]["head"]["bias"]
    expected = np.outer([0.25, 0.75], [p, (1 - p) / 2 - 1, (1 - p) / 2])
    np.testing.assert_allclose(slope, expected, atol=1e-6)
    # d/ds_k = g_k p (m_k - 2.5): of experts 1 and 3 -/+ 3 p / 8, of the others none.
    slope = grads["gate"]["bias"]
    np.testing.assert_allclose(slope, [0, -0.375 * p, 0, 0.375 * p], atol=1e-6)


def test_the_loss_of_an_anchor_by_hand():
    alg = ours()
    server = constant_gate(start(alg), [0, 0, 0, np.log(3)])
    batch = Batch(jnp.zeros((1, 4, 4, 1)), jnp.array([1]), jnp.ones(1))
    value, grads = gradient(alg, mixture(alg, server, 5, pinned=3), batch)
    # Expert 3 alone, logits (3, 0, 0); and -log of the gate's 3 / 6 for it.
    expected = np.log(np.exp(3) + 2) - np.log(0.5)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(
        grads["gate"]["bias"], [1 / 6, 1 / 6, 1 / 6, -1 / 2], atol=1e-6
    )
    for leaf in jax.tree.leaves(grads["experts"]):
        assert np.all(leaf[0] == 0)


def test_an_unseen_client_answers_with_the_expert_ranked_first():
    alg = ours(num_sent=M)
    model, server = tiny().model, start(alg)
    inputs = clients.withhold_labels(data_of(4))
    nothing = inputs._replace(size=jnp.int32(0))
    batch = clients.take(inputs, jnp.arange(9), 0, 9)
    common = model.init(ROOT)
    features = model.features(common, batch.x)
    draw = np.random.default_rng(2)
    experts = jax.tree.map(
        lambda x: jnp.float32(draw.normal(size=x.shape)), server.experts
    )
    kernel = jnp.float32(draw.normal(size=(HIDDEN, M)))
    bias = -jnp.mean(features, 0) @ kernel  # so that inputs differ in their best
    gate = {"kernel": kernel, "bias": bias}
    down = message(alg, 11, server._replace(experts=experts, gate=gate))
    adapted = alg.client.adapt(ROOT, down, common, AdaptData(nothing, inputs))
    found = alg.client.model.predict(alg.client.deploy(down, adapted), batch.x)
    best = np.argmax(np.asarray(features @ kernel + bias), -1)
    assert len(set(best.tolist())) > 1
    for i, expert in enumerate(best):
        mine = jax.tree.map(lambda a, e=expert: a[e], experts)
        expected = model.predict(mine, batch.x[i : i + 1])[0]
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)


def test_a_deployed_copy_can_be_fine_tuned():
    alg = ours()
    down = message(alg, 5, start(alg))
    before = alg.client.deploy(down, alg.client.init(ROOT, ROOT, down))
    data = AdaptData(data_of(5), clients.withhold_labels(data_of(5)))
    args = (ROOT, before, data, down.round, jnp.int32(1))
    after = jax.jit(alg.client.tune)(*args)
    assert tree.finite(after)
    assert float(tree.norm(tree.sub(after["params"], before["params"]))) > 1e-3
    chex.assert_trees_all_equal(after["stats"], before["stats"])


def test_a_pretrained_common_expert():
    pretrained = tiny().model.init(jax.random.key(7))
    alg = ours(common_expert=lambda common: pretrained)
    server = start(alg)
    for expert in range(M):
        copy = jax.tree.map(lambda x, e=expert: x[e], server.experts)
        chex.assert_trees_all_equal(copy, pretrained)
    client = alg.client.init(ROOT, ROOT, message(alg, 5, server))
    chex.assert_trees_all_equal(client, pretrained)


# The wire, and bad input ------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "num_sent"), [(1, None), (2, None), (2, M)])
def test_experts_and_gate_each_way(top_k, num_sent):
    alg = ours(top_k=top_k, num_sent=num_sent)
    messages = comm.describe(alg)
    down = num_sent or top_k
    for leaf in jax.tree.leaves(messages.own.experts):
        assert leaf.shape[0] == down
    cost = comm.cost(messages)
    # With their numbers and the anchor's; with their numbers and the client's shares.
    assert cost.down_numbers == down * P + GATE + down + 1
    assert cost.up_numbers == top_k * P + GATE + top_k + M
    assert cost.down_bytes == 4 * cost.down_numbers
    assert cost.up_bytes == 4 * cost.up_numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(top_k=0), "top_k=0 must be at least 1"),
        (dict(top_k=5), "num_experts=4 must be at least 5"),
        (dict(num_sent=1), "num_sent=1 must be at least 2"),
        (dict(num_sent=5), "num_experts=4 must be at least 5"),
        (dict(anchors_per_expert=-1), "anchors_per_expert=-1 must be at least 0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        ours(**options)


def test_a_model_without_a_head():
    whole = tiny().model
    model = whole._replace(apply=lambda *args: Outputs(whole.predict(*args)))
    with pytest.raises(ValueError, match="no layer named 'head'"):
        fedjets(model, local=make_local(), num_clients=NUM_CLIENTS)
