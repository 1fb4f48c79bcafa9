"""Writes the record of a study's sweep: what its table is made from, and may be again.

python -m experiments.studies.record runs/table_1 --out=experiments/results/NAME.json

A record names config, seeds, commit, hardware, date and settings, and has a row for
each group of runs that differ in seeds alone: mean, sample deviation, number and value
of seeds of every column, what was published, and of one column the paired difference
from the baseline with its 95 % t interval. There is none of a sweep that has not ended,
or of runs that were made from files which are no commit.
"""

import datetime
import importlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments.studies.study import Group, Study, Values, cpu, named, scale_of
from hyperjax.engine import log
from hyperjax.engine.checkpoint import write_atomically
from hyperjax.errors import check_choice
from hyperjax.launch import cli, finished, origin, outputs
from hyperjax.protocols import common
from hyperjax.sweeps import points, statistics, tables
from hyperjax.sweeps import record as sweeps

# Where a run is made and what it was started from: not what it is.
_PLACES = re.compile(r"data\.data_dir|start\..*|method\.freeze|engine\..*|tensorboard")
_FLAGS = re.compile(r"--(workdir|config\.data\.data_dir|index)(=|$)")
_FOLDERS = re.compile(r"(?<![^\s:=])/\S*/")  # of absolute paths


class Run(NamedTuple):
    """A point of a sweep that has ended."""

    group: Group
    fields: dict[str, Any]  # that the point changes, but for seeds
    about: Mapping[str, Any]  # config.json
    values: Values | None  # None: it diverged


def record(folder: str, name: str | None = None) -> dict[str, Any]:
    """Returns the record of the sweep in a folder.

    Args:
      folder: of the sweep.
      name: of the study; None: the first named sweep of its command.

    Raises:
      ValueError: it holds no sweep of a study, a point has not ended, or a run was made
        from changed files.
    """
    found = sweeps.Record(folder).read()
    if not found:
        raise ValueError(f"{folder!r} holds no sweep (no {sweeps.FILE})")
    given = arguments(shlex.split(found["command"]))
    config = given["config"][-1]
    swept = [text.partition(":")[0] for text in given["sweep"] if "=" not in text]
    known = studies_of(config)
    name = name or next(iter(swept), "")
    check_choice("study", name, known)
    study = known[name]
    unfinished = [
        entry["name"]
        for entry in found["points"]
        if entry["status"] not in (sweeps.FINISHED, sweeps.DIVERGED)
    ]
    if unfinished:
        raise ValueError(
            f"{folder!r}: {len(unfinished)} points have not ended well, such as "
            f"{unfinished[0]!r}; the command that made the sweep goes on"
        )
    alike = in_common([origin.as_tuples(e["fields"]) for e in found["points"]])
    runs = [read(Path(folder), entry, study, alike) for entry in found["points"]]
    commits = sorted({str(run.about["commit"]) for run in runs})
    changed = [each for each in commits if each.endswith("+") or each == "None"]
    if changed:
        raise ValueError(
            f"{folder!r} has runs of files that are no commit ({changed[0]}); commit "
            "them, and run the study in a new folder"
        )
    first = runs[0].about
    configs = [common.flat(run.about["config"]) for run in runs]
    shared = in_common(configs) - set(points.SEEDS)
    about = dict(
        study=name,
        asks=study.asks,
        scale=scale_of(config.partition(":")[2])[0],
        config=config,
        command=without_places(found["command"]),
        seeds=sorted({run.about["config"]["seed"] for run in runs}),
        commit=", ".join(commits),
        date=datetime.date.today().isoformat(),
        hardware=hardware(first),
        versions=first["versions"],
        tuning=tuning(found),
        columns=dict(study.columns),
        compared=study.compared,
        baseline=study.baseline,
        settings={
            field: value
            for field, value in configs[0].items()
            if field in shared and not _PLACES.fullmatch(field)
        },
        rows=rows_of(runs, study),
    )
    return without_folders(about)


def arguments(command: Sequence[str]) -> dict[str, list[str]]:
    """Returns {flag: values} of a command with --flag=value."""
    found: dict[str, list[str]] = {"sweep": []}
    for argument in command:
        flag, equals, value = argument.partition("=")
        if equals:
            found.setdefault(flag.lstrip("-"), []).append(value)
    if "config" not in found:
        raise ValueError(f"the sweep's command has no --config=...: {command}")
    return found


def without_places(command: str) -> str:
    """Returns a command without what is of one machine alone."""
    return shlex.join(a for a in shlex.split(command) if not _FLAGS.match(a))


def without_folders(told: Any) -> Any:
    """Returns nested dicts and lists whose texts name files without their folders."""
    if isinstance(told, str):
        return _FOLDERS.sub("", told)
    if isinstance(told, dict):
        return {key: without_folders(value) for key, value in told.items()}
    return [*map(without_folders, told)] if isinstance(told, list | tuple) else told


def tuning(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns how numbers were chosen and all that were tried; None if none were."""
    if not found.get("tune"):
        return None
    told = ("fields", "value", "chosen", "status")
    trials = [{k: t.get(k) for k in told} for t in found["trials"]]
    return {**found["tune"], "trials": trials}


def hardware(about: Mapping[str, Any]) -> str:
    """Returns what a run was made on."""
    if about.get("device") == "cpu":
        return cpu(about["plan"]["devices"])  # each core is one, see `cli.use_cores`
    return str(about.get("device"))


def studies_of(config: str) -> Mapping[str, Study]:
    """Returns the studies of a config file, given as after --config.

    Raises:
      ValueError: it is no file of studies.
    """
    path = Path(config.partition(":")[0])
    if path.suffix != ".py" or path.parent.name != "studies":
        raise ValueError(
            f"the sweep is one of {config!r}, which is no file of experiments/studies"
        )
    return importlib.import_module(f"experiments.studies.{path.stem}").STUDIES


def in_common(fields: Sequence[Mapping[str, Any]]) -> set[str]:
    """Returns the fields that all have, with the same value."""
    return {
        field
        for field, value in fields[0].items()
        if all(field in other and other[field] == value for other in fields)
    }


def read(root: Path, entry: Mapping[str, Any], study: Study, alike: set[str]) -> Run:
    """Returns a point of a sweep, and what its run gave.

    Args:
      root: folder of the sweep.
      entry: of sweep.json.
      study: what is asked.
      alike: fields that say nothing, since all points have the same.
    """
    folder = root / entry["name"]
    fields = {
        field: value
        for field, value in origin.as_tuples(entry["fields"]).items()
        if field not in points.SEEDS and not _PLACES.fullmatch(field)
    }
    label = named(fields, study.rows) or ""
    said = {*study.rows.get(label, ()), *alike}
    rest = {k: v for k, v in fields.items() if k not in said}
    run = finished.read(str(folder))
    values = None
    if entry["status"] == sweeps.FINISHED:
        values = finished.latest_of(run)
        values["best"] = (values.get("best_by_validation") or {}).get("pacc")
        values |= study.measure(folder) if study.measure else {}
    return Run((label, words(rest)), fields, run.about, values)


def words(rest: Mapping[str, Any]) -> str:
    """Returns settings as short text: "alpha=0.1, partition=iid"."""
    short = points.labels(list(rest))
    texts = {
        k: tables.setting(json.dumps(v))
        if isinstance(v, list | tuple)
        else points.as_text(v)
        for k, v in rest.items()
    }
    return ", ".join(f"{short[k]}={text}" for k, text in texts.items())


def rows_of(runs: Sequence[Run], study: Study) -> list[dict[str, Any]]:
    """Returns a row for every group; Holm's correction is over all of them."""
    groups: dict[Group, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    values = {
        group: {r.about["config"]["seed"]: dict(r.values) for r in own if r.values}
        for group, own in groups.items()
    }
    if study.derive:
        study.derive(values)

    def by_seed(group: Group, metric: str) -> dict[int, Any]:
        own = values.get(group, {})
        known = {seed: own[seed].get(metric) for seed in sorted(own)}
        # A mean of the rest would be one of those where nothing went wrong.
        return {} if None in known.values() else known

    rows = []
    for group, own in groups.items():
        config = own[0].about["config"]
        row: dict[str, Any] = dict(label=group[0], settings=group[1])
        row["fields"] = own[0].fields
        row["learning_rate"] = config["local"]["learning_rate"]
        row["diverged"] = sum(run.values is None for run in own)
        for metric in study.columns:
            seeds = by_seed(group, metric)
            if seeds:
                row[metric] = statistics.spread(list(seeds.values()))._asdict()
                row[metric]["per_seed"] = seeds
        data = config["data"]
        where = data["name"].removesuffix("5k"), data["partition"]
        # Of a label, or of one with its settings.
        places = ((*where, name) for name in (group[0], ", ".join(group)))
        found = (study.published[place] for place in places if place in study.published)
        row["published"] = dict(next(found, {}))
        if study.baseline not in (None, group[0]):
            other = by_seed((study.baseline, group[1]), study.compared)
            pair = statistics.paired(by_seed(group, study.compared), other)
            row["difference"] = pair._asdict()
        row["seconds"] = [round(run.values["seconds"]) for run in own if run.values]
        rows.append(row)
    tested = [row["difference"] for row in rows if "difference" in row]
    for pair, p in zip(tested, statistics.holm([t["p"] for t in tested]), strict=True):
        pair["holm"] = p
    return rows


def main(folder: str, out: str, name: str | None) -> int:
    """Writes a record; returns the exit code."""
    path = outputs.files(out=out)["out"]
    found = record(folder, name)
    write_atomically(path, json.dumps(log.jsonable(found), indent=1) + "\n")
    print(f"record: {path}")
    draw = studies_of(found["config"])[found["study"]].picture
    if draw:
        entries = sweeps.Record(folder).read()["points"]
        done = [e["name"] for e in entries if e["status"] == sweeps.FINISHED]
        svg = path.with_suffix(".svg")
        write_atomically(svg, draw([Path(folder) / name for name in done]) + "\n")
        print(f"picture: {svg}")
    return 0


if __name__ == "__main__":
    _OUT = cli.define_path("out", None, "The record's file.")
    _STUDY = flags.DEFINE_string("study", None, "Default: the sweep's own name.")
    cli.run(
        lambda folder: main(folder, str(_OUT.value), _STUDY.value),
        needs=("out",),
        takes_arguments=True,
    )
