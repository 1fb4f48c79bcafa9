"""Runs the points of a sweep, one after another; what fails does not end the rest."""

import contextlib
import functools
import gc
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from absl import logging

from hyperjax.data import sources
from hyperjax.launch import build, data, train, workdir
from hyperjax.protocols.common import flat
from hyperjax.runs.experiment import Experiment
from hyperjax.sweeps import group, lockstep, reuse
from hyperjax.sweeps import record as records
from hyperjax.sweeps.live import Shown
from hyperjax.sweeps.points import SEEDS, Point, shown
from hyperjax.sweeps.record import Record

Item = TypeVar("Item")


def check(
    points: Sequence[Point],
    read: group.Reader,
    say: Callable[[str], object] = lambda what: None,
) -> None:
    """Builds every network and method that points have, once; nothing is compiled.

    Args:
      points: of a sweep, and trials.
      read: reads their data sets.
      say: is told how far it has come.

    Raises:
      ValueError: it says which point cannot be, and why.
    """
    first: dict[Hashable, Point] = {}
    for point in points:
        first.setdefault(group.setting(point.config), point)
    built: set[Hashable] = set()
    for number, point in enumerate(first.values()):
        say(f"checking setting {number + 1} of {len(first)}")
        config = point.config
        try:
            source = read(config.data)
            shape = build.sample_shape(source, config.data)
            of = shape, source.num_classes, sources.vocabulary(source.x)
            if (known := (group.built_of(config), of)) in built:
                continue
            built.add(known)
            build.make_algorithm(config, build.make_model(config, *of))
        except Exception as error:
            raise ValueError(f"the point {shown(point.fields)}: {error}") from error


def check_baseline(baseline: str | None, points: Sequence[Point]) -> None:
    """Raises ValueError unless some points are those that --baseline names."""
    if baseline is None:
        return
    from hyperjax.sweeps import statistics  # which takes long to import

    swept = dict.fromkeys(f for p in points for f in p.fields if f not in SEEDS)
    fields = [field for field in swept if field != "method.name"]
    groups = []
    for point in points:
        values = {field: flat(point.config).get(field) for field in fields}
        method = point.fields.get("method.name", point.config.method.name)
        groups.append({"method": method, **values})
    statistics.parse_baseline(baseline, groups)


def grouped(points: Sequence[Point]) -> list[list[Point]]:
    """Returns the points by program, in the order in which these are met first."""
    found: dict[Hashable, list[Point]] = {}
    for point in points:
        found.setdefault(group.key(point.config), []).append(point)
    return list(found.values())


def ordered(points: Sequence[Point]) -> list[Point]:
    """Returns the points so that those of one program are neighbours."""
    return [point for group in grouped(points) for point in group]


def part(items: Sequence[Item], index: str | None) -> list[Item]:
    """Returns the slice of the points that --index=i/n names, i from 0 to n - 1.

    Slices are of neighbours, whose programs are alike, and differ in size by one.

    Raises:
      ValueError: it is none.
    """
    if index is None:
        return list(items)
    first, _, second = index.partition("/")
    if not (first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise ValueError(
            f"--index={index!r} must be i/n with i from 0 to n - 1, such as 0/8"
        )
    i, n = int(first), int(second)
    return list(items[i * len(items) // n : (i + 1) * len(items) // n])


def run(
    record: Record,
    points: Sequence[Point],
    show: Shown,
    each: Callable[[], object] = lambda: None,
    run_one: Callable[..., dict[str, Any]] = train.train,
    plan: str = "auto",
    read: group.Reader | None = None,
    page: bool = True,
    alike: reuse.Alike | None = None,
) -> dict[str, str]:
    """Trains points, or reads what they gave.

    Args:
      record: of the sweep; what becomes of each point is written there.
      points: to be run, in this order.
      show: what is shown.
      each: called after every point.
      run_one: `launch.train.train`, of points that take turns.
      plan: of points of one program, see `lockstep.plan`.
      read: reads their data sets; what it has read is not read again.
      page: whether each point gets its page, see `launch.train.train`.
      alike: points of earlier calls, whose training these may have; these are added.

    Returns:
      {name: status}; "running" where another process is at work on it.

    Raises:
      train.Stopped, KeyboardInterrupt: it was asked to stop.
    """
    found: dict[str, str] = {}
    read, alike = read or group.Reader(), {} if alike is None else alike
    for training, others in reuse.by_training(points).items():
        alike.setdefault(training, []).extend(others)
    with _stops_at_once():
        for members in grouped(points):
            for point in members:
                whose = reuse.begin(record.folder, point, alike)
                if whose is not None:
                    show.say(f"{point.name}: has the training of {whose}")
            how = lockstep.plan(plan, members)
            alone = how != lockstep.SEQUENCE
            built = _built(record, members, show, one_device=alone, read=read)
            if how != lockstep.SEQUENCE and built:
                together = [point for point in members if point.name in built]
                found |= _together(record, together, built, show, how, each, page)
            for point in members:
                if point.name not in found:
                    once = functools.partial(
                        run_one,
                        experiment=built.pop(point.name, None),
                        show=show.point,
                        page=page,
                    )
                    found[point.name] = _one(record, point, show, once)
                    each()
            del built
            _drop_programs()
    return found


def _together(
    record: Record,
    points: Sequence[Point],
    built: Mapping[str, Experiment],
    show: Shown,
    how: str,
    each: Callable[[], object],
    page: bool,
) -> dict[str, str]:
    """Trains points of one program side by side."""
    found: dict[str, str] = {}

    def ended(point: Point, result: dict[str, Any] | Exception) -> None:
        found[point.name] = _ended(record, point, show, result)
        each()

    show.begin(*(point.name for point in points))
    for point in points:
        record.set_status(point.name, records.RUNNING)
    name, rounds = f"{len(points)} points, {how}", points[0].config.rounds
    with show.point(name, rounds) as progress:
        lockstep.run(points, built, record.folder, how, progress, ended, page)
    return found


def _built(
    record: Record,
    members: Sequence[Point],
    show: Shown,
    one_device: bool,
    read: group.Reader,
) -> dict[str, Experiment]:
    """Builds runs of one program together; {} if each is to be built by itself."""
    left = [
        point
        for point in members
        if not (record.folder / point.name / workdir.SUMMARY).exists()
        and record.entry(point.name)["status"] != records.DIVERGED
    ]
    configs = [point.config for point in left]
    if not left or configs[0].engine.memory_map:  # files lie in a run's folder
        return {}
    with show.point(left[0].name, configs[0].rounds) as progress:
        runs = "a run" if len(left) == 1 else f"{len(left)} runs of one program"
        progress.stage(f"reading {configs[0].data.name}, building {runs}")
        try:
            found = group.experiments(configs, one_device, read)
            progress.say(data.brief(found[0].federation))
        except Exception:  # each then says what is wrong with it
            logging.debug("building a group", exc_info=True)
            return {}
    return dict(zip((point.name for point in left), found, strict=True))


def _one(record: Record, point: Point, show: Shown, run_one: Callable) -> str:
    folder = record.folder / point.name
    before = record.entry(point.name)
    if before["status"] == records.DIVERGED and folder.exists():
        # The same config gives the same bits.
        show.ended(point.name, _said(before["status"], before["message"]), ran=False)
        return records.DIVERGED
    show.begin(point.name)
    ran = not (folder / workdir.SUMMARY).exists()
    record.set_status(point.name, records.RUNNING)
    result: dict[str, Any] | Exception
    asked: list[bool] = []
    try:
        result = run_one(
            point.config, str(folder), point.name, stopping=train.signals_kept_in(asked)
        )
    except train.Stopped:
        raise
    except Exception as error:
        result = error
    status = _ended(record, point, show, result, ran)
    if any(asked):  # when the run had no more calls before which to stop
        raise train.Stopped(point.config.rounds)
    return status


def _ended(
    record: Record,
    point: Point,
    show: Shown,
    result: dict[str, Any] | Exception,
    ran: bool = True,
) -> str:
    """Says how a point has ended, by its summary or what it raised; returns that."""
    if isinstance(result, workdir.InUse):
        show.ended(point.name, "another process is at work on it", ran=False)
        return records.RUNNING
    status, message = records.FINISHED, ""
    if isinstance(result, FloatingPointError):
        status, message = records.DIVERGED, str(result)
    elif isinstance(result, Exception):
        logging.debug("%s", point.name, exc_info=result)
        status, message = records.FAILED, f"{type(result).__name__}: {result}"
    record.set_status(point.name, status, message)
    said = _said(status, message) if message else _accuracies(result)
    show.ended(point.name, said, ran)
    return status


def _said(status: str, message: str) -> str:
    """A line's worth of what went wrong."""
    return f"{status}: {message.splitlines()[0].partition('. ')[0]}"


def _accuracies(summary: Any) -> str:
    return train.outcome(summary).splitlines()[0]


def _drop_programs() -> None:
    """Drops compiled programs before they are too many.

    A process may have 65,530 memory maps, and every program takes a few.
    """
    with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as maps:
        if sum(1 for _ in maps) > 40_000:
            jax.clear_caches()
            gc.collect()


@contextlib.contextmanager
def _stops_at_once() -> Iterator[None]:
    """SIGTERM interrupts as SIGINT does; while it trains, `train` has its own way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
