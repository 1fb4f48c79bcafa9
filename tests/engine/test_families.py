"""Clients with different networks in one run: the laws of the contract, jointly."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import (
    BATCH,
    NUM_CLASSES,
    NUM_CLIENTS,
    Normed,
    make_local,
    tiny,
    traced_once,
    weights,
)

from hyperjax import models, over_families, rng, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.mh_pfedhn import mh_pfedhn
from hyperjax.data import clients
from hyperjax.engine import (
    checkpoint,
    cohorts,
    comm,
    evaluate,
    exchange,
    families,
    schedule,
    sharding,
    stores,
)
from hyperjax.engine.evaluate import Population
from hyperjax.types import AdaptData, ClientData, Cohort, Outputs, Visit

# One worker runs all, and compiles each program once.
pytestmark = pytest.mark.xdist_group("families")

ROOT = jax.random.key(0)
CLOSE = dict(rtol=2e-4, atol=2e-5)  # different order of sums, several steps
MEMBERS = {
    "line": np.array([5, 0, 3]),
    "deep": np.array([1, 6]),
    "norm": np.array([2, 4, 7]),
}


@functools.cache
def groups() -> families.Families:
    return families.families(MEMBERS)


@functools.cache
def method():
    """MH-pFedHN on three networks, of which two share a head.

    K = 83 for "deep" makes three embeddings of 32 numbers, K = 51 for "line" and
    K = 53 for "norm" make two. Momentum stays on the clients, as statistics do.
    """
    networks = {
        "line": models.MLP(NUM_CLASSES, hidden=()),
        "deep": models.MLP(NUM_CLASSES, hidden=(4,)),
        "norm": Normed(),
    }
    alg = mh_pfedhn(
        {k: models.from_linen(v, (4, 4, 1), NUM_CLASSES) for k, v in networks.items()},
        local=make_local(),
        family_sizes={name: len(ids) for name, ids in MEMBERS.items()},
        output_size=32,
        embedding_size=4,
        hidden_size=4,
        num_layers=1,
        embedding_deviation=1.0,
        server_opt=optax.adam(0.05),
        persist_optimizer="all",
    )
    return traced_once(alg)


# Who belongs where -------------------------------------------------------------------


def test_members_have_numbers_inside_their_family():
    found = groups()
    assert found.names == ("deep", "line", "norm")
    assert [found.size(name) for name in found.names] == [2, 3, 3]
    np.testing.assert_array_equal(found.members["line"], [0, 3, 5])
    np.testing.assert_array_equal(found.family, [1, 0, 2, 1, 2, 1, 0, 2])
    np.testing.assert_array_equal(found.place, [0, 0, 0, 1, 1, 2, 1, 2])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a": [0, 1], "b": [1]}, r"must hold each of 0\.\.2 once"),
        ({"a": [0, 3], "b": [1]}, r"must hold each of 0\.\.2 once"),
        ({"a": [-1, 0], "b": [1]}, r"must hold each of 0\.\.2 once"),
        ({"a": [0, 1], "b": []}, "family 'b' has no members"),
    ],
)
def test_everybody_belongs_somewhere_and_families_have_members(members, message):
    members = {name: np.array(ids, np.int32) for name, ids in members.items()}
    with pytest.raises(ValueError, match=message):
        families.families(members)


def test_members_are_whole_numbers():
    with pytest.raises(ValueError, match="members of family 'a' are float64"):
        families.families({"a": np.array([0.0, 1.7]), "b": np.array([2])})


def test_without_families_all_are_one():
    found = families.families(3)
    cohort = cohort_of([2, 0], width=4, num=3)
    assert found.names == (families.ALONE,)
    assert found.cohorts(cohort) == {families.ALONE: cohort}
    ids = jnp.array([2, 0, 7])
    assert found.everywhere(families.ALONE, ids) is ids


def test_who_never_trained_has_the_number_after_the_last():
    ids = np.array([4, 9, 0, 8, 7])
    found = groups().numbers(ids, novel=[2, 0])  # 8 is of "norm", 9 of "deep"
    expected = {
        "deep": ([1], [2]),
        "line": ([2], [0]),
        "norm": ([0, 3, 4], [1, 3, 2]),
    }
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        chex.assert_trees_all_equal(found[name], tuple(map(np.array, pair)))
    assert found["norm"][1].dtype == np.int32
    assert groups().numbers(ids[:1], [2, 0]).keys() == {"norm"}
    with pytest.raises(ValueError, match=r"client 10 belongs to no family; .* 0 to 9"):
        groups().numbers(np.array([3, 10]), [2, 0])


def test_without_families_all_keep_their_numbers():
    places, numbers = families.families(3).numbers([5, 1, 9], ())[families.ALONE]
    assert places.tolist() == [0, 1, 2] and numbers.tolist() == [5, 1, 9]


def test_a_method_and_its_clients_have_the_same_families():
    with pytest.raises(ValueError, match=r"families \['deep', 'line', 'norm'\].*'x'"):
        simulator.__wrapped__(members=families.families({"x": np.arange(NUM_CLIENTS)}))
    fewer = {name: ids[ids < 7] for name, ids in MEMBERS.items()}
    with pytest.raises(ValueError, match="table holds 8 clients, the families 7"):
        simulator.__wrapped__(members=families.families(fewer))
    with pytest.raises(ValueError, match=r"the clients belong to \[''\]"):
        simulator(members=None)
    with pytest.raises(ValueError, match=r"the clients belong to \[''\]"):
        evaluate.evaluator(method(), tiny().pool, {}, **OPTIONS)


def cohort_of(ids, active=None, width=NUM_CLIENTS, num=NUM_CLIENTS) -> Cohort:
    """A padded cohort."""
    ids = np.asarray(ids, np.int32)
    active = np.ones(len(ids)) if active is None else np.asarray(active)
    active = np.pad(np.where(ids < num, active, 0.0), (0, width - len(ids)))
    ids = jnp.asarray(np.pad(ids, (0, width - len(ids)), constant_values=num))
    weight = weights().at[ids].get(mode="clip")
    active = jnp.asarray(active, jnp.float32)
    return Cohort(ids, active, weight, jnp.int32(0), jnp.float32(num))


@functools.partial(jax.jit, static_argnames="multiple")
def split(cohort, multiple=1):
    return groups().cohorts(cohort, multiple)


def test_cohorts_are_cut_by_family():
    # 6 dropped out; 8 is padding, and so would be any number from there on.
    parts = split(cohort_of([7, 6, 8, 5, 2, 99, 3], (1, 0, 1, 1, 1, 1, 1)))
    expected = {
        "deep": ([1, 2], [0, 0], [6, 0]),
        "line": ([2, 1, 3], [1, 1, 0], [5, 3, 0]),
        "norm": ([2, 0, 3], [1, 1, 0], [7, 2, 0]),
    }
    assert parts.keys() == expected.keys()
    for name, (ids, active, owners) in expected.items():
        part = parts[name]
        np.testing.assert_array_equal(part.ids, ids)
        np.testing.assert_array_equal(part.active, active)
        real = np.array(ids) < groups().size(name)
        weight = np.where(real, weights()[np.array(owners)], 0.0)
        np.testing.assert_array_equal(part.weight, weight)
        assert part.round == 0 and part.population == NUM_CLIENTS


def test_parts_have_room_for_all_that_could_be_in_them():
    def room(cohort, multiple):
        return {k: len(v.ids) for k, v in split(cohort, multiple).items()}

    everyone, two = cohort_of(range(NUM_CLIENTS)), cohort_of([7, 2], width=2)
    assert room(everyone, 1) == {"deep": 2, "line": 3, "norm": 3}
    assert room(two, 1) == {"deep": 2, "line": 2, "norm": 2}
    assert room(everyone, 4) == {"deep": 4, "line": 4, "norm": 4}
    # More room than the whole cohort has.
    parts = split(two, 3)
    assert room(two, 3) == {"deep": 3, "line": 3, "norm": 3}
    np.testing.assert_array_equal(parts["norm"].ids, [2, 0, 3])
    np.testing.assert_array_equal(parts["norm"].active, [1, 1, 0])
    np.testing.assert_array_equal(parts["deep"].ids, [2, 2, 2])


def test_everywhere_undoes_the_cut():
    order = np.random.default_rng(0).permutation(NUM_CLIENTS)
    for multiple in (1, 4):
        found = []
        for name, part in split(cohort_of(order), multiple).items():
            ids = np.asarray(groups().everywhere(name, part.ids))
            padding = np.asarray(part.ids) >= groups().size(name)
            np.testing.assert_array_equal(ids[padding], NUM_CLIENTS)
            # In the cohort's order.
            expected = [k for k in order if k in MEMBERS[name]]
            np.testing.assert_array_equal(ids[~padding], expected)
            found += expected
        assert sorted(found) == list(range(NUM_CLIENTS))


# Joint exchanges ---------------------------------------------------------------------


def spread(whole):
    """Rows of the index table by family: [N_f, ...]."""
    return {name: whole[groups().members[name]] for name in groups().names}


def data_of(cohorts) -> dict[str, ClientData]:
    """The data of cohorts by family; padding shows the last member."""
    found, (rows, size) = {}, tiny().table
    for name, cohort in cohorts.items():
        place = np.minimum(np.asarray(cohort.ids), groups().size(name) - 1)
        found[name] = ClientData(
            jnp.asarray(spread(rows)[name][place]),
            jnp.asarray(spread(size)[name][place]),
            tiny().pool,
        )
    return found


@functools.cache
def start():
    """Server state and stored rows before the first exchange."""
    server = method().server.init(rng.stream(ROOT, "common_init"))
    rows, seen = {}, {}
    for name in groups().names:
        spec = comm.describe(families.view(method(), name)).client
        rows[name], seen[name] = stores.zeros(spec, groups().size(name))
    return server, rows, seen


@functools.cache
def jitted(mapper="map", mesh=None):
    return jax.jit(exchange.make_joint_exchange(method(), mapper, mesh))


def exchanged(cohorts, *, state=None, run=None):
    """Runs an exchange with cohorts by family; returns (server, rows, seen, info)."""
    server, rows, seen = start() if state is None else arrays(state)
    got, were = {}, {}
    for name, cohort in cohorts.items():
        got[name], were[name] = stores.gather(rows[name], seen[name], cohort.ids)
    run = run or jitted()
    server, new, info = run(ROOT, server, got, were, data_of(cohorts), cohorts)
    rows, seen = dict(rows), dict(seen)
    for name, cohort in cohorts.items():
        rows[name], seen[name] = stores.scatter(
            rows[name], seen[name], cohort.ids, new[name], cohort.active > 0
        )
    return jax.device_get((server, rows, seen, info))


def one_exchange(ids, active=None, *, multiple=1, **options):
    return exchanged(split(cohort_of(ids, active), multiple), **options)


IDS = (5, 1, 7, 3, 2)  # of all families


@functools.cache
def reference():
    return one_exchange(IDS)


def test_training_changes_everybody_who_took_part_and_stays_finite():
    server, rows, seen, info = reference()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((server, rows, info)))
    assert info["samples"] == 2 * sum(tiny().table.size[list(IDS)])
    np.testing.assert_array_equal(
        np.concatenate([seen[name] for name in groups().names]),
        [1, 0, 0, 1, 1, 1, 0, 1],
    )
    for name in groups().names:
        before, after = start()[0].tables[name], server.tables[name]
        moved = np.any(np.asarray(before != after), axis=(1, 2))
        np.testing.assert_array_equal(moved, seen[name])
    chex.assert_trees_all_equal_shapes_and_dtypes((server, rows, seen), start())


def test_order_and_padding_of_the_cohort_do_not_matter():
    chex.assert_trees_all_close(one_exchange(sorted(IDS)), reference(), **CLOSE)
    in_front = (NUM_CLIENTS, 99, *IDS)
    chex.assert_trees_all_close(one_exchange(in_front), reference(), **CLOSE)


def test_a_drop_out_counts_as_absent():
    # The last family loses one of two, the first all it has.
    dropped = one_exchange((5, 1, 7, 3, 2), active=(1, 0, 0, 1, 1))
    chex.assert_trees_all_close(dropped, one_exchange((5, 3, 2)), **CLOSE)


@pytest.mark.slow  # each family's clients are mapped as those without: test_conformance
def test_one_after_another_and_all_at_once_agree():
    found = one_exchange(IDS, run=jitted("vmap"))
    chex.assert_trees_all_close(found, reference(), **CLOSE)


def test_one_device_and_four_agree():
    mesh = sharding.client_mesh(NUM_CLIENTS)
    assert mesh.size == 4
    found = one_exchange(IDS, multiple=4, run=jitted("map", mesh))
    chex.assert_trees_all_close(found, reference(), **CLOSE)


def test_some_of_the_families_are_enough():
    # As if the others were there and nobody of them came.
    cohorts = split(cohort_of((5, 7, 3)))
    some = {name: cohorts[name] for name in ("line", "norm")}
    expected = exchanged(cohorts)
    chex.assert_trees_all_close(exchanged(some), expected, **CLOSE)
    # In any order.
    other_way = {name: cohorts[name] for name in ("norm", "line")}
    chex.assert_trees_all_equal(exchanged(other_way), exchanged(some))


def test_absent_families_and_clients_keep_their_bits():
    before = one_exchange(range(NUM_CLIENTS))[:3]
    # Nobody of "deep", and a drop-out of "norm".
    server, rows, seen, _ = one_exchange((3, 4), active=(1, 0), state=before)
    was, old_rows, _ = before
    for m in ("2", "3"):
        parts = [(s.phi["heads"][m], s.opt["heads"][m]) for s in (server, was)]
        assert (tree.sha256(parts[0]) == tree.sha256(parts[1])) == (m == "3")
    for name in groups().names:
        absent = np.flatnonzero(groups().members[name] != 3)
        kept = [
            jax.tree.map(lambda x, a=absent: np.asarray(x)[a], found)
            for found in (
                (server.tables[name], server.opt["tables"][name], rows[name]),
                (was.tables[name], was.opt["tables"][name], old_rows[name]),
            )
        ]
        chex.assert_trees_all_equal(*kept)
        assert np.all(seen[name])


def test_nobody_at_all_changes_nothing():
    before = reference()[:3]
    after = one_exchange(IDS, active=np.zeros(len(IDS)), state=before)
    chex.assert_trees_all_equal(after[:3], before)
    assert np.all(np.isfinite(jax.tree.leaves(after[3])))


# A family's view ---------------------------------------------------------------------


def test_a_view_is_the_method_of_one_family():
    alg = method()
    cohort = split(cohort_of((5, 3)))["line"]
    line = families.view(alg, "line")
    assert isinstance(line.client.model, type(tiny().model))
    server = start()[0]

    @jax.jit
    def both(server):
        down = line.server.downlink(ROOT, server, cohort)
        up = jax.tree.map(jnp.ones_like, down.own)
        one = line.server.update(ROOT, server, up, cohort)
        downs = alg.server.downlink(ROOT, server, {"line": cohort})
        joint = alg.server.update(ROOT, server, {"line": up}, {"line": cohort})
        return (down, one), (downs["line"], joint)

    found, expected = both(server)
    assert found[0].own.shape == (3, 51)
    chex.assert_trees_all_equal(found, expected)


def test_a_method_without_families_is_its_own_view():
    alg = fedavg(tiny().model, local=make_local())
    assert families.view(alg, families.ALONE) is alg
    assert families.clients(alg) == {families.ALONE: alg.client}
    assert alg.as_given(alg.by_family(7)) == 7
    assert method().by_family(method().as_given({"a": 1})) == {"a": 1}


def test_every_method_can_speak_in_mappings():
    assert families.mapped(method()) is method()
    base = fedavg(tiny().model, local=make_local())
    alg = families.mapped(base._replace(opening=base))
    cohort = cohort_of((5, 3))
    for one in (alg, alg.opening):
        assert one.has_families and one.client == {families.ALONE: base.client}
        server = one.server.init(ROOT)
        down = base.server.downlink(ROOT, server, cohort)
        named = {families.ALONE: cohort}
        sent = one.server.downlink(ROOT, server, named)
        chex.assert_trees_all_equal(sent, {families.ALONE: down})
        up = jax.tree.map(jnp.ones_like, comm.describe(base).uplink)
        up = jax.tree.map(lambda x: jnp.stack([x] * NUM_CLIENTS), up)
        chex.assert_trees_all_equal(
            one.server.update(ROOT, server, {families.ALONE: up}, named),
            base.server.update(ROOT, server, up, cohort),
        )


def test_a_client_starts_the_same_in_training_and_in_the_view_of_its_family():
    # Evaluation sees views: a client that never trained must not start differently.
    def arrive(key, variables):
        return jax.tree.map(lambda x: x + jax.random.normal(key), variables)

    base = fedavg(
        tiny().model._replace(visit=Visit(arrive)), local=make_local(), keep=".*"
    )
    alg = base._replace(client={"a": base.client, "b": base.client})
    down = base.server.downlink(ROOT, base.server.init(ROOT), cohort_of([0]))
    ids = jnp.arange(2)
    states = {}
    for name in "ab":
        in_training = exchange.first_visit(alg, ROOT, down, ids, name)
        states[name] = in_training.kept["params/head/bias"]
        seen = exchange.first_visit(families.view(alg, name), ROOT, down, ids)
        chex.assert_trees_all_equal(seen, in_training)
    assert np.all(states["a"] != states["b"])


# Rounds ------------------------------------------------------------------------------


@functools.cache
def simulator(sequential=False, store="device", store_dir=None, **options):
    options = {"sampler": "uniform", "members": groups(), **options}
    return schedule.simulator(
        method(),
        tiny().table,
        tiny().pool,
        weight=tiny().table.size,
        cohort_size=3,
        sequential=sequential,
        store=store,
        store_dir=store_dir,
        **options,
    )


def rounds(sim, start, num, carry=None):
    """Runs rounds one by one, so that all runs share one program."""
    carry, infos = sim.init(ROOT) if carry is None else carry, []
    for number in range(start, start + num):
        carry, info = sim.run(ROOT, carry, number, 1, donate=True)
        infos.append(info)
    return jax.device_get((carry, infos))


def test_samples_of_each_family_need_room():
    """Of a cohort of three, three, two and three could be of the families."""
    num, table = 2**16, np.arange(2**16, dtype=np.int32).reshape(NUM_CLIENTS, -1)
    pool = jax.tree.map(np.asarray, tiny().pool)
    far = pool._replace(x=np.broadcast_to(pool.x[:1], (num, 4, 4, 1)), y=np.zeros(num))

    def build(limit, sequential=False):
        schedule.simulator(
            *(method(), clients.Table(table, np.full(NUM_CLIENTS, 1)), far),
            weight=weights(),
            cohort_size=3,
            sampler="uniform",
            members=groups(),
            sequential=sequential,
            store="host",
            pool_mb=limit,
        )

    # 0.125 MB each, those of now and those of next.
    with pytest.raises(ValueError, match=r"two cohorts of 3 in 3 families, 2\.0 MB"):
        build(1)
    build(2)
    build(1, sequential=True)


@functools.cache
def whole(sequential=False, store="device"):
    return rounds(simulator(sequential, store), 0, 3)


def arrays(host):
    """Back on the device: methods index their tables as JAX does."""
    return jax.tree.map(jnp.asarray, host)


def drawn(number, sequential):
    """The cohort of a round; its order matters if clients come one by one."""
    key = rng.stream(jax.random.fold_in(ROOT, number), "cohort")
    ids = cohorts.sample("uniform", key, NUM_CLIENTS, 3)
    order = rng.stream(key, "order")
    return np.asarray(jax.random.permutation(order, ids) if sequential else ids)


in_either_mode = pytest.mark.parametrize("sequential", [False, True])


# One after another: tests/engine/test_sequential.py.
at_once = pytest.mark.parametrize(
    "sequential", [False, pytest.param(True, marks=pytest.mark.slow)]
)


@pytest.mark.slow
@at_once
def test_device_store_host_store_and_files_agree(sequential, tmp_path):
    on_host = whole(sequential, "host")
    chex.assert_trees_all_close(whole(sequential), on_host, **CLOSE)
    in_files = simulator(sequential, "host", str(tmp_path))
    chex.assert_trees_all_equal(rounds(in_files, 0, 3), on_host)
    assert {p.name for p in tmp_path.iterdir()} == set(MEMBERS)


@pytest.mark.parametrize("store", ["device", "host"])
@at_once
def test_a_resumed_run_has_the_same_bits(sequential, store, tmp_path):
    sim = simulator(sequential, store)
    half, _ = rounds(sim, 0, 2)
    checkpoint.save(tmp_path, 2, half)
    template = schedule.abstract_carry(method(), groups())
    chex.assert_trees_all_equal_shapes_and_dtypes(template, half)
    restored = checkpoint.restore(tmp_path, template)
    carry, _ = rounds(sim, restored.round, 1, sim.load(restored.carry))
    assert tree.sha256(carry) == tree.sha256(whole(sequential, store)[0])


# In tests/algorithms/test_mh_pfedhngd.py rounds in turn are those of a loop by hand.
@pytest.mark.slow
def test_in_turn_is_a_loop_over_views():
    alg = method()
    server, rows, seen = jax.tree.map(np.array, start())
    turns = {name: _turn(families.view(alg, name), name) for name in groups().names}
    for number in range(3):
        for k in drawn(number, True):
            name = groups().names[groups().family[k]]
            i = int(groups().place[k])
            row = jax.tree.map(lambda x, i=i: x[i], rows[name])
            data = jax.tree.map(lambda x, k=k: x[k], tiny().table)
            at = jnp.int32(i), jnp.int32(number)
            server, row = turns[name](server, row, seen[name][i], at, data)
            seen[name][i] = True
            pairs = zip(jax.tree.leaves(rows[name]), jax.tree.leaves(row), strict=True)
            for x, y in pairs:
                x[i] = y
    carry, _ = whole(True)
    chex.assert_trees_all_close(tuple(carry), (server, rows, seen), **CLOSE)


def _turn(alg, name):
    """One client's exchange, by the functions of a family's view."""

    @jax.jit
    def turn(server, row, seen, at, data):
        i, number = at
        one = jnp.ones(1)
        cohort = Cohort(i[None], one, one, number, jnp.float32(NUM_CLIENTS))
        key = jax.random.fold_in(ROOT, number)
        key = jax.random.fold_in(rng.stream(key, name), i)
        down = alg.server.downlink(key, server, cohort)
        down = down._replace(own=down.own[0], round=number)
        new = alg.client.init(key, rng.stream(ROOT, "common_init"), down)
        row = jax.tree.map(lambda x, y: jnp.where(seen, x, y), row, new)
        key = jax.random.fold_in(rng.stream(key, "client_update" + name), i)
        data = ClientData(*data, tiny().pool)
        up, row, _ = alg.client.update(key, down, row, data)
        return alg.server.update(key, server, up[None], cohort)[0], row

    return turn


@in_either_mode
def test_visits_are_those_that_took_place(sequential):
    sim = simulator(sequential)
    by_hand = dict.fromkeys(groups().names, 0)
    assert sim.visits(ROOT, 0) == by_hand
    for number in range(3):
        for k in drawn(number, sequential):
            by_hand[groups().names[groups().family[k]]] += 1
    assert sim.visits(ROOT, 3) == by_hand
    assert sum(by_hand.values()) == 9 and len(set(by_hand.values())) > 1
    full = simulator(sequential, sampler="full")
    assert full.visits(ROOT, 5) == {"deep": 10, "line": 15, "norm": 15}


@at_once
def test_a_round_reports_all_families(sequential):
    carry, infos = whole(sequential)
    for number, info in enumerate(infos):
        size = tiny().table.size[drawn(number, sequential)]
        assert info["samples"] == 2 * size.sum()
        assert info["steps"] == 2 * np.sum(-(-size // BATCH))
        assert np.all(np.isfinite(info["loss"]))
    # An embedding's optimizer counts its client's visits.
    tables = carry.server.opt["tables"]
    counted = {name: int(opt[0].count.sum()) for name, opt in tables.items()}
    assert counted == simulator(sequential).visits(ROOT, 3)


# Evaluation --------------------------------------------------------------------------

# Strangers of every family, not in the families' order.
STRANGERS = np.array([2, 0, 1, 2])


@functools.cache
def populations() -> dict[str, Population]:
    """All clients in an order of their own, and four novel ones."""
    ids = np.array([4, 0, 7, 6, 5, 1, 3, 2], np.int32)
    table = clients.Table(*(x[ids] for x in tiny().table))
    novel = clients.table([np.arange(k, 9) for k in range(4)])
    late = np.arange(NUM_CLIENTS, NUM_CLIENTS + 4, dtype=np.int32)
    return {
        "pacc": Population(ids, table, table),
        "zacc": Population(late, *2 * [novel]),
    }


OPTIONS = dict(source_prior=np.array([0.2, 0.5, 0.3]), batch_size=4)


@functools.cache
def evaluator():
    return evaluate.evaluator(
        method(),
        tiny().pool,
        populations(),
        members=groups(),
        novel=STRANGERS,
        tuned=populations(),
        **OPTIONS,
    )


@functools.cache
def scores(kind: str):
    """All scores: deployed, or tuned for one epoch."""
    carry = whole()[0]
    if kind == "evaluate":
        return evaluator().evaluate(ROOT, carry, 3)
    return evaluator().tune(ROOT, carry, 3, 1)


def test_values_are_in_the_order_of_the_population():
    carry, pool = whole()[0], tiny().pool
    answer = {name: _answers(name) for name in groups().names}
    for metric, population in populations().items():
        found = scores("evaluate")[metric]
        np.testing.assert_array_equal(found["size"], population.inputs.size)
        for i, k in enumerate(population.ids):
            known = k < NUM_CLIENTS
            which = groups().family[k] if known else STRANGERS[k - NUM_CLIENTS]
            name = groups().names[which]
            place = groups().place[k] if known else groups().size(name)
            last = min(place, groups().size(name) - 1)
            row = jax.tree.map(lambda x, i=last: x[i], carry.rows[name])
            seen = known and carry.seen[name][last]
            logits = answer[name](carry.server, row, seen, np.int32(place))
            rows = population.inputs.rows[i, : population.inputs.size[i]]
            labels = np.asarray(pool.y)[rows]
            right = np.mean(np.argmax(logits[rows], 1) == labels)
            assert found["accuracy"][i] == pytest.approx(right)
            nll = -jax.nn.log_softmax(logits[rows])[np.arange(len(rows)), labels]
            assert found["loss"][i] == pytest.approx(float(nll.mean()), rel=1e-4)


def _answers(name):
    """The logits of a client of a family on all samples there are."""
    alg, pool = families.view(method(), name), tiny().pool

    @jax.jit
    def answer(server, row, seen, place):
        one = jnp.ones(1)
        cohort = Cohort(place[None], one, one, jnp.int32(3), jnp.float32(NUM_CLIENTS))
        down = alg.server.downlink(ROOT, server, cohort)
        down = down._replace(own=down.own[0], round=jnp.int32(3))
        new = alg.client.init(ROOT, rng.stream(ROOT, "common_init"), down)
        row = jax.tree.map(lambda x, y: jnp.where(seen, x, y), row, new)
        nothing = ClientData(jnp.zeros(1, jnp.int32), jnp.int32(0), pool)
        adapted = alg.client.adapt(ROOT, down, row, AdaptData(nothing, nothing))
        x = (pool.x / 255.0 - pool.mean) / pool.std
        return alg.client.model.predict(alg.client.deploy(down, adapted), x)

    return answer


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        # The network with statistics stands for the others, and what is deployed is
        # above, by hand.
        ("tune", ("norm",)),
        *(
            pytest.param(kind, tuple(MEMBERS), marks=pytest.mark.slow)
            for kind in ("evaluate", "tune")
        ),
    ],
)
def test_scores_are_those_of_each_family_alone(kind, names):
    carry, compared = whole()[0], 0
    for name in names:
        i = groups().names.index(name)
        alone, where = {}, {}
        for metric, population in populations().items():
            whose = np.concatenate([groups().family, STRANGERS])[population.ids]
            where[metric] = np.flatnonzero(whose == i)
            ids = population.ids[where[metric]]
            inside = np.where(
                ids < NUM_CLIENTS,
                groups().place[ids % NUM_CLIENTS],
                groups().size(name),
            )
            tables = (
                clients.Table(*(x[where[metric]] for x in table))
                for table in population[1:]
            )
            alone[metric] = Population(inside.astype(np.int32), *tables)
        evaluator = evaluate.evaluator(
            families.view(method(), name), tiny().pool, alone, tuned=alone, **OPTIONS
        )
        stored = ({families.ALONE: x[name]} for x in (carry.rows, carry.seen))
        of = schedule.Carry(carry.server, *stored)
        expected = (
            evaluator.evaluate(ROOT, of, 3)
            if kind == "evaluate"
            else evaluator.tune(ROOT, of, 3, 1)
        )
        for metric, columns in expected.items():
            assert columns.keys() == scores(kind)[metric].keys()
            for column, values in columns.items():
                found = scores(kind)[metric][column][where[metric]]
                np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)
                compared += 1
    assert compared > 4 * len(names)


def test_deployed_networks_are_those_that_are_scored():
    carry, pool = whole()[0], tiny().pool
    for metric, population in populations().items():
        train, inputs = (ClientData(*table, pool) for table in population[1:])
        everybody = evaluator().deploy(ROOT, carry, 3, population.ids, inputs, train)
        assert len(everybody) == len(population.ids)
        for i, found in enumerate(everybody):
            rows = population.inputs.rows[i, : population.inputs.size[i]]
            log_probs = jax.nn.log_softmax(found.logits)
            nll = -log_probs[np.arange(len(rows)), np.asarray(pool.y)[rows]].mean()
            expected = scores("evaluate")[metric]["loss"][i]
            assert float(nll) == pytest.approx(expected, rel=1e-5)
            who = int(population.ids[i])
            family = [*groups().family, *STRANGERS][who]
            network = tree.count(found.network["params"])
            assert (
                network == {"deep": 83, "line": 51, "norm": 53}[groups().names[family]]
            )
    with pytest.raises(ValueError, match="client 12 belongs to no family"):
        evaluator().deploy(ROOT, carry, 3, [12], data_of_nobody())


def data_of_nobody():
    return ClientData(np.zeros((1, 1), np.int32), np.ones(1, np.int32), tiny().pool)


def test_families_of_one_structure_have_programs_of_their_own():
    same, pool = fedavg(tiny().model, local=make_local()), tiny().pool
    model = same.client.model
    upside_down = model._replace(apply=lambda *args: Outputs(-model.predict(*args)))
    other = same._replace(client=same.client._replace(model=upside_down))
    alg = over_families.averaged({"a": same, "b": other})
    members = families.families({"a": np.arange(4), "b": np.arange(4, NUM_CLIENTS)})
    nothing = {name: jnp.zeros(4, bool) for name in "ab"}
    server = alg.server.init(ROOT)
    rows = {name: comm.describe(families.view(alg, name)).client for name in "ab"}
    rows = {name: stores.zeros(spec, 4)[0] for name, spec in rows.items()}
    carry = schedule.Carry(server, rows, nothing)
    table = clients.Table(*(np.stack([x[4]] * 2) for x in tiny().table))
    both = np.array([0, 4], np.int32)  # one of each family, the same samples
    found = evaluate.evaluator(
        *(alg, pool, {"pacc": Population(both, table, table)}),
        members=members,
        **OPTIONS,
    )
    a, b = found.deploy(ROOT, carry, 0, both, ClientData(*table, pool))
    np.testing.assert_array_equal(a.logits, -b.logits)
    # Never the same class.
    assert found.evaluate(ROOT, carry, 0)["pacc"]["accuracy"].sum() <= 1


def test_tuning_lowers_the_loss_on_what_it_trains_on():
    for metric in ("pacc", "zacc"):
        before, after = (scores(kind)[metric]["loss"] for kind in ("evaluate", "tune"))
        assert np.mean(after) < np.mean(before)


def test_strangers_of_a_family_get_one_network():
    # The two of "norm" see overlapping images; their networks are equal.
    distance = scores("evaluate")["zacc"]["distance_swapped"]
    assert np.all(distance[[0, 3]] == 0)
    assert scores("evaluate")["pacc"]["distance_swapped"].min() > 0
