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

--tune='local.learning_rate=0.03,0.1' chooses a value for everything that is swept but
seeds, by what participants set aside for validation (data.validation_fraction), or on a
federation of the seed --tune_seed; --by names the metric.
"""

import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from hyperjax.launch import cli, train
from hyperjax.sweeps import live, page, points, record, runner, tune
from hyperjax.sweeps.points import Point
from hyperjax.sweeps.record import Record
from hyperjax.sweeps.tune import Setting


class Asked(NamedTuple):
    """What the command line says."""

    config: str  # as after --config
    workdir: str
    sweep: Sequence[str]
    arguments: Sequence[str] = ()  # --config.field=value, for all points
    list: bool = False
    index: str | None = None
    baseline: str | None = None
    tune: Sequence[str] = ()
    by: str | None = None
    tune_seed: int | None = None
    command: str = ""  # for the record


class Plan(NamedTuple):
    """A sweep, all of which has been checked."""

    record: Record
    points: list[Point]
    trials: list[Point]  # runs by which numbers are chosen
    mine: list[Setting]  # those of this process
    first: ConfigDict  # of the first point, before anything is chosen for it
    tuned: dict[str, Any]  # fields, by and seed of what is chosen; {} if nothing


def main(asked: Asked) -> int:
    """Runs a sweep, or what is left of it; returns the exit code.

    Raises:
      ValueError: before anything is written: a flag, a point, or a folder that holds
        something else.
    """
    plan = make_plan(asked)
    if asked.list:
        print(listed(plan))
        return 0
    if not any(setting.points for setting in plan.mine):
        print(f"--index={asked.index}: of {len(plan.points)} points it has none.")
        return 0
    try:
        return ended(run(plan, asked))
    except (train.Stopped, KeyboardInterrupt):
        print("Stopped; the same command goes on.", flush=True)
        return 130


def make_plan(asked: Asked) -> Plan:
    """Reads the flags, and checks all that can be before a point is run."""
    if not asked.sweep:
        raise ValueError("--sweep is required, such as --sweep=seed=0..2; see --help")
    path, arguments = asked.config, asked.arguments
    there = Record(asked.workdir)
    named = points.find_named(path)
    axes = [points.axis("sweep", text, named) for text in asked.sweep]
    others = [points.axis("tune", text, {}) for text in asked.tune]
    points.check_once(arguments, points.product([*axes, *others]))
    grid, tried = points.product(axes), points.product(others)
    names = record.names(there.read())
    given = points.resolve(path, arguments, grid, names, more=tried[0])
    given = runner.ordered(given)
    runner.check_baseline(asked.baseline, given)
    record.check_base(there, path, arguments)
    tuned, settings = {}, [Setting(runner.part(given, asked.index), [])]
    if others:
        seed = asked.tune_seed
        by = tune.check_metric(asked.by, seed)
        tuned = dict(fields=list(tried[0]), by=by, seed=seed)
        settings = tune.settings(path, arguments, given, tried, by, seed)
    elif asked.by or asked.tune_seed is not None:
        raise ValueError("--by and --tune_seed go with --tune=field=values")
    else:
        record.check_runs(there, given)
    trials = [trial for setting in settings for trial in setting.trials]
    cli.use_cores(max(point.config.engine.devices for point in given))
    runner.check([*given, *trials])
    return Plan(
        there,
        given,
        trials,
        runner.part(settings, asked.index) if others else settings,
        points.read(path, arguments, points.as_texts(given[0].fields)),
        tuned,
    )


def run(plan: Plan, asked: Asked) -> dict[str, str]:
    """Runs this process's part of a plan; returns what became of each point."""
    there = plan.record
    about = dict(command=asked.command, baseline=asked.baseline, tune=plan.tuned)
    record.begin(there, plan.points, plan.first, plan.trials, **about)
    show = live.Shown(sum(len(s.points) + len(s.trials) for s in plan.mine))
    statuses: dict[str, str] = {}

    def each() -> None:
        page.write(there.folder, there.read(), show.left())

    each()
    for setting in plan.mine:
        members = setting.points
        if setting.trials:
            runner.run(there, setting.trials, show, each)
            chosen = tune.choose(there, setting, plan.tuned["by"])
            if chosen is None:
                for point in members:
                    statuses[point.name] = record.FAILED
                    there.set_status(point.name, record.FAILED, tune.NONE_ENDED)
                    show.ended(point.name, f"failed: {tune.NONE_ENDED}", ran=False)
                continue
            values = {field: chosen[field] for field in plan.tuned["fields"]}
            record.set_tuned(there, members, values)
            members = [with_values(point, values, asked) for point in members]
        statuses |= runner.run(there, members, show, each)
    return statuses


def with_values(point: Point, values: dict[str, Any], asked: Asked) -> Point:
    """Returns a point with the values that were chosen for it."""
    texts = points.as_texts({**point.fields, **values})
    return point._replace(config=points.read(asked.config, asked.arguments, texts))


def listed(plan: Plan) -> str:
    """Returns the points as text, and what has become of each."""
    content = plan.record.read()
    known = {e["name"]: e["status"] for e in content.get("points", ())}
    mine = [point for setting in plan.mine for point in setting.points]
    trials = [trial for setting in plan.mine for trial in setting.trials]
    several = len(mine) < len(plan.points)
    lines = [
        f"{len(mine)} points"
        + (f" of {len(plan.points)}" if several else "")
        + f" in {plan.record.folder}"
    ]
    if trials:
        tuned = plan.tuned
        fields, each = ", ".join(tuned["fields"]), len(plan.mine[0].trials)
        where = "" if tuned["seed"] is None else f" at seed {tuned['seed']}"
        lines.append(
            f"{len(trials)} trials before them: {each} values of {fields} for each of "
            f"{len(plan.mine)} settings, chosen by {tuned['by']}{where}"
        )
    for group in runner.grouped(mine):
        lines.append(f"one program for {len(group)}:")
        lines += [f"  {p.name}  {known.get(p.name, '')}".rstrip() for p in group]
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
    config = cli.define_config()
    workdir = cli.define_path("workdir", None, "Folder of the sweep.")
    sweeps = flags.DEFINE_multi_string("sweep", [], "field=values, or a sweep's name.")
    list_only = flags.DEFINE_bool("list", False, "Print the points; run nothing.")
    index = flags.DEFINE_string("index", None, "i/n: run slice i, 0 to n - 1, of n.")
    baseline = flags.DEFINE_string(
        "baseline", None, "field=value of the points that others are compared with."
    )
    tuned = flags.DEFINE_multi_string("tune", [], "field=values to choose among.")
    by = flags.DEFINE_string("by", None, "What --tune chooses by; vacc or pacc.")
    tune_seed = flags.DEFINE_integer(
        "tune_seed", None, "--tune chooses on a federation of this seed."
    )

    def run() -> int:
        path = flags.FLAGS[config.name].config_filename  # type: ignore[attr-defined]
        asked = Asked(
            path,
            str(workdir.value),
            sweeps.value,
            arguments,
            list_only.value,
            index.value,
            baseline.value,
            tuned.value,
            by.value,
            tune_seed.value,
            command,
        )
        return main(asked)

    cli.run(run, needs=("config", "workdir"))
