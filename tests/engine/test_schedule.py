"""The simulator as a notebook uses it: nothing of the caller's is destroyed."""

import functools
import hashlib
import mmap
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import NUM_CLIENTS, make_local, method, tiny, weights

from hyperjax import hosts, tree
from hyperjax.algorithms.mh_pfedhn import mh_pfedhn
from hyperjax.data.clients import Table
from hyperjax.engine import cohorts, comm, families, schedule, sharding, stores

ROOT = jax.random.key(3)
# "fedper" keeps a part on its clients; see the laws for all others.
METHOD = "fedper"


def build(**options):
    given = dict(table=tiny().table, pool=tiny().pool)
    given |= {k: options.pop(k) for k in tuple(options) if k in given}
    options = dict(weight=weights(), cohort_size=3, sampler="uniform") | options
    return schedule.simulator(method(METHOD), **given, **options)


@functools.cache
def simulator(kind):
    options = {
        "device": {},
        "mesh": dict(mesh=sharding.client_mesh(4)),
        "host": dict(store="host"),
    }
    return build(**options[kind])


def digest(carry):
    return tree.sha256(jax.device_get(carry))


@pytest.mark.parametrize(
    "kind", ["device", pytest.param("mesh", marks=pytest.mark.slow), "host"]
)
def test_a_cell_may_be_run_twice(kind):
    sim = simulator(kind)
    start = sim.init(ROOT)
    before = digest(start)
    once, info = sim.run(ROOT, start, 0, 2)
    assert digest(start) == before != digest(once)
    again, info_again = sim.run(ROOT, start, 0, 2)
    assert digest(again) == digest(once)
    chex.assert_trees_all_equal(info, info_again)
    # And with another state in between, from where the first left off.
    sim.run(ROOT, once, 2, 2)
    assert digest(once) == digest(again)


@pytest.mark.parametrize("kind", ["device", "host"])
def test_what_a_cell_shows_is_a_line(kind):
    sim = simulator(kind)
    assert (
        repr(sim) == f"Simulator(clients' state on the {kind}, {sim.width} at a time)"
    )
    carry = sim.init(ROOT)
    server, own = tree.count(carry.server), tree.count(carry.rows)
    expected = f"{server:,} numbers of the server and {own:,} of {NUM_CLIENTS} clients"
    assert repr(carry) == f"Carry({expected})"


def test_both_stores_count_the_same_arithmetic():
    works = []
    for kind in ("device", "host"):
        sim = simulator(kind)
        sim.run(ROOT, sim.init(ROOT), 0, 2)
        works.append(sim.program.work)
    assert works[0].step == works[1].step > 0
    assert works[1].round == pytest.approx(works[0].round, rel=0.01)


@pytest.mark.parametrize("kind", ["device", "mesh", "host"])
def test_clients_are_by_family_even_without_families(kind):
    carry = simulator(kind).init(ROOT)
    assert list(carry.rows) == list(carry.seen) == [families.ALONE]
    template = schedule.abstract_carry(method(METHOD), NUM_CLIENTS)
    chex.assert_trees_all_equal_shapes_and_dtypes(carry, template)
    # Nobody reads of a family where there is none.
    head = "params/head/kernel"
    assert f"rows/kept/{head}" in tree.paths(carry)


@pytest.mark.parametrize("kind", ["device", "mesh", "host"])
def test_donating_gives_the_same_bits_from_the_same_program(kind):
    sim = simulator(kind)
    kept, _ = sim.run(ROOT, sim.init(ROOT), 0, 2)
    seconds = sim.program.seconds
    start = sim.init(ROOT)
    given, _ = sim.run(ROOT, start, 0, 2, donate=True)
    assert digest(given) == digest(kept)
    assert sim.program.seconds == seconds
    # A carry that was not kept is gone, as its caller asked.
    arrays = [x for x in jax.tree.leaves(start.server) if isinstance(x, jax.Array)]
    assert all(x.is_deleted() for x in arrays)


def test_a_state_of_host_arrays_is_a_state():
    sim = simulator("device")
    start = jax.device_get(sim.init(ROOT))
    before = digest(start)
    found, _ = sim.run(ROOT, start, 0, 2)
    assert digest(start) == before
    assert digest(found) == digest(sim.run(ROOT, sim.init(ROOT), 0, 2)[0])


def test_a_memory_mapped_store_is_never_changed_unasked(tmp_path):
    sim = build(store="host", store_dir=str(tmp_path))
    start = sim.init(ROOT)
    before = digest(start)
    with pytest.raises(ValueError, match=r"memory-mapped store .* donate=True"):
        sim.run(ROOT, start, 0, 1)
    assert digest(start) == before


def test_a_seed_stands_for_the_root_everywhere():
    sim = simulator("device")
    assert digest(sim.init(3)) == digest(sim.init(ROOT))
    found, _ = sim.run(3, sim.init(3), 0, 2)
    raw, _ = sim.run(jax.random.PRNGKey(3), sim.init(jax.random.PRNGKey(3)), 0, 2)
    assert digest(found) == digest(raw) == digest(sim.run(ROOT, sim.init(3), 0, 2)[0])
    assert sim.visits(3, 2) == sim.visits(ROOT, 2)
    for call in (sim.init, lambda root: sim.run(root, sim.init(3), 0, 1)):
        with pytest.raises(ValueError, match=r"root=0\.5 is no key"):
            call(0.5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 0), "num_rounds=0 must be at least 1"),
        ((0, 1.5), "num_rounds=1.5 must be a whole number"),
        ((-1, 1), "start=-1 must be at least 0"),
    ],
)
def test_rounds_are_whole_numbers(arguments, match):
    sim = simulator("device")
    with pytest.raises(ValueError, match=match):
        sim.run(ROOT, sim.init(ROOT), *arguments)


def test_a_state_of_something_else_is_refused():
    sim = simulator("device")
    carry = sim.init(ROOT)
    few = jax.tree.map(lambda x: x[:5], carry.rows)
    gone = sim.init(ROOT)
    sim.run(ROOT, gone, 0, 2, donate=True)
    for given, match in (
        ((1, 2), "carry is tuple; accepted: what init"),
        (carry._replace(server=()), "carry is the state of another method"),
        (carry._replace(rows=few), r"carry\.rows.* \(5, .*that of other clients"),
        (gone, "was donated to an earlier run"),
    ):
        with pytest.raises(ValueError, match=match):
            sim.run(ROOT, given, 0, 2)


def table(**fields):
    good = Table(*(np.array(x) for x in tiny().table))
    return good._replace(
        **{k: change(getattr(good, k)) for k, change in fields.items()}
    )


ONES = np.ones(NUM_CLIENTS)
FAULTS = {
    "weights of others": (
        dict(weight=np.ones(3)),
        r"weight is float64 of shape \(3,\)",
    ),
    "a scalar weight": (dict(weight=1.0), r"weight .* of shape \(\)"),
    "a column of weights": (dict(weight=ONES[:, None]), r"weight .* of shape \(8, 1\)"),
    "negative": (dict(weight=ONES - 2 * np.eye(8)[3]), r"weight of client 3 is -1\.0"),
    "nan": (dict(weight=ONES / np.r_[np.ones(7), np.nan]), "weight of client 7 is nan"),
    "infinite": (dict(weight=ONES * np.inf), "weight of client 0 is inf"),
    "all zero": (dict(weight=0 * ONES), "weight is zero for all clients"),
    "words": (dict(weight=["1"] * 8), "weight is <U1 of shape"),
    "truth": (dict(weight=ONES > 0), "weight is bool of shape"),
    "none": (dict(weight=None), "weight is object of shape"),
    "mapper": (
        dict(mapper="pmap"),
        "mapper='pmap' is unknown; accepted: 'map', 'vmap'",
    ),
    "mapper auto": (
        dict(mapper="auto"),
        "mapper='auto' is unknown .see resolve_mapper",
    ),
    "mapper block": (dict(mapper="block"), "mapper='block' .*a block size instead"),
    "block of none": (dict(mapper=0), "mapper=0 must be at least 1"),
    "truth as block": (dict(mapper=True), "mapper=True must be a whole number"),
    "part of a client": (dict(mapper=1.5), r"mapper=1\.5 must be a whole number"),
    "no mapper": (dict(mapper=None), "mapper=None must be a whole number"),
    "nobody": (dict(cohort_size=0), "cohort_size=0 must be between 1 and the 8"),
    "more than all": (dict(cohort_size=9), "cohort_size=9 must be between 1 and the 8"),
    "half a client": (
        dict(cohort_size=2.5),
        r"cohort_size=2\.5 must be a whole number",
    ),
    "sampler": (dict(sampler="unifrom"), "sampler='unifrom' .* mean 'uniform'"),
    "store": (dict(store="disk"), "store='disk' is unknown"),
    "files of no store": (dict(store_dir="x"), "store_dir='x' goes with store='host'"),
    "other images": (
        dict(pool=tiny().pool._replace(x=jnp.zeros((44, 28, 28, 1), jnp.uint8))),
        r"pool has samples of shape \(28, 28, 1\); the network takes \(4, 4, 1\)",
    ),
    "rows of others": (
        dict(table=table(rows=lambda x: x + 40)),
        "rows 40 to 83 of a pool",
    ),
    "negative rows": (
        dict(table=table(rows=lambda x: x - 1)),
        "rows -1 to 42 of a pool",
    ),
    "too large": (
        dict(table=table(size=lambda x: x + 1)),
        "3 to 10 samples; .* 0 to 9",
    ),
    "sizes of others": (
        dict(table=table(size=lambda x: x[:3])),
        r"sizes of shape \(3,\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_makes_no_sense_is_refused_by_name(fault):
    fields, match = FAULTS[fault]
    with pytest.raises(ValueError, match=match):
        build(**fields)


@pytest.mark.parametrize("weight", [[1] * NUM_CLIENTS, weights(), np.eye(8)[2]])
def test_weights_may_be_any_numbers(weight):
    assert build(weight=weight).init(ROOT)


# What is remembered of a method ------------------------------------------------------


def test_a_view_of_a_family_is_one_and_is_described_once():
    network = tiny().model
    traced = []

    def init(key):
        traced.append(key)
        return network.init(key)

    alg = mh_pfedhn(
        {"a": network._replace(init=init), "b": network},
        local=make_local(),
        family_sizes={"a": 5, "b": 3},
        output_size=32,
        embedding_size=4,
        hidden_size=4,
        num_layers=1,
    )
    assert families.view(alg, "a") is families.view(alg, "a")
    assert families.view(alg, "a") is not families.view(alg, "b")
    first = comm.describe(families.view(alg, "a"))
    count = len(traced)
    schedule.abstract_carry(alg, families.families({"a": range(5), "b": range(5, 8)}))
    assert comm.describe(families.view(alg, "a")) is first
    assert len(traced) == count
    with pytest.raises(ValueError, match=r"families \['a', 'b'\].*families.view"):
        comm.describe(alg)


@pytest.mark.parametrize("num", [cohorts.SORTED + 1, 5000, 2**16, 10**6])
def test_cohorts_of_many_clients_are_of_different_ones(num):
    draw = jax.jit(lambda key: cohorts.sample("uniform", key, num, 300))
    ids = np.asarray(draw(ROOT))
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < num
    assert (np.diff(ids) > 0).all()
    other = np.asarray(draw(jax.random.key(4)))
    assert len(np.intersect1d(ids, other)) < 60  # some 18 of 300 at the smallest


def test_the_order_of_many_clients_is_one_of_all_and_even():
    num = 1000
    whole = jax.jit(lambda key: cohorts._places(key, num, num))
    assert np.sort(whole(ROOT)).tolist() == list(range(num))
    few = jax.jit(jax.vmap(lambda key: cohorts._places(key, num, 100)))
    drawn = np.asarray(few(jax.random.split(ROOT, 2000)))
    counts = np.bincount(drawn.ravel(), minlength=num)
    # Each of 1,000 is in 2,000 cohorts of 100 as often as a coin of 1/10 says: the
    # chi-square has 999 degrees of freedom.
    chi_square = ((counts - 200) ** 2 / (200 * 0.9)).sum()
    assert 800 < chi_square < 1200
    pairs = (drawn == 0).any(1) & (drawn == 1).any(1)
    assert 5 < pairs.sum() < 40  # 19.8 expected


def test_a_large_host_store_takes_memory_as_it_is_written():
    spec = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    rows, seen = stores.host_zeros(spec, 2000)
    assert rows["x"].shape == (2000, 1000) and rows["x"].dtype == np.float32
    assert not rows["x"].any()
    ids = np.array([5, 1999, 2000])
    new, alive = {"x": np.ones((3, 1000), np.float32)}, np.array([True, True, False])
    stores.host_scatter(rows, seen, ids, new, alive)
    assert seen.nonzero()[0].tolist() == [5, 1999]
    assert rows["x"].sum(1).nonzero()[0].tolist() == [5, 1999]
    assert stores.host_gather(rows, seen, ids[:2])[0]["x"].min() == 1


def test_a_process_reads_and_writes_the_rows_it_holds():
    rows = {"x": np.arange(12.0).reshape(6, 2)}
    seen, ids = np.array([True, True, False, True, True, True]), np.array([1, 4, 6])
    found, known = stores.host_gather(rows, seen, ids, range(3))
    np.testing.assert_array_equal(found["x"], [[2, 3], [0, 0], [0, 0]])
    np.testing.assert_array_equal(known, seen[[1, 4, 5]])
    new = {"x": -np.ones((3, 2))}
    before = rows["x"].copy()
    alive = np.array([True, True, False])
    stores.host_scatter(rows, seen, ids, new, alive, range(3, 6))
    np.testing.assert_array_equal(rows["x"][:4], before[:4])
    np.testing.assert_array_equal(rows["x"][4], [-1, -1])
    assert seen.tolist() == [True, True, False, True, True, True]


def test_rows_that_processes_hold_are_added_up_to_the_bit():
    mesh = sharding.client_mesh(4, 2)
    numbers = np.array([[-0.0, np.nan], [1e-45, 2.0], [np.inf, -3.0]], np.float32)
    state = {"x": numbers, "n": np.array([-1, 2, 3], np.int32)}
    state["seen"] = np.array([True, False, True])
    parts = hosts.put_mine(state, sharding.in_parts(mesh), mesh.size)
    run = jax.jit(stores._sum_of_parts, out_shardings=sharding.everywhere(mesh))
    for name, x in run(parts).items():
        assert x.dtype == state[name].dtype
        assert np.asarray(x).tobytes() == state[name].tobytes()
    # What is sent is a cohort, whoever there is beside it.
    text = run.lower(parts).compile().as_text()
    sent = re.findall(r"= (.*?) (?:all-|reduce-scatter|collective-)[a-z-]*\(", text)
    assert sent and all("[2," not in shapes for shapes in sent)


STATE = "scaffold"  # a table of parameters for every client


@functools.cache
def population(devices, num=5004):
    """A simulator of many clients, cohorts of four."""
    rows, size = tiny().table
    table = Table(np.resize(rows, (num, rows.shape[1])), np.resize(size, num))
    return schedule.simulator(
        *(method(STATE), table, tiny().pool),
        weight=np.ones(num),
        cohort_size=4,
        sampler="uniform",
        mesh=sharding.client_mesh(4, devices),
    )


def test_of_clients_state_the_cohorts_travels_alone():
    sim = population(2)
    start, kept = sim.init(ROOT), families.ALONE
    for x in jax.tree.leaves((start.rows, start.seen, sim.given[0])):
        assert [shard.data.shape[0] for shard in x.addressable_shards] == [2502, 2502]
    args = ROOT, start, jnp.arange(2), *sim.given
    args = sharding.replicate(args[0], sim.program.mesh), *args[1:]
    text = jax.jit(sim.function, donate_argnums=(1,)).lower(*args).compile().as_text()
    sent = re.findall(r"= (.*?) (?:all-|reduce-scatter|collective-)[a-z-]*\(", text)
    assert any("[4,16,4]" in shapes for shapes in sent)  # rows of a kernel
    assert not [shapes for shapes in sent if re.search(r"\[(5004|2502)\b", shapes)]
    # And stays where it is from call to call.
    end, _ = sim.run(ROOT, start, 0, 2)
    end, _ = sim.run(ROOT, end, 2, 2)
    assert end.seen[kept].sharding == start.seen[kept].sharding
    again, _ = sim.run(ROOT, sim.load(jax.device_get(end)), 4, 2)
    end, _ = sim.run(ROOT, end, 4, 2)
    assert digest(again) == digest(end)
    # On one device the results are the same.
    alone, _ = population(1).run(ROOT, population(1).init(ROOT), 0, 6)
    chex.assert_trees_all_close(jax.device_get(end), jax.device_get(alone), atol=1e-5)


@pytest.mark.parametrize("num", [8, 9])
def test_rows_of_owners_come_and_go_bit_by_bit(num):
    mesh = sharding.client_mesh(8, 4)
    owners = sharding.owners(num, mesh)
    assert (owners is None) == (num == 9)
    x = np.arange(3.0 * num, dtype=np.float32).reshape(num, 3)
    x[1], x[2, 1] = -0.0, np.nan
    rows, seen = {"x": x, "n": np.arange(num)}, np.arange(num) % 2 == 0
    ids = jnp.array([1, 2, 7, num, 0])
    if owners is not None:
        rows, seen = jax.device_put((rows, seen), sharding.in_parts(owners))
    rows, seen = jax.tree.map(jnp.asarray, (rows, seen))
    found = jax.jit(functools.partial(stores.gather, owners=owners))(rows, seen, ids)
    assert digest(found) == digest(
        jax.tree.map(lambda x: np.asarray(x)[[1, 2, 7, num - 1, 0]], (rows, seen))
    )
    new = jax.tree.map(lambda x: x + 1, found[0])
    alive = jnp.array([True, True, False, False, False])
    scatter = jax.jit(functools.partial(stores.scatter, owners=owners))
    written = scatter(rows, seen, ids, new, alive)
    expected = stores.scatter(
        *jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x)), (rows, seen, ids, new, alive)
        )
    )
    assert digest(written) == digest(expected)


def resident():
    """MB of the process's memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE / 2**20


@pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="Linux counts so")
def test_a_large_host_store_takes_no_memory_as_it_is_read():
    spec = {"x": jax.ShapeDtypeStruct((2**15,), jnp.float32)}
    rows, seen = stores.host_zeros(spec, 1000)  # 125 MB
    rows["x"][7], seen[7], before = 1, True, resident()
    tree.sha256((rows, seen))
    assert resident() - before < 30
    # As it is of bytes copied.
    small = {"x": rows["x"][6:9]}
    whole = hashlib.sha256(b"x|<f4|(3, 32768)|" + small["x"].tobytes())
    assert tree.sha256(small) == whole.hexdigest()


def test_a_host_store_without_room_is_refused(monkeypatch):
    def full(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    spec = {"x": jax.ShapeDtypeStruct((2**15,), jnp.float32)}
    with pytest.raises(ValueError, match=r"1,000 clients, 0\.1 GB.*memory_map=True"):
        stores.host_zeros(spec, 1000)


# Samples on the host -----------------------------------------------------------------


def on_host(tmp_path):
    """The pool, its samples in a file that is mapped to memory."""
    pool = jax.tree.map(np.asarray, tiny().pool)
    np.save(tmp_path / "x.npy", pool.x)
    return pool._replace(x=np.load(tmp_path / "x.npy", mmap_mode="r"))


@pytest.mark.parametrize("options", [{}, dict(mesh=4), dict(sequential=True)])
def test_samples_that_travel_change_no_bit(options, tmp_path):
    if "mesh" in options:
        options = dict(mesh=sharding.client_mesh(4))
    mine = build(store="host", **options) if options else simulator("host")
    far = build(store="host", pool=on_host(tmp_path), **options)
    expected, info = mine.run(ROOT, mine.init(ROOT), 0, 2)
    found, info_far = far.run(ROOT, far.init(ROOT), 0, 2)
    assert digest(found) == digest(expected)
    chex.assert_trees_all_equal(info_far, info)


def test_samples_that_do_not_fit_are_refused(tmp_path):
    far, num = on_host(tmp_path), 2**16
    big = far._replace(x=np.broadcast_to(far.x[:1], (num, 4, 4, 1)), y=np.zeros(num))
    table = Table(np.arange(num, dtype=np.int32).reshape(8, -1), np.full(8, num // 8))
    with pytest.raises(ValueError, match=r"pool_mb=1 .* all samples, 1\.0 MB|store"):
        build(pool=big, table=table, pool_mb=1)
    # 3 of 8 clients, those of now and those of next: three quarters of 1 MB.
    build(pool=big, table=table, pool_mb=1, store="host")
    with pytest.raises(ValueError, match=r"pool_mb=1 .* two cohorts of 5, 1\.2 MB"):
        build(pool=big, table=table, pool_mb=1, store="host", cohort_size=5)
    there = tiny().pool._replace(x=jnp.zeros((2**17, 4, 4, 1), jnp.uint8))
    with pytest.raises(ValueError, match=r"pool_mb=1 .* all samples, 2\.0 MB.* host"):
        build(pool=there, pool_mb=1)
    with pytest.raises(ValueError, match=r"on the host.*accepted: store='host'"):
        build(pool=far)


@pytest.mark.parametrize("kind", ["device", "host"])
def test_nobody_changes_but_participants(kind):
    sim = simulator(kind)
    carry = jax.device_get(sim.init(ROOT))
    for start, num in ((0, 2), (2, 2)):
        new = jax.device_get(sim.run(ROOT, sim.load(carry), start, num)[0])
        seen = new.seen[families.ALONE]
        (ids,) = sim.participants(ROOT, start, num).values()
        assert 3 <= len(ids) < NUM_CLIENTS and seen[ids].all(), start
        others = np.setdiff1d(np.arange(NUM_CLIENTS), ids)
        for x, y in zip(*map(jax.tree.leaves, (carry[1:], new[1:])), strict=True):
            np.testing.assert_array_equal(x[others], y[others])
        carry = new
