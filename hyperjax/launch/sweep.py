"""Trains many runs from one command; the same command goes on with a stopped sweep.

hyperjax sweep --config=zero_shot:hyperfedzero,data=digits --workdir=runs/abl \
    --sweep='seed=0..2' --sweep='data.alpha=0.1,1' --sweep='method.name=fedavg,fedprox'

Points are the product of the --sweep flags: a field and its values (a..b and a..b..step
are whole numbers, both ends included; commas inside brackets and quotes belong to a
value), or the name of a function sweep_NAME(add) in the config's file or the
experiment's, which adds points one by one: add({"method.name": "fedprox", "seed": 1}).
Every point is a run in a folder of its own, which `train` continues and `evaluate`
serves. One that diverges or fails is marked, and the others go on; the exit code is 0
only if every point has ended well.
"""

import shlex
import sys
from collections.abc import Sequence

from absl import flags

from hyperjax.launch import cli, train
from hyperjax.sweeps import live, points, record, runner
from hyperjax.sweeps.points import Point
from hyperjax.sweeps.record import Record


def main(
    path: str,
    folder: str,
    sweeps: Sequence[str],
    arguments: Sequence[str],
    *,
    list_only: bool = False,
    index: str | None = None,
    baseline: str | None = None,
    command: str = "",
) -> int:
    """Runs a sweep, or what is left of it; returns the exit code.

    Args:
      path: as after --config.
      folder: of the sweep.
      sweeps: as after --sweep.
      arguments: --config.field=value, for all points.
      list_only: print the points and how they would be run; write nothing.
      index: "i/n", of which slice i is run.
      baseline: "field=value" of the points that others are compared with.
      command: for the record.

    Raises:
      ValueError: before anything is written: a flag, a point, or a folder that holds
        something else.
    """
    if not sweeps:
        raise ValueError("--sweep is required, such as --sweep=seed=0..2; see --help")
    there = Record(folder)
    named = points.find_named(path)
    grid = points.product([points.axis("sweep", text, named) for text in sweeps])
    given = points.resolve(path, arguments, grid, record.names(there.read()))
    record.check_base(there, path, arguments)
    record.check_runs(there, given)
    cli.use_cores(max(point.config.engine.devices for point in given))
    runner.check(given)
    mine = runner.part(given, index)
    if list_only:
        print(listed(mine, there))
        return 0
    if not mine:
        print(f"--index={index}: nothing is left for it of {len(given)} points.")
        return 0
    record.begin(there, given, command=command, baseline=baseline)
    try:
        statuses = runner.run(there, mine, live.Shown(len(mine)))
    except (train.Stopped, KeyboardInterrupt):
        print("Stopped; the same command goes on.", flush=True)
        return 130
    return ended(statuses)


def listed(given: Sequence[Point], there: Record) -> str:
    """Returns the points as text, and what has become of each."""
    known = {e["name"]: e["status"] for e in there.read().get("points", ())}
    widest = max(len(point.name) for point in given)
    lines = [f"{len(given)} points in {there.folder}"]
    lines += [
        f"  {point.name:{widest}}  {known.get(point.name, '')}".rstrip()
        for point in given
    ]
    return "\n".join(lines)


def ended(statuses: dict[str, str]) -> int:
    """Prints what became of the points; returns the exit code."""
    values = list(statuses.values())
    counts = {status: values.count(status) for status in dict.fromkeys(values)}
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{len(values)} points: {said}")
    return 0 if set(values) <= {record.FINISHED} else 1


def launch() -> None:
    """Runs the command with what the command line says."""
    command = shlex.join(["hyperjax", "sweep", *sys.argv[1:]])
    arguments = cli.config_arguments(sys.argv[1:])
    cli.define_config()
    workdir = cli.define_path("workdir", None, "Folder of the sweep.")
    sweeps = flags.DEFINE_multi_string("sweep", [], "field=values, or a sweep's name.")
    list_only = flags.DEFINE_bool("list", False, "Print the points; run nothing.")
    index = flags.DEFINE_string("index", None, "i/n: run slice i, 0 to n - 1, of n.")
    baseline = flags.DEFINE_string(
        "baseline", None, "field=value of the points that others are compared with."
    )

    def run() -> int:
        return main(
            flags.FLAGS["config"].config_filename,  # type: ignore[attr-defined]
            str(workdir.value),
            sweeps.value,
            arguments,
            list_only=list_only.value,
            index=index.value,
            baseline=baseline.value,
            command=command,
        )

    cli.run(run, needs=("config", "workdir"))
