"""Who takes part when, and many rounds in one compiled call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import rng
from hyperjax.data.clients import Table
from hyperjax.engine import comm, compiled, exchange, sharding, stores
from hyperjax.errors import check_choice
from hyperjax.types import Algorithm, Array, ClientData, Cohort, Key, Pool, PyTree

SAMPLERS = ("full", "uniform")
STORES = ("device", "host")


class Carry(NamedTuple):
    """Everything that changes during training."""

    server: PyTree
    rows: PyTree  # client state, leaves [N, ...]
    seen: Any  # [N] bool: has the client ever taken part?


def abstract_carry(alg: Algorithm, num_clients: int) -> Carry:
    """Returns the structure, shapes and dtypes of a run's carry; computes nothing."""
    messages = comm.describe(alg)
    rows, seen = jax.eval_shape(lambda: stores.zeros(messages.client, num_clients))
    return Carry(messages.server, rows, seen)


def sample(name: str, key: Key, num_clients: int, cohort_size: int) -> Array:
    """Returns the ids of a cohort, [C] int32, ascending; the same on every machine.

    "full" takes all N clients, "uniform" C of N without replacement.
    """
    if name == "full":
        return jnp.arange(num_clients, dtype=jnp.int32)
    order = jax.random.permutation(key, num_clients)[:cohort_size]
    return jnp.sort(order).astype(jnp.int32)


class Simulator(NamedTuple):
    """A method bound to its clients' data.

    Attributes:
      init: `(root) -> Carry`.
      load: `(carry of host arrays) -> Carry`, to go on from a checkpoint.
      run: `(root, carry, start, num_rounds) -> (carry, info)`: rounds start,
        start + 1, ... with info leaves [num_rounds]. The given carry is consumed.
      program: the compiler; its `seconds` says how long compilation took so far.
    """

    init: Callable
    load: Callable
    run: Callable
    program: compiled.Compiled


def simulator(
    alg: Algorithm,
    table: Table,
    pool: Pool,
    *,
    weight: np.ndarray,
    cohort_size: int,
    sampler: str = "full",
    sequential: bool = False,
    mapper: str | int = "map",
    mesh: Any = None,
    store: str = "device",
    store_dir: str | None = None,
) -> Simulator:
    """Builds the engine of one training run.

    Args:
      alg: the method.
      table: pool rows of the N participating clients.
      pool: the samples.
      weight: [N] aggregation weights, registered once.
      cohort_size: C; ignored by the sampler "full".
      sampler: "full" or "uniform".
      sequential: the clients of a round come one after another, in random order, each
        in an exchange of its own, so that the server steps after every client; then
        several devices are no use.
      mapper: see `sharding.map_clients`.
      mesh: see `sharding.client_mesh`.
      store: "device" keeps the state and the row numbers of all clients on the
        device, and runs all rounds of a call as one program; "host" keeps both in
        host memory, or in files under `store_dir`, and moves a cohort at a time.
      store_dir: folder of the host store's memory-mapped files; None for memory.

    Raises:
      ValueError: unknown sampler or store, or a cohort size outside 1..N.
    """
    num_clients = len(table.size)
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("store", store, STORES)
    if not 1 <= cohort_size <= num_clients:
        raise ValueError(
            f"cohort_size={cohort_size} must be between 1 and the "
            f"{num_clients} participating clients"
        )
    cohort_size = num_clients if sampler == "full" else cohort_size
    mesh = None if sequential else mesh
    padded = sharding.padded_size(cohort_size, mesh)

    def draw(root, round, weight):
        key = rng.stream(jax.random.fold_in(root, round), "cohort")
        ids = sample(sampler, key, num_clients, cohort_size)
        if sequential:
            ids = jax.random.permutation(rng.stream(key, "order"), ids)
        return exchange.make_cohort(ids, num_clients, weight, round, padded)

    parts = _Parts(
        init_server=lambda root: alg.server.init(rng.stream(root, "common_init")),
        draw=draw,
        exchange=exchange.make_exchange(alg, mapper, mesh, alone=sequential),
        sequential=sequential,
        row=comm.describe(alg).client,
        table=table,
        pool=sharding.replicate(pool, mesh),
        weight=sharding.replicate(jnp.asarray(weight, jnp.float32), mesh),
        mesh=mesh,
    )
    return _on_device(parts) if store == "device" else _on_host(parts, store_dir)


class _Parts(NamedTuple):
    """What both stores build a simulator from."""

    init_server: Callable  # (root) -> server
    draw: Callable  # (root, round, weight [N]) -> Cohort
    exchange: Callable
    sequential: bool
    row: PyTree  # abstract state of one client
    table: Table
    pool: Pool
    weight: Array
    mesh: Any


def _one_by_one(cohort: Cohort) -> Cohort:
    """Cohorts of one client each, leaves [C, 1] or, for what all share, [C]."""
    num = cohort.ids.shape[0]
    return Cohort(
        *(x[:, None] for x in (cohort.ids, cohort.active, cohort.weight)),
        *(jnp.broadcast_to(x, (num,)) for x in (cohort.round, cohort.population)),
    )


def _on_device(parts: _Parts) -> Simulator:
    """All rounds of a call are one program; client state is part of its carry."""
    program = compiled.Compiled(parts.mesh)
    table = sharding.replicate(Table(*map(jnp.asarray, parts.table)), parts.mesh)

    def init(root):
        server = jax.jit(parts.init_server)(root)
        rows, seen = stores.zeros(parts.row, len(parts.table.size))
        return sharding.replicate(Carry(server, rows, seen), parts.mesh)

    def load(arrays):
        return sharding.replicate(jax.tree.map(jnp.asarray, arrays), parts.mesh)

    def many_rounds(root, carry, rounds, table, pool, weight):
        def one_exchange(carry, cohort):
            data = ClientData(
                table.rows.at[cohort.ids].get(mode="clip"),
                table.size.at[cohort.ids].get(mode="clip"),
                pool,
            )
            state, seen = stores.gather(carry.rows, carry.seen, cohort.ids)
            server, state, info = parts.exchange(
                root, carry.server, state, seen, data, cohort
            )
            rows, seen = stores.scatter(
                carry.rows, carry.seen, cohort.ids, state, cohort.active > 0
            )
            return Carry(server, rows, seen), info

        def body(carry, round):
            cohort = parts.draw(root, round, weight)
            if not parts.sequential:
                return one_exchange(carry, cohort)
            carry, infos = jax.lax.scan(one_exchange, carry, _one_by_one(cohort))
            return carry, exchange.round_info(infos)

        return jax.lax.scan(body, carry, rounds)

    def run(root, carry, start, num_rounds):
        rounds = jnp.arange(start, start + num_rounds, dtype=jnp.int32)
        root = sharding.replicate(root, parts.mesh)
        args = (root, carry, rounds, table, parts.pool, parts.weight)
        return program("rounds", many_rounds, args, donate=(1,))

    return Simulator(init, load, run, program)


def _on_host(parts: _Parts, folder: str | None) -> Simulator:
    """One program per exchange; only a cohort's state and row numbers travel."""
    program = compiled.Compiled(parts.mesh)
    table, num_clients = parts.table, len(parts.table.size)

    def init(root):
        server = sharding.replicate(jax.jit(parts.init_server)(root), parts.mesh)
        return Carry(server, *stores.host_zeros(parts.row, num_clients, folder))

    def load(arrays):
        server = jax.tree.map(jnp.asarray, arrays.server)
        rows, seen = stores.host_zeros(parts.row, num_clients, folder)
        found = jax.tree.leaves((arrays.rows, arrays.seen))
        for x, y in zip(jax.tree.leaves((rows, seen)), found, strict=True):
            x[...] = y
        return Carry(sharding.replicate(server, parts.mesh), rows, seen)

    def one_round(root, carry, round):
        cohort = program("cohort", parts.draw, (root, jnp.int32(round), parts.weight))
        if not parts.sequential:
            return one_exchange(root, carry, cohort)
        infos, turns = [], _one_by_one(cohort)
        for turn in range(len(cohort.ids)):
            one = jax.tree.map(lambda x, turn=turn: x[turn], turns)
            carry, info = one_exchange(root, carry, one)
            infos.append(info)
        infos = jax.tree.map(lambda *x: jnp.stack(x), *infos)
        return carry, jax.device_get(exchange.round_info(infos))

    def one_exchange(root, carry, cohort):
        ids = np.asarray(cohort.ids)
        state, seen = stores.host_gather(carry.rows, carry.seen, ids)
        place = np.minimum(ids, num_clients - 1)
        data = ClientData(table.rows[place], table.size[place], parts.pool)
        inputs = (root, carry.server, state, seen, data, cohort)
        inputs = sharding.replicate(inputs, parts.mesh)
        server, state, info = program("exchange", parts.exchange, inputs, donate=(1,))
        alive = np.asarray(cohort.active) > 0
        stores.host_scatter(carry.rows, carry.seen, ids, state, alive)
        return carry._replace(server=server), jax.device_get(info)

    def run(root, carry, start, num_rounds):
        root = sharding.replicate(root, parts.mesh)
        infos = []
        for round in range(start, start + num_rounds):
            carry, info = one_round(root, carry, round)
            infos.append(info)
        return carry, jax.tree.map(lambda *x: np.stack(x), *infos)

    return Simulator(init, load, run, program)
