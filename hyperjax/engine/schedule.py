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
from hyperjax.types import Algorithm, Array, ClientData, Key, Pool, PyTree

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
    padded = sharding.padded_size(cohort_size, mesh)
    one_exchange = exchange.make_exchange(alg, mapper, mesh)
    weights = jnp.asarray(weight, jnp.float32)
    row_spec = comm.describe(alg).client
    program = compiled.Compiled(mesh)

    def init_server(root):
        return alg.server.init(rng.stream(root, "common_init"))

    def draw(root, round, weight):
        key = rng.stream(jax.random.fold_in(root, round), "cohort")
        ids = sample(sampler, key, num_clients, cohort_size)
        return exchange.make_cohort(ids, num_clients, weight, round, padded)

    if store == "device":
        on_device = sharding.replicate(
            (jnp.asarray(table.rows), jnp.asarray(table.size), pool, weights), mesh
        )

        def init(root):
            server = jax.jit(init_server)(root)
            rows, seen = stores.zeros(row_spec, num_clients)
            return sharding.replicate(Carry(server, rows, seen), mesh)

        def load(arrays):
            return sharding.replicate(jax.tree.map(jnp.asarray, arrays), mesh)

        def many_rounds(root, carry, rounds, rows, size, pool, weight):
            def body(carry, round):
                cohort = draw(root, round, weight)
                ids = cohort.ids
                data = ClientData(
                    rows.at[ids].get(mode="clip"), size.at[ids].get(mode="clip"), pool
                )
                state, seen = stores.gather(carry.rows, carry.seen, ids)
                server, state, info = one_exchange(
                    root, carry.server, state, seen, data, cohort
                )
                new = stores.scatter(
                    carry.rows, carry.seen, ids, state, cohort.active > 0
                )
                return Carry(server, *new), info

            return jax.lax.scan(body, carry, rounds)

        def run(root, carry, start, num_rounds):
            rounds = jnp.arange(start, start + num_rounds, dtype=jnp.int32)
            args = (sharding.replicate(root, mesh), carry, rounds, *on_device)
            return program("rounds", many_rounds, args, donate=(1,))

        return Simulator(init, load, run, program)

    def init_host(root):
        server = sharding.replicate(jax.jit(init_server)(root), mesh)
        return Carry(server, *stores.host_zeros(row_spec, num_clients, store_dir))

    def load_host(arrays):
        server = jax.tree.map(jnp.asarray, arrays.server)
        rows, seen = stores.host_zeros(row_spec, num_clients, store_dir)
        found = jax.tree.leaves((arrays.rows, arrays.seen))
        for x, y in zip(jax.tree.leaves((rows, seen)), found, strict=True):
            x[...] = y
        return Carry(sharding.replicate(server, mesh), rows, seen)

    pool = sharding.replicate(pool, mesh)

    def run_host(root, carry, start, num_rounds):
        infos = []
        server, rows, seen = carry
        for round in range(start, start + num_rounds):
            args = (root, jnp.int32(round), weights)
            cohort = program("cohort", draw, args)
            ids = np.asarray(cohort.ids)
            state, was_seen = stores.host_gather(rows, seen, ids)
            place = np.minimum(ids, num_clients - 1)
            data = ClientData(table.rows[place], table.size[place], pool)
            inputs = (root, server, state, was_seen, data, cohort)
            inputs = sharding.replicate(inputs, mesh)
            server, state, info = program("exchange", one_exchange, inputs, donate=(1,))
            stores.host_scatter(rows, seen, ids, state, np.asarray(cohort.active) > 0)
            infos.append(jax.device_get(info))
        stacked = jax.tree.map(lambda *x: np.stack(x), *infos)
        return Carry(server, rows, seen), stacked

    return Simulator(init_host, load_host, run_host, program)
