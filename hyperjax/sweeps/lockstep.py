"""Trains the points of a program side by side, rounds of all in one call."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hyperjax import rng
from hyperjax.engine import together
from hyperjax.engine.progress import Progress, Silent
from hyperjax.errors import check_choice
from hyperjax.launch import train
from hyperjax.runs import loop
from hyperjax.runs.experiment import Experiment
from hyperjax.sweeps.points import Point

SEQUENCE = "sequence"
PLANS = ("auto", SEQUENCE, *together.PLANS)


def plan(asked: str, points: Sequence[Point]) -> str:
    """Returns how points of one program are run: "sequence", "map" or "vmap".

    "auto" is "vmap" on accelerators, which want large products, and "sequence" on the
    CPU, where a batch of points is slower than one after another.

    Raises:
      ValueError: another, or one under which these points cannot be run.
    """
    check_choice("--plan", asked, PLANS)
    engines = [point.config.engine for point in points]
    kept = [e for e in engines if e.store != "device" or e.devices > 1]
    if asked == "auto":
        slower = jax.default_backend() == "cpu"
        return SEQUENCE if kept or slower else "vmap"
    if kept and asked != SEQUENCE:
        raise ValueError(
            f"--plan={asked} goes with engine.store='device' and engine.devices 0 or "
            f"1, not with {kept[0].store!r} and {kept[0].devices}: devices are for "
            "points then"
        )
    return asked


def run(
    points: Sequence[Point],
    experiments: Mapping[str, Experiment],
    folder: Path,
    how: str,
    progress: Progress,
    ended: Callable[[Point, dict[str, Any] | Exception], object],
    page: bool = True,
) -> None:
    """Trains, or continues, points of one program.

    A point's folder is as after `train` alone, and is `train`'s to continue.

    Args:
      points: that have rounds left, or a summary to be written.
      experiments: of the points by name, as of `group.experiments`.
      folder: in which each has a folder of its name.
      how: "map" or "vmap".
      progress: of all.
      ended: told of a point's summary, or of what ended it.
      page: whether each gets its page, see `train`.

    Raises:
      train.Stopped, KeyboardInterrupt: it was asked to stop.
    """
    simulators = [experiments[point.name].simulator for point in points]
    mesh = together.point_mesh(len(points))
    side = together.Together(simulators, how, mesh)
    side.program.watcher = progress.compiling
    turns: dict[int, tuple[Experiment, loop.State]] = {}

    def on(i: int, go: Callable[[], tuple[Experiment, loop.State]]) -> None:
        """Lets a point go on to where it wants rounds."""
        turns.pop(i, None)
        try:
            turns[i] = go()
        except StopIteration as done:
            ended(points[i], done.value)
        except train.Stopped:
            raise
        except Exception as error:
            ended(points[i], error)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(train.stop_signals())
        runs = []
        for i, point in enumerate(points):
            made = train.steps(
                point.config,
                folder / point.name,
                point.name,
                show=lambda *_: _Part(progress),
                experiment=experiments[point.name],
                stopping=lambda: contextlib.nullcontext(stop),
                page=page,
            )
            runs.append(stack.enter_context(contextlib.closing(made)))
            on(i, functools.partial(next, made))
        while turns:
            first = min(state.round for _, state in turns.values())
            now = [i for i, (_, state) in turns.items() if state.round == first]
            results, seconds = _call(side, {i: turns[i] for i in now})
            for i, (carry, info) in zip(now, results, strict=True):
                each, _ = turns[i]
                each.plan.update(points=side.size)
                if how == "vmap":
                    each.plan.update(points_at_once=side.at_once)
                try:
                    call = loop.checked(first, carry, info, seconds / len(now))
                except loop.Diverged as error:
                    on(i, functools.partial(runs[i].throw, error))
                else:
                    on(i, functools.partial(runs[i].send, call))
            done = (state.round for _, state in turns.values())
            progress.update(min(done, default=points[0].config.rounds), {})
        if stop():  # which nobody has looked at since the last call
            raise train.Stopped(points[0].config.rounds)


def _call(
    side: together.Together, turns: Mapping[int, tuple[Experiment, loop.State]]
) -> tuple[list[together.Result], float]:
    """The next rounds of points that are equally far, and the seconds they took."""
    settings = [experiment.settings for experiment, _ in turns.values()]
    states = [state for _, state in turns.values()]
    start = states[0].round
    num = loop.next_stop(settings[0], start) - start
    roots = [rng.root_key(each.seed) for each in settings]
    began, compiled = time.perf_counter(), side.program.seconds
    found = side.run(list(turns), roots, [s.carry for s in states], start, num)
    results = [(carry, jax.device_get(info)) for carry, info in found]
    compiling = side.program.seconds - compiled
    return results, time.perf_counter() - began - compiling


class _Part(Silent):
    """What a point does, in the lines of all."""

    def __init__(self, whole: Progress):
        self._whole = whole

    def stage(self, what: str) -> None:
        self._whole.stage(what)

    def compiling(self, program: str | None) -> None:
        self._whole.compiling(program)
