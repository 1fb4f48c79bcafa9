"""pFedHN on quadratics, and the published numbers."""

import functools

import chex
import federated
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratics as q

from hyperjax import tree
from hyperjax.algorithms.fedavg import Uplink
from hyperjax.algorithms.pfedhn import pfedhn
from hyperjax.engine import comm
from hyperjax.hypernets import heads
from hyperjax.models import HEAD, ZOO, from_linen
from hyperjax.types import Cohort

PC = dict(keep=q.HEAD, persist_optimizer="kept")
# A server whose step is the clipped gradient itself.
BARE = dict(server_opt=optax.sgd(1.0), weight_decay=0.0)
MOVING = dict(server_opt=optax.sgd(0.02, momentum=0.9), weight_decay=0.05)
# Published rounds are of one client; then some of several, with absences.
COHORTS = ((2,), (0,), (2,), (3,), (2,), *q.PARTIAL)
PATHS = ("params/body/w", "params/head/w")


@functools.cache
def ours(train=q.training(q.DECAYING), num_hidden=1, hidden_size=3, **options):
    return pfedhn(
        q.model(),
        local=train,
        num_clients=q.N,
        embedding_size=2,
        hidden_size=hidden_size,
        num_hidden=num_hidden,
        **options,
    )


@functools.partial(jax.jit, static_argnames="pc")
def emitted(phi, v, pc=False):
    """A client's theta [2]; a head that is its own is as it started."""
    spec = {path: jax.ShapeDtypeStruct((), jnp.float32) for path in PATHS[: 2 - pc]}
    net = heads.per_tensor(spec, condition_size=2, hidden_size=3, num_hidden=1)
    found = net.generate(phi, v)
    return jnp.stack([found.get(path, q.START[i]) for i, path in enumerate(PATHS)])


@functools.partial(jax.jit, static_argnames="pc")
def pulled(phi, v, delta, pc=False):
    """(d theta / d(phi, v))' delta."""
    return jax.grad(lambda phi, v: delta @ emitted(phi, v, pc), (0, 1))(phi, v)


@functools.partial(jax.jit, static_argnames="pc")
def end_to_end(phi, table, ids, pc=False):
    """The mean loss of some clients, and its gradient in (phi, table)."""

    def mean(phi, table):
        theta = jax.vmap(lambda v: emitted(phi, v, pc))(table[ids])
        gap = theta - jnp.float32(q.B)[ids]
        curvature = jnp.float32(q.A)[ids]
        return jnp.einsum("ki,kij,kj->", gap, curvature, gap) / 2 / len(ids)

    return jax.value_and_grad(mean, (0, 1))(phi, table)


def parts(state):
    return state.server.phi, state.server.table


def absorbed(alg, server, deltas, ids, active=None):
    """The server, and what it reports, once clients sent their changes [C, 2]."""
    active = np.ones(len(ids)) if active is None else active
    cohort = Cohort(
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(active, jnp.float32),
        jnp.ones(len(ids)),
        jnp.int32(0),
        jnp.float32(q.N),
    )
    deltas = jnp.asarray(deltas, jnp.float32).T
    uplink = Uplink(dict(zip(PATHS, deltas, strict=True)), ())
    return jax.jit(alg.server.update)(jax.random.key(0), server, uplink, cohort)


# Whole exchanges ---------------------------------------------------------------------


def visit(client, theta, trace):
    """Local training with momentum and decay that goes on from a trace."""
    for _ in range(q.SIZES[client]):
        trace = 0.9 * trace + q.gradient(client, theta) + 0.1 * theta
        theta = theta - q.LR * trace
    return theta, trace


def descent(params, grads, trace):
    """One step of MOVING's optimizer."""
    add = functools.partial(jax.tree.map, lambda m, g, p: 0.9 * m + g + 0.05 * p)
    trace = add(trace, grads, params)
    return jax.tree.map(lambda p, m: p - 0.02 * m, params, trace), trace


def by_hand(server, cohorts, pc, faithful):
    """Algorithm 1; returns (phi, table, what clients keep [N, 2])."""
    phi, table = jax.device_get(server.phi), np.array(server.table)
    slow, rows = tree.zeros_like(phi), np.zeros_like(table)
    shared = np.array([True, not pc])
    home, memory = np.tile(q.START, (q.N, 1)), np.zeros((q.N, 2))
    for cohort in cohorts:
        alive = [k for k in cohort if k >= 0]
        sums, dense = tree.zeros_like(phi), np.zeros_like(table)
        for k in alive:
            received = np.float64(emitted(phi, table[k], pc))
            theta = np.where(shared, received, home[k])
            # A shared layer's optimizer starts anew, a kept one's goes on.
            home[k], memory[k] = visit(k, theta, np.where(shared, 0, memory[k]))
            delta = (theta - home[k]) * shared / len(alive)
            grads, dense[k] = pulled(phi, table[k], np.float32(delta), pc)
            sums = tree.add(sums, grads)
        phi, slow = descent(phi, sums, slow)
        moved = range(q.N) if faithful else alive
        for k in moved:
            table[k], rows[k] = descent(table[k], dense[k], rows[k])
    return phi, table, home


@pytest.mark.parametrize(
    ("pc", "faithful"),
    [
        *((False, False), (False, True), (True, False)),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_exchanges_equal_the_algorithm(pc, faithful):
    alg = ours(faithful=faithful, **MOVING, **(PC if pc else {}))
    state = q.play(alg, *COHORTS)
    *expected, home = by_hand(q.start(alg).server, COHORTS, pc, faithful)
    chex.assert_trees_all_close(parts(state), tuple(expected), **q.CLOSE)
    if pc:
        found = state.rows.kept[PATHS[1]]
        np.testing.assert_allclose(found, home[:, 1], **q.CLOSE)


@pytest.mark.parametrize("faithful", [False, True])
def test_a_faithful_clip_is_of_the_body_alone(faithful):
    alg = ours(train=q.training(clip_norm=0.5), faithful=faithful, **BARE, **PC)
    start = q.start(alg).server
    body = np.float64(emitted(start.phi, start.table[3], True))[0]
    theta = np.array([body, q.START[1]])
    for _ in range(q.SIZES[3]):
        slope = q.gradient(3, theta)
        norm = abs(slope[0]) if faithful else np.linalg.norm(slope)
        clipped = slope * min(1, 0.5 / norm)
        theta = theta - q.LR * np.where([True, not faithful], clipped, slope)
    state = q.play(alg, (3,))
    np.testing.assert_allclose(
        [state.uplink.delta[PATHS[0]][0], state.rows.kept[PATHS[1]][3]],
        [theta[0] - body, theta[1]],
        **q.CLOSE,
    )


def test_embeddings_of_absent_clients_stay():
    alg = ours(**MOVING)
    before = q.play(alg, q.EVERYONE)
    # Client 3 was drawn and dropped out.
    after = q.play(alg, (2,), (0, -1 - 3), (2,), state=before)
    rows = (after.server.table, jax.tree.leaves(after.server.opt_table))
    were = (before.server.table, jax.tree.leaves(before.server.opt_table))
    for new, old in zip(jax.tree.leaves(rows), jax.tree.leaves(were), strict=True):
        np.testing.assert_array_equal(new[[1, 3]], old[[1, 3]])
        assert np.all(new[[0, 2]] != old[[0, 2]])
    # The authors' dense table moves at every step.
    dense = ours(faithful=True, **MOVING)
    assert np.all(q.play(dense, (2,)).server.table != q.start(dense).server.table)


def test_without_a_kept_layer_it_is_pfedhn():
    full = q.play(ours(**MOVING), *COHORTS)
    none = q.play(ours(keep=(), **MOVING), *COHORTS)
    # Two programs: the compiler may order a sum otherwise.
    chex.assert_trees_all_close(none.server, full.server, rtol=1e-5, atol=1e-7)


def test_an_optimizer_of_nothing_kept_is_refused():
    with pytest.raises(ValueError, match=r"persist_optimizer='kept' .* keep=\(\)"):
        ours(keep=(), persist_optimizer="kept")


def test_own_tables_of_networks_are_local_training():
    # h(v) = v and phi frozen: half of a client's way is half a step for its row.
    def rows_only(grads, state, params=None):
        step = 0.0 if isinstance(grads, dict) else -0.5
        return jax.tree.map(lambda g: step * g, grads), state

    rows_opt = optax.GradientTransformation(lambda params: (), rows_only)
    alg = ours(num_hidden=0, hidden_size=2, server_opt=rows_opt, weight_decay=0.0)
    state = q.start(alg)
    phi = tree.zeros_like(state.server.phi)
    phi["trunk"]["Dense_0"]["kernel"] = jnp.eye(2)
    for i, path in enumerate(PATHS):
        phi["heads"][path]["kernel"] = jnp.eye(2)[:, i : i + 1]
    table = jnp.asarray(np.tile(q.START, (q.N, 1)), jnp.float32)
    state = state._replace(server=state.server._replace(phi=phi, table=table))
    # Alone: a round of several would divide by their number.
    cohorts = ((2,), (0,), (2,), (3,), (0,), (2,))
    found = q.play(alg, *cohorts, state=state).server
    expected = np.tile(q.START, (q.N, 1))
    for (k,) in cohorts:
        trained, _ = visit(k, expected[k], np.zeros(2))
        expected[k] += 0.5 * (trained - expected[k])
    np.testing.assert_allclose(found.table, expected, **q.CLOSE)
    chex.assert_trees_all_equal(found.phi, jax.device_get(phi))


# The gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("cohort", [(2,), q.EVERYONE])
@pytest.mark.parametrize("pc", [False, True])
def test_one_plain_step_is_the_end_to_end_gradient(pc, cohort):
    alg = ours(q.steps(1), keep=q.HEAD if pc else None, **BARE)
    before = q.start(alg)
    found = tree.sub(parts(before), parts(q.play(alg, cohort)))
    ids = np.array(cohort)
    value, grads = end_to_end(*parts(before), ids, pc)
    assert tree.norm(grads) * q.LR < 50  # not clipped
    chex.assert_trees_all_close(found, tree.scale(grads, q.LR), **q.CLOSE)
    # A small step that way lowers the loss, one the other way raises it.
    for factor, sign in ((-0.01, -1), (0.01, 1)):
        moved = tree.add(parts(before), tree.scale(found, factor))
        assert sign * (end_to_end(*moved, ids, pc)[0] - value) > 0


def test_several_clients_are_the_mean_of_their_pulls():
    alg, deltas = ours(**BARE), np.array([[1.0, -2.0], [0.5, 3.0], [0.0, 0.0]])
    server = q.start(alg).server
    # The third was drawn and dropped out: it does not count.
    both, _ = absorbed(alg, server, deltas, (2, 0, 1), (1, 1, 0))
    moved = []
    for delta, k in zip(deltas, (2, 0), strict=False):
        grads, row = pulled(server.phi, server.table[k], jnp.float32(-delta))
        table = jnp.zeros_like(server.table).at[k].set(row)
        moved.append((grads, table))
    mean = tree.scale(tree.add(*moved), 0.5)
    expected = tree.sub((server.phi, server.table), mean)
    chex.assert_trees_all_close((both.phi, both.table), expected, **q.CLOSE)


def test_the_gradient_is_clipped_over_all_it_reaches():
    # BARE's step is the gradient; with a bound of 50 the largest step is 50 long.
    server = q.start(ours(**BARE)).server
    before = (server.phi, server.table)
    steps = []
    for size in (1.0, 1e3):
        deltas = size * np.array([[1.0, -2.0], [3.0, 1.0]])
        after, info = absorbed(ours(**BARE), server, deltas, (3, 1))
        steps.append(tree.sub(before, (after.phi, after.table)))
        norms = float(tree.norm(steps[-1])), float(info["gradient_norm"])
        assert norms[0] == pytest.approx(min(norms[1], 50.0), rel=1e-4)
    assert norms[1] > 50
    short = tree.scale(steps[0], 1 / float(tree.norm(steps[0])))
    long = tree.scale(steps[1], 1 / 50)
    chex.assert_trees_all_close(long, short, rtol=1e-4, atol=1e-5)


def test_no_change_moves_nothing_without_decay():
    alg = ours(server_opt=optax.sgd(0.01, momentum=0.9), weight_decay=0.0)
    server = q.start(alg).server
    after, info = absorbed(alg, server, np.zeros((2, 2)), (3, 1))
    chex.assert_trees_all_equal(after, server)
    assert info["gradient_norm"] == 0
    # Nor does a round that nobody came to, whatever decays.
    alg = ours(**MOVING)
    server = q.play(alg, (2,)).server
    after, _ = absorbed(alg, server, np.zeros((2, 2)), (3, 1), (0, 0))
    chex.assert_trees_all_equal(after, server)


def test_a_frozen_hypernetwork_keeps_its_bits_and_lends_no_length():
    options = dict(BARE, freeze=".*")
    server = q.start(ours(**options)).server
    deltas = 1e4 * np.array([[1.0, -2.0], [3.0, 1.0]])
    after, info = absorbed(ours(**options), server, deltas, (3, 1))
    chex.assert_trees_all_equal(after.phi, server.phi)
    pairs = zip((3, 1), np.float32(deltas), strict=True)
    rows = [pulled(server.phi, server.table[k], d)[1] for k, d in pairs]
    # The mean over two clients; the bound is on what received gradient.
    length = np.linalg.norm(np.array(rows)) / 2
    assert length > 50
    assert float(info["gradient_norm"]) == pytest.approx(length, rel=1e-4)
    assert float(tree.norm(after.table - server.table)) == pytest.approx(50, rel=1e-4)
    # Momentum and decay do not move it either.
    moving = ours(**MOVING, freeze=("trunk/.*", "heads/.*"))
    after = q.play(moving, (2,), (0,)).server
    chex.assert_trees_all_equal(after.phi, q.start(moving).server.phi)


# Families ----------------------------------------------------------------------------


@functools.cache
def over_families(sizes=(("a", 3), ("b", 1)), **options):
    return pfedhn(
        {name: q.model() for name, _ in sizes},
        local=q.training(q.DECAYING),
        num_clients=q.N,
        family_sizes=dict(sizes),
        embedding_size=2,
        hidden_size=3,
        num_hidden=1,
        **options,
    )


def cohort_of(*ids):
    ones = jnp.ones(len(ids))
    ids = jnp.asarray(ids, jnp.int32)
    return Cohort(ids, ones, ones, jnp.int32(0), jnp.float32(q.N))


def uplink_of(deltas):
    columns = jnp.asarray(deltas, jnp.float32).T
    return Uplink(dict(zip(PATHS, columns, strict=True)), ())


def test_a_single_family_is_the_method_itself():
    alone, key = over_families((("a", q.N),), **MOVING), jax.random.key(0)
    server = alone.server.init(key)
    plain = ours(**MOVING).server.init(key)
    deltas, ids = [[1.0, -2.0], [3.0, 1.0]], (3, 1)
    down = jax.jit(alone.server.downlink)(key, server, {"a": cohort_of(*ids)})
    own = jax.jit(ours(**MOVING).server.downlink)(key, plain, cohort_of(*ids)).own
    chex.assert_trees_all_equal(down["a"].own, own)
    after, _ = jax.jit(alone.server.update)(
        key, server, {"a": uplink_of(deltas)}, {"a": cohort_of(*ids)}
    )
    expected, _ = absorbed(ours(**MOVING), plain, deltas, ids)
    chex.assert_trees_all_equal(jax.tree.leaves(after), jax.tree.leaves(expected))


def test_each_family_pulls_through_its_own_slice():
    alg, key = over_families(**BARE), jax.random.key(0)
    server = alg.server.init(key)
    # One of two clients; family b's client is number 3 of all, and has one of its own.
    cohorts = {"a": cohort_of(1), "b": cohort_of(0)}
    deltas = {"a": [[1.0, -2.0]], "b": [[0.5, 3.0]]}
    update = jax.jit(alg.server.update)
    uplinks = {name: uplink_of(d) for name, d in deltas.items()}
    after, _ = update(key, server, uplinks, cohorts)
    table = np.array(server.table, np.float64)
    for name, k in (("a", 1), ("b", 3)):
        heads = {p: server.phi["heads"][f"{name}/{p}"] for p in PATHS}
        theirs = {"trunk": server.phi["trunk"], "heads": heads}
        delta = -jnp.float32(deltas[name][0]) / 2
        grads, row = pulled(theirs, server.table[k], delta)
        table[k] -= row
        for path in PATHS:
            moved = tree.sub(heads[path], grads["heads"][path])
            found = after.phi["heads"][f"{name}/{path}"]
            chex.assert_trees_all_close(found, moved, **q.CLOSE)
    np.testing.assert_allclose(after.table, table, **q.CLOSE)
    # Of a family that sent nothing neither heads nor embeddings move.
    after, _ = update(key, server, {"b": uplinks["b"]}, {"b": cohorts["b"]})
    for path in PATHS:
        name = f"a/{path}"
        chex.assert_trees_all_equal(after.phi["heads"][name], server.phi["heads"][name])
    np.testing.assert_array_equal(after.table[:3], server.table[:3])
    assert np.all(after.table[3] != server.table[3])


def test_unseen_clients_of_a_family_get_the_network_of_the_mean_embedding():
    alg, key = over_families(**MOVING), jax.random.key(0)
    server = alg.server.init(key)
    down = jax.jit(alg.server.downlink)(key, server, {"b": cohort_of(1, 0)})
    theirs = {
        "trunk": server.phi["trunk"],
        "heads": {p: server.phi["heads"][f"b/{p}"] for p in PATHS},
    }
    expected = [emitted(theirs, v) for v in (server.table.mean(0), server.table[3])]
    np.testing.assert_allclose(q.vector(down["b"].own), expected, rtol=1e-5, atol=1e-6)


def test_families_must_be_those_of_the_models():
    with pytest.raises(ValueError, match=r"family_sizes=.* are 4 clients.*=5"):
        pfedhn(
            {"a": q.model(), "b": q.model()},
            local=q.training(),
            num_clients=5,
            family_sizes={"a": 3, "b": 1},
        )
    with pytest.raises(ValueError, match=r"family_sizes is of \[\], models of \['a'\]"):
        pfedhn({"a": q.model()}, local=q.training(), num_clients=5)


# Messages ----------------------------------------------------------------------------


def test_unseen_clients_get_the_network_of_the_mean_embedding():
    alg = ours(**MOVING)
    server = q.play(alg, (2,), (0,)).server
    ones = jnp.ones(3)
    ids = jnp.array([0, 4, 17])
    cohort = Cohort(ids, ones, ones, jnp.int32(0), jnp.float32(q.N))
    own = jax.jit(alg.server.downlink)(jax.random.key(0), server, cohort).own
    mean = server.table.mean(0)
    expected = [emitted(server.phi, v) for v in (server.table[0], mean, mean)]
    np.testing.assert_allclose(q.vector(own), expected, rtol=1e-5, atol=1e-6)


@functools.cache
def published(num_classes):
    return from_linen(ZOO["pfedhn_cnn"](num_classes), (32, 32, 3), num_classes)


@pytest.mark.parametrize(
    ("num_classes", "options", "numbers", "kept", "stored"),
    [
        (10, {}, 121_182, 0, 12_271_732),
        # The network itself: tests/models/test_networks.py.
        pytest.param(100, {}, 128_832, 0, 13_044_382, marks=pytest.mark.slow),
        (10, dict(keep=HEAD), 120_332, 850, 12_185_882),
    ],
)
def test_published_numbers(num_classes, options, numbers, kept, stored):
    model = published(num_classes)
    local = federated.make_local()
    messages = comm.describe(pfedhn(model, local=local, num_clients=50, **options))
    cost = comm.cost(messages)
    assert cost.down_numbers == cost.up_numbers == numbers
    assert tree.count(messages.client) == kept
    assert tree.count((messages.server.phi, messages.server.table)) == stored
    assert messages.server.table.shape == (50, 13)


def test_statistics_stay_at_home():
    model = federated.normed()
    alg = pfedhn(model, local=federated.make_local(), num_clients=2)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    cost = comm.cost(comm.describe(alg))
    assert cost.down_numbers == cost.up_numbers == tree.count(variables["params"])
    # Emitted variances would start at either sign.
    with pytest.raises(ValueError, match="bn_stats='average' would have the hyper"):
        local = federated.make_local()
        pfedhn(model, local=local, num_clients=2, bn_stats="average")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(num_clients=0), "num_clients=0 must be at least 1"),
        (dict(embedding_size=-1), "embedding_size=-1 must be at least 0"),
        (dict(hidden_size=0), "hidden_size=0 must be at least 1"),
        (dict(freeze="tail/.*"), "'tail/.*' matches no variable"),
        (dict(keep="params/top/.*"), "'params/top/.*' matches no variable"),
    ],
)
def test_bad_input(option, message):
    with pytest.raises(ValueError, match=message):
        pfedhn(q.model(), local=q.training(), **{"num_clients": q.N, **option})
