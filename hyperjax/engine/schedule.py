"""Who takes part when, and many rounds in one compiled call."""

import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import compiling, hosts, rng, tree
from hyperjax.data import clients
from hyperjax.data.clients import Table, is_on_host
from hyperjax.data.ragged import Rows
from hyperjax.engine import comm, compiled, exchange, families, sharding, stores
from hyperjax.engine.families import Families
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.types import Algorithm, Array, ClientData, Cohort, Key, Pool, PyTree

SAMPLERS = ("full", "uniform")
STORES = ("device", "host")
SORTED = 4096  # clients; sorting takes 0.2 ms for 1e3 and a second for 1e6


class Carry(NamedTuple):
    """Everything that changes during training.

    Clients are by family, `rows[families.ALONE]` where there are none.
    """

    server: PyTree
    rows: dict[str, PyTree]  # client state, leaves [N_f, ...]
    seen: dict[str, Any]  # [N_f] bool: has the client ever taken part?

    def __repr__(self) -> str:
        clients = sum(map(len, self.seen.values()))
        own = tree.count(self.rows)
        return (
            f"Carry({tree.count(self.server):,} numbers of the server and {own:,} of "
            f"{clients:,} clients)"
        )


def abstract_carry(alg: Algorithm, members: Families | int) -> Carry:
    """Returns the structure, shapes and dtypes of a run's carry; computes nothing.

    `members` are the clients of each family, or how many there are without families.
    """
    groups = _groups(members)
    rows, seen = {}, {}
    for name in groups.names:
        messages = comm.describe(families.view(alg, name))
        spec, num = messages.client, groups.size(name)
        rows[name], seen[name] = jax.eval_shape(
            lambda s=spec, n=num: stores.zeros(s, n)
        )
    return Carry(messages.server, rows, seen)


def _groups(members: Families | Mapping[str, np.ndarray] | int) -> Families:
    return members if isinstance(members, Families) else families.families(members)


def sample(name: str, key: Key, num_clients: int, cohort_size: int) -> Array:
    """Returns the ids of a cohort, [C] int32, ascending; the same on every machine.

    "full" takes all N clients, "uniform" C of N without replacement: the first of them
    in a random order, which is that of sorted random numbers for up to `SORTED` clients
    and otherwise one in which only C places are computed.
    """
    if name == "full":
        return jnp.arange(num_clients, dtype=jnp.int32)
    if num_clients > SORTED:
        order = _places(key, num_clients, cohort_size)
    else:
        order = jax.random.permutation(key, num_clients)[:cohort_size]
    return jnp.sort(order).astype(jnp.int32)


def _places(key: Key, num: int, count: int) -> Array:
    """Returns where a random permutation of 0 to num - 1 takes the first `count`.

    A Feistel network of four rounds (Luby, Rackoff 1988) permutes the numbers of so
    many bits, and what lies outside goes through it again: cycle walking (Black,
    Rogaway 2002). At most four times as many numbers as `num` have an even number of
    bits.
    """
    half = max(1, -(-(num - 1).bit_length() // 2))
    mask = jnp.uint32(2**half - 1)
    keys = jax.random.bits(key, (4,), jnp.uint32)

    def mixed(x, key):  # the finalizer of MurmurHash3
        x = (x ^ key) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return (x ^ (x >> 16)) & mask

    def permuted(x):
        left, right = x >> half, x & mask
        for i in range(4):
            left, right = right, left ^ mixed(right, keys[i])
        return (left << half) | right

    def walk(x):
        return jnp.where(x < num, x, permuted(x))

    start = permuted(jnp.arange(count, dtype=jnp.uint32))
    return jax.lax.while_loop(lambda x: jnp.any(x >= num), walk, start)


class Simulator(NamedTuple):
    """A method bound to its clients' data.

    A root is a key or an integer seed, see `rng.root_key`.

    Attributes:
      init: `(root) -> Carry`.
      load: `(carry of host arrays) -> Carry`, to go on from a checkpoint.
      run: `(root, carry, start, num_rounds, donate=False) -> (carry, info)`: rounds
        start, start + 1, ... with info leaves [num_rounds]. The given carry can be
        used again; with `donate` it is consumed, and its memory is that of the result.
        A memory-mapped store has one copy of its rows, so there it must be donated.
      visits: `(root, num_rounds) -> {family: int}`, exchanges of all clients so far.
      participants: `(root, start, num_rounds) -> {family: [.] int}`, the numbers inside
        their family of clients who take part in rounds start, start + 1, ...; nobody
        else's state changes.
      program: the compiler; its `seconds` says how long compilation took so far.
      function: `(root, carry, rounds, *given) -> (carry, info)`, what `run` compiles;
        None with a host store.
      given: arrays of this simulator alone.
      width: how many clients a device trains at a time.
      held: by family, whose rows this process holds, where there are several.
    """

    init: Callable
    load: Callable
    run: Callable
    visits: Callable
    participants: Callable
    program: compiled.Compiled
    function: Callable | None = None
    given: tuple = ()
    width: int = 1
    held: Mapping[str, stores.Held] = MappingProxyType({})

    def __repr__(self) -> str:
        where = "host" if self.function is None else "device"
        return f"Simulator(clients' state on the {where}, {self.width} at a time)"


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
        _check_streaming(alg, sequential, mapper)
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

    groups = _groups(num_clients if members is None else members)
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

    _check_data(alg, table, pool)
    staged = bool(alg.opening or alg.closing)
    _check_store(pool, store)
    if is_on_host(pool):
        rooms = groups.rooms(padded, 1 if mesh is None else mesh.size).values()
        num = sum(_room(pool, table, room) for room in rooms)
        num *= 2 if staged or not sequential else 0  # trained on, and on their way
        num += _room(pool, table, 1) if sequential else 0
        what = f"samples of two cohorts of {padded}"
        what = what if staged or not sequential else "samples of a client"
        what += f" in {len(rooms)} families" if len(rooms) > 1 else ""
        check_room(pool, num, pool_mb, what, "smaller cohorts")
    else:
        check_room(pool, len(pool.x), pool_mb, "all samples", "a pool on the host")
    sharding.map_clients(alg.client, mapper, mesh)  # refuses another mapper
    parts = _Parts(
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
        weight=sharding.replicate(_checked_weight(weight, num_clients), mesh),
        mesh=mesh,
        program=program,
    )
    built = _on_device(parts) if store == "device" else _on_host(parts, store_dir)
    return _with_checks(built, alg, groups, must_donate=store_dir is not None)


def _check_streaming(alg: Algorithm, sequential: bool, mapper: str | int) -> None:
    """Refuses to sum up uplinks where the sum is not all that is asked for.

    Raises:
      ValueError: it is not, or there would be no sum.
    """
    if not alg.server.mean_only and alg.server.sums is None:
        raise ValueError(
            "streaming=True sums clients' answers up as they come, and the server of "
            "this method needs each of them; accepted: False, or a method whose server "
            "needs means or sums of them alone, such as fedavg without an uplink"
        )
    if sequential:
        raise ValueError(
            "streaming=True would change nothing: with sequential=True clients come "
            "one by one"
        )
    if mapper == "vmap":
        raise ValueError(
            "streaming=True would change nothing: with mapper='vmap' all clients "
            "finish together; accepted: map, block"
        )


def check_images(alg: Algorithm, pool: Pool) -> None:
    """Refuses samples that a network does not take.

    Raises:
      ValueError: naming their shape, the network's and its family.
    """
    for name, client in families.clients(alg).items():
        if pool.x.shape[1:] != tuple(client.model.sample_shape):
            of = f" of the family {name!r}" if name else ""
            raise ValueError(
                f"pool has samples of shape {pool.x.shape[1:]}; the network{of} takes "
                f"{tuple(client.model.sample_shape)}"
            )


def _check_data(alg: Algorithm, table: Table, pool: Pool) -> None:
    """Refuses samples that a network does not take, and rows that a pool lacks."""
    check_images(alg, pool)
    rows, size = table.rows, np.asarray(table.size)
    rows = rows if isinstance(rows, Rows) else np.asarray(rows)
    if rows.ndim != 2 or size.shape != rows.shape[:1]:
        raise ValueError(
            f"table has rows of shape {rows.shape} and sizes of shape {size.shape}; "
            "accepted: [N, n_max] and [N]"
        )
    if size.min() < 0 or size.max() > rows.shape[1]:
        raise ValueError(
            f"table has clients of {size.min()} to {size.max()} samples; its rows have "
            f"room for 0 to {rows.shape[1]}"
        )
    given = rows.parts.flat if isinstance(rows, Rows) else rows
    if given.min(initial=0) < 0 or given.max(initial=0) >= len(pool.x):
        raise ValueError(
            f"table names rows {given.min()} to {given.max()} of a pool of "
            f"{len(pool.x)} samples"
        )


def _room(pool: Pool, table: Table, clients: int) -> int:
    """Returns how many samples of a pool so many clients have at most."""
    return min(len(pool.x), clients * table.rows.shape[1])


def _check_store(pool: Pool, store: str) -> None:
    """Refuses samples on the host where nothing fetches them from there."""
    if is_on_host(pool) and store != "host":
        raise ValueError(
            "the pool's samples are on the host, where a cohort's are taken from; "
            f"accepted: store='host' with it, not {store!r}"
        )


def check_room(pool: Pool, num: int, limit_mb: int, what: str, instead: str) -> None:
    """Refuses so many samples on the device.

    Raises:
      ValueError: they take more than the limit, if there is one, in MB of 2^20 bytes.
    """
    needed = num * (pool.x.nbytes // max(1, len(pool.x))) / 2**20
    if limit_mb and needed > limit_mb:
        raise ValueError(
            f"pool_mb={limit_mb} is too little for {what}, {needed:.1f} MB; accepted: "
            f"a higher limit, 0 for none, or {instead}"
        )


def _checked_weight(weight: Any, num_clients: int) -> Array:
    """Returns aggregation weights, [N] float32."""
    given = np.asarray(weight)
    if given.shape != (num_clients,) or given.dtype.kind not in "iuf":
        raise ValueError(
            f"weight is {given.dtype} of shape {given.shape}; accepted: a number for "
            f"each of the {num_clients} clients"
        )
    bad = np.flatnonzero(~(np.isfinite(given) & (given >= 0)))
    if len(bad):
        raise ValueError(
            f"weight of client {bad[0]} is {given[bad[0]]}; weights must be finite and "
            "not negative"
        )
    if not given.any():
        raise ValueError("weight is zero for all clients; one at least must count")
    return jnp.asarray(given, jnp.float32)


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


class _Parts(NamedTuple):
    """What both stores build a simulator from."""

    alg: Algorithm
    hyper: compiled.Hyper
    visits: Callable
    participants: Callable
    draw: Callable  # (root, round, weight [N]) -> Cohort
    mapper: str | int
    streaming: bool
    cohort_size: int  # with padding
    sequential: bool
    groups: Families
    table: Table
    pool: Pool
    weight: Array
    mesh: Any
    program: compiled.Compiled

    @property
    def width(self) -> int:
        """How many clients a device trains at a time."""
        if isinstance(self.mapper, int):
            return self.mapper
        devices = 1 if self.mesh is None else self.mesh.size
        return self.cohort_size // devices if self.mapper == "vmap" else 1

    def init_server(self, root):
        """The server's first state."""

        def init(root, values):
            server = self.hyper.method(values).server
            return server.init(rng.stream(root, "common_init"))

        args = (sharding.replicate(root, self.mesh), self.hyper.values)
        return self.program("init", init, args, times=compiling.ONCE)

    def exchange(self, values: Mapping[str, Any]) -> Callable:
        """The exchange of the method that hyper-parameters make."""
        alg = self.hyper.method(values)
        return exchange.make_joint_exchange(
            alg,
            self.mapper,
            self.mesh,
            alone=self.sequential,
            streaming=self.streaming,
        )

    def opening(self, values: Mapping[str, Any]) -> Callable:
        """Likewise of what opens a round; there must be such a thing."""
        return self._beside(self.hyper.method(values).opening, "opening")

    def closing(self, values: Mapping[str, Any]) -> Callable:
        """And of what closes it."""
        return self._beside(self.hyper.method(values).closing, "closing")

    def _beside(self, alg: Any, stage: str) -> Callable:
        return exchange.make_joint_exchange(alg, self.mapper, self.mesh, stage=stage)

    def cohorts(self, cohort: Cohort) -> dict[str, Cohort]:
        """A cohort by family."""
        return self.groups.cohorts(cohort, 1 if self.mesh is None else self.mesh.size)

    def held(self, parted: Mapping[str, bool]) -> dict[str, stores.Held]:
        """Whose rows this process holds, of families whose rows are parted."""
        sizes = {name: self.groups.size(name) for name in parted}
        several = hosts.several()
        return {
            k: hosts.part(sizes[k]) if parted[k] and several else None for k in sizes
        }

    def rows(self) -> dict[str, PyTree]:
        """The abstract state of one client of each family."""
        views = {name: families.view(self.alg, name) for name in self.groups.names}
        return {name: comm.describe(alg).client for name, alg in views.items()}

    def members(self, cohorts: dict[str, Cohort]) -> dict[str, Array]:
        """Rows of the index table for cohorts by family, clipped to real ones."""
        last = len(self.table.size) - 1
        return {
            name: jnp.minimum(self.groups.everywhere(name, cohort.ids), last)
            for name, cohort in cohorts.items()
        }


def _one_by_one(cohort: Cohort) -> Cohort:
    """Cohorts of one client each, leaves [C, 1] or, for what all share, [C]."""
    num = cohort.ids.shape[0]
    return Cohort(
        *(x[:, None] for x in (cohort.ids, cohort.active, cohort.weight)),
        *(jnp.broadcast_to(x, (num,)) for x in (cohort.round, cohort.population)),
    )


def _round_info(opened: dict, info: dict, closed: dict) -> dict:
    """What a round reports: opening and closing have names of their own."""
    opened = {f"opening_{name}": x for name, x in opened.items()}
    return {**info, **opened, **{f"closing_{name}": x for name, x in closed.items()}}


def _on_device(parts: _Parts) -> Simulator:
    """All rounds of a call are one program; client state is part of its carry."""
    program, groups, mesh = parts.program, parts.groups, parts.mesh
    owners = {name: sharding.owners(groups.size(name), mesh) for name in groups.names}
    of_all = sharding.owners(len(parts.table.size), mesh)

    def place(owners):
        """Where arrays [N, ...] are; None: where JAX puts them."""
        if mesh is None:
            return None
        return sharding.in_parts(owners) if owners else sharding.everywhere(mesh)

    def put(x, owners):
        return x if mesh is None else hosts.put(x, place(owners))

    places = {name: place(owners[name]) for name in groups.names}
    table = jax.tree.map(np.asarray, parts.table)  # the rectangle, of `ragged.Rows`
    table = jax.tree.map(jnp.asarray, put(table, of_all))

    def init(root):
        carry = Carry(sharding.replicate(parts.init_server(root), mesh), {}, {})
        for name, spec in parts.rows().items():
            zeros = stores.zeros(spec, groups.size(name), places[name])
            carry.rows[name], carry.seen[name] = zeros
        return carry

    def load(arrays):
        server = sharding.replicate(jax.tree.map(jnp.asarray, arrays.server), mesh)
        rows, seen = (
            {name: put(x, owners[name]) for name, x in kept.items()}
            for kept in (arrays.rows, arrays.seen)
        )
        return Carry(server, *jax.tree.map(jnp.asarray, (rows, seen)))

    def many_rounds(root, carry, rounds, table, pool, weight, values):
        trained = parts.exchange(values)
        opening = parts.alg.opening and parts.opening(values)
        closing = parts.alg.closing and parts.closing(values)

        def one_exchange(carry: Carry, cohorts, run=trained):
            server, rows, seen = carry
            data, state, was_seen = {}, {}, {}
            for name, members in parts.members(cohorts).items():
                mine = Table(*(stores.taken(x, members, of_all) for x in table))
                data[name] = ClientData(mine.rows, mine.size, pool)
                state[name], was_seen[name] = stores.gather(
                    rows[name], seen[name], cohorts[name].ids, owners[name]
                )
            server, state, info = run(root, server, state, was_seen, data, cohorts)
            rows, seen = dict(rows), dict(seen)
            for name, cohort in cohorts.items():
                rows[name], seen[name] = stores.scatter(
                    rows[name],
                    seen[name],
                    cohort.ids,
                    state[name],
                    cohort.active > 0,
                    owners[name],
                )
            return Carry(server, rows, seen), info

        def one_client(carry, cohort):
            """An exchange with the only family there is someone of."""
            known = jnp.minimum(cohort.ids[0], len(groups.family) - 1)
            place = jnp.asarray(groups.place)[known]

            def branch(name):
                def run(carry):
                    ids = jnp.where(cohort.active > 0, place, groups.size(name))
                    return one_exchange(carry, {name: cohort._replace(ids=ids)})

                return run

            family = jnp.asarray(groups.family)[known]
            return jax.lax.switch(family, [branch(n) for n in groups.names], carry)

        def body(carry, round):
            cohort, opened, closed = parts.draw(root, round, weight), {}, {}
            if opening:
                carry, opened = one_exchange(carry, parts.cohorts(cohort), opening)
            if not parts.sequential:
                carry, info = one_exchange(carry, parts.cohorts(cohort))
            else:
                carry, infos = jax.lax.scan(one_client, carry, _one_by_one(cohort))
                info = exchange.round_info(infos)
            if closing:
                carry, closed = one_exchange(carry, parts.cohorts(cohort), closing)
            return carry, _round_info(opened, info, closed)

        return jax.lax.scan(body, carry, rounds)

    def run(root, carry, start, num_rounds):
        rounds = jnp.arange(start, start + num_rounds, dtype=jnp.int32)
        root = sharding.replicate(root, mesh)
        args = (root, carry, rounds, *given)
        whole = mesh and sharding.everywhere(mesh)
        outputs = mesh and (Carry(whole, places, places), whole)
        found = program("rounds", many_rounds, args, donate=(1,), places=outputs)
        program.keep_work("rounds", num_rounds, width)
        return found

    given = table, parts.pool, parts.weight, parts.hyper.values
    width = 1 if parts.sequential else parts.width
    who = parts.visits, parts.participants
    held = parts.held({name: where is not None for name, where in owners.items()})
    return Simulator(init, load, run, *who, program, many_rounds, given, width, held)


def _on_host(parts: _Parts, folder: str | None) -> Simulator:
    """One program per exchange; only a cohort's state and row numbers travel."""
    program, groups = parts.program, parts.groups
    table = parts.table
    # Where processes take turns together there is no mesh, and each does it all.
    held = parts.held(dict.fromkeys(groups.names, parts.mesh is not None))

    def empty():
        rows, seen = {}, {}
        for name, spec in parts.rows().items():
            place = folder if folder is None else os.path.join(folder, name)
            rows[name], seen[name] = stores.host_zeros(spec, groups.size(name), place)
        return rows, seen

    def init(root):
        return Carry(parts.init_server(root), *empty())

    def load(arrays):
        server = jax.tree.map(jnp.asarray, arrays.server)
        rows, seen = empty()
        for name, known in arrays.seen.items():
            seen[name][...] = known
            mine, theirs = map(jax.tree.leaves, (rows[name], arrays.rows[name]))
            for x, y in zip(mine, theirs, strict=True):
                # Others are zeros.
                ids = np.flatnonzero(known)
                for some in stores.pieces(x, ids[stores.is_held(ids, held[name])]):
                    x[some] = y[some]
        return Carry(sharding.replicate(server, parts.mesh), rows, seen)

    staged = bool(parts.alg.opening or parts.alg.closing)
    together = staged or not parts.sequential

    def drawn(root, round):
        """The cohort of a round, and by family if clients are together in one."""
        cohort = program("cohort", parts.draw, (root, jnp.int32(round), parts.weight))
        if not together:
            return cohort, {}, {}
        cohorts = program("cohorts", parts.cohorts, (cohort,))
        return cohort, cohorts, places_of(cohorts)

    def places_of(cohorts):
        """Rows of the index table, by family."""
        return jax.tree.map(np.asarray, parts.members(cohorts))

    def data_of(places):
        """What clients train on, on the device as far as it may travel ahead."""
        found = {}
        for name, place in places.items():
            mine, pool = Table(table.rows[place], table.size[place]), parts.pool
            if is_on_host(pool):
                room = _room(pool, table, len(place))
                pool, (mine,) = clients.some(pool, mine, room=room)
                pool = jax.tree.map(jnp.asarray, pool)
                pool = sharding.replicate(pool, parts.mesh)
            found[name] = ClientData(*mine, pool)
        return found

    def one_round(root, carry, cohort, cohorts, data):
        opened: dict[str, Array] = {}
        if parts.alg.opening:
            carry, opened = one_exchange(root, carry, cohorts, data, "opening")
        if parts.sequential:
            carry, info = one_by_one(root, carry, cohort)
        else:
            carry, info = one_exchange(root, carry, cohorts, data)
        closed: dict[str, Array] = {}
        if parts.alg.closing:
            carry, closed = one_exchange(root, carry, cohorts, data, "closing")
        return carry, _round_info(opened, info, closed)

    def one_by_one(root, carry, cohort):
        infos, turns = [], _one_by_one(cohort)
        for turn, client in enumerate(np.asarray(cohort.ids)):
            one = jax.tree.map(lambda x, turn=turn: x[turn], turns)
            name = groups.names[groups.family[client]]
            one = one._replace(ids=jnp.asarray(groups.place[[client]]))
            alone = {name: one}
            carry, info = one_exchange(root, carry, alone, data_of(places_of(alone)))
            infos.append(info)
        infos = jax.tree.map(lambda *x: jnp.stack(x), *infos)
        return carry, jax.device_get(exchange.round_info(infos))

    def one_exchange(root, carry: Carry, cohorts, data, stage="exchange"):
        rows, seen = carry.rows, carry.seen
        state, was_seen = {}, {}
        for name, cohort in cohorts.items():
            where = held[name], parts.mesh, program, name
            state[name], was_seen[name] = stores.fetched(
                rows[name], seen[name], np.asarray(cohort.ids), *where
            )
        inputs = (root, carry.server, state, was_seen, data, cohorts)
        inputs = (parts.hyper.values, *sharding.replicate(inputs, parts.mesh))

        def run(values, *inputs):
            return getattr(parts, stage)(values)(*inputs)

        server, state, info = program(stage, run, inputs, donate=(2,))
        if not (staged or parts.sequential):  # it is all there is of a round
            program.keep_work(stage, 1, parts.width)
        for name, cohort in cohorts.items():
            ids, alive = np.asarray(cohort.ids), np.asarray(cohort.active) > 0
            stores.host_scatter(
                rows[name], seen[name], ids, state[name], alive, held[name]
            )
        return carry._replace(server=server), jax.device_get(info)

    def run(root, carry, start, num_rounds):
        root = sharding.replicate(root, parts.mesh)
        infos, stop = [], start + num_rounds
        with ThreadPoolExecutor(1) as porter:
            cohort, cohorts, places = drawn(root, start)
            data = porter.submit(data_of, places)
            for round in range(start, stop):
                now = cohort, cohorts, data.result()
                if round + 1 < stop:  # it is taken there while this one computes
                    cohort, cohorts, places = drawn(root, round + 1)
                    data = porter.submit(data_of, places)
                carry, info = one_round(root, carry, *now)
                infos.append(info)
        return carry, jax.tree.map(lambda *x: np.stack(x), *infos)

    who = parts.visits, parts.participants
    return Simulator(init, load, run, *who, program, held=held)
