"""Client state in blocks of clients, each a file named by what it holds.

A block is the rows of some clients that follow one another, as plain bytes; its file is
called by their SHA-256. States that have a block in common share its file, so that a
checkpoint costs what changed since the one before. Clients who were never seen are
zeros (see `stores`): a block holds the rows of the others, one client after another,
and where there are none it has no file.
"""

import contextlib
import errno
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax
import numpy as np

from hyperjax import tree
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
    rows: PyTree, seen: np.ndarray, changed: np.ndarray | None
) -> Iterator[tuple[int, str | None, bytes]]:
    """Yields blocks: place, digest and bytes; no digest of one never seen.

    Args:
      rows: leaves [N, ...], NumPy.
      seen: [N] bool.
      changed: ids of clients whose blocks are yielded; None for all.
    """
    size = clients_per_block(rows, len(seen))
    every = count(rows, len(seen))
    places = range(every) if changed is None else np.unique(changed // size)
    for place in places if every else ():
        those = slice(int(place) * size, (int(place) + 1) * size)
        if not seen[those].any():
            yield int(place), None, b""
            continue
        known = np.flatnonzero(seen[those]) + those.start
        each = [_as_bytes(x[known]) for x in jax.tree.leaves(rows)]
        content = np.concatenate(each, axis=1).tobytes()
        yield int(place), hashlib.sha256(content).hexdigest(), content


def _as_bytes(x: np.ndarray) -> np.ndarray:
    """The bytes of rows, [n, bytes of a row]."""
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return flat.reshape(len(x), _width(x))


def _width(x: np.ndarray) -> int:
    """Bytes of a row."""
    return x.dtype.itemsize * math.prod(x.shape[1:])


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


def read(
    folder: Path, template: PyTree, seen: np.ndarray | None, digests: list[str | None]
) -> PyTree:
    """Returns the rows that blocks hold, NumPy.

    Args:
      folder: where their files are.
      template: leaves [N, ...], abstract.
      seen: [N] bool, of whom there are rows; None: of all in a block, leaf by leaf, as
        blocks once were.
      digests: of every block, in order.

    Raises:
      ValueError: a block is not what its name says.
      FileNotFoundError: one is not there.
    """
    leaves, structure = jax.tree.flatten(template)
    rows = [stores.unwritten(x.shape, np.dtype(x.dtype)) for x in leaves]
    size = clients_per_block(template, len(rows[0])) if rows else 1
    for place, digest in enumerate(digests):
        if digest is None:
            continue
        content = (folder / digest).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"block {digest} does not match its digest")
        those = slice(place * size, (place + 1) * size)
        if seen is None:
            _put_leaves([x[those] for x in rows], content)
        else:
            put(rows, np.flatnonzero(seen[those]) + those.start, content)
    return jax.tree.unflatten(structure, rows)


def put(rows: PyTree, ids: np.ndarray, content: bytes) -> None:
    """Writes rows of some clients, one after another in a block, into a host store.

    Raises:
      ValueError: the block holds those of more clients or fewer.
    """
    each = sum(map(_width, jax.tree.leaves(rows)))
    if len(content) != each * len(ids):
        raise ValueError(f"a block has {len(content)} bytes, not {each * len(ids)}")
    found, done = np.frombuffer(content, np.uint8).reshape(len(ids), each), 0
    for x in jax.tree.leaves(rows):
        mine = found[:, done : done + _width(x)].tobytes()
        x[ids] = np.frombuffer(mine, x.dtype).reshape(len(ids), *x.shape[1:])
        done += _width(x)


def _put_leaves(rows: list[np.ndarray], content: bytes) -> None:
    """The same of a block that holds one leaf after another."""
    offset = 0
    for part in rows:
        found = np.frombuffer(content, part.dtype, part.size, offset)
        part[...] = found.reshape(part.shape)
        offset += part.nbytes


def keep_only(folder: Path, digests: set[str]) -> None:
    """Removes all files but those of some blocks, also what a kill left half."""
    if folder.is_dir():
        for name in os.listdir(folder):
            if name not in digests:
                with contextlib.suppress(OSError):  # somebody has it open
                    os.unlink(folder / name)
