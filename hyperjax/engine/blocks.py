"""Client state in blocks of clients, each a file named by what it holds.

A block is the rows of some clients that follow one another, leaf by leaf, as plain
bytes; its file is called by their SHA-256. States that have a block in common share its
file, so that a checkpoint costs what changed since the one before. Blocks of which no
client was ever seen are zeros (see `stores`), and have no file.
"""

import contextlib
import errno
import hashlib
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
        content = b"".join(x[those].tobytes() for x in jax.tree.leaves(rows))
        yield int(place), hashlib.sha256(content).hexdigest(), content


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


def read(folder: Path, template: PyTree, digests: list[str | None]) -> PyTree:
    """Returns the rows that blocks hold, NumPy.

    Args:
      folder: where their files are.
      template: leaves [N, ...], abstract.
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
        offset = 0
        for x in rows:
            part = x[place * size : (place + 1) * size]
            found = np.frombuffer(content, x.dtype, part.size, offset)
            part[...] = found.reshape(part.shape)
            offset += part.nbytes
    return jax.tree.unflatten(structure, rows)


def keep_only(folder: Path, digests: set[str]) -> None:
    """Removes all files but those of some blocks, also what a kill left half."""
    if folder.is_dir():
        for name in os.listdir(folder):
            if name not in digests:
                with contextlib.suppress(OSError):  # somebody has it open
                    os.unlink(folder / name)
