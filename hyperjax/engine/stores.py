"""Where client state lives between visits: on the device, or on the host.

Both stores allocate zeros and a `seen` flag per client; a client's real initial state
is computed on its first visit, so a million clients cost no initialisation. Rows of
clients that do not take part come back bitwise equal.

On several devices each may own the rows of some clients, see `sharding.owners`: then a
cohort's rows travel and nobody else's, and a device has room for its part alone.
"""

import contextlib
import functools
import math
import mmap
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

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


def host_gather(rows: PyTree, seen: np.ndarray, ids: np.ndarray):
    """As `gather`, for host arrays."""
    place = np.minimum(ids, len(seen) - 1)
    return jax.tree.map(lambda x: x[place], rows), seen[place]


def host_scatter(rows, seen, ids, new, alive) -> None:
    """As `scatter`, in place."""
    keep = alive & (ids < len(seen))
    for x, y in zip(jax.tree.leaves(rows), jax.tree.leaves(new), strict=True):
        x[ids[keep]] = np.asarray(y)[keep]
    seen[ids[keep]] = True
