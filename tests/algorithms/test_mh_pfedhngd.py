"""MH-pFedHNGD: what teacher and copy do to clients, and the two halves of a round."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import normed, tiny
from test_fedavg import FULL, LR, MODEL, PARTS, K, pool
from test_fedproto import inputs
from test_fml import LINE, data_of, flat_of
from test_lg_fedavg import FAMILY_SIZES, MEMBERS

from hyperjax import rng, training, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.mh_pfedhn import mh_pfedhn
from hyperjax.algorithms.mh_pfedhngd import GLOBAL, mh_pfedhngd
from hyperjax.data import clients
from hyperjax.engine import comm, families, schedule
from hyperjax.models.linen import distillation
from hyperjax.types import AdaptData, Batch, Cohort, Downlink

NETWORKS = {"plain": LINE, "wide": MODEL}
SIZES = {"plain": 15, "wide": 35}  # one embedding of 16 numbers, and three
SMALL = 15  # theta_g shares the head of "plain"
CLOSE = dict(rtol=1e-5, atol=1e-6)
T, LAM = 3.0, 0.4
# Linear in the gradient on the first step; nothing is clipped.
SERVER = optax.sgd(0.1, momentum=0.9)
OPTIONS = dict(
    output_size=16,
    embedding_size=3,
    hidden_size=4,
    num_layers=1,
    embedding_deviation=1.0,
    server_opt=SERVER,
    clip_norm=1e9,
)
WEIGHT = {"plain": [4.0, 6.0], "wide": [8.0, 2.0]}
FLAT = wrappers.flat(fedavg(LINE, local=FULL))


@functools.cache
def ours(lam=LAM, clip=None, **options):
    return mh_pfedhngd(
        NETWORKS,
        local=FULL._replace(clip_norm=clip),
        family_sizes=FAMILY_SIZES,
        lam=lam,
        temperature=T,
        **OPTIONS,
        **options,
    )


@functools.cache
def mh(with_global=False):
    """MH-pFedHN, alone or with one more family of one client."""
    more = ({GLOBAL: LINE}, {GLOBAL: 1}) if with_global else ({}, {})
    return mh_pfedhn(
        {**NETWORKS, **more[0]},
        local=FULL,
        family_sizes={**FAMILY_SIZES, **more[1]},
        **OPTIONS,
    )


def cohorts_of(number, names=tuple(NETWORKS), active=(1, 1), ids=(0, 1)):
    who = {}
    for name in names:
        weight = [WEIGHT[name][i] for i in ids]
        floats = (jnp.asarray(x, jnp.float32) for x in (active, weight))
        round = jnp.int32(number)
        who[name] = Cohort(jnp.asarray(ids, jnp.int32), *floats, round, jnp.float32(4))
    return who


@functools.cache
def first():
    return ours().server.init(jax.random.key(0))


@jax.jit
def opened(state, copies, cohorts):
    """The state after the opening of a round, and the norm of its gradient."""
    return ours().opening.server.update(jax.random.key(0), state, copies, cohorts)


@jax.jit
def stepped(state, ups, cohorts):
    """MH-pFedHN's server with the global model as one more client."""
    return mh(True).server.update(jax.random.key(0), state, ups, cohorts)


def only_global():
    one = jnp.ones(1)
    return {GLOBAL: Cohort(jnp.zeros(1, jnp.int32), one, one, jnp.int32(0), one[0])}


def changes(seed, names=tuple(NETWORKS), num=2):
    """What clients send when a round opens."""
    draw = np.random.default_rng(seed)
    return {name: jnp.float32(draw.normal(size=(num, SMALL))) for name in names}


def mean_change(*pairs):
    """The mean of clients' copies' changes by weight."""
    total = sum(weight * np.float64(change) for weight, change in pairs)
    return total / sum(weight for weight, _ in pairs)


def theta_g(state):
    """The global model of a hypernetwork."""
    return mh(True).server.downlink(None, state, only_global())[GLOBAL].own[0]


# The loss ---------------------------------------------------------------------------

DRAW = np.random.default_rng(0)
BATCH = Batch(jnp.zeros((3, 1)), jnp.array([0, 1, 2]), jnp.array([1.0, 1.0, 0.0]))
STUDENT, TEACHER = (jnp.float32(DRAW.normal(size=(3, 4))) for _ in range(2))


TAUGHT = jax.jit(jax.value_and_grad(distillation))


def test_a_teacher_who_knows_no_more_teaches_nothing():
    value, slope = TAUGHT(STUDENT, STUDENT, BATCH, 15.0)
    assert value == 0
    # T^2 = 225 times the rounding of float32.
    np.testing.assert_allclose(slope, np.zeros((3, 4)), atol=225 * 1e-7)


def test_divergence_by_hand():
    p, s = (jax.nn.softmax(z / T, -1) for z in (TEACHER, STUDENT))
    expected = T**2 * np.sum(p * np.log(p / s), -1)
    value, slope = TAUGHT(STUDENT, TEACHER, BATCH, T)
    # The last sample is padding.
    np.testing.assert_allclose(value, expected[:2].mean(), rtol=1e-5)
    np.testing.assert_allclose(slope[:2], T * (s - p)[:2] / 2, **CLOSE)
    assert np.all(slope[2] == 0)


def test_hot_distillation_compares_centred_logits():
    # T^2 d KL / dz -> (z - z_g, centred) / C per sample; two samples of three.
    gap = np.float64(STUDENT - TEACHER)
    limit = (gap - gap.mean(1, keepdims=True))[:2] / 4 / 2
    error = []
    for temperature in (10.0, 100.0):
        slope = TAUGHT(STUDENT, TEACHER, BATCH, temperature)[1][:2]
        error.append(np.max(np.abs(slope - limit)))
    assert error[1] < error[0] / 5 and error[1] < 0.01


# Clients ----------------------------------------------------------------------------


class Round(NamedTuple):
    """What one client sends in a round: the change of its copy, then of its own."""

    copy: jax.Array
    own: jax.Array
    info: dict


@functools.cache
def _visit(name, lam, clip, **options):
    alg = ours(lam, clip, **options)
    first, then = alg.opening.client[name], alg.client[name]

    @jax.jit
    def run(theta_g, down, data):
        key, received = jax.random.key(0), Downlink(theta_g, round=jnp.int32(0))
        client = first.init(key, jax.random.key(1), received)
        copy, client, _ = first.update(key, received, client, data)
        own, _, info = then.update(key, down, client, data)
        return Round(copy, own, info)

    return run


# What a client received: theta_g, and a network of its own.
THETA_G = jnp.float32(DRAW.normal(size=SMALL))
DOWN = {
    name: Downlink((), jnp.float32(DRAW.normal(size=size)), jnp.int32(0))
    for name, size in SIZES.items()
}


def visit(name="plain", lam=LAM, clip=None, theta_g=THETA_G, shared=(), **options):
    down = DOWN[name]._replace(shared=shared)
    return _visit(name, lam, clip, **options)(theta_g, down, data_of(PARTS[1]))


def linear(theta):
    """Kernel [4, 3] and bias of the linear network, from its flat form."""
    parts = FLAT.cut(jnp.asarray(theta))
    return parts["params/head/kernel"], parts["params/head/bias"]


def descended(theta, slope):
    """The change of a step whose gradient at the logits is `slope(z, p, onehot)`."""
    x, y = inputs(PARTS[1])
    x = x.reshape(len(x), -1)
    kernel, bias = linear(theta)
    z = x @ kernel + bias
    at_logits = slope(z, x, jax.nn.one_hot(y, K)) / len(x)
    parts = {
        "params/head/kernel": -LR * x.T @ at_logits,
        "params/head/bias": -LR * at_logits.sum(0),
    }
    return FLAT.join(parts)


def test_a_step_towards_labels_and_the_received_teacher():
    down = DOWN["plain"]

    def slope(z, x, label):
        kernel, bias = linear(THETA_G)
        teacher = jax.nn.softmax((x @ kernel + bias) / T)
        towards = T * (jax.nn.softmax(z / T) - teacher)
        return LAM * towards + (1 - LAM) * (jax.nn.softmax(z) - label)

    sent = visit()
    np.testing.assert_allclose(sent.own, descended(down.own, slope), **CLOSE)
    assert sent.info["distillation"] > 0


def test_the_copy_learns_from_labels_alone_and_is_not_clipped():
    def slope(z, x, label):
        return jax.nn.softmax(z) - label

    expected = descended(THETA_G, slope)
    sent = visit(clip=1e-3)
    np.testing.assert_allclose(sent.copy, expected, **CLOSE)
    assert np.linalg.norm(sent.copy) > 0.01
    np.testing.assert_allclose(np.linalg.norm(sent.own), LR * 1e-3, rtol=1e-3)
    clipped = visit(clip=1e-3, clip_global=True)
    np.testing.assert_allclose(np.linalg.norm(clipped.copy), LR * 1e-3, rtol=1e-3)
    np.testing.assert_array_equal(clipped.own, sent.own)


def test_a_fresh_teacher_is_not_what_the_copy_started_from():
    start, teacher = jnp.float32(DRAW.normal(size=(2, SMALL)))
    found = visit("wide", theta_g=start, shared=teacher, teacher="fresh")
    stale = visit("wide", theta_g=start)
    np.testing.assert_allclose(found.copy, stale.copy, **CLOSE)
    taught = visit("wide", theta_g=teacher)
    np.testing.assert_allclose(found.own, taught.own, **CLOSE)
    assert np.max(np.abs(found.own - stale.own)) > 1e-3


def test_without_lambda_clients_do_what_those_of_mh_pfedhn_do():
    side = mh().client["wide"]

    @jax.jit
    def plain(down, data):
        key = jax.random.key(0)
        client = side.init(key, jax.random.key(1), down)
        return side.update(key, down, client, data)[0]

    expected = plain(DOWN["wide"], data_of(PARTS[1]))
    alone = visit("wide", lam=0.0)
    np.testing.assert_allclose(alone.own, expected, rtol=1e-6, atol=1e-7)
    assert np.max(np.abs(visit("wide").own - expected)) > 1e-3


@functools.cache
def _tuned(lam, met):
    """Deployed and fine-tuned variables of a client that has met theta_g or not."""
    alg, down, data = ours(lam), DOWN["wide"], data_of(PARTS[1])
    first, side = alg.opening.client["wide"], alg.client["wide"]

    @jax.jit
    def run():
        key, received = jax.random.key(0), Downlink(THETA_G, round=jnp.int32(0))
        client = side.init(key, jax.random.key(1), down)
        if met:
            _, client, _ = first.update(key, received, client, data)
        adapted = side.adapt(key, down, client, AdaptData(data, data))
        variables = side.deploy(down, adapted)
        return variables, side.tune(
            key, variables, AdaptData(data, data), jnp.int32(0), jnp.int32(1)
        )

    return run()


def test_fine_tuning_learns_from_the_teacher_last_received():
    variables, after = _tuned(LAM, True)
    teacher = dict(variables["memory"]["teacher"])
    assert teacher.pop("known") == 1
    chex.assert_trees_all_equal(teacher, FLAT.cut(THETA_G))
    flat = wrappers.flat(fedavg(MODEL, local=FULL))
    change = tree.sub(flat_of(after), flat_of(variables))
    np.testing.assert_allclose(flat.join(change), visit("wide").own, **CLOSE)
    # Its predictions are its own network's.
    chex.assert_trees_all_equal(flat_of(variables), flat.cut(DOWN["wide"].own))
    x, _ = inputs(PARTS[1])
    alone = {"params": variables["params"], "stats": {}}
    found = ours().client["wide"].model.predict(variables, x)
    np.testing.assert_array_equal(found, MODEL.predict(alone, x))


def test_whoever_has_met_no_teacher_fine_tunes_on_labels_alone():
    (_, unseen), (_, by_labels) = _tuned(LAM, False), _tuned(0.0, True)
    chex.assert_trees_all_close(flat_of(unseen), flat_of(by_labels), rtol=1e-6)


# The server -------------------------------------------------------------------------


def test_it_starts_as_mh_pfedhn():
    state = first()
    expected = mh().server.init(jax.random.key(0))
    chex.assert_trees_all_equal(state.phi, expected.phi)
    assert state.phi["heads"].keys() == {"1", "3"}
    for name in NETWORKS:
        np.testing.assert_array_equal(state.tables[name], expected.tables[name])
    assert state.tables[GLOBAL].shape == (1, 1, 3)


@functools.cache
def after_an_opening():
    """Of a round in which client 1 of "wide" dropped out; the weighted changes."""
    ups, who = changes(7), cohorts_of(0)
    who["wide"] = cohorts_of(0, ["wide"], active=(1, 0))["wide"]
    pairs = [*zip(WEIGHT["plain"], ups["plain"], strict=True)]
    pairs.append((WEIGHT["wide"][0], ups["wide"][0]))
    return pairs, opened(first(), ups, who)


def test_everybody_is_sent_one_global_model():
    downs = ours().opening.server.downlink(None, first(), cohorts_of(0))
    for name in NETWORKS:
        assert downs[name].own == ()
        np.testing.assert_allclose(downs[name].shared, theta_g(first()), rtol=1e-6)


def test_the_global_step_is_on_the_mean_of_the_copies_changes():
    pairs, (state, info) = after_an_opening()
    mean = jnp.float32(mean_change(*pairs))
    expected, norm = stepped(first(), {GLOBAL: mean[None]}, only_global())
    chex.assert_trees_all_close(state, expected, **CLOSE)
    np.testing.assert_allclose(info["gradient_norm"], norm["gradient_norm"], rtol=1e-5)
    # What networks clients are sent comes of it.
    before, after = (
        ours().server.downlink(None, s, cohorts_of(0)) for s in (first(), state)
    )
    for name in NETWORKS:
        assert np.max(np.abs(after[name].own - before[name].own)) > 1e-4


def test_one_step_on_the_mean_is_the_mean_of_steps():
    # The first step of gradient descent is linear in the change that causes it.
    pairs, _ = after_an_opening()
    start = first()

    def moved(change):
        after, _ = stepped(start, {GLOBAL: jnp.float32(change)[None]}, only_global())
        parts = (after.phi["extractor"], after.phi["heads"]["1"], after.tables[GLOBAL])
        was = (start.phi["extractor"], start.phi["heads"]["1"], start.tables[GLOBAL])
        return tree.sub(parts, was)

    together = moved(mean_change(*pairs))
    shares = [weight / 18 for weight, _ in pairs]
    apart = [moved(change) for _, change in pairs]
    mixed = jax.tree.map(
        lambda *x: sum(s * y for s, y in zip(shares, x, strict=True)), *apart
    )
    chex.assert_trees_all_close(together, mixed, rtol=1e-4, atol=1e-6)
    assert float(tree.norm(together)) > 0.01


def test_the_global_step_leaves_other_families_alone():
    _, (after, _) = after_an_opening()
    found, were = (
        {k: (x.tables[k], x.opt["tables"][k]) for k in x.tables}
        for x in (after, first())
    )
    for name in NETWORKS:
        chex.assert_trees_all_equal(found[name], were[name])
    assert tree.sha256(found[GLOBAL]) != tree.sha256(were[GLOBAL])
    # Its own head is "plain"'s; that of "wide" has no part in it.
    heads, were = after.phi["heads"], first().phi["heads"]
    chex.assert_trees_all_equal(heads["3"], were["3"])
    assert np.any(heads["1"]["w"] != were["1"]["w"])
    # A round of nobody moves nothing, momentum included.
    later, _ = opened(after, changes(9), cohorts_of(1, active=(0, 0)))
    chex.assert_trees_all_equal(later, after)


def test_the_global_step_may_touch_the_idle():
    # After a step of everybody's, so that all but one client have momentum.
    who = cohorts_of(0)
    who["wide"] = cohorts_of(0, ["wide"], active=(1, 0))["wide"]
    draw = np.random.default_rng(3)
    ups = {k: jnp.float32(draw.normal(size=(2, n))) for k, n in SIZES.items()}
    was, _ = stepped(first(), ups, who)
    plain, _ = opened(was, changes(9), who)
    alg = ours(global_step_touches_idle=True).opening
    after, _ = jax.jit(alg.server.update)(None, was, changes(9), who)
    # What theta_g is made of moves as it would,
    for part in (lambda x: x.phi["extractor"], lambda x: x.phi["heads"]["1"]):
        chex.assert_trees_all_close(part(after), part(plain), **CLOSE)
    np.testing.assert_allclose(after.tables[GLOBAL], plain.tables[GLOBAL], **CLOSE)
    # and all the rest goes on by its momentum: t' = 0.9 t, x' = x - 0.1 t'.
    idle = [
        lambda x: (x.phi["heads"]["3"], x.opt["heads"]["3"][0].trace),
        *(lambda x, k=k: (x.tables[k], x.opt["tables"][k][0].trace) for k in NETWORKS),
    ]
    for part in idle:
        (before, trace), found = part(was), part(after)
        trace = tree.scale(trace, 0.9)
        expected = tree.sub(before, tree.scale(trace, 0.1)), trace
        chex.assert_trees_all_close(found, expected, **CLOSE)
        assert tree.norm(tree.sub(found[0], before)) > 1e-4
    # Whom momentum has not reached yet, it does not move.
    np.testing.assert_array_equal(after.tables["wide"][1], was.tables["wide"][1])


def test_a_fresh_teacher_is_the_global_model_of_the_hypernetwork_as_it_is():
    alg, (_, (state, _)) = ours(teacher="fresh"), after_an_opening()
    for server in (first(), state):
        downs = alg.server.downlink(None, server, cohorts_of(0))
        plain = ours().server.downlink(None, server, cohorts_of(0))
        for name in NETWORKS:
            np.testing.assert_allclose(downs[name].shared, theta_g(server), rtol=1e-6)
            np.testing.assert_array_equal(downs[name].own, plain[name].own)


# Rounds of the engine ---------------------------------------------------------------


# The official loop written anew: dictionaries of numbers, autodiff, no engine.

RATE, EPS, CLIP, EPOCHS = 0.05, 1e-3, 0.02, 2
TWICE = FULL._replace(phases=(training.Phase(epochs=EPOCHS),))
WHO = ["plain 0", "wide 0", "plain 1", "wide 1"]  # clients 0 to 3


@functools.cache
def official():
    return mh_pfedhngd(
        NETWORKS,
        local=TWICE,
        family_sizes=FAMILY_SIZES,
        lam=LAM,
        temperature=T,
        **{**OPTIONS, "server_opt": optax.adam(RATE, eps=EPS), "clip_norm": CLIP},
    )


def forward(theta, x):
    """Logits of the linear network, or of that with a hidden layer, by their sizes."""
    shapes = {15: (3, 12), 35: (4, 16, 3, 12)}[theta.size]
    parts = jnp.split(theta, np.cumsum(shapes)[:-1])
    if theta.size == 35:
        x = jax.nn.relu(x @ parts[1].reshape(4, 4) + parts[0])
    return x @ parts[-1].reshape(4, 3) + parts[-2]


def generated(part, size):
    a = part["V"]
    for layer in part["extractor"].values():
        a = jax.nn.relu(a @ layer["kernel"] + layer["bias"])
    rows = [a[r] @ part["head"]["w"][r] + part["head"]["b"][r] for r in range(len(a))]
    return jnp.concatenate(rows)[:size]


@jax.jit
def trained(theta, x, y, real, teacher, lam):
    def loss(theta):
        z, z_g = forward(theta, x), forward(teacher, x)
        log_p, log_s = jax.nn.log_softmax(z_g / T), jax.nn.log_softmax(z / T)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_s), -1)
        label = jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1)[:, 0]
        each = lam * T**2 * kl - (1 - lam) * label
        return jnp.sum(jnp.where(real, each, 0)) / jnp.sum(real)

    for _ in range(EPOCHS):
        theta = theta - LR * jax.grad(loss)(theta)
    return theta


@functools.partial(jax.jit, static_argnums=1)
def pulled(part, size, old_minus_new):
    theta, pull = jax.vjp(lambda p: generated(p, size), part)
    return theta, pull(old_minus_new)[0]


class Rewrite:
    """Values and Adam's moments by name: the extractor, heads, rows of embeddings."""

    def __init__(self, state):
        self.values = {"extractor": state.phi["extractor"]}
        self.values |= {f"head {m}": head for m, head in state.phi["heads"].items()}
        for name, table in state.tables.items():
            self.values |= {f"{name} {i}": row for i, row in enumerate(table)}
        self.values = jax.tree.map(np.float64, self.values)
        self.adam = {k: (0.0, 0.0, 0) for k in tree.by_path(self.values)}

    def pull(self, name, old_minus_new=None):
        """The network that comes of a row, and gradients by name of what it is of."""
        family = name.split()[0]
        size = SIZES.get(family, SMALL)
        head = {"plain": "head 1", "wide": "head 3", GLOBAL: "head 1"}[family]
        names = {"extractor": "extractor", "head": head, "V": name}
        part = {k: jax.tree.map(jnp.float32, self.values[n]) for k, n in names.items()}
        change = jnp.zeros(size) if old_minus_new is None else old_minus_new
        theta, gradient = pulled(part, size, change)
        return theta, {n: gradient[k] for k, n in names.items()}

    def step(self, name, old_minus_new):
        gradient = jax.tree.map(np.float64, self.pull(name, old_minus_new)[1])
        norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient)))
        values = tree.by_path(self.values)
        for path, g in tree.by_path(gradient).items():
            g = g * min(1.0, CLIP / norm)
            m, v, t = self.adam[path]
            m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
            root = np.sqrt(v / (1 - 0.999**t)) + EPS
            values[path] = values[path] - RATE * m / (1 - 0.9**t) / root
            self.adam[path] = m, v, t
        structure = jax.tree.structure(self.values)
        self.values = jax.tree.unflatten(structure, list(values.values()))

    def round(self, order):
        # Of one size, so that a single program trains all.
        data, sizes = [], np.array([len(part) for part in PARTS])
        for x, y in map(inputs, PARTS):
            rest = max(sizes) - len(y)
            padded = [np.pad(a, (0, rest)) for a in (y, np.ones(len(y), bool))]
            data.append((np.pad(x.reshape(len(x), -1), ((0, rest), (0, 0))), *padded))
        teacher, _ = self.pull(f"{GLOBAL} 0")
        copies = [trained(teacher, *each, teacher, 0.0) for each in data]
        changes = [teacher - copy for copy in copies]
        mean = sum(n * change for n, change in zip(sizes, changes, strict=True))
        self.step(f"{GLOBAL} 0", mean / sizes.sum())
        for client in order:
            theta, _ = self.pull(WHO[client])
            self.step(WHO[client], theta - trained(theta, *data[client], teacher, LAM))
        return teacher


def simulator():
    return schedule.simulator(
        official(),
        clients.table(PARTS),
        pool(),
        weight=np.array([len(part) for part in PARTS]),
        cohort_size=4,
        members=families.families(MEMBERS),
        sequential=True,
    )


@functools.cache
def three_rounds():
    """The carry before the first round, and after each."""
    sim, root = simulator(), jax.random.key(0)
    carry = sim.init(root)
    states, infos = [jax.device_get(carry)], []
    for number in range(3):
        carry, info = sim.run(root, carry, number, 1)
        states.append(jax.device_get(carry))
        infos.append(jax.device_get(info))
    return sim, states, infos


def test_rounds_are_those_of_the_official_loop():
    _, states, infos = three_rounds()
    expected = Rewrite(states[0].server)
    for number in range(2):
        key = rng.stream(jax.random.fold_in(jax.random.key(0), number), "cohort")
        order = jax.random.permutation(rng.stream(key, "order"), jnp.arange(4))
        teacher = expected.round(order)
        found, rows = states[number + 1].server, states[number + 1].rows
        chex.assert_trees_all_close(
            Rewrite(found).values, expected.values, rtol=1e-4, atol=1e-5
        )
        # Adam counts the steps of each part on its own.
        counts = {
            "extractor/Dense_0/bias": found.opt["extractor"][0].count,
            "head 1/b": found.opt["heads"]["1"][0].count,
            "wide 1": found.opt["tables"]["wide"][0].count[1],
            f"{GLOBAL} 0": found.opt["tables"][GLOBAL][0].count[0],
        }
        assert counts == {path: expected.adam[path][2] for path in counts}
        # All had the teacher that the hypernetwork gave before the round.
        for name, ids in MEMBERS.items():
            for row in range(len(ids)):
                held = FLAT.join(
                    {
                        path.removeprefix("memory/teacher/"): x[row]
                        for path, x in rows[name].kept.items()
                        if path != "memory/teacher/known"
                    }
                )
                np.testing.assert_allclose(held, teacher, rtol=1e-4, atol=1e-5)
        info = infos[number]
        assert info["samples"] == info["opening_samples"] == 20 * EPOCHS
        assert info["opening_loss"] > 0
    start = Rewrite(states[0].server).values["extractor"]
    assert float(tree.norm(tree.sub(start, expected.values["extractor"]))) > 0.1


@pytest.mark.slow
def test_a_run_resumed_between_rounds_has_the_same_bits():
    sim, states, _ = three_rounds()
    again, _ = sim.run(jax.random.key(0), sim.load(states[2]), 2, 1)
    assert tree.sha256(jax.device_get(again)) == tree.sha256(states[3])


# The wire, and bad input ------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_own_network_and_global_model_each_way(name):
    costs = comm.cost(comm.describe(families.view(ours(), name)))
    assert costs.down_numbers == costs.up_numbers == SIZES[name] + SMALL
    fresh = comm.cost(comm.describe(families.view(ours(teacher="fresh"), name)))
    assert fresh.down_numbers == SIZES[name] + 2 * SMALL
    assert fresh.up_numbers == costs.up_numbers


def test_the_halves_of_a_round_send_one_network_each():
    messages = comm.describe(families.view(ours(), "wide"))
    halves = [comm.cost(m) for m in (messages.opening, messages._replace(opening=None))]
    assert [half.down_numbers for half in halves] == [SMALL, SIZES["wide"]]
    assert [half.up_numbers for half in halves] == [SMALL, SIZES["wide"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lam=1.1), r"lam=1\.1 must be at least 0 and at most 1"),
        (dict(lam=float("nan")), r"lam=nan must be a finite number"),
        (dict(teacher="frehs"), r"teacher='frehs' is unknown; .*'fresh'"),
        (dict(temperature=0.0), r"temperature=0\.0 must be positive"),
        (dict(keep=r"params/head/.*"), r"keep='params/head/\.\*' must be None"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        mh_pfedhngd(NETWORKS, local=FULL, family_sizes=FAMILY_SIZES, **options)


def test_a_teacher_with_running_statistics_is_refused():
    with pytest.raises(ValueError, match="must do without running statistics"):
        mh_pfedhngd({"a": normed()}, local=FULL, family_sizes={"a": 1})


def test_statistics_that_would_be_emitted_are_refused_and_the_teacher_is_none():
    sizes, both = {"a": 1, "b": 1}, {"a": tiny().model, "b": normed()}
    with pytest.raises(ValueError, match=r"bn_stats='average'.*use 'local'"):
        mh_pfedhngd(both, local=FULL, family_sizes=sizes, bn_stats="average")
    alike = {"a": tiny().model, "b": tiny().model}
    mh_pfedhngd(alike, local=FULL, family_sizes=sizes, bn_stats="average")
