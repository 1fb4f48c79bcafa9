"""MH-pFedHNGD: what teacher and copy do to clients, and when the global model moves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import normed
from test_fedavg import FULL, LR, MODEL, PARTS, K, pool
from test_fedproto import inputs
from test_fml import LINE, data_of, flat_of
from test_lg_fedavg import FAMILY_SIZES, MEMBERS

from hyperjax import mixing, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.mh_pfedhn import mh_pfedhn
from hyperjax.algorithms.mh_pfedhngd import GLOBAL, Uplink, mh_pfedhngd
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
FLAT = mixing.flat(fedavg(LINE, local=FULL))


@functools.cache
def ours(lam=LAM, clip=None, **options):
    return mh_pfedhngd(
        NETWORKS,
        local=functools.partial(FULL, clip_norm=clip),
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
    return jax.jit(ours().server.init)(jax.random.key(0))


@jax.jit
def absorbed(state, ups, cohorts):
    return ours().server.update(jax.random.key(0), state, ups, cohorts)[0]


@jax.jit
def received(state, cohorts):
    return ours().server.downlink(jax.random.key(0), state, cohorts)


@jax.jit
def stepped(state, ups, cohorts):
    """MH-pFedHN's server with the global model as one more client."""
    return mh(True).server.update(jax.random.key(0), state, ups, cohorts)[0]


def only_global():
    one = jnp.ones(1)
    return {GLOBAL: Cohort(jnp.zeros(1, jnp.int32), one, one, jnp.int32(0), one[0])}


def changes(seed, names=tuple(NETWORKS), num=2):
    draw = np.random.default_rng(seed)
    shapes = {name: ((num, SIZES[name]), (num, SMALL)) for name in names}
    return {
        name: Uplink(*(jnp.float32(draw.normal(size=s)) for s in shapes[name]))
        for name in names
    }


def own(ups):
    return {name: up.own for name, up in ups.items()}


def mean_change(*pairs):
    """The mean of clients' copies' changes by weight."""
    total = sum(weight * np.float64(change) for weight, change in pairs)
    return total / sum(weight for weight, _ in pairs)


def theta_g(inner):
    """The global model of a hypernetwork."""
    return mh(True).server.downlink(None, inner, only_global())[GLOBAL].own[0]


# The loss ---------------------------------------------------------------------------

DRAW = np.random.default_rng(0)
BATCH = Batch(jnp.zeros((3, 1)), jnp.array([0, 1, 2]), jnp.array([1.0, 1.0, 0.0]))
STUDENT, TEACHER = (jnp.float32(DRAW.normal(size=(3, 4))) for _ in range(2))


def test_a_teacher_who_knows_no_more_teaches_nothing():
    value, slope = jax.value_and_grad(distillation)(STUDENT, STUDENT, BATCH, 15.0)
    assert value == 0
    # T^2 = 225 times the rounding of float32.
    np.testing.assert_allclose(slope, np.zeros((3, 4)), atol=225 * 1e-7)


def test_divergence_by_hand():
    p, s = (jax.nn.softmax(z / T, -1) for z in (TEACHER, STUDENT))
    expected = T**2 * np.sum(p * np.log(p / s), -1)
    value, slope = jax.value_and_grad(distillation)(STUDENT, TEACHER, BATCH, T)
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
        slope = jax.grad(distillation)(STUDENT, TEACHER, BATCH, temperature)[:2]
        error.append(np.max(np.abs(slope - limit)))
    assert error[1] < error[0] / 5 and error[1] < 0.01


# Clients ----------------------------------------------------------------------------


@functools.cache
def _visit(name, lam, clip, **options):
    side = ours(lam, clip, **options).client[name]

    @jax.jit
    def run(down, data):
        key = jax.random.key(0)
        client = side.init(key, jax.random.key(1), down)
        return side.update(key, down, client, data)

    return run


# What a client received: theta_g, and a network of its own.
DOWN = {
    name: Downlink(
        jnp.float32(DRAW.normal(size=SMALL)),
        jnp.float32(DRAW.normal(size=size)),
        jnp.int32(0),
    )
    for name, size in SIZES.items()
}


def visit(name="plain", lam=LAM, clip=None, shared=None, **options):
    down = DOWN[name] if shared is None else DOWN[name]._replace(shared=shared)
    return _visit(name, lam, clip, **options)(down, data_of(PARTS[1]))


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
        kernel, bias = linear(down.shared)
        teacher = jax.nn.softmax((x @ kernel + bias) / T)
        towards = T * (jax.nn.softmax(z / T) - teacher)
        return LAM * towards + (1 - LAM) * (jax.nn.softmax(z) - label)

    uplink, _, info = visit()
    np.testing.assert_allclose(uplink.own, descended(down.own, slope), **CLOSE)
    assert info["distillation"] > 0


def test_the_copy_learns_from_labels_alone_and_is_not_clipped():
    def slope(z, x, label):
        return jax.nn.softmax(z) - label

    expected = descended(DOWN["plain"].shared, slope)
    uplink, *_ = visit(clip=1e-3)
    np.testing.assert_allclose(uplink.copy, expected, **CLOSE)
    assert np.linalg.norm(uplink.copy) > 0.01
    np.testing.assert_allclose(np.linalg.norm(uplink.own), LR * 1e-3, rtol=1e-3)
    clipped, *_ = visit(clip=1e-3, clip_global=True)
    np.testing.assert_allclose(np.linalg.norm(clipped.copy), LR * 1e-3, rtol=1e-3)
    np.testing.assert_array_equal(clipped.own, uplink.own)


def test_a_fresh_teacher_is_not_what_the_copy_starts_from():
    start, teacher = jnp.float32(DRAW.normal(size=(2, SMALL)))
    found, *_ = visit("wide", shared=jnp.stack([start, teacher]), teacher="fresh")
    np.testing.assert_allclose(found.copy, visit("wide", shared=start)[0].copy, **CLOSE)
    taught, *_ = visit("wide", shared=teacher)
    np.testing.assert_allclose(found.own, taught.own, **CLOSE)
    assert np.max(np.abs(found.own - visit("wide", shared=start)[0].own)) > 1e-3


def test_without_lambda_clients_do_what_those_of_mh_pfedhn_do():
    side = mh().client["wide"]

    @jax.jit
    def plain(down, data):
        key, down = jax.random.key(0), down._replace(shared=())
        client = side.init(key, jax.random.key(1), down)
        return side.update(key, down, client, data)[0]

    expected = plain(DOWN["wide"], data_of(PARTS[1]))
    uplink, *_ = visit("wide", lam=0.0)
    np.testing.assert_allclose(uplink.own, expected, rtol=1e-6, atol=1e-7)
    taught, *_ = visit("wide")
    assert np.max(np.abs(taught.own - expected)) > 1e-3


def test_fine_tuning_learns_from_the_teacher_of_today():
    # On a first visit too.
    side, down = ours().client["wide"], DOWN["wide"]
    key, data = jax.random.key(0), AdaptData(data_of(PARTS[1]), data_of(PARTS[1]))
    adapted = side.adapt(key, down, side.init(key, key, down), data)
    variables = side.deploy(down, adapted)
    teacher = variables["stats"]["teacher"]
    chex.assert_trees_all_equal(teacher, FLAT.cut(down.shared))
    # Its predictions are its own network's.
    flat = mixing.flat(fedavg(MODEL, local=FULL)).cut(down.own)
    chex.assert_trees_all_equal(flat_of(variables), flat)
    x, _ = inputs(PARTS[1])
    alone = {"params": variables["params"], "stats": {}}
    found = side.model.predict(variables, x)
    np.testing.assert_array_equal(found, MODEL.predict(alone, x))


# The server -------------------------------------------------------------------------


def test_it_starts_as_mh_pfedhn():
    state = first()
    expected = jax.jit(mh().server.init)(jax.random.key(0))
    chex.assert_trees_all_equal(state.inner.phi, expected.phi)
    assert state.inner.phi["heads"].keys() == {"1", "3"}
    for name in NETWORKS:
        found, table = state.inner.tables[name], expected.tables[name]
        np.testing.assert_array_equal(found, table)
    assert state.inner.tables[GLOBAL].shape == (1, 1, 3)


def test_within_a_round_networks_move_as_those_of_mh_pfedhn():
    # And theta_g waits: the same for all clients of a round, together or in turn.
    state, expected = first(), jax.jit(mh().server.init)(jax.random.key(0))
    plain = jax.jit(mh().server.update)
    teacher = received(state, cohorts_of(0))["plain"].shared
    np.testing.assert_allclose(teacher, theta_g(state.inner), rtol=1e-6)
    total = 0.0
    for turn, name in enumerate(("plain", "wide", "plain")):
        who, ups = cohorts_of(0, [name]), changes(turn, [name])
        downs = received(state, who)
        np.testing.assert_array_equal(downs[name].shared, teacher)
        state = absorbed(state, ups, who)
        expected, _ = plain(None, expected, own(ups), who)
        total = total + np.array(WEIGHT[name]) @ np.float64(ups[name].copy)
    for part in ("extractor", "heads"):
        chex.assert_trees_all_close(
            state.inner.phi[part], expected.phi[part], rtol=1e-6, atol=1e-7
        )
    for name in NETWORKS:
        chex.assert_trees_all_close(
            (state.inner.tables[name], state.inner.opt["tables"][name]),
            (expected.tables[name], expected.opt["tables"][name]),
            rtol=1e-6,
            atol=1e-7,
        )
    kept = (state.inner.tables[GLOBAL], state.teacher)
    chex.assert_trees_all_equal(kept, (first().inner.tables[GLOBAL], teacher))
    np.testing.assert_allclose(state.change, total, **CLOSE)
    assert state.weight == 10 + 10 + 10 and state.round == 0


@functools.cache
def after_one_round():
    """After a round in which client 1 of "wide" dropped out."""
    ups = changes(7)
    who = cohorts_of(0)
    who["wide"] = cohorts_of(0, ["wide"], active=(1, 0))["wide"]
    return ups, absorbed(first(), ups, who)


def test_the_global_step_is_taken_when_the_next_round_begins():
    ups, state = after_one_round()
    copies = [*zip(WEIGHT["plain"], ups["plain"].copy, strict=True)]
    copies.append((WEIGHT["wide"][0], ups["wide"].copy[0]))
    mean = jnp.float32(mean_change(*copies))
    inner = stepped(state.inner, {GLOBAL: mean[None]}, only_global())
    who, ups = cohorts_of(1), changes(8)
    # Clients of the next round are sent what comes of it,
    downs = received(state, who)
    expected = mh().server.downlink(None, inner, who)
    for name in NETWORKS:
        np.testing.assert_allclose(downs[name].shared, theta_g(inner), **CLOSE)
        np.testing.assert_allclose(downs[name].own, expected[name].own, **CLOSE)
    assert np.max(np.abs(downs["wide"].shared - state.teacher)) > 1e-4
    # the server goes on from it, once,
    turns = state
    for name in NETWORKS:
        part = {name: who[name]}
        turns = absorbed(turns, {name: ups[name]}, part)
        inner = stepped(inner, own({name: ups[name]}), part)
    chex.assert_trees_all_close(turns.inner, inner, **CLOSE)
    np.testing.assert_array_equal(turns.teacher, downs["plain"].shared)
    assert turns.weight == 20 and turns.round == 1
    # and whoever is evaluated in between, of one family or another, sees the same.
    for name in NETWORKS:
        seen = received(state, cohorts_of(1, [name]))[name]
        chex.assert_trees_all_close(seen, downs[name], rtol=1e-6, atol=1e-7)


def test_one_step_on_the_mean_is_the_mean_of_steps():
    # The first step of gradient descent is linear in the change that causes it.
    ups, _ = after_one_round()
    start = first().inner
    pairs = [*zip(WEIGHT["plain"], ups["plain"].copy, strict=True)]
    pairs.append((WEIGHT["wide"][0], ups["wide"].copy[0]))

    def moved(change):
        after = stepped(start, {GLOBAL: jnp.float32(change)[None]}, only_global())
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
    _, state = after_one_round()
    nobody = changes(9)
    after = absorbed(state, nobody, cohorts_of(1, active=(0, 0)))
    found, were = (
        {k: (x.tables[k], x.opt["tables"][k]) for k in x.tables}
        for x in (after.inner, state.inner)
    )
    for name in NETWORKS:
        chex.assert_trees_all_equal(found[name], were[name])
    assert tree.sha256(found[GLOBAL]) != tree.sha256(were[GLOBAL])
    # Its own head is "plain"'s; that of "wide" has no part in it.
    heads, were = after.inner.phi["heads"], state.inner.phi["heads"]
    chex.assert_trees_all_equal(heads["3"], were["3"])
    assert np.any(heads["1"]["w"] != were["1"]["w"])
    # A round of nobody moves nothing, momentum included, when the next one begins.
    later = absorbed(after, nobody, cohorts_of(2, active=(0, 0)))
    chex.assert_trees_all_equal(later.inner, after.inner)
    assert later.weight == 0 and np.all(later.change == 0)


def test_the_global_step_may_touch_the_idle():
    _, state = after_one_round()
    nobody = changes(9), cohorts_of(1, active=(0, 0))
    plain = absorbed(state, *nobody).inner
    alg = ours(global_step_touches_idle=True)
    after = jax.jit(alg.server.update)(None, state, *nobody)[0].inner
    # What theta_g is made of moves as it would,
    for part in (lambda x: x.phi["extractor"], lambda x: x.phi["heads"]["1"]):
        chex.assert_trees_all_close(part(after), part(plain), **CLOSE)
    found, expected = after.tables[GLOBAL], plain.tables[GLOBAL]
    np.testing.assert_allclose(found, expected, **CLOSE)
    # and all the rest goes on by its momentum: t' = 0.9 t, x' = x - 0.1 t'.
    was = state.inner
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


def test_a_fresh_teacher_has_learned_from_the_copies_received_so_far():
    send = jax.jit(ours(teacher="fresh").server.downlink)
    who, ups = cohorts_of(0, ["wide"]), changes(3, ["wide"])
    start, teacher = send(None, first(), who)["wide"].shared
    np.testing.assert_array_equal(start, first().teacher)
    np.testing.assert_allclose(teacher, start, rtol=1e-6)
    state = absorbed(first(), ups, who)
    mean = mean_change(*zip(WEIGHT["wide"], ups["wide"].copy, strict=True))
    inner = stepped(state.inner, {GLOBAL: jnp.float32(mean)[None]}, only_global())
    later, teacher = send(None, state, who)["wide"].shared
    np.testing.assert_array_equal(later, start)
    np.testing.assert_allclose(teacher, theta_g(inner), **CLOSE)
    assert np.max(np.abs(teacher - start)) > 1e-4
    # When the next round begins, that is what everything starts from.
    start, again = send(None, state, cohorts_of(1, ["wide"]))["wide"].shared
    np.testing.assert_allclose(start, teacher, **CLOSE)
    np.testing.assert_allclose(again, start, rtol=1e-6)


# Rounds of the engine ---------------------------------------------------------------


def test_rounds_one_by_one_and_a_run_that_is_resumed_between_them():
    sizes = np.array([len(part) for part in PARTS])
    sim = schedule.simulator(
        ours(),
        clients.table(PARTS),
        pool(),
        weight=sizes,
        cohort_size=4,
        members=families.families(MEMBERS),
        sequential=True,
    )
    root, carry, states = jax.random.key(0), None, []
    for number in range(3):
        carry = sim.init(root) if carry is None else carry
        carry, _ = sim.run(root, carry, number, 1)
        states.append(jax.device_get(carry))
        # Each in its turn, of one teacher, which has yet to learn from the round.
        state = states[-1].server
        assert state.weight == sizes.sum() and state.round == number
        assert np.linalg.norm(state.change) > 1e-3
        for name, rows in states[-1].rows.items():
            held = {p: x for p, x in rows.kept.items() if p.startswith("stats/teacher")}
            for row in range(len(MEMBERS[name])):
                found = {
                    p.removeprefix("stats/teacher/"): x[row] for p, x in held.items()
                }
                chex.assert_trees_all_equal(found, FLAT.cut(state.teacher))
    assert len({tree.sha256(carry.server.teacher) for carry in states}) == 3
    again, _ = sim.run(root, sim.load(states[1]), 2, 1)
    assert tree.sha256(jax.device_get(again)) == tree.sha256(states[2])


# The wire, and bad input ------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_own_network_and_global_model_each_way(name):
    costs = comm.cost(comm.describe(families.view(ours(), name)))
    assert costs.down_numbers == costs.up_numbers == SIZES[name] + SMALL
    fresh = comm.cost(comm.describe(families.view(ours(teacher="fresh"), name)))
    assert fresh.down_numbers == SIZES[name] + 2 * SMALL
    assert fresh.up_numbers == costs.up_numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lam=1.1), r"lam=1\.1 must lie in \[0, 1\]"),
        (dict(lam=float("nan")), r"lam=nan must lie in"),
        (dict(teacher="frehs"), r"teacher='frehs' is unknown; .*'fresh'"),
        (dict(temperature=0.0), r"temperature=0\.0 be positive"),
        (dict(keep=r"params/head/.*"), r"keep='params/head/\.\*' must be None"),
        (dict(bn_stats="average"), r"bn_stats='average'.*use 'local'"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        mh_pfedhngd(NETWORKS, local=FULL, family_sizes=FAMILY_SIZES, **options)


def test_a_teacher_with_running_statistics_is_refused():
    with pytest.raises(ValueError, match="must do without running statistics"):
        mh_pfedhngd({"a": normed()}, local=FULL, family_sizes={"a": 1})
