"""A sweep's folder: `sweep.json`, which all processes at work on its points share."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from hyperjax.engine.checkpoint import read_json, write_atomically
from hyperjax.launch import finished, origin, outputs, workdir
from hyperjax.protocols import common
from hyperjax.sweeps import points
from hyperjax.sweeps.points import Point

FILE, LOCK = finished.SWEEP, ".sweep.lock"
FORMAT = 1
WAITING, RUNNING = "waiting", "running"
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
ENDED = (FINISHED, DIVERGED, FAILED)
_AGAIN = "remove it: the command that made the sweep writes it anew"
# Fields that a sweep may go on with other values of, as its runs may.
_FREE = re.compile(
    r"rounds|data\.(data_dir|download)|evaluation\..*|checkpoint\..*|tensorboard|tracker"
)


class Record:
    """Reads and changes `sweep.json`, one process at a time."""

    def __init__(self, path: str):
        """Makes nothing yet.

        Raises:
          ValueError: the folder cannot be written to, or holds something else.
        """
        self.folder = outputs.folder("workdir", path)
        self.path = self.folder / FILE
        if self.folder.is_dir() and not self.path.exists():
            held = [p for p in self.folder.iterdir() if not p.name.startswith(".")]
            if held:
                raise ValueError(
                    f"--workdir={path!r} is not empty and holds no sweep; give a new "
                    "folder"
                )
        self.read()  # refuses what is damaged

    def read(self) -> dict[str, Any]:
        """Returns what it holds; {} if there is none yet."""
        try:
            found = read_json(self.path, _AGAIN)
        except FileNotFoundError:
            return {}
        if found.get("format") != FORMAT or not isinstance(found.get("points"), list):
            raise ValueError(
                f"{str(self.path)!r} was written by another version of hyperjax; give "
                "a new folder"
            )
        return found

    @contextlib.contextmanager
    def change(self) -> Iterator[dict[str, Any]]:
        """Yields what it holds, to be changed in place, and writes it if it was."""
        with _locked(self.folder / LOCK):
            found = self.read()
            before = json.dumps(found)
            yield found
            if json.dumps(found) != before:
                write_atomically(self.path, json.dumps(found, indent=1) + "\n")

    def entry(self, name: str) -> dict[str, Any]:
        """Returns what is known of a point."""
        return _entry(self.read(), name)

    def set_status(self, name: str, status: str, message: str = "") -> None:
        """Says what a point is at."""
        with self.change() as found:
            entry = _entry(found, name)
            entry.update(status=status, message=message)


def _entry(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    entries = [*found["points"], *found.get("trials", ())]
    return next(entry for entry in entries if entry["name"] == name)


def names(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns {`points.key`: name} of the points of a sweep."""
    return {points.key(e["fields"]): e["name"] for e in found.get("points", ())}


def check_base(record: Record, path: str, arguments: Sequence[str]) -> None:
    """Refuses to go on with a sweep whose runs would become others.

    Args:
      record: of the sweep.
      path: as after --config.
      arguments: --config.field=value of the command line.

    Raises:
      ValueError: it names the field, what it was and what is given now.
    """
    first = record.read().get("first")
    if first is None:
        return
    texts = {k: points.as_text(origin.as_tuples(v)) for k, v in first["fields"].items()}
    config = points.read(path, arguments, texts)
    there = common.flat(first["config"])
    now = common.flat(origin.as_json(config))
    for field in sorted(there):  # others are those of a newer version
        if not _FREE.fullmatch(field) and there.get(field) != now.get(field):
            raise ValueError(
                f"--workdir={str(record.folder)!r} holds a sweep of another config; "
                f"give a new folder or the same value. Differing: {field}: "
                f"{there.get(field)} there, {now.get(field)} given"
            )


def check_runs(record: Record, given: Sequence[Point]) -> None:
    """Refuses to go on with runs that would become others, see `origin.compare`.

    Raises:
      ValueError: naming the run and the fields.
    """
    for point in given:
        if (record.folder / point.name / workdir.CONFIG).exists():
            config = origin.as_json(common.filled(point.config))
            origin.compare(record.folder / point.name, config)


def begin(
    record: Record,
    given: Sequence[Point],
    first: ml_collections.ConfigDict,
    trials: Sequence[Point] = (),
    **about: Any,
) -> None:
    """Writes the points of a command beside those that are there.

    Args:
      record: of the sweep.
      given: the points of the command.
      first: the config of the first of them, before anything is chosen for it.
      trials: runs by which numbers are chosen.
      **about: what else is to be known of it, as JSON.
    """
    record.folder.mkdir(parents=True, exist_ok=True)
    with record.change() as found:
        found.update(
            format=FORMAT,
            **about,
            commit=origin.commit(),
            versions={name: origin.version(name) for name in origin.PACKAGES},
        )
        config = origin.as_json(first)
        found.setdefault("first", dict(fields=given[0].fields, config=config))
        for kind, members in (("points", given), ("trials", trials)):
            entries = found.setdefault(kind, [])
            there = {entry["name"] for entry in entries}
            entries += [
                dict(name=point.name, fields=point.fields, status=WAITING, message="")
                for point in members
                if point.name not in there
            ]
        swept = [field for entry in found["points"] for field in entry["fields"]]
        found["fields"] = list(dict.fromkeys(swept))


def set_tuned(
    record: Record, given: Sequence[Point], values: Mapping[str, Any]
) -> None:
    """Says what was chosen for points."""
    with record.change() as found:
        for point in given:
            _entry(found, point.name)["tuned"] = dict(values)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for a file's lock, where there are locks."""
    with open(path, "a", encoding="utf-8") as lock:
        if workdir.fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                workdir.fcntl.flock(lock, workdir.fcntl.LOCK_EX)
        yield
