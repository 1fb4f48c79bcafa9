"""Where client state lives between visits: on the device, or on the host.

Both stores allocate zeros and a `seen` flag per client; a client's real initial state
is computed on its first visit, so a million clients cost no initialisation. Rows of
clients that do not take part come back bitwise equal.

On several devices each may own the rows of some clients, see `sharding.owners`: then a
cohort's rows travel and nobody else's, and a device has room for its part alone. Of
several processes each holds the rows of its part of the clients, see `hosts.parts`. A
host store then is as large as ever for whoever indexes it, but of others' rows nothing
is written or read, so that they take no memory.
"""

import contextlib
import functools
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from hyperjax import hosts
from hyperjax.engine import sharding
from hyperjax.types import Array, PyTree


def zeros(spec: PyTree, num_clients: int, place: Any = None) -> tuple[PyTree, Array]:
    """Returns device rows [N, ...] of zeros and seen [N] false.

    `place` is a device or sharding for them.
    """
    empty = functools.partial(jnp.zeros, device=place)
    rows = jax.tree.map(lambda s: empty((num_clients, *s.shape), s.dtype), spec)
    return rows, empty(num_clients, bool)


def gather(
    rows: PyTree, seen: Array, ids: Array, owners: Any = None
) -> tuple[PyTree, Array]:
    """Returns the rows of a cohort; padding ids show the last client."""
    take = functools.partial(taken, ids=ids, owners=owners)
    return jax.tree.map(take, rows), take(seen)


def taken(x: Array, ids: Array, owners: Any = None) -> Array:
    """Returns rows of an array [N, ...], those of ids beyond it the last.

    With `owners`, see `sharding.owners`, each sends the rows it has, and no others.
    """
    if owners is None:
        return x.at[ids].get(mode="clip")
    last = x.shape[0] - 1

    def own(x, ids):
        place, mine = _own_places(x, jnp.minimum(ids, last))
        found = _bits(x.at[place].get(mode="clip"))
        found = jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), found, 0)
        return _bits(jax.lax.psum(found, sharding.CLIENTS), x.dtype)

    along, whole = PartitionSpec(sharding.CLIENTS), PartitionSpec()
    run = jax.shard_map(
        own, mesh=owners, in_specs=(along, whole), out_specs=whole, check_vma=False
    )
    return run(x, ids)


def scatter(
    rows: PyTree,
    seen: Array,
    ids: Array,
    new: PyTree,
    alive: Array,
    owners: Any = None,
) -> tuple[PyTree, Array]:
    """Writes a cohort back; padding ids are dropped."""

    def written(rows, seen, ids, new, alive):
        rows = jax.tree.map(lambda x, y: x.at[ids].set(y, mode="drop"), rows, new)
        # The larger of both: whoever was seen once stays so when it drops out.
        return rows, seen.at[ids].max(alive, mode="drop")

    def own(rows, seen, ids, new, alive):
        place, mine = _own_places(seen, ids)
        return written(rows, seen, jnp.where(mine, place, len(seen)), new, alive)

    if owners is None:
        return written(rows, seen, ids, new, alive)
    along, whole = PartitionSpec(sharding.CLIENTS), PartitionSpec()
    run = jax.shard_map(
        own,
        mesh=owners,
        in_specs=(along, along, whole, whole, whole),
        out_specs=along,
        check_vma=False,
    )
    return run(rows, seen, ids, new, alive)


def _bits(x: Array, dtype: Any = None) -> Array:
    """Whole numbers of the same bits, or those of whole numbers as another type.

    Sums with 0 leave them as they are; a sum of numbers would make 0.0 of -0.0.
    """
    if bool in (x.dtype, dtype):
        return x.astype(dtype or jnp.uint8)
    dtype = dtype or f"uint{8 * x.dtype.itemsize}"
    return jax.lax.bitcast_convert_type(x, jnp.dtype(dtype))


def _own_places(x: Array, ids: Array) -> tuple[Array, Array]:
    """Where a device's part of an array has clients, and whether it has them."""
    place = ids - jax.lax.axis_index(sharding.CLIENTS) * x.shape[0]
    return place, (place >= 0) & (place < x.shape[0])


def host_zeros(
    spec: PyTree, num_clients: int, folder: str | None = None
) -> tuple[PyTree, np.ndarray]:
    """Returns NumPy rows [N, ...] and seen [N]; memory-mapped files if a folder."""
    leaves, structure = jax.tree.flatten(spec)

    def allocate(i, s):
        shape = (num_clients, *s.shape)
        if folder is None:
            return unwritten(shape, np.dtype(s.dtype))
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"rows_{i}.npy")
        return np.lib.format.open_memmap(path, "w+", s.dtype, shape)

    rows = [allocate(i, s) for i, s in enumerate(leaves)]
    return jax.tree.unflatten(structure, rows), np.zeros(num_clients, bool)


def unwritten(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns zeros that take memory as they are written to.

    NumPy asks for huge pages where an array has more than 4 MB, and then the first row
    that is written in each of them costs 2 MB.

    Raises:
      ValueError: the system has no room for so many.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < 2**22 or not hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux alone has it
        return np.zeros(shape, dtype)
    # Private: what was never written is the system's one page of zeros when it is read.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        raise ValueError(
            f"state of {shape[0]:,} clients, {size / 2**30:.1f} GB, has no room in "
            "host memory; accepted: fewer clients, a smaller network, or files for it "
            "(engine.memory_map=True, store_dir)"
        ) from error
    with contextlib.suppress(OSError):  # of a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


_AT_ONCE = 2**23  # bytes of rows that are copied


def pieces(rows: PyTree, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yields some of the clients `ids` after others, so that their rows are small."""
    leaves = jax.tree.leaves(rows)
    each = sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in leaves)
    num = max(1, _AT_ONCE // max(1, each))
    for start in range(0, len(ids), num):
        yield ids[start : start + num]


# Which clients' rows a process holds; None: everybody's.
Held: TypeAlias = range | None


def is_held(ids: np.ndarray, held: Held) -> np.ndarray:
    """Returns whether a process holds the rows of clients, [C] bool."""
    if held is None:
        return np.ones(len(ids), bool)
    return (ids >= held.start) & (ids < held.stop)


def host_gather(rows: PyTree, seen: np.ndarray, ids: np.ndarray, held: Held = None):
    """As `gather`, for host arrays; others' rows than those that are held are 0."""
    place = np.minimum(ids, len(seen) - 1)
    if held is None:
        return jax.tree.map(lambda x: x[place], rows), seen[place]
    mine = is_held(place, held)

    def own(x):
        found = np.zeros((len(place), *x.shape[1:]), x.dtype)
        found[mine] = x[place[mine]]
        return found

    return jax.tree.map(own, rows), seen[place]


def host_scatter(rows, seen, ids, new, alive, held: Held = None) -> None:
    """As `scatter`, in place; only those are written that are held."""
    keep = alive & (ids < len(seen))
    seen[ids[keep]] = True
    keep &= is_held(ids, held)
    for x, y in zip(jax.tree.leaves(rows), jax.tree.leaves(new), strict=True):
        x[ids[keep]] = np.asarray(y)[keep]


def fetched(
    rows: PyTree,
    seen: Any,
    ids: np.ndarray,
    held: Held,
    mesh: Any,
    program: Callable,
    family: str,
) -> tuple[PyTree, Any]:
    """As `host_gather` of rows that several processes hold, on all their devices.

    Args:
      rows: leaves [N, ...], of either store.
      seen: [N] bool.
      ids: [C] int.
      held: by this process; None: all is here.
      mesh: all devices.
      program: what compiles, see `compiled.Compiled`.
      family: theirs.
    """
    if held is None:
        return host_gather(rows, seen, ids)
    if isinstance(seen, np.ndarray):
        part, known = host_gather(rows, seen, ids, held)
        parts = hosts.put_mine(part, sharding.in_parts(mesh), mesh.size)
        return program("fetch", _sum_of_parts, (parts,), family=family), known
    fetch = functools.partial(gather, owners=mesh)
    there = sharding.replicate(np.asarray(ids), mesh)
    return program("fetch", fetch, (rows, seen, there), family=family)


def fetcher(held: Mapping[str, Held] | None, mesh: Any, program: Callable) -> Callable:
    """Returns `fetched(rows, seen, ids, family)` with the rest of its arguments."""

    def fetch(rows, seen, ids, family):
        mine = (held or {}).get(family)
        return fetched(rows, seen, ids, mine, mesh, program, family)

    return fetch


def _sum_of_parts(parts: PyTree) -> PyTree:
    """Rows [C, ...] out of [D, C, ...], of which one at most is not 0, to the bit."""

    def one(x):
        bits = _bits(x)
        return _bits(jnp.sum(bits, axis=0, dtype=bits.dtype), x.dtype)

    return jax.tree.map(one, parts)


def on_host(rows: PyTree, held: Held) -> PyTree:
    """Returns rows of either store as NumPy arrays [N, ...], others' left out."""

    def one(x):
        if held is None or isinstance(x, np.ndarray):
            return jax.device_get(x)
        found = unwritten(x.shape, np.dtype(x.dtype))
        for shard in x.addressable_shards:
            found[shard.index] = np.asarray(shard.data)
        return found

    return jax.tree.map(one, rows)
