"""Client state in blocks of clients, each a file named by what it holds.

A block is the rows of some clients that follow one another, as plain bytes; its file is
called by their SHA-256. States that have a block in common share its file, so that a
checkpoint costs what changed since the one before. Clients who were never seen are
zeros (see `stores`): a block holds the rows of the others, one client after another,
and where there are none it has no file.
"""

import contextlib
import errno
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

import jax
import numpy as np

from hyperjax import hosts, tree
from hyperjax.engine import stores
from hyperjax.types import PyTree

BYTES = 2**16  # of a block, or more if there would be too many of them, or of one row
MOST = 2**14  # blocks: what is listed in each checkpoint


def clients_per_block(rows: PyTree, num_clients: int) -> int:
    """Returns how many clients are in a block of rows, leaves [N, ...]."""
    each = -(-tree.num_bytes(rows) // max(1, num_clients))
    return max(1, BYTES // max(1, each), -(-num_clients // MOST))


def count(rows: PyTree, num_clients: int) -> int:
    """Returns the number of blocks; none where clients keep nothing."""
    if not jax.tree.leaves(rows):
        return 0
    return -(-num_clients // clients_per_block(rows, num_clients))


def contents(
    rows: PyTree, seen: np.ndarray, changed: np.ndarray | None, parted: bool = False
) -> Iterator[tuple[int, str | None, bytes]]:
    """Yields blocks: place, digest and bytes; no digest of one never seen.

    Args:
      rows: leaves [N, ...], NumPy.
      seen: [N] bool.
      changed: ids of clients whose blocks are yielded; None for all.
      parted: whether each process holds the rows of its part of the clients. Then
        process 0 asks the others for theirs, and they have no bytes to yield.
    """
    size = clients_per_block(rows, len(seen))
    every = count(rows, len(seen))
    places = range(every) if changed is None else np.unique(changed // size)
    for place in places if every else ():
        known = _known(seen, int(place), size)
        if not len(known):
            yield int(place), None, b""
            continue
        make = functools.partial(of_clients, rows)
        content = gathered(make, known, len(seen), parted)
        here = hosts.is_first() or not parted
        digest = hashlib.sha256(content).hexdigest() if here else None
        yield int(place), digest, content


def gathered(
    make: Callable[[np.ndarray], bytes], ids: np.ndarray, num: int, parted: bool
) -> bytes:
    """Returns what is made of some of `num` clients, ids ascending, by who has them.

    If they are parted, then on process 0, and on others nothing.
    """
    if not parted:
        return make(ids)
    return b"".join(
        hosts.fetched(process, functools.partial(make, ids[mine]))
        for process, mine in _shares(ids, num)
    )


def of_clients(rows: PyTree, ids: np.ndarray) -> bytes:
    """Returns the rows of clients, one client after another."""
    each = [_as_bytes(x[ids]) for x in jax.tree.leaves(rows)]
    return np.concatenate(each, axis=1).tobytes()


def _known(seen: np.ndarray, place: int, size: int) -> np.ndarray:
    """Who of a block was ever seen, ids ascending."""
    return np.flatnonzero(seen[place * size : (place + 1) * size]) + place * size


def _shares(ids: np.ndarray, num: int) -> Iterator[tuple[int, slice]]:
    """Which process has which of some ids, ascending, where clients are parted."""
    for process, part in enumerate(hosts.parts(num)):
        first, last = np.searchsorted(ids, [part.start, part.stop])
        if first < last:
            yield process, slice(first, last)


def _as_bytes(x: np.ndarray) -> np.ndarray:
    """The bytes of rows, [n, bytes of a row]."""
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return flat.reshape(len(x), _width(x))


def _width(x: Any) -> int:
    """Bytes of a row."""
    return np.dtype(x.dtype).itemsize * math.prod(x.shape[1:])


# What a file system says that has no such operation.
_NOT_THERE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def sync(file: IO) -> None:
    """Has what was written to an open file outlast a loss of power, where that goes."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise


def write(folder: Path, digest: str, content: bytes) -> None:
    """Writes a block, which others may share, as a whole or not at all."""
    folder.mkdir(exist_ok=True)
    part = folder / f".{digest}.part"
    with open(part, "wb") as file:
        file.write(content)
        sync(file)  # before the digest that will name it
    os.replace(part, folder / digest)


# Returns the content of a block, given its place and who of it was ever seen.
Source: TypeAlias = Callable[[int, np.ndarray], bytes]


def in_files(folder: Path, digests: list[str | None]) -> Source:
    """Returns a source of blocks in files.

    It raises ValueError if a block is not what its name says, and FileNotFoundError if
    it is not there.

    Args:
      folder: where the files are.
      digests: of every block, in order.
    """

    def source(place, known):
        digest = digests[place]
        if digest is None:
            raise ValueError(f"block {place} of clients is not listed")
        content = (folder / digest).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"block {digest} does not match its digest")
        return content

    return source


def by_leaves(source: Source, template: PyTree) -> Source:
    """Returns the source of blocks that hold all of their clients, leaf by leaf."""
    leaves = jax.tree.leaves(template)
    size = clients_per_block(template, len(leaves[0])) if leaves else 1

    def converted(place, known):
        content, offset, found = source(place, known), 0, []
        for x in leaves:
            num = min(size, len(x) - place * size)
            shape = num, _width(x)
            each = np.frombuffer(content, np.uint8, math.prod(shape), offset)
            found.append(each.reshape(shape)[known - place * size])
            offset += math.prod(shape)
        return np.concatenate(found, axis=1).tobytes()

    return converted


def check(template: PyTree, seen: np.ndarray, source: Source) -> None:
    """Reads all blocks, and raises what their source does, or a ValueError."""
    each = sum(map(_width, jax.tree.leaves(template)))
    size = clients_per_block(template, len(seen))
    for place in range(count(template, len(seen))):
        known = _known(seen, place, size)
        if len(known) and len(source(place, known)) != each * len(known):
            raise ValueError(f"block {place} holds other clients than were seen")


def read(
    template: PyTree, seen: np.ndarray, source: Source | None, parted: bool = False
) -> PyTree:
    """Returns the rows that blocks hold, NumPy.

    Args:
      template: leaves [N, ...], abstract.
      seen: [N] bool, of whom there are rows.
      source: of the blocks; of several processes, that of process 0 alone.
      parted: whether each process takes the rows of its part of the clients; otherwise
        all take all.
    """
    leaves, structure = jax.tree.flatten(template)
    rows = [stores.unwritten(x.shape, np.dtype(x.dtype)) for x in leaves]
    size = clients_per_block(template, len(seen))
    each = sum(map(_width, leaves))
    for place in range(count(template, len(seen))):
        known = _known(seen, place, size)
        if not len(known):
            continue
        content = b"" if source is None else source(place, known)
        everybody = ((i, slice(0, len(known))) for i in range(hosts.count()))
        for process, some in _shares(known, len(seen)) if parted else everybody:
            part = content[each * some.start : each * some.stop]
            if part := hosts.handed(process, part):
                _put(rows, known[some], part)
    return jax.tree.unflatten(structure, rows)


def _put(rows: list[np.ndarray], ids: np.ndarray, content: bytes) -> None:
    """Writes rows of some clients into a host store."""
    each = sum(map(_width, rows))
    if len(content) != each * len(ids):
        raise ValueError(f"a block has {len(content)} bytes, not {each * len(ids)}")
    found, done = np.frombuffer(content, np.uint8).reshape(len(ids), each), 0
    for x in rows:
        mine = found[:, done : done + _width(x)].tobytes()
        x[ids] = np.frombuffer(mine, x.dtype).reshape(len(ids), *x.shape[1:])
        done += _width(x)


def keep_only(folder: Path, digests: set[str]) -> None:
    """Removes all files but those of some blocks, also what a kill left half."""
    if folder.is_dir():
        for name in os.listdir(folder):
            if name not in digests:
                with contextlib.suppress(OSError):  # somebody has it open
                    os.unlink(folder / name)
