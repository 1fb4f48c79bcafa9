"""Runs of one program side by side: an axis of points before that of clients."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hyperjax.engine.compiled import Compiled
from hyperjax.engine.schedule import Carry, Simulator
from hyperjax.errors import check_choice
from hyperjax.types import PyTree

POINTS = "points"
PLANS = ("map", "vmap")
_SPARE = 0.2  # of a device's memory, which is not for programs

Result = tuple[Carry, dict[str, Any]]  # as of `Simulator.run`


def point_mesh(num_points: int) -> Mesh | None:
    """Returns a mesh of the local devices that help, or None if one is as good.

    Nothing travels between devices, since points share nothing that changes.
    """
    devices = jax.local_devices()
    rows = -(-num_points // len(devices))
    used = -(-num_points // rows)
    if used == 1:
        return None
    auto = (jax.sharding.AxisType.Auto,)
    return Mesh(np.array(devices[:used]), (POINTS,), axis_types=auto)


class Together:
    """Rounds of several simulators in one call of one program.

    With "map" a point's states are bit for bit those it has alone; with "vmap" points
    are one more axis of every array, and sums come in another order.

    Attributes:
      size: how many points a call has.
      program: the compiler; its `seconds` says how long compilation took so far.
    """

    def __init__(
        self,
        simulators: Sequence[Simulator],
        plan: str,
        mesh: Mesh | None = None,
        limit: int | None = None,
    ):
        """Compiles nothing yet.

        Args:
          simulators: of one program (see `like` of `runs.experiment.experiment`), whose
            tables are as wide, with stores on the device, each for one device.
          plan: "map" or "vmap".
          mesh: of `point_mesh`; None: one device.
          limit: bytes of a device that the program may take; by default four fifths of
            what the device says it has, if it does. Where it would take more, fewer
            points are in a call.

        Raises:
          ValueError: another plan, or simulators that do not go together.
        """
        check_choice("plan", plan, PLANS)
        if any(s.function is None or s.program.mesh is not None for s in simulators):
            raise ValueError(
                "points run together with engine.store='device', each on one device"
            )
        if len({id(each.program) for each in simulators}) > 1:
            raise ValueError("points run together that are of one program")
        self.program = Compiled(numerics=simulators[0].program.numerics)
        self._plan = plan
        self._mesh: Any = mesh
        self._limit = _memory() if limit is None else limit
        self._devices = 1 if mesh is None else mesh.size
        self.size = -(-len(simulators) // self._devices) * self._devices
        self._first = simulators[0]
        self._function: Any = self._first.function
        leaves, (self._structure, *_) = zip(
            *(jax.tree.flatten(each.given) for each in simulators), strict=True
        )
        # What all have, such as the pixels, is there once.
        columns = list(zip(*leaves, strict=True))
        self._own = [any(x is not c[0] for x in c) for c in columns]
        self._shared = [
            c[0] for c, own in zip(columns, self._own, strict=True) if not own
        ]
        self._owned = [
            [x for x, own in zip(each, self._own, strict=True) if own]
            for each in leaves
        ]

    def run(
        self,
        members: Sequence[int],
        roots: Sequence[Any],
        carries: Sequence[Carry],
        start: int,
        num_rounds: int,
    ) -> list[Result]:
        """Runs rounds start, start + 1, ... of members, by their places.

        Returns:
          For each what `Simulator.run` does. The carries that were given stay.
        """
        rounds = jnp.arange(start, start + num_rounds, dtype=jnp.int32)
        points = [
            (carry, (root, self._owned[i]))
            for i, root, carry in zip(members, roots, carries, strict=True)
        ]
        found: list[Result] = []
        while len(found) < len(points):
            found += self._call(points[len(found) :], rounds)
        return found

    @property
    def at_once(self) -> int:
        """How many points a device has as one more axis of its arrays."""
        return self.size // self._devices if self._plan == "vmap" else 1

    def _call(self, points: list[tuple], rounds: Any) -> list[Result]:
        """One call, of as many of the points as fit.

        The program has always as many places: a point has the same bits whatever the
        others are, but with more or fewer of them it need not.
        """
        while True:
            now = points[: self.size]
            filled = now + now[-1:] * (self.size - len(now))
            carries, own = jax.tree.map(lambda *x: jnp.stack(x), *filled)
            args = carries, own, (rounds, self._shared)
            if self._mesh is not None:
                along, whole = PartitionSpec(POINTS), PartitionSpec()
                args = tuple(map(self._put, args, (along, along, whole)))
            run = self.program.made("rounds", self._many(), args, (0,))
            if not self._shrunk(run):
                break
        outputs = run(*args)
        if self.program.work is None:
            width = self.at_once * self._first.width
            self.program.keep_work("rounds", len(rounds), width, self.size)
            self._first.program.work = self.program.work
        if self._mesh is not None:
            outputs = jax.device_put(outputs, self._mesh.devices.flat[0])
        return [_at(outputs, i) for i in range(len(now))]

    def _many(self) -> Callable:
        """The program, `(carries, own, shared) -> results`, of leaves [S, ...]."""

        def one(carry, own, shared):
            (root, owned), (rounds, common) = own, shared
            parts = {True: iter(owned), False: iter(common)}
            given = self._structure.unflatten(next(parts[own]) for own in self._own)
            return self._function(root, carry, rounds, *given)

        def many(carries, own, shared):
            if self._plan == "vmap":
                return jax.vmap(one, (0, 0, None))(carries, own, shared)

            def alone(point):
                # What is fused with it would be summed in another order.
                carry, own = jax.lax.optimization_barrier(point)
                return jax.lax.optimization_barrier(one(carry, own, shared))

            return jax.lax.map(alone, (carries, own))

        if self._mesh is None:
            return many
        along, whole = PartitionSpec(POINTS), PartitionSpec()
        return jax.shard_map(
            many,
            mesh=self._mesh,
            in_specs=(along, along, whole),
            out_specs=along,
            check_vma=False,
        )

    def _put(self, tree: PyTree, where: PartitionSpec) -> PyTree:
        return jax.device_put(tree, NamedSharding(self._mesh, where))

    def _shrunk(self, run: Any) -> bool:
        """Whether a program takes too much; then calls are smaller from now on."""
        each = self.size // self._devices
        if not self._limit or each == 1 or not hasattr(run, "memory_analysis"):
            return False
        found = run.memory_analysis()
        taken = (
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            + found.temp_size_in_bytes
            - found.alias_size_in_bytes
        )
        if taken <= self._limit:
            return False
        fit = int(each * self._limit / taken)
        self.size = max(1, min(fit, each - 1)) * self._devices
        return True


def _at(stacked: PyTree, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], stacked)


def _memory() -> int | None:
    """Bytes of a device that programs may have; None if it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return limit and int(limit * (1 - _SPARE))
