"""Commands as processes, forked from a server that has imported what they need.

Each costs its own work only. It is a process of its own all the same, and runs its
module as `__main__` with flags.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

PRELOADED = (
    "hyperjax.launch.build",
    "hyperjax.launch.report",
    "hyperjax.runs.results",
    "hyperjax.launch.workdir",
    "altair",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "orbax.checkpoint",
    "tensorboardX",
)


class Result(NamedTuple):
    """What a process left: its exit code and what it printed."""

    code: int
    out: str
    err: str


class Process(NamedTuple):
    """A command that is running."""

    process: multiprocessing.Process
    folder: Path

    def result(self) -> Result:
        self.process.join(timeout=300)
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        assert self.process.exitcode is not None, f"it hangs: {err}"
        return Result(self.process.exitcode, out, err)


def launch(
    folder: Path,
    module: str,
    argv: Sequence[str],
    cwd: Path,
    before: Callable[..., object] | None = None,
    *args,
) -> Process:
    """Starts `python -m module *argv` in `cwd`; its output goes to files in `folder`.

    `before(*args)` is called in the process before anything else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(
        target=_main, args=(folder, module, tuple(argv), cwd, before, args)
    )
    process.start()
    return Process(process, folder)


def _main(folder, module, argv, cwd, before, args) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.chdir(cwd)
    # The suite is compile-bound; see conftest.py.
    jax.config.update("jax_disable_most_optimizations", True)
    if before is not None:
        before(*args)
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
