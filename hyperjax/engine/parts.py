"""What simulators are, and what both stores of client state build them from."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import compiling, hosts, rng, tree
from hyperjax.data.clients import Table
from hyperjax.engine import comm, compiled, exchange, families, sharding, stores
from hyperjax.engine.families import Families
from hyperjax.types import Algorithm, Array, Cohort, Pool, PyTree


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
    groups = groups_of(members)
    rows, seen = {}, {}
    for name in groups.names:
        messages = comm.describe(families.view(alg, name))
        spec, num = messages.client, groups.size(name)
        rows[name], seen[name] = jax.eval_shape(
            lambda s=spec, n=num: stores.zeros(s, n)
        )
    return Carry(messages.server, rows, seen)


def groups_of(members: Families | Mapping[str, np.ndarray] | int) -> Families:
    return members if isinstance(members, Families) else families.families(members)


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


class Parts(NamedTuple):
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


def turns_of(cohort: Cohort) -> Cohort:
    """Cohorts of one client each, leaves [C, 1] or, for what all share, [C]."""
    num = cohort.ids.shape[0]
    return Cohort(
        *(x[:, None] for x in (cohort.ids, cohort.active, cohort.weight)),
        *(jnp.broadcast_to(x, (num,)) for x in (cohort.round, cohort.population)),
    )


def round_info(opened: dict, info: dict, closed: dict) -> dict:
    """What a round reports: opening and closing have names of their own."""
    opened = {f"opening_{name}": x for name, x in opened.items()}
    return {**info, **opened, **{f"closing_{name}": x for name, x in closed.items()}}
