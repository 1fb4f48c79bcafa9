"""Checkpoints that survive a kill at any moment, and notice damage.

A checkpoint holds the carry (server state, client rows, seen flags) after a number of
rounds, written by orbax, and a digest of it; no key, since keys follow from the round.
It counts once its digest exists, which is written last and atomically.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from hyperjax import tree
from hyperjax.errors import first_line
from hyperjax.types import PyTree

DIGEST = "digest.json"


class Restored(NamedTuple):
    """The newest intact checkpoint."""

    round: int
    carry: PyTree


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save(folder: str | os.PathLike, round: int, carry: PyTree, keep: int = 2) -> str:
    """Writes a checkpoint, then removes all but the newest `keep`.

    Args:
      folder: holds the checkpoints of one run.
      round: number of finished rounds.
      carry: a tree of arrays.
      keep: how many to keep; at least 2, so that a damaged newest one can be skipped.

    Returns:
      The digest of the carry.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round_{round:08d}"
    if path.exists():  # unfinished, or found damaged on the way here
        shutil.rmtree(path)
    arrays = jax.device_get(carry)
    digest = tree.sha256(arrays)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path / "carry", _named(arrays))
    write_atomically(path / DIGEST, json.dumps({"round": round, "sha256": digest}))
    for old in _finished(folder)[: -max(keep, 2)]:
        shutil.rmtree(old)
    return digest


def restore(folder: str | os.PathLike, template: PyTree) -> Restored | None:
    """Returns the newest intact checkpoint, or None if there never was one.

    Damaged ones are reported and passed over.

    Args:
      folder: as in `save`.
      template: an abstract carry: its structure, shapes and dtypes.

    Raises:
      ValueError: there are checkpoints, and every one is damaged.
    """
    finished = _finished(Path(folder).absolute())
    for path in reversed(finished):
        try:
            return _read(path, template)
        except Exception as error:  # any sign of damage, from orbax or our own check
            logging.warning(
                "Checkpoint %s is damaged (%s); trying the one before.",
                path,
                first_line(error),
            )
    if finished:
        raise ValueError(
            f"every checkpoint in {folder} is damaged; nothing was changed. Start "
            "again in a new workdir, or remove that folder to start from round 0"
        )
    return None


def _read(path: Path, template: PyTree) -> Restored:
    import orbax.checkpoint as ocp

    record = json.loads((path / DIGEST).read_text())
    with ocp.PyTreeCheckpointer() as checkpointer:
        named = checkpointer.restore(path / "carry")
    leaves, structure = jax.tree.flatten(template)
    arrays = [np.asarray(named[_name(i)]) for i in range(len(leaves))]
    carry = jax.tree.unflatten(structure, arrays)
    if tree.sha256(carry) != record["sha256"]:
        raise ValueError("its content does not match its digest")
    for leaf, found in zip(leaves, jax.tree.leaves(carry), strict=True):
        if leaf.shape != found.shape or leaf.dtype != found.dtype:
            raise ValueError(
                f"it holds {found.dtype}{found.shape} where "
                f"{leaf.dtype}{leaf.shape} is expected"
            )
    return Restored(record["round"], carry)


def _finished(folder: Path) -> list[Path]:
    """Checkpoints with a digest file, oldest first."""
    return sorted(path.parent for path in folder.glob(f"round_*/{DIGEST}"))


def _name(i: int) -> str:
    return f"leaf_{i:05d}"


def _named(carry: PyTree) -> dict[str, Any]:
    """Leaves by number: orbax rebuilds plain dicts, not our named tuples."""
    return {_name(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(carry))}
