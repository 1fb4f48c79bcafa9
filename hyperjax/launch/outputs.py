"""Where results go: judged before anything is computed."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path


def files(**paths: str | None) -> dict[str, Path]:
    """Returns the output files that were given by flag, and makes their folders.

    Raises:
      ValueError: one of them cannot be written; then no folder has been made.
    """
    found = {flag: _file(flag, p) for flag, p in paths.items() if p is not None}
    for flag, path in found.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--{flag}={paths[flag]!r}: {error.strerror}") from error
    return found


def folder(flag: str, path: str | os.PathLike) -> Path:
    """Returns the path of an output folder, which need not be there yet.

    Raises:
      ValueError: it cannot be made or written to.
    """
    found = Path(path).expanduser()
    _check(flag, path, found)
    return found


@contextlib.contextmanager
def room(flag: str, path: str | os.PathLike) -> Iterator[Path]:
    """Makes an output folder; takes it away again if nothing gets into it.

    Raises:
      ValueError: it cannot be made or written to.
    """
    found = folder(flag, path)
    absent = [p for p in (found, *found.parents) if not p.exists()]
    try:
        found.mkdir(parents=True, exist_ok=True)
        yield found
    except (Exception, KeyboardInterrupt):
        remove_empty(absent)
        raise


@contextlib.contextmanager
def file(flag: str, path: str) -> Iterator[Path]:
    """Makes the folder of an output file; takes it away again if nothing gets into it.

    Raises:
      ValueError: the file cannot be written.
    """
    found = _file(flag, path)
    with room(flag, found.parent):
        yield found


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, innermost first, that hold nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _file(flag: str, path: str) -> Path:
    found = Path(path).expanduser()
    if not path or found.is_dir():
        raise ValueError(f"--{flag}={path!r} is not a file; give a file's name")
    _check(flag, path, found.parent)
    return found


def _check(flag: str, given: str | os.PathLike, path: Path) -> None:
    """Refuses a folder that cannot be made, or not be written to."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"--{flag}={str(given)!r}: {str(there)!r} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"--{flag}={str(given)!r}: {str(there)!r} cannot be written to"
        )
