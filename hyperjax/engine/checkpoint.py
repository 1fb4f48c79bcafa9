"""Checkpoints that survive a kill at any moment, and notice damage.

A checkpoint holds the carry (server state, client rows, seen flags) after a number of
rounds, written by orbax, and a digest of it; no key, since keys follow from the round.
It counts once its digest exists, which is written last and atomically.

Arrays go by their paths, so that orbax alone can open one:

  with orbax.checkpoint.PyTreeCheckpointer() as reader:
      arrays = reader.restore("<run>/checkpoints/round_00000050/carry")
  arrays["server/theta/params/head/kernel"]
"""

import errno
import json
import os
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from hyperjax import hosts, tree
from hyperjax.errors import first_line
from hyperjax.types import PyTree

DIGEST = "digest.json"
FORMAT = 2  # of a checkpoint; before, arrays went by number and no format was said
OLDER = (
    "was made by an older version of hyperjax and can be neither continued nor served "
    "by this one"
)


class Restored(NamedTuple):
    """The newest intact checkpoint."""

    round: int
    carry: PyTree


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    # Bytes of a path that are no text ("surrogates") must not cost a report.
    with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
    os.replace(part, path)


# What a file system says that has no such operation.
_NOT_THERE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def read_json(path: str | os.PathLike, remedy: str, kind: type = dict) -> Any:
    """Reads a JSON file.

    Args:
      path: the file.
      remedy: what to do if it is damaged, for the message.
      kind: dict or list, what it holds.

    Raises:
      ValueError: it is no JSON, or holds something else.
      FileNotFoundError: it is not there.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's errors and those of UTF-8 are such
        raise damaged(path, error, remedy) from error
    if not isinstance(found, kind):
        raise damaged(path, f"it holds no {kind.__name__}", remedy)
    return found


def read_npz(
    path: str | os.PathLike,
    remedy: str,
    names: Iterable[str] | None = None,
    need: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Reads arrays of an .npz file.

    Args:
      path: the file.
      remedy: what to do if it is damaged, for the message.
      names: the arrays to read, if they are there; all by default.
      need: those that must be there.

    Raises:
      ValueError: it is not an .npz file, is damaged, holds Python objects, or lacks
        one that is needed.
      FileNotFoundError: it is not there.
    """
    try:
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array, as .npy files do")
        with content:
            absent = [name for name in need if name not in content.files]
            if absent:
                raise ValueError(f"it has no array {', '.join(map(repr, absent))}")
            wanted = content.files if names is None else names
            return {name: content[name] for name in wanted if name in content.files}
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # zip, zlib and NumPy each have errors of their own
        raise damaged(path, error, remedy, "an .npz file of plain arrays") from error


def damaged(
    path: str | os.PathLike, why: Exception | str, remedy: str, kind: str = "readable"
) -> ValueError:
    """Returns the error of a file that cannot be read: which, why, and what to do."""
    reason = why if isinstance(why, str) else first_line(why)
    return ValueError(f"{str(path)!r} is not {kind} ({reason}); {remedy}")


def save(folder: str | os.PathLike, round: int, carry: PyTree, keep: int = 2) -> str:
    """Writes a checkpoint, then removes all but the newest `keep`.

    Args:
      folder: holds the checkpoints of one run.
      round: number of finished rounds.
      carry: a tree of arrays.
      keep: how many to keep; at least 2, so that a damaged newest one can be skipped.

    Returns:
      The digest of the carry.

    Raises:
      ValueError: two arrays have one path.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round_{round:08d}"
    if path.exists():  # unfinished, or found damaged on the way here
        shutil.rmtree(path)
    arrays = jax.device_get(carry)
    digest = tree.sha256(arrays)
    with _orbax() as checkpointer:
        checkpointer.save(path / "carry", _by_path(arrays))
    record = {"format": FORMAT, "round": round, "sha256": digest}
    write_atomically(path / DIGEST, json.dumps(record))
    for old in finished(folder)[: -max(keep, 2)]:
        # Without its digest it does not count. Network file systems may refuse to
        # remove a folder with files that somebody has open.
        (old / DIGEST).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    return digest


def restore(folder: str | os.PathLike, template: PyTree) -> Restored | None:
    """Returns the newest intact checkpoint, or None if there never was one.

    Damaged ones are reported and passed over.

    Args:
      folder: as in `save`.
      template: an abstract carry: its structure, shapes and dtypes.

    Raises:
      ValueError: there are checkpoints, and every one is damaged, or the newest intact
        one is that of an older version.
    """
    found = finished(Path(folder).absolute())
    for path in reversed(found):
        try:
            return _read(path, template)
        except _Older:
            raise ValueError(f"{str(path)!r} {OLDER}") from None
        except Exception as error:  # any sign of damage, from orbax or our own check
            logging.warning(
                "Checkpoint %s is damaged (%s); trying the one before.",
                path,
                textwrap.shorten(first_line(error), 300),  # orbax has 2,000 letters
            )
    if found:
        raise ValueError(
            f"every checkpoint in {folder} is damaged, or was written by a version "
            "with another state; nothing was changed. Start again in a new workdir, "
            "or remove that folder to start from round 0"
        )
    return None


class _Older(Exception):
    """A checkpoint is of an older format."""


def _read(path: Path, template: PyTree) -> Restored:
    record = json.loads((path / DIGEST).read_text(encoding="utf-8"))
    if record.get("format", 1) < FORMAT:
        raise _Older
    with _orbax() as checkpointer:
        named = checkpointer.restore(path / "carry")
    leaves, structure = jax.tree.flatten(template)
    names = tree.paths(template)
    other = sorted({*named} ^ {*names})
    if other:
        holds = "holds" if other[0] in named else "lacks"
        raise ValueError(f"it {holds} {other[0]!r}, which is that of another state")
    carry = jax.tree.unflatten(structure, [np.asarray(named[name]) for name in names])
    if tree.sha256(carry) != record["sha256"]:
        raise ValueError("its content does not match its digest")
    for leaf, found in zip(leaves, jax.tree.leaves(carry), strict=True):
        if leaf.shape != found.shape or leaf.dtype != found.dtype:
            raise ValueError(
                f"it holds {found.dtype}{found.shape} where "
                f"{leaf.dtype}{leaf.shape} is expected"
            )
    return Restored(record["round"], carry)


def _orbax() -> Any:
    """Returns what reads and writes arrays, in this process alone."""
    import orbax.checkpoint as ocp

    if not hosts.several():
        return ocp.PyTreeCheckpointer()
    # Or else it waits for the others, who do not come.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="hyperjax"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def finished(folder: Path) -> list[Path]:
    """Returns the checkpoints that count, those with a digest file, oldest first."""
    return sorted(path.parent for path in folder.glob(f"round_*/{DIGEST}"))


def _by_path(carry: PyTree) -> dict[str, np.ndarray]:
    """Leaves by path: orbax rebuilds plain dicts, not our named tuples."""
    names = tree.paths(carry)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the state has several arrays under {', '.join(twice)}")
    leaves = map(np.asarray, jax.tree.leaves(carry))
    return dict(zip(names, leaves, strict=True))
