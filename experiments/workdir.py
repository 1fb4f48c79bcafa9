"""The folder of a run: made once, locked while in use, refused to another config."""

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from hyperjax.engine.checkpoint import write_atomically

CONFIG, SUMMARY = "config.json", "summary.json"
PACKAGES = ("hyperjax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")


@contextlib.contextmanager
def claim(path: str | os.PathLike, config: ml_collections.ConfigDict) -> Iterator[Path]:
    """Yields the folder of a run, new or to be continued, for this process alone.

    Raises:
      ValueError: it is a file, not writable, in use by another process, holds
        something else, or was made by another config (the message names the fields).
    """
    workdir = Path(path).expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir={str(path)!r} is a file; give a folder")
    is_new = not (workdir / CONFIG).exists()
    if is_new and workdir.is_dir() and any(_visible(workdir)):
        raise ValueError(
            f"workdir={str(path)!r} is not empty and holds no run; give a new folder"
        )
    if not is_new:
        compare(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ValueError(
            f"workdir={str(path)!r} cannot be written to: {error.strerror}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"workdir={str(path)!r} is in use by another process"
            ) from None
        yield workdir


def _visible(workdir: Path) -> Iterator[Path]:
    return (p for p in workdir.iterdir() if not p.name.startswith("."))


def compare(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if the folder was made by another config."""
    made_by = flatten(json.loads((workdir / CONFIG).read_text())["config"])
    given = flatten(as_json(config))
    fields = sorted(made_by.keys() | given.keys())
    absent = "(absent)"
    differing = [
        f"{f}: {made_by.get(f, absent)} there, {given.get(f, absent)} given"
        for f in fields
        if made_by.get(f, absent) != given.get(f, absent)
    ]
    if differing:
        raise ValueError(
            f"workdir={str(workdir)!r} was made by another config; give a new folder "
            f"or the same values. Differing: {'; '.join(differing)}"
        )


def describe(workdir: Path, config: ml_collections.ConfigDict, plan: dict) -> None:
    """Writes config.json: resolved config, commit, versions, device, plan."""
    record = dict(
        config=as_json(config),
        commit=commit(),
        versions={name: version(name) for name in PACKAGES},
        device=plan["device"],
        plan=plan,
    )
    write_atomically(workdir / CONFIG, json.dumps(record, indent=2) + "\n")


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns a config as it comes back from JSON (tuples as lists)."""
    return json.loads(json.dumps(config.to_dict()))


def as_tuples(value: Any) -> Any:
    """Undoes what JSON does to tuples."""
    if isinstance(value, dict):
        return {k: as_tuples(v) for k, v in value.items()}
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value} of nested dicts."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


@functools.cache  # of what was loaded, whatever is checked out meanwhile
def commit() -> str | None:
    """Returns the commit of the code, "+" if changed since; None without git."""
    here = Path(__file__).parent

    def git(*args):
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    """Returns an installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
