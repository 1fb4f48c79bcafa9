"""The laws of the contract, for every method found in the package."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import (
    METHODS,
    NUM_CLIENTS,
    SLOW,
    SMALL,
    STACKS,
    THOROUGH,
    build,
    make_local,
    messages,
    method,
    tiny,
    weights,
)

from hyperjax import registry, rng, tree
from hyperjax.engine import checkpoint, comm, exchange, schedule, sharding, stores
from hyperjax.types import ClientData, Cohort

ROOT = jax.random.key(0)
CLOSE = dict(rtol=2e-4, atol=2e-5)  # different order of sums, several steps


def stacks(quick):
    """Parametrises a law; one process tests all laws of a stack, compiling once."""

    def param(stack):
        marks = [pytest.mark.xdist_group(stack)]
        if stack in SLOW or stack not in quick:
            marks.append(pytest.mark.slow)
        return pytest.param(stack, marks=marks)

    return pytest.mark.parametrize("stack", [param(stack) for stack in STACKS])


every_method = stacks(STACKS)
every_method_at_length = stacks(THOROUGH)  # laws that take programs of their own
every_client_at_length = stacks(THOROUGH[:1])  # and know nothing of the server


@functools.cache
def start(stack: str):
    """Server state and stored rows before the first exchange."""
    alg = method(stack)
    # Step by step: what draws numbers takes long to compile, and methods draw alike.
    server = alg.server.init(rng.stream(ROOT, "common_init"))
    rows, seen = stores.zeros(comm.describe(alg).client, NUM_CLIENTS)
    return server, rows, seen


def cohort_of(ids, active=None, width=NUM_CLIENTS) -> Cohort:
    """A cohort padded to one width, so that tests share compiled programs."""
    ids = np.asarray(ids, np.int32)
    active = np.ones(len(ids)) if active is None else active
    active = np.pad(np.asarray(active, np.float32), (0, width - len(ids)))
    ids = np.pad(ids, (0, width - len(ids)), constant_values=NUM_CLIENTS)
    active = jnp.asarray(np.where(ids < NUM_CLIENTS, active, 0.0), jnp.float32)
    ids = jnp.asarray(ids)
    weight = weights().at[ids].get(mode="clip")
    return Cohort(ids, active, weight, jnp.int32(0), jnp.float32(NUM_CLIENTS))


def data_of(ids) -> ClientData:
    """The data of a cohort; padding shows the last client."""
    place = np.minimum(np.asarray(ids), NUM_CLIENTS - 1)
    rows, size = tiny().table
    return ClientData(jnp.asarray(rows[place]), jnp.asarray(size[place]), tiny().pool)


SENT = {}  # stack -> what one client was sent and sent back, while that was traced


@functools.cache
def jitted(stack: str, mapper="map", mesh=None):
    alg = method(stack)

    def update(key, down, client, data):
        uplink, *rest = alg.client.update(key, down, client, data)
        sent = (down.shared, down.own), uplink
        SENT[stack] = jax.tree.map(jax.typeof, sent)
        return uplink, *rest

    overheard = alg._replace(client=alg.client._replace(update=update))
    return jax.jit(exchange.make_exchange(overheard, mapper, mesh))


def one_exchange(stack, ids, active=None, *, state=None, width=NUM_CLIENTS, run=None):
    """Runs an exchange; returns (server, rows [N], seen, info)."""
    server, rows, seen = state or start(stack)
    cohort = cohort_of(ids, active, width)
    got, was_seen = stores.gather(rows, seen, cohort.ids)
    run = run or jitted(stack)
    server, new, info = run(ROOT, server, got, was_seen, data_of(cohort.ids), cohort)
    rows, seen = stores.scatter(rows, seen, cohort.ids, new, cohort.active > 0)
    return server, rows, seen, info


def finite(state) -> bool:
    """Whether all is finite; by NumPy, which compiles nothing."""
    numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.number)]
    return all(np.isfinite(x).all() for x in numbers)


IDS = (5, 1, 6, 3)


@every_method
def test_equal_inputs_give_equal_bits_and_arguments_stay(stack):
    before = tree.sha256(start(stack))
    first, second = one_exchange(stack, IDS), one_exchange(stack, IDS)
    assert tree.sha256(first) == tree.sha256(second)
    assert tree.sha256(start(stack)) == before


@every_method
def test_training_changes_the_server_and_stays_finite(stack):
    server, rows, _, info = one_exchange(stack, IDS)
    # A method without a server's knowledge changes its clients.
    assert tree.sha256((server, rows)) != tree.sha256(start(stack)[:2])
    assert finite((server, rows, info))


@every_method
def test_order_of_the_cohort_does_not_matter(stack):
    chex.assert_trees_all_close(
        one_exchange(stack, IDS), one_exchange(stack, sorted(IDS)), **CLOSE
    )


@every_method
def test_padding_in_front_changes_nothing(stack):
    in_front = (NUM_CLIENTS, NUM_CLIENTS, *IDS)
    chex.assert_trees_all_close(
        one_exchange(stack, IDS), one_exchange(stack, in_front), **CLOSE
    )


@every_method_at_length
def test_a_cohort_without_padding_is_the_same(stack):
    without = one_exchange(stack, IDS, width=len(IDS))
    chex.assert_trees_all_close(without, one_exchange(stack, IDS), **CLOSE)


@every_client_at_length
def test_a_wider_index_table_changes_nothing(stack):
    alg, pool, table = method(stack), tiny().pool, tiny().table
    server = start(stack)[0]
    down = alg.server.downlink(ROOT, server, cohort_of([3], width=1))
    own = jax.tree.map(lambda x: x[0], down.own)
    down = down._replace(own=own, round=jnp.int32(0))
    client = alg.client.init(ROOT, rng.stream(ROOT, "common_init"), down)

    def update(rows):
        data = ClientData(jnp.asarray(rows), jnp.int32(table.size[3]), pool)
        return jax.jit(alg.client.update)(ROOT, down, client, data)

    wide = np.pad(table.rows[3], (0, 9))
    chex.assert_trees_all_close(update(table.rows[3]), update(wide), **CLOSE)


@every_method_at_length
def test_one_after_another_and_all_at_once_agree(stack):
    run = jitted(stack, "vmap")
    chex.assert_trees_all_close(
        one_exchange(stack, IDS), one_exchange(stack, IDS, run=run), **CLOSE
    )


@every_client_at_length
def test_blocks_of_three_agree(stack):
    run = jitted(stack, 3)
    chex.assert_trees_all_close(
        one_exchange(stack, IDS), one_exchange(stack, IDS, run=run), **CLOSE
    )


@pytest.mark.slow
def test_blocks_are_of_clients_of_about_a_size(monkeypatch):
    sizes = []

    def untrained(fn, *_):
        def run(mapped, shared):
            sizes.append(mapped.size.tolist())
            like = jax.eval_shape(jax.vmap(fn, (0, None)), mapped, shared)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

        return run

    monkeypatch.setattr(sharding, "map_clients", untrained)
    ids, of_two = range(NUM_CLIENTS), sharding.client_mesh(NUM_CLIENTS, 2)
    for plan in (("map", None), (3, None), (3, of_two)):
        run = exchange.make_exchange(method("fedavg"), *plan)
        one_exchange("fedavg", tuple(ids), run=run)
    drawn, ordered, dealt = sizes
    assert drawn == tiny().table.size.tolist() != ordered
    assert ordered == sorted(drawn, reverse=True)
    assert dealt == ordered[::2] + ordered[1::2]


# Of a mean, and of sums of the server's own; one at a time is a block of one.
@stacks(("fedavg", "scaffold"))
@pytest.mark.parametrize("mapper", [pytest.param("map", marks=pytest.mark.slow), 2])
def test_summing_up_as_clients_finish_agrees(stack, mapper):
    alg = method(stack)
    if not alg.server.mean_only and alg.server.sums is None:
        pytest.skip("the server asks for more than a mean")
    run = jax.jit(exchange.make_exchange(alg, mapper, streaming=True))
    ids = (NUM_CLIENTS, *IDS)  # five lanes: blocks of two leave one over
    chex.assert_trees_all_close(
        one_exchange(stack, ids, width=5, run=run), one_exchange(stack, IDS), **CLOSE
    )


def test_whose_uplinks_may_be_summed_up():
    servers = {s: method(s).server for s in METHODS}
    mean = {s for s, server in servers.items() if server.mean_only}
    summed = mean | {s for s, server in servers.items() if server.sums}
    assert {"fedavg", "fedprox", "fedbn", "fedrep", "ditto", "moon"} < summed
    assert {"hyperfedzero", "hyperfednet", "opt1"} < summed
    # These ask for other means too.
    assert {"scaffold", "feddyn", "fednova"} == summed - mean
    # And these for the clients one by one.
    for name in ("fedamp", "fedfomo", "fedgen"):
        assert name not in summed
    for name in ("fedjets", "fedproto", "pfedhn", "mh_pfedhn", "mh_pfedhngd"):
        assert name not in summed


def test_what_is_summed_up_does_not_wait_in_memory():
    alg = method("fedavg")
    server, rows, seen = start("fedavg")

    def temporary(num, streaming):
        ids = np.arange(num) % NUM_CLIENTS
        cohort = cohort_of(ids, width=num)
        got = stores.gather(rows, seen, cohort.ids)
        run = jax.jit(exchange.make_exchange(alg, streaming=streaming))
        compiled = run.lower(ROOT, server, *got, data_of(ids), cohort).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    uplink = 4 * tree.count(server.theta)
    # A client more is its key and its place, not what it sends.
    assert temporary(64, True) - temporary(16, True) < 48 * uplink / 8
    assert temporary(64, False) > 64 * uplink


@every_method_at_length
def test_one_device_and_four_agree(stack):
    mesh = sharding.client_mesh(NUM_CLIENTS)
    assert mesh.size == 4
    run = jitted(stack, "map", mesh)
    chex.assert_trees_all_close(
        one_exchange(stack, IDS), one_exchange(stack, IDS, run=run), **CLOSE
    )


@every_method
def test_a_drop_out_counts_as_absent(stack):
    dropped = one_exchange(stack, (5, 1, 7), active=(1, 1, 0))
    absent = one_exchange(stack, (5, 1))
    chex.assert_trees_all_close(dropped, absent, **CLOSE)


@every_method_at_length
def test_nan_of_an_inactive_client_reaches_nobody(stack):
    alg = method(stack)

    def update(key, down, client, data):
        out = alg.client.update(key, down, client, data)
        broken = data.size == 0  # only padding and drop-outs have no samples here
        return jax.tree.map(lambda x: jnp.where(broken, jnp.nan, x), out)

    poisoned = alg._replace(client=alg.client._replace(update=update))
    run = jax.jit(exchange.make_exchange(poisoned))
    out = one_exchange(stack, (5, 1, 7), active=(1, 1, 0), run=run)
    assert finite(out)
    chex.assert_trees_all_close(out, one_exchange(stack, (5, 1)), **CLOSE)


@every_method
def test_absent_clients_keep_their_bits(stack):
    state = one_exchange(stack, range(NUM_CLIENTS))[:3]
    _, rows, _, _ = one_exchange(stack, (*IDS, NUM_CLIENTS), state=state)
    absent = np.setdiff1d(np.arange(NUM_CLIENTS), IDS)
    before = jax.tree.map(lambda x: np.asarray(x)[absent], state[1])
    after = jax.tree.map(lambda x: np.asarray(x)[absent], rows)
    chex.assert_trees_all_equal(before, after)


@every_method
def test_state_keeps_its_structure_and_nothing_retraces(stack):
    server, rows, seen, _ = one_exchange(stack, IDS)
    chex.assert_trees_all_equal_shapes_and_dtypes((server, rows, seen), start(stack))
    programs = jitted(stack)._cache_size()
    one_exchange(stack, IDS, state=(server, rows, seen))
    assert jitted(stack)._cache_size() == programs


@every_method
def test_described_messages_are_those_really_sent(stack):
    one_exchange(stack, IDS)
    down, uplink = SENT[stack]
    sizes = comm.cost(comm.describe(method(stack)).alone)
    assert sizes.up_numbers == sum(x.size for x in jax.tree.leaves(uplink))
    assert sizes.up_bytes == sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(uplink)
    )
    sent = jax.tree.leaves(down)
    assert sizes.down_numbers == sum(x.size for x in sent)
    assert sizes.down_bytes == sum(x.size * x.dtype.itemsize for x in sent)


@pytest.mark.parametrize(
    "stack", [pytest.param(s, marks=pytest.mark.xdist_group(s)) for s in METHODS]
)
def test_with_all_its_listed_defaults_it_is_the_method_with_none(stack):
    """Nothing is given twice, and no default is changed where no signature shows it.

    Numbers that are not fixed can be arguments of a program: nothing of a method
    branches on them, or makes shapes of them.
    """
    # Before anything is traced, as what is made once is made here.
    expected, found = messages(method(stack)), []
    known = registry.options(stack)
    given = {k: o.default for k, o in known.items() if k not in SMALL}
    numbers = {k for k, o in known.items() if o.type is float and not o.fixed}

    def describe(rate, decay, bound, numbers):
        optimizer = optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9)
        )
        local = make_local(optimizer=optimizer, clip_norm=bound)
        found.append(messages(build(stack, local=local, **{**given, **numbers})))

    jax.eval_shape(describe, 0.1, 0.01, 1.0, {k: known[k].default for k in numbers})
    assert found == [expected]


PROGRAMS = {}  # (stack, store) -> what was compiled for it


def simulator(stack, store, **options) -> schedule.Simulator:
    sim = schedule.simulator(
        method(stack),
        tiny().table,
        tiny().pool,
        weight=tiny().table.size,
        sampler="uniform",
        cohort_size=3,
        store=store,
        program=PROGRAMS.get((stack, store)),
        **options,
    )
    PROGRAMS[stack, store] = sim.program
    return sim


def two_rounds(stack, store, **options):
    sim = simulator(stack, store, **options)
    return jax.device_get(sim.run(ROOT, sim.init(ROOT), 0, 2, donate=True))


@every_method_at_length
def test_device_store_host_store_and_files_agree(stack, tmp_path):
    on_host = two_rounds(stack, store="host")
    chex.assert_trees_all_close(two_rounds(stack, store="device"), on_host, **CLOSE)
    in_files = two_rounds(stack, store="host", store_dir=str(tmp_path))
    chex.assert_trees_all_equal(in_files, on_host)


@every_method_at_length
def test_a_resumed_run_has_the_same_bits(stack, tmp_path):
    check_resuming(stack, "device", tmp_path)


@every_method_at_length
def test_a_resumed_run_from_the_host_has_the_same_bits(stack, tmp_path):
    check_resuming(stack, "host", tmp_path)


def check_resuming(stack, store, tmp_path):
    sim = simulator(stack, store)
    whole = sim.init(ROOT)
    for first in (0, 2, 4):
        whole, _ = sim.run(ROOT, whole, first, 2)
    half, _ = sim.run(ROOT, sim.init(ROOT), 0, 2)
    checkpoint.save(tmp_path, 2, half)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), half)
    del half
    again = simulator(stack, store)  # as another process would
    restored = checkpoint.restore(tmp_path, template)
    carry = again.load(restored.carry)
    for first in (restored.round, restored.round + 2):
        carry, _ = again.run(ROOT, carry, first, 2)
    assert tree.sha256(jax.device_get(carry)) == tree.sha256(jax.device_get(whole))


@every_client_at_length
def test_seeds_are_one_more_axis(stack):
    alg = method(stack)
    data = data_of(range(NUM_CLIENTS))
    rows, seen = stores.zeros(comm.describe(alg).client, NUM_CLIENTS)
    cohort = cohort_of(range(NUM_CLIENTS))
    run = exchange.make_exchange(alg, "vmap")

    def one(root):
        server = alg.server.init(rng.stream(root, "common_init"))
        return run(root, server, rows, seen, data, cohort)[0]

    roots = jax.vmap(jax.random.key)(jnp.arange(2))
    together = jax.jit(jax.vmap(one))(roots)
    alone = jax.jit(one)(roots[1])
    last = jax.tree.map(lambda x: x[1], together)
    chex.assert_trees_all_close(last, alone, **CLOSE)
