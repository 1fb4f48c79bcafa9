"""A method bound to its clients: many rounds in one compiled call."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import rng
from hyperjax.data.clients import Table, is_on_host
from hyperjax.engine import checks, compiled, exchange, families, sharding
from hyperjax.engine.cohorts import SAMPLERS, sample
from hyperjax.engine.families import Families
from hyperjax.engine.on_device import on_device
from hyperjax.engine.on_host import on_host
from hyperjax.engine.parts import Carry, Parts, Simulator, abstract_carry, groups_of
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.types import Algorithm, Pool

STORES = ("device", "host")


def simulator(
    alg: Algorithm,
    table: Table,
    pool: Pool,
    *,
    weight: np.ndarray,
    cohort_size: int,
    members: Families | Mapping[str, np.ndarray] | None = None,
    sampler: str = "full",
    sequential: bool = False,
    mapper: str | int = "map",
    mesh: Any = None,
    store: str = "device",
    store_dir: str | None = None,
    pool_mb: int = 0,
    streaming: bool = False,
    program: compiled.Compiled | None = None,
    hyper: compiled.Hyper | None = None,
) -> Simulator:
    """Builds the engine of one training run.

    Args:
      alg: the method.
      table: pool rows of the N participating clients.
      pool: the samples. Of those on the host, see `clients.make_pool`, a cohort's
        travel to the device, while the cohort before is trained.
      weight: [N] aggregation weights, not negative and not all zero, registered once.
      cohort_size: C; ignored by the sampler "full".
      members: the clients of each family by its name, for methods with families.
      sampler: "full" or "uniform".
      sequential: the clients of a round come one after another, in random order, each
        in an exchange of its own, so that the server steps after every client; then
        several devices are no use. An exchange that opens the round is with all.
      mapper: see `sharding.map_clients`.
      mesh: see `sharding.client_mesh`.
      store: "device" keeps the state and the row numbers of all clients on the
        device, of several on that of their `sharding.owners`, and runs all rounds of a
        call as one program; "host" keeps both in host memory, or in files under
        `store_dir`, and moves a cohort at a time.
      store_dir: folder of the host store's memory-mapped files; None for memory.
      pool_mb: how many MB of 2^20 bytes samples may take on a device: all of them, or,
        where they travel, those of two cohorts; 0: no limit.
      streaming: uplinks are summed up as clients finish instead of kept, see
        `exchange.make_joint_exchange`.
      program: the compiler, that of a simulator of the same method and arguments but
        for table, pool, weight and values of hyper-parameters, whose programs then
        serve this one too; None for one of its own.
      hyper: how the method follows from hyper-parameters that are arguments of the
        programs; None: they are built in.

    Raises:
      ValueError: unknown sampler, store or mapper, a cohort size outside 1..N, samples
        that do not fit, or that are on the host without the host store, weights that
        are none, members that are not the method's families of these N, or
        `streaming` where it cannot be.
    """
    num_clients = len(table.size)
    check_at_least(0, pool_mb=pool_mb)
    if streaming:
        checks.check_streaming(alg, sequential, mapper)
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("store", store, STORES)
    if store_dir is not None and store != "host":
        raise ValueError(f"store_dir={store_dir!r} goes with store='host'")
    check_number(whole=True, cohort_size=cohort_size)
    if not 1 <= cohort_size <= num_clients:
        raise ValueError(
            f"cohort_size={cohort_size} must be between 1 and the "
            f"{num_clients} participating clients"
        )
    cohort_size = num_clients if sampler == "full" else cohort_size
    mesh = None if sequential else mesh
    padded = sharding.padded_size(cohort_size, mesh)
    program = program or compiled.Compiled(mesh)

    def draw(root, round, weight):
        key = rng.stream(jax.random.fold_in(root, round), "cohort")
        ids = sample(sampler, key, num_clients, cohort_size)
        if sequential:
            ids = jax.random.permutation(rng.stream(key, "order"), ids)
        return exchange.make_cohort(ids, num_clients, weight, round, padded)

    groups = groups_of(num_clients if members is None else members)
    families.check(alg, groups)
    if len(groups.family) != num_clients:
        raise ValueError(
            f"the table holds {num_clients} clients, the families {len(groups.family)}"
        )

    def visits(root, num_rounds):
        if len(groups.names) == 1:
            return {groups.names[0]: num_rounds * cohort_size}
        if sampler == "full":
            return {name: num_rounds * groups.size(name) for name in groups.names}

        def count(root, rounds):
            def one(round):
                ids = draw(root, round, jnp.zeros(num_clients)).ids[:cohort_size]
                family = jnp.asarray(groups.family)[ids]
                return jnp.bincount(family, length=len(groups.names))

            return jax.lax.map(one, rounds)

        root = sharding.replicate(root, mesh)
        counts = program("visits", count, (root, jnp.arange(num_rounds)))
        return dict(zip(groups.names, map(int, np.sum(counts, 0)), strict=True))

    def participants(root, start, num_rounds):
        if sampler == "full":
            return {name: np.arange(groups.size(name)) for name in groups.names}
        root = sharding.replicate(root, mesh)
        ids = [
            parts.program("cohort", draw, (root, jnp.int32(round), parts.weight)).ids
            for round in range(start, start + num_rounds)
        ]
        known = np.unique(np.asarray(jax.device_get(ids)))
        known = known[known < num_clients]  # others fill a cohort up
        family, place = groups.family[known], groups.place[known]
        return {name: place[family == i] for i, name in enumerate(groups.names)}

    checks.check_data(alg, table, pool)
    staged = bool(alg.opening or alg.closing)
    checks.check_store(pool, store)
    if is_on_host(pool):
        rooms = groups.rooms(padded, 1 if mesh is None else mesh.size).values()
        num = sum(checks.most_samples(pool, table, room) for room in rooms)
        num *= 2 if staged or not sequential else 0  # trained on, and on their way
        num += checks.most_samples(pool, table, 1) if sequential else 0
        what = f"samples of two cohorts of {padded}"
        what = what if staged or not sequential else "samples of a client"
        what += f" in {len(rooms)} families" if len(rooms) > 1 else ""
        checks.check_room(pool, num, pool_mb, what, "smaller cohorts")
    else:
        checks.check_room(
            pool, len(pool.x), pool_mb, "all samples", "a pool on the host"
        )
    sharding.map_clients(alg.client, mapper, mesh)  # refuses another mapper
    parts = Parts(
        alg=alg,
        hyper=hyper or compiled.Hyper.none(alg),
        visits=visits,
        participants=participants,
        draw=draw,
        mapper=mapper,
        streaming=streaming,
        cohort_size=padded,
        sequential=sequential,
        groups=groups,
        table=table,
        pool=pool if is_on_host(pool) else sharding.replicate(pool, mesh),
        weight=sharding.replicate(checks.checked_weight(weight, num_clients), mesh),
        mesh=mesh,
        program=program,
    )
    built = on_device(parts) if store == "device" else on_host(parts, store_dir)
    return _with_checks(built, alg, groups, must_donate=store_dir is not None)


def _with_checks(
    simulator: "Simulator", alg: Algorithm, groups: Families, must_donate: bool
) -> "Simulator":
    """Roots become keys, what is given is checked, carries survive unless donated."""

    @functools.cache
    def template():
        return abstract_carry(alg, groups)

    def run(root, carry, start, num_rounds, donate=False):
        check_at_least(0, start=start)
        check_at_least(1, num_rounds=num_rounds)
        _check_carry(carry, template())
        if must_donate and not donate:
            raise ValueError(
                "a memory-mapped store is changed in place: say donate=True, and go on "
                "with the carry that comes back"
            )
        if not donate:
            carry = jax.tree.map(lambda x: x.copy(), carry)
        return simulator.run(rng.root_key(root), carry, start, num_rounds)

    return simulator._replace(
        init=lambda root: simulator.init(rng.root_key(root)),
        run=run,
        visits=lambda root, rounds: simulator.visits(rng.root_key(root), rounds),
        participants=lambda root, *rounds: simulator.participants(
            rng.root_key(root), *rounds
        ),
    )


def _check_carry(carry: Any, template: Carry) -> None:
    """Refuses the state of another method or population, or one that was donated."""
    accepted = "accepted: what init, load or run of this simulator returned"
    if not isinstance(carry, Carry):
        raise ValueError(f"carry is {type(carry).__name__}; {accepted}")
    structure: Any = jax.tree.structure(carry)
    if structure != jax.tree.structure(template):
        raise ValueError(f"carry is the state of another method; {accepted}")
    specs = jax.tree.leaves_with_path(template)
    for (path, spec), x in zip(specs, jax.tree.leaves(carry), strict=True):
        where = f"carry{jax.tree_util.keystr(path)}"
        if x.shape != spec.shape or x.dtype != spec.dtype:
            raise ValueError(
                f"{where} is {x.dtype} {x.shape}, not {spec.dtype} {spec.shape}: it is "
                f"that of other clients or another network; {accepted}"
            )
        if isinstance(x, jax.Array) and x.is_deleted():
            raise ValueError(f"{where} was donated to an earlier run; {accepted}")
