"""Checkpoints that survive a kill at any moment, and notice damage.

A checkpoint holds the carry (server state, client rows, seen flags) after a number of
rounds and a digest of it; no key, since keys follow from the round. It counts once its
digest exists, which is written last and atomically.

Client rows are in blocks of clients, files that checkpoints share, see `blocks`: what
is written is what changed, and the digest is made of theirs. So a block that is damaged
on the disk may be one of every checkpoint. All else is written by orbax. Arrays go by
their paths, so that orbax alone can open one:

  with orbax.checkpoint.PyTreeCheckpointer() as reader:
      arrays = reader.restore("<run>/checkpoints/round_00000050/carry")
  arrays["server/theta/params/head/kernel"]
"""

import functools
import hashlib
import json
import os
import shutil
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from hyperjax import hosts, tree
from hyperjax.engine import blocks, stores
from hyperjax.engine.schedule import Carry
from hyperjax.errors import first_line
from hyperjax.types import PyTree

DIGEST = "digest.json"
INDEX = "rows.json"  # which blocks client rows are made of
BLOCKS = "blocks"  # the folder that checkpoints share
# Of a checkpoint. Still read: 3, where blocks hold rows of clients who were never seen
# too, and 2, where orbax wrote client rows, and the digest was that of the whole. In 1
# arrays went by number, and no format was said.
FORMAT = 4
_BLOCKS_SINCE, _SEEN_SINCE = 3, 4
LARGE = 2**16  # clients; see `state_digest`
OLDER = (
    "was made by an older version of hyperjax and can be neither continued nor served "
    "by this one"
)


class Restored(NamedTuple):
    """The newest intact checkpoint."""

    round: int
    carry: Carry


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    # Bytes of a path that are no text ("surrogates") must not cost a report.
    with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        blocks.sync(file)
    os.replace(part, path)


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


def is_whole_npz(path: str | os.PathLike, remedy: str) -> bool:
    """Returns whether an .npz file holds arrays, without keeping them in memory.

    Raises:
      ValueError: it is damaged.
      FileNotFoundError: it is not there.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            names = archive.namelist()
    except FileNotFoundError:
        raise
    except Exception as error:  # zip and zlib each have errors of their own
        raise damaged(path, error, remedy, "an .npz file of plain arrays") from error
    if broken is not None:
        why = f"{broken} is not what was written"
        raise damaged(path, why, remedy, "an .npz file of plain arrays")
    return bool(names)


def damaged(
    path: str | os.PathLike, why: Exception | str, remedy: str, kind: str = "readable"
) -> ValueError:
    """Returns the error of a file that cannot be read: which, why, and what to do."""
    reason = why if isinstance(why, str) else first_line(why)
    return ValueError(f"{str(path)!r} is not {kind} ({reason}); {remedy}")


class Saver:
    """Writes the checkpoints of a run, one after another.

    Args:
      folder: holds the checkpoints of one run; None: nothing is written, and digests
        are computed as if it were.
      keep: how many to keep; at least 2, so that a damaged newest one can be skipped.
      held: by family, whose rows this process holds, see `schedule.Simulator`.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        keep: int = 2,
        held: Mapping[str, stores.Held] | None = None,
    ):
        self._folder = None if folder is None else Path(folder).absolute()
        self._held = held or {}
        self._keep = max(keep, 2)
        self._digests: dict[str, list[str | None]] = {}  # of blocks, as last written

    def save(
        self,
        round: int,
        carry: Carry,
        changed: Callable[[], Mapping[str, np.ndarray]] | None = None,
    ) -> str:
        """Writes a checkpoint, then removes all but the newest ones.

        Args:
          round: number of finished rounds.
          carry: the state.
          changed: returns the clients, by family, whose rows may not be as they were
            when this last saved; None: all. Not called where it makes no difference.

        Returns:
          The digest of the carry.

        Raises:
          ValueError: two arrays have one path.
        """
        carry = _on_host(carry, self._held)
        path = None
        if self._folder is not None:
            path = self._folder / f"round_{round:08d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():  # unfinished, or found damaged on the way here
                shutil.rmtree(path)
        named = _by_path(carry)
        mine = tree.paths(carry._replace(rows={}))
        arrays = {
            name: [str(x.dtype), x.shape]
            for name, x in named.items()
            if name not in mine
        }
        index = json.dumps({"arrays": arrays, "blocks": self._blocks(carry, changed)})
        if _parted(self._held):
            index = hosts.of_first(index)
        digest = _digest(carry, index)
        if path is None:
            return digest
        with _orbax() as checkpointer:
            checkpointer.save(path / "carry", {name: named[name] for name in mine})
        write_atomically(path / INDEX, index)
        record = {"format": FORMAT, "round": round, "sha256": digest}
        write_atomically(path / DIGEST, json.dumps(record))
        self._remove_old()
        return digest

    def _blocks(self, carry: Carry, changed: Callable | None) -> dict[str, list]:
        """Writes blocks that may have changed; returns the digests of all."""
        before, self._digests = self._digests, {}  # none if this does not end well
        numbers = {
            name: blocks.count(rows, len(carry.seen[name]))
            for name, rows in carry.rows.items()
        }
        known = before.keys() == carry.rows.keys() and max(numbers.values()) > 1
        these = changed() if known and changed is not None else None
        found: dict[str, list[str | None]] = {}
        for name, rows in carry.rows.items():
            found[name] = [None] * numbers[name] if these is None else before[name]
            ids = None if these is None else these[name]
            parted = self._held.get(name) is not None
            for place, digest, content in blocks.contents(
                rows, carry.seen[name], ids, parted
            ):
                if digest is not None and self._folder is not None:
                    blocks.write(self._folder / BLOCKS, digest, content)
                found[name][place] = digest
        self._digests = found
        return found

    def _remove_old(self) -> None:
        """Removes checkpoints that are not kept, and blocks that none has any more."""
        folder, used = self._folder, set()
        assert folder is not None
        for old in finished(folder)[: -self._keep]:
            # Without its digest it does not count. Network file systems may refuse to
            # remove a folder with files that somebody has open.
            (old / DIGEST).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)
        for path in finished(folder):
            try:
                if _format(path) >= _BLOCKS_SINCE:
                    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
                    used |= {d for each in index["blocks"].values() for d in each}
            except (OSError, ValueError, LookupError, TypeError):
                return  # damaged: nobody knows which blocks it has
        blocks.keep_only(folder / BLOCKS, used)


def save(folder: str | os.PathLike, round: int, carry: Carry, keep: int = 2) -> str:
    """Writes one checkpoint, all of it, see `Saver`; returns the digest."""
    return Saver(folder, keep).save(round, carry)


def state_digest(carry: Carry, held: Mapping[str, stores.Held] | None = None) -> str:
    """Returns the digest of a state by which runs are compared.

    Of more than `LARGE` clients it leaves out the rows of those who were never seen,
    which are zeros. Where processes hold rows of some clients each, see `held` of a
    `Saver`, it is process 0 that adds them up.
    """
    held = held or {}
    carry, rows = _on_host(carry, held), {}
    for name, seen in carry.seen.items():
        large, parted = len(seen) > LARGE, held.get(name) is not None
        ids = np.flatnonzero(seen) if large else np.arange(len(seen))
        wrapped = functools.partial(_Rows, ids=ids, parted=parted)
        mine = carry.rows[name]
        rows[name] = jax.tree.map(wrapped, mine) if large or parted else mine
    digest = tree.sha256(carry._replace(rows=rows))
    return hosts.of_first(digest) if _parted(held) else digest


class _Rows:
    """Rows of some clients, which `tree.sha256` takes piece by piece."""

    def __init__(self, x: np.ndarray, ids: np.ndarray, parted: bool):
        self._x, self._ids, self._parted = x, ids, parted
        self.dtype, self.shape = x.dtype, (len(ids), *x.shape[1:])

    def pieces(self) -> Iterator[np.ndarray]:
        def make(ids):
            return self._x[ids].tobytes()

        for some in stores.pieces(self._x, self._ids):
            found = blocks.gathered(make, some, len(self._x), self._parted)
            yield np.frombuffer(found, np.uint8)


def _parted(held: Mapping[str, stores.Held]) -> bool:
    return any(each is not None for each in held.values())


def _on_host(carry: Carry, held: Mapping[str, stores.Held]) -> Carry:
    """A state as NumPy arrays, without rows that other processes hold."""
    return Carry(
        jax.device_get(carry.server),
        {name: stores.on_host(x, held.get(name)) for name, x in carry.rows.items()},
        {name: hosts.whole(x) for name, x in carry.seen.items()},
    )


def _digest(carry: Carry, index: str) -> str:
    """Returns the digest of a state: of the server's, and of what is in blocks."""
    rest = tree.sha256(carry._replace(rows={}))
    return hashlib.sha256(f"{rest}|{index}".encode()).hexdigest()


def restore(
    folder: str | os.PathLike,
    template: Carry,
    held: Mapping[str, stores.Held] | None = None,
) -> Restored | None:
    """Returns the newest intact checkpoint, or None if there never was one.

    Damaged ones are reported and passed over. Of several processes all must ask, and
    process 0 reads; each has rows of the clients that it holds.

    Args:
      folder: as of a `Saver`; that of process 0 counts.
      template: an abstract carry: its structure, shapes and dtypes.
      held: as of a `Saver`.

    Raises:
      ValueError: there are checkpoints, and every one is damaged, or the newest intact
        one is that of an older version.
    """
    found = _newest(Path(folder).absolute(), template) if hosts.is_first() else None
    round = hosts.of_first(found and found.round)
    if round is None:
        return None
    if not hosts.several():
        return found and Restored(found.round, found.carry._replace(rows=found.rows))
    part = template._replace(rows={})
    carry = hosts.arrays_of_first(found and found.carry, part)
    sources = found.sources if found else {}
    rows = {
        name: blocks.read(
            spec,
            carry.seen[name],
            sources.get(name),
            held is not None and held.get(name) is not None,
        )
        for name, spec in template.rows.items()
    }
    return Restored(round, carry._replace(rows=rows))


class _Found(NamedTuple):
    """An intact checkpoint."""

    round: int
    carry: Carry  # without rows
    sources: dict[str, blocks.Source]  # of these, by family
    rows: dict[str, PyTree]  # themselves, if no other process needs them


def _newest(folder: Path, template: Carry) -> _Found | None:
    found = finished(folder)
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


def _format(path: Path) -> int:
    return json.loads((path / DIGEST).read_text(encoding="utf-8")).get("format", 1)


def _read(path: Path, template: Carry) -> _Found:
    record = json.loads((path / DIGEST).read_text(encoding="utf-8"))
    in_blocks = _format(path) >= _BLOCKS_SINCE
    if _format(path) < 2:
        raise _Older
    with _orbax() as checkpointer:
        named = checkpointer.restore(path / "carry")
    index: dict[str, dict] = {"arrays": {}, "blocks": {}}
    said = ""
    if in_blocks:
        said = (path / INDEX).read_text(encoding="utf-8")
        index = json.loads(said)
    _check_names({*named, *index["arrays"]}, {*tree.paths(template)})
    part = template._replace(rows={}) if in_blocks else template
    leaves = [np.asarray(named[name]) for name in tree.paths(part)]
    carry = jax.tree.unflatten(jax.tree.structure(part), leaves)
    found = _digest(carry, said) if in_blocks else tree.sha256(carry)
    if found != record["sha256"]:
        raise ValueError("its content does not match its digest")
    shapes = {name: (x.dtype, x.shape) for name, x in named.items()}
    for name, (dtype, shape) in index["arrays"].items():
        shapes[name] = np.dtype(dtype), tuple(shape)
    for name, leaf in tree.by_path(template).items():
        dtype, shape = shapes[name]
        if leaf.shape != shape or leaf.dtype != dtype:
            raise ValueError(
                f"it holds {dtype}{shape} where {leaf.dtype}{leaf.shape} is expected"
            )
    sources: dict[str, blocks.Source] = {}
    rows: dict[str, PyTree] = {}
    for name, spec in template.rows.items():
        if in_blocks:
            sources[name] = blocks.in_files(path.parent / BLOCKS, index["blocks"][name])
            if _format(path) < _SEEN_SINCE:
                sources[name] = blocks.by_leaves(sources[name], spec)
        else:
            sources[name] = functools.partial(_of_rows, carry.rows[name])
        given = spec, carry.seen[name], sources[name]
        if hosts.several():
            blocks.check(*given)  # before the others rely on them
        else:
            rows[name] = blocks.read(*given)
    return _Found(record["round"], carry._replace(rows={}), sources, rows)


def _of_rows(rows: PyTree, place: int, known: np.ndarray) -> bytes:
    """A source of blocks, see `blocks.Source`."""
    return blocks.of_clients(rows, known)


def _check_names(found: set[str], expected: set[str]) -> None:
    """Refuses arrays that are not those of a state, by their paths."""
    other = sorted(found ^ expected)
    if other:
        holds = "holds" if other[0] in found else "lacks"
        raise ValueError(f"it {holds} {other[0]!r}, which is that of another state")


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


def _by_path(carry: Carry) -> dict[str, np.ndarray]:
    """Leaves by path: orbax rebuilds plain dicts, not our named tuples."""
    names = tree.paths(carry)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the state has several arrays under {', '.join(twice)}")
    leaves = map(np.asarray, jax.tree.leaves(carry))
    return dict(zip(names, leaves, strict=True))
