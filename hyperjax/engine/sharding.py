"""Maps a function over clients: one after another, batched, on one device or many."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from hyperjax import hosts
from hyperjax.errors import check_at_least, check_choice
from hyperjax.types import Array, PyTree

CLIENTS = "clients"
MAPPERS = ("auto", "map", "vmap", "block")
RAGGED = 1.5  # times the mean; see `resolve_mapper`


def resolve_mapper(
    mapper: str,
    block_size: int,
    backend: str,
    sizes: Sequence[int] | np.ndarray = (1,),
) -> str | int:
    """Turns a config's mapper into "map", "vmap" or a block size.

    "auto" is "map" on the CPU, where a batch of 32 already fills a core and batched
    per-client kernels are slow (`benchmarks/round_time.py` compares them). Accelerators
    want large products: "vmap", where all clients take the steps of the largest one;
    or, if that has more than `RAGGED` times the mean of their sizes, blocks of clients
    of about a size, see `by_size` (`benchmarks/cohort.py` counts their steps).

    Args:
      mapper: one of `MAPPERS`.
      block_size: of "block".
      backend: JAX's name of it.
      sizes: [N] samples of the clients who train.

    Raises:
      ValueError: unknown mapper, or a block size below 1.
    """
    check_choice("mapper", mapper, MAPPERS)
    check_at_least(1, block_size=block_size)
    if mapper == "auto":
        if backend == "cpu":
            return "map"
        mapper = "block" if np.max(sizes) > RAGGED * np.mean(sizes) else "vmap"
    return block_size if mapper == "block" else mapper


def client_mesh(cohort_size: int, max_devices: int = 0) -> Mesh | None:
    """Returns a mesh over the axis "clients", or None if one device is as good.

    Uses the fewest local devices that minimise clients per device, so that 8 clients
    on 6 devices take 4 devices with 2 clients each. `max_devices` = 0 means all. With
    several processes all of their devices: each holds a part of what is shared.

    Raises:
      ValueError: a cohort size below 1, a negative number of devices, or one that
        processes cannot have equal parts of.
    """
    check_at_least(1, cohort_size=cohort_size)
    check_at_least(0, max_devices=max_devices)
    devices = hosts.devices(max_devices)
    rows = -(-cohort_size // len(devices))
    used = len(devices) if hosts.several() else -(-cohort_size // rows)
    if used == 1:
        return None
    # Auto axes: explicit ones would ask method code for output shardings.
    return Mesh(
        np.array(devices[:used]),
        (CLIENTS,),
        axis_types=(jax.sharding.AxisType.Auto,),
    )


def owners(num_clients: int, mesh: Mesh | None) -> Mesh | None:
    """Returns a mesh whose devices own equal parts of so many clients, or None.

    Device d owns the d-th part of them, in the order of their numbers. There are none
    where parts would not be equal; then what is kept of all clients is on every device.
    """
    return None if mesh is None or num_clients % mesh.size else mesh


def padded_size(cohort_size: int, mesh: Mesh | None) -> int:
    """Returns the cohort size rounded up to a multiple of the device count."""
    devices = 1 if mesh is None else mesh.size
    return -(-cohort_size // devices) * devices


def map_clients(fn: Callable, mapper: str | int, mesh: Mesh | None) -> Callable:
    """Maps `fn(mapped, shared)` over the leading axis of `mapped`, leaves [C, ...].

    Args:
      fn: function of one client.
      mapper: "map" (in sequence: each client runs its own number of steps), "vmap"
        (all at once) or a block size (vmapped blocks in sequence).
      mesh: devices to split C over; C must be a multiple of their number.

    Returns:
      `mapped_fn(mapped, shared) -> outputs [C, ...]`.

    Raises:
      ValueError: another mapper.
    """
    if mapper not in ("map", "vmap"):
        kind = {"block": "a block size instead", "auto": "see resolve_mapper"}
        if isinstance(mapper, str):
            hint = f" ({kind[mapper]})" if mapper in kind else ""
            raise ValueError(
                f"mapper={mapper!r} is unknown{hint}; accepted: 'map', 'vmap', or the "
                "number of clients in a block"
            )
        check_at_least(1, mapper=mapper)

    def local_map(mapped, shared):
        if mapper == "vmap":
            return jax.vmap(fn, (0, None))(mapped, shared)
        batch_size = None if isinstance(mapper, str) else mapper
        return jax.lax.map(lambda m: fn(m, shared), mapped, batch_size=batch_size)

    if mesh is None:
        return local_map
    along = PartitionSpec(CLIENTS)
    return jax.shard_map(
        local_map,
        mesh=mesh,
        in_specs=(along, PartitionSpec()),
        out_specs=along,
        check_vma=False,
    )


def by_size(size: Array, devices: int = 1) -> Array:
    """Returns an order of clients in which neighbours have about as many samples.

    Clients of a block take as many steps as the largest of them. The largest come
    first, dealt out to devices in turn.

    Args:
      size: [C] int.
      devices: how many have equal parts of the order; C is a multiple of it.

    Returns:
      [C] int32, a permutation.
    """
    order = jnp.argsort(-size, stable=True)
    return order.reshape(-1, devices).T.reshape(-1)


def everywhere(mesh: Mesh) -> jax.sharding.NamedSharding:
    """Returns the sharding that puts a copy on every device of the mesh."""
    return jax.sharding.NamedSharding(mesh, PartitionSpec())


def in_parts(mesh: Mesh) -> jax.sharding.NamedSharding:
    """Returns the sharding of arrays [N, ...] whose rows are with their `owners`."""
    return jax.sharding.NamedSharding(mesh, PartitionSpec(CLIENTS))


def replicate(a: PyTree, mesh: Mesh | None) -> PyTree:
    """Puts a copy of a tree on every device of the mesh."""
    return a if mesh is None else hosts.put(a, everywhere(mesh))
