r"""Trains many runs from one command; the same command continues a stopped sweep.

hyperjax sweep --config=zero_shot:hyperfedzero,data=digits --workdir=runs/abl \
    --sweep=seed=0..2 --sweep=data.alpha=0.1,1.0 --sweep=method.name=fedavg,fedprox

Points are the product of the --sweep flags. Each is a field and its values, where
a..b and a..b..step are whole numbers, both ends included, and commas in brackets or
quotes belong to a value; or the name of a function sweep_NAME(add) in the config's
file or the experiment's, which adds points one by one:
add({"method.name": "fedprox", "method.mu": 0.1}).

Every point is a run in a folder of its own, which `train` continues and `evaluate`
serves, and has a page. Of many small runs pages take longer than the runs: --nopages
leaves them to `hyperjax report FOLDER`. A point that diverges or fails is marked, and
the others go on; the exit code is 0 only if every point has ended well.

--tune=local.learning_rate=0.03,0.1 chooses a value for each setting (all that is
swept but seeds), by what participants set aside (data.validation_fraction), or on a
federation of the seed --tune_seed. --by names the metric. A choice at an end of what
was tried is said; the same command with more values goes on, and keeps what it had.

Several processes (--process_id=i --num_processes=n, with a --coordinator that is not
called) each run their slice of the points, as --index=i/n does.
"""

import functools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from hyperjax import protocols
from hyperjax.launch import cli, overview, train
from hyperjax.sweeps import (
    group,
    live,
    lockstep,
    page,
    points,
    record,
    results,
    reuse,
    runner,
    tune,
)
from hyperjax.sweeps.points import Point
from hyperjax.sweeps.record import Record
from hyperjax.sweeps.tune import Setting


class Asked(NamedTuple):
    """What the command line says."""

    config: str  # as after --config
    workdir: str
    sweep: Sequence[str]
    arguments: Sequence[str] = ()  # --config.field=value, for all points
    list_only: bool = False
    part: str | None = None
    baseline: str | None = None
    tune: Sequence[str] = ()
    by: str | None = None
    tune_seed: int | None = None
    plan: str = "auto"  # of points of one program
    pages: bool = True  # of points
    command: str = ""  # for the record


class Plan(NamedTuple):
    """A sweep, all of which has been checked."""

    record: Record
    points: list[Point]
    trials: list[Point]  # runs by which numbers are chosen
    mine: list[Setting]  # those of this process
    first: ConfigDict  # of the first point, before anything is chosen for it
    tuned: dict[str, Any]  # fields, by and seed of what is chosen; {} if nothing
    read: group.Reader


def main(asked: Asked) -> int:
    """Runs a sweep, or what is left of it; returns the exit code.

    Raises:
      ValueError: before anything is written: a flag, a point, or a folder that holds
        something else.
    """
    plan = make_plan(asked)
    if asked.list_only:
        print(listed(plan, asked.plan))
        return 0
    if not any(setting.points for setting in plan.mine):
        print(f"--index={asked.part}: of {len(plan.points)} points it has none.")
        return 0
    try:
        well = ended(run(plan, asked))
        for said in tune.at_the_edge(plan.record.read()):
            print(said)
        return 0 if write_results(plan.record) and well else 1
    except (train.Stopped, KeyboardInterrupt):
        entries = plan.record.read()["points"]
        done = sum(entry["status"] in record.ENDED for entry in entries)
        print(
            f"Stopped: {done} of {len(entries)} points have ended; the same command "
            "continues.",
            flush=True,
        )
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
    with cli.doing("sweep", f"reading the configs of {len(grid)} points"):
        given = points.resolve(path, arguments, grid, names, more=tried[0])
    given = runner.ordered(given)
    runner.check_baseline(asked.baseline, given)
    record.check_base(there, path, arguments)
    tuned, settings = {}, [Setting(runner.part(given, asked.part), [])]
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
    devices = [point.config.engine.devices for point in given]
    cli.use_cores(max(devices) if all(devices) else 0)
    for members in runner.grouped(given):
        lockstep.plan(asked.plan, members)
    read, every = group.Reader(), [*given, *trials]
    print(f"{len(every)} points: reading data, checking each.", file=sys.stderr)
    with cli.doing("sweep", "checking settings") as shown:
        runner.check(every, read, shown.stage)
    return Plan(
        there,
        given,
        trials,
        runner.part(settings, asked.part) if others else settings,
        points.read(path, arguments, points.as_texts(given[0].fields)),
        tuned,
        read,
    )


def run(plan: Plan, asked: Asked) -> dict[str, str]:
    """Runs this process's part of a plan; returns what became of each point."""
    there = plan.record
    about = dict(command=asked.command, baseline=asked.baseline, tune=plan.tuned)
    record.begin(there, plan.points, plan.first, plan.trials, **about)
    every = [point for s in plan.mine for point in (*s.trials, *s.points)]
    show = live.Shown({point.name: group.key(point.config) for point in every})
    statuses: dict[str, str] = {}
    pages = page.Page(there, show)
    go = functools.partial(
        runner.run,
        there,
        show=show,
        each=pages.write,
        plan=asked.plan,
        read=plan.read,
        page=asked.pages,
        alike={},
    )
    for setting in plan.mine:
        members = setting.points
        if setting.trials:
            tried = go(points=setting.trials)
            members = with_values(plan, setting, tried, asked)
            for point in members:
                moved = tune.take_up(there.folder, point, plan.tuned["fields"])
                if moved is not None:
                    there.set_status(point.name, record.WAITING)
                    show.say(f"{point.name}: its run with other values is in {moved}")
            for point in setting.points if not members else ():
                message = tune.unknown(tried)
                there.set_status(point.name, record.FAILED, message)
                show.ended(point.name, f"failed: {message}", ran=False)
                statuses[point.name] = record.FAILED
        statuses |= go(points=members)
    pages.write(last=True)
    return statuses


def with_values(
    plan: Plan, setting: Setting, tried: Mapping[str, str], asked: Asked
) -> list[Point]:
    """Returns the points of a setting with the values chosen for them; [] if none."""
    chosen = tune.choose(plan.record, setting, plan.tuned["by"], tried)
    if chosen is None:
        return []
    values = {field: chosen[field] for field in plan.tuned["fields"]}
    record.set_tuned(plan.record, setting.points, values)
    found = []
    for point in setting.points:
        texts = points.as_texts({**point.fields, **values})
        config = points.read(asked.config, asked.arguments, texts)
        found.append(point._replace(config=config))
    return found


def listed(plan: Plan, how: str = "auto") -> str:
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
    devices = jax.devices()
    lines.append(f"on {len(devices)} x {devices[0].device_kind}")
    for members in runner.grouped(mine):
        order = lockstep.plan(how, members)
        order = "one after another" if order == lockstep.SEQUENCE else order
        alike = points.alike(members).items() - points.alike(mine).items()
        said = f" ({points.shown(dict(sorted(alike)))})" if alike else ""
        lines.append(f"one program for {len(members)}, {order}{said}:")
        lines += [f"  {p.name}  {known.get(p.name, '')}".rstrip() for p in members]
    for first, *others in reuse.once(mine):
        lines.append(f"trained once for {len(others) + 1}: {first.name}")
    return "\n".join(lines)


def write_results(there: Record) -> bool:
    """Writes tables and figures once all points have ended; returns whether it could.

    Raises nothing: what the runs came to is in their folders.
    """
    if not results.has_ended(there.read()):
        print("Tables are written when the other points have ended.")
        return True
    try:
        with cli.doing("sweep", "writing tables, figures and the page"):
            results.write(there)
    except Exception as error:
        print(f"error: no tables: {error}", file=sys.stderr)
        return False
    print(f"tables: {there.folder / 'table.md'}\nreport: {there.folder / page.PAGE}")
    return True


def ended(statuses: dict[str, str]) -> bool:
    """Prints what became of the points; returns whether all ended well."""
    values = list(statuses.values())
    counts = {status: values.count(status) for status in dict.fromkeys(values)}
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{len(values)} points: {said}")
    return set(values) <= {record.FINISHED}


def named_sweeps(argv: Sequence[str]) -> str:
    """Returns a table of the named sweeps of --config, or of all experiments."""
    given = [text.partition("=")[2] for text in argv if text.startswith("--config=")]
    rows = [
        (f"{path.partition(':')[0]}: {name}", overview.first_line(function))
        for path in given or protocols.NAMES
        for name, function in points.find_named(path).items()
    ]
    return overview.table("Named sweeps: --sweep=NAME", rows)


def launch() -> None:
    """Runs the command with what the command line says."""
    if {"--help", "-help", "-h"} & set(sys.argv):
        doc = f"{(__doc__ or '').strip()}\n\n{named_sweeps(sys.argv)}"
        sys.modules["__main__"].__doc__ = doc
    whole = [text for text in sys.argv[1:] if not re.match("--?index=", text)]
    command = shlex.join(["hyperjax", "sweep", *whole])
    arguments = cli.config_arguments(sys.argv[1:])
    config = cli.define_config()
    folder = cli.define_path("workdir", None, "Folder of the sweep.")
    sweeps = flags.DEFINE_multi_string("sweep", [], "field=values, or a sweep's name.")
    list_only = flags.DEFINE_bool("list", False, "Print the points; run nothing.")
    index = flags.DEFINE_string("index", None, "i/n: run slice i, 0 to n - 1, of n.")
    baseline = flags.DEFINE_string(
        "baseline", None, "METHOD or field=value that the others are compared with."
    )
    tuned = flags.DEFINE_multi_string("tune", [], "field=values to choose among.")
    by = flags.DEFINE_string("by", None, "What --tune goes by: vacc, pacc, pacc_ftE.")
    tune_seed = flags.DEFINE_integer(
        "tune_seed", None, "--tune chooses on a federation of this seed."
    )

    plan = flags.DEFINE_enum(
        "plan",
        "auto",
        lockstep.PLANS,
        "Points of one program: in sequence, or side by side (map, vmap).",
    )
    drawn = flags.DEFINE_bool(
        "pages", True, "A page of each point; --nopages leaves them to `report FOLDER`."
    )

    def run() -> int:
        path = flags.FLAGS[config.name].config_filename  # type: ignore[attr-defined]
        asked = Asked(
            path,
            str(folder.value),
            sweeps.value,
            arguments,
            list_only.value,
            index.value or cli.part_of_processes(),
            baseline.value,
            tuned.value,
            by.value,
            tune_seed.value,
            plan.value,
            drawn.value,
            command,
        )
        return main(asked)

    cli.run(run, needs=("config", "workdir"), apart=True)
