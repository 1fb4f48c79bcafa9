"""The folder of a run: made once, locked while in use, refused to another run."""

import contextlib
import errno
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from absl import logging

from hyperjax import hosts
from hyperjax.engine import checkpoint, log
from hyperjax.launch import outputs

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

CONFIG, SUMMARY, CLIENTS = "config.json", "summary.json", "clients.json"
PARTITION, REPORT, STORE, LOCK = "partition.npz", "report.html", "store", ".lock"
CHECKPOINTS, PROFILE = "checkpoints", "profile"
EMBEDDINGS = "embeddings.jsonl"
FITTED = "fitted.npz"  # what participants found out last, for whoever is deployed
TRAINED = "trained.json"  # whose training a run has, and what that took
SPENT = ("seconds", "samples_per_second", "compile_seconds", "flops")
AGAIN = "remove it: the command that made the run writes it anew"

# What a folder holds before its first checkpoint, none of it worth keeping.
_BEGINNINGS = (
    CONFIG,
    PARTITION,
    log.METRICS,
    log.TIMING,
    log.TRAINING,
    log.EVENTS,
    EMBEDDINGS,
    STORE,
    CHECKPOINTS,
)


class InUse(ValueError):
    """Another process runs in this folder."""


@contextlib.contextmanager
def claim(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the folder of a run, new or to be continued, for this process alone.

    Of several processes process 0 has it, and the others an empty one that is removed.
    What fails before the first checkpoint of a new run leaves nothing behind.

    Raises:
      ValueError: it is a file, not writable, in use by another process, or holds
        something else.
    """
    if not hosts.is_first():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    workdir = Path(path).expanduser()
    try:
        str(workdir.absolute()).encode()
    except UnicodeEncodeError:  # which the library that writes checkpoints refuses
        raise ValueError(
            f"workdir={str(path)!r} has bytes that are no text where file names are "
            f"{sys.getfilesystemencoding()!r}; set PYTHONUTF8=1, or give another folder"
        ) from None
    try:
        if workdir.exists() and not workdir.is_dir():
            raise ValueError(f"workdir={str(path)!r} is a file; give a folder")
        is_new = not (workdir / CONFIG).exists()
        if is_new and workdir.is_dir() and any(_visible(workdir)):
            raise ValueError(
                f"workdir={str(path)!r} is not empty and holds no run; give a new "
                "folder"
            )
        absent = [p for p in (workdir, *workdir.parents) if not p.exists()]
        had_lock = (workdir / LOCK).exists()
        try:
            lock = _lock(workdir)
        except BaseException:
            outputs.remove_empty(absent)
            raise
    except BlockingIOError:
        raise InUse(f"workdir={str(path)!r} is in use by another process") from None
    except OSError as error:
        raise ValueError(
            f"workdir={str(path)!r} cannot be written to: {error.strerror}"
        ) from error
    with lock:
        try:
            yield workdir
        except (Exception, KeyboardInterrupt):
            if is_new and not checkpoint.finished(workdir / CHECKPOINTS):
                _undo(workdir, absent, had_lock)
            raise


def _visible(workdir: Path) -> Iterator[Path]:
    return (p for p in workdir.iterdir() if not p.name.startswith("."))


def _lock(workdir: Path) -> TextIO:
    """Makes a folder and locks it.

    Raises:
      BlockingIOError: another process holds the lock.
      OSError: the folder or the lock's file cannot be made.
    """
    while True:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / LOCK, "a", encoding="utf-8")  # noqa: SIM115
        try:
            _hold(lock, workdir)
            # Another process may have given up the folder meanwhile, and removed it.
            if os.path.exists(lock.name) and os.path.samestat(
                os.stat(lock.name), os.fstat(lock.fileno())
            ):
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()


def _hold(lock: TextIO, workdir: Path) -> None:
    """Locks a file where there are locks."""
    if fcntl is None:
        reason = f"{platform.system()} has no fcntl"
    else:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(error.errno, error.strerror) from error
            reason = str(error.strerror)
    logging.warning(
        "%s cannot be locked (%s): see to it that no other process uses it.",
        workdir,
        reason,
    )


def _undo(workdir: Path, absent: list[Path], had_lock: bool) -> None:
    """Removes what a run that never began has made: its files, then its folders."""
    for name in _BEGINNINGS:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            _remove(path)
    for name in (*(f".{name}.part" for name in _BEGINNINGS), f".part-{PARTITION}"):
        _remove(workdir / name)
    if not had_lock:
        _remove(workdir / LOCK)
    outputs.remove_empty(absent)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
