"""Numbers chosen for every setting of a sweep before it runs, never on test clients.

A setting is what the sweep changes, without the seeds. For each, every value of --tune
is tried: at its first seed, judged on the samples that participants set aside for
validation; or, with --tune_seed, on a federation of that seed, judged on what its
participants hold out. Trials are runs like any other, in the folder `tune`; what was
tried and what was chosen is in `sweep.json` and `tuning.csv`.

The same command with more values goes on: what has been tried is not tried again, and
points for which another value is chosen now are run anew. Their run with the value
before is kept in `tune/earlier`.
"""

import contextlib
import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hyperjax.engine.checkpoint import read_json, write_atomically
from hyperjax.launch import finished, origin, workdir
from hyperjax.protocols import common
from hyperjax.sweeps import points
from hyperjax.sweeps.points import SEEDS, Point, Texts
from hyperjax.sweeps.record import DIVERGED, FAILED, FINISHED, RUNNING, Record

TABLE = "tuning.csv"
EARLIER = f"{finished.TRIALS}/earlier"
_SUFFIXES = ("", "_mean", "_p10")
VALIDATION = tuple(f"vacc{suffix}" for suffix in _SUFFIXES)
PARTICIPANTS = tuple(f"pacc{suffix}" for suffix in _SUFFIXES)
_FINE_TUNED = re.compile(r"pacc_ft(0|[1-9]\d*)(_mean)?")


class Setting(NamedTuple):
    """Points that differ by seeds alone, and the trials that choose for them."""

    points: list[Point]
    trials: list[Point]


def check_metric(by: str | None, seed: int | None) -> str:
    """Returns the metric to choose by.

    Raises:
      ValueError: it is measured where a choice would spoil what the sweep reports.
    """
    accepted = VALIDATION if seed is None else (*PARTICIPANTS, *VALIDATION)
    by = by or accepted[0]
    if by in accepted or (seed is not None and _FINE_TUNED.fullmatch(by)):
        return by
    others = ", ".join(accepted)
    if seed is not None:
        others += ", pacc_ftE or pacc_ftE_mean (after E epochs of fine-tuning)"
    kind = by.partition("_")[0]
    if kind in ("zacc", "gacc"):
        raise ValueError(
            f"--by={by}: it is measured on clients and samples that only the result "
            f"may be measured on, and would be none if it were chosen by; accepted: "
            f"{others}"
        )
    if kind == "pacc" and seed is None:
        raise ValueError(
            f"--by={by}: the sweep reports it for the same clients; with --tune_seed=N "
            f"it is that of a federation of another seed; accepted without: {others}"
        )
    raise ValueError(f"--by={by!r} is unknown (accepted: {others})")


def settings(
    path: str,
    arguments: Sequence[str],
    given: Sequence[Point],
    tried: Sequence[Texts],
    by: str,
    seed: int | None,
) -> list[Setting]:
    """Returns the settings of a sweep, each with its trials.

    Args:
      path, arguments: see `points.resolve`.
      given: the points of the sweep.
      tried: values of the tuned fields.
      by: see `check_metric`.
      seed: of the federation that is tuned on; None: the setting's first.

    Raises:
      ValueError: nobody sets samples aside for validation or is fine-tuned for as many
        epochs, or the seed is one of the sweep's.
    """
    found: dict[str, list[Point]] = {}
    for point in given:
        setting = {k: v for k, v in point.fields.items() if k not in SEEDS}
        found.setdefault(points.key(setting), []).append(point)
    grid = []
    for members in found.values():
        first = members[0]
        texts = points.as_texts(first.fields)
        if seed is not None:
            data_seed = first.config.data.seed
            texts["seed"] = str(seed)
            if data_seed >= 0:  # else it follows
                texts["data.seed"] = str(seed)
            taken = [p for p in members if seed in (p.config.seed, p.config.data.seed)]
            if taken:
                raise ValueError(
                    f"--tune_seed={seed} is the seed of the point {taken[0].name}; "
                    "give one that the sweep does not report"
                )
        grid += [{**texts, **values} for values in tried]
    trials = points.resolve(path, arguments, grid)
    for trial in trials:
        if match := _FINE_TUNED.fullmatch(by):
            epochs = trial.config.evaluation.finetune_epochs
            if int(match[1]) not in epochs:
                raise ValueError(
                    f"--by={by}: participants are fine-tuned for "
                    f"{', '.join(map(str, epochs)) or 'no'} epochs here, "
                    f"evaluation.finetune_epochs={tuple(epochs)}"
                )
        if by in VALIDATION and not trial.config.data.validation_fraction:
            raise ValueError(
                f"--tune by {by} needs samples that participants set aside for it, and "
                "data.validation_fraction is 0: give --config.data.validation_fraction="
                "0.2, or --tune_seed=N to choose on a federation of another seed"
            )
    named = [trial._replace(name=f"{finished.TRIALS}/{trial.name}") for trial in trials]
    per = len(tried)
    return [
        Setting(members, named[i * per : (i + 1) * per])
        for i, members in enumerate(found.values())
    ]


def value(folder: Path, by: str) -> float | None:
    """Returns the metric of a finished run; None without it."""
    try:
        return read_json(folder / workdir.SUMMARY, workdir.AGAIN).get(by)
    except FileNotFoundError:
        return None


def choose(
    record: Record, setting: Setting, by: str, tried: Mapping[str, str]
) -> dict[str, Any] | None:
    """Chooses among the trials of a setting, and writes it down.

    Args:
      record: of the sweep.
      setting: what is chosen for.
      by: the metric.
      tried: what became of the trials. One that diverged has no value; until every
        other is finished nothing is chosen.

    Returns:
      What the trial with the highest metric, the first of equals, changes; or None.
    """
    found = {t.name: value(record.folder / t.name, by) for t in setting.trials}
    known = {name: number for name, number in found.items() if number is not None}
    if set(tried.values()) <= {FINISHED, DIVERGED}:
        best = max(known, key=lambda name: known[name], default=None)
    else:
        best = None
    with record.change() as content:
        tuned = content["tune"]["fields"]
        of = _setting(setting.trials[0].fields, tuned)
        for entry in content["trials"]:
            if entry["name"] in found:
                entry["value"] = found[entry["name"]]
            # Of an earlier grid, too, which may have been wider.
            if _setting(entry["fields"], tuned) == of:
                entry["chosen"] = entry["name"] == best
        write_table(record.folder / TABLE, content)
    return next((t.fields for t in setting.trials if t.name == best), None)


def take_up(folder: Path, point: Point, fields: Sequence[str]) -> str | None:
    """Puts the run of a point aside if it was made with other values of some fields.

    A run that was put aside with its values before is taken up again.

    Args:
      folder: of the sweep.
      point: with the config that it is to be run with.
      fields: the tuned ones.

    Returns:
      Where the run with other values is now; None if there is none to put aside.
    """

    def aside(own: Mapping[str, Any]) -> Path:
        return folder / EARLIER / point.name / points.name_all([own])[0]

    home, moved = folder / point.name, None
    config = common.flat(point.config)
    values = {field: config[field] for field in fields}
    # Of no run, of one in use and of a damaged one `train` says what is to be said.
    with contextlib.suppress(FileNotFoundError, ValueError), workdir.claim(home):
        there = common.flat(origin.read(home)["config"])
        own = {field: origin.as_tuples(there.get(field)) for field in fields}
        if own != values and not aside(own).exists():
            aside(own).parent.mkdir(parents=True, exist_ok=True)
            moved = home.rename(aside(own)).relative_to(folder).as_posix()
    if aside(values).exists() and not home.exists():
        aside(values).rename(home)
    return moved


def at_the_edge(content: Mapping[str, Any]) -> list[str]:
    """Returns what to say of values that were chosen at an end of what was tried.

    Args:
      content: of `sweep.json`.

    Example:
      >>> trials = [{"fields": {"rate": x}, "value": 1 - x} for x in (0.1, 0.3, 1.0)]
      >>> trials[0]["chosen"] = True
      >>> at_the_edge({"tune": {"fields": ["rate"]}, "trials": trials})
      ['rate=0.1, the smallest tried, is chosen for 1 of 1 settings.']
    """
    tuned = content.get("tune", {}).get("fields", ())
    by_setting: dict[str, list[Mapping[str, Any]]] = {}
    for trial in content.get("trials", ()):
        by_setting.setdefault(_setting(trial["fields"], tuned), []).append(trial)
    counts: Counter[tuple[str, str, Any]] = Counter()
    for trials in by_setting.values():
        for field in tuned:
            tried = [trial["fields"].get(field) for trial in trials]
            if {type(value) for value in tried} - {int, float} or len(set(tried)) < 2:
                continue
            ends = {"smallest": min(tried), "largest": max(tried)}
            for value, trial in zip(tried, trials, strict=True):
                if trial.get("chosen"):
                    at = ((field, end, value) for end, x in ends.items() if x == value)
                    counts.update(at)
    return [
        f"{field}={value}, the {end} tried, is chosen for {num} of {len(by_setting)} "
        "settings."
        for (field, end, value), num in counts.items()
    ]


def _setting(fields: Mapping[str, Any], tuned: Sequence[str]) -> str:
    """What a trial changes beside the values that are tried."""
    return points.key({k: v for k, v in fields.items() if k not in tuned})


def unknown(tried: Mapping[str, str]) -> str:
    """Says why nothing was chosen."""
    for status, words in ((RUNNING, "is run by another process"), (FAILED, FAILED)):
        if status in tried.values():
            name = next(name for name, known in tried.items() if known == status)
            return f"nothing is chosen for it yet: {name} {words}"
    return "no value of --tune came to an end"


def write_table(path: Path, content: dict[str, Any]) -> None:
    """Writes `tuning.csv`: a row per trial."""
    trials, by = content["trials"], content["tune"]["by"]
    swept = list(dict.fromkeys(field for entry in trials for field in entry["fields"]))
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow([*swept, by, "chosen", "status", "folder"])
    for entry in trials:
        cells = [entry["fields"].get(field) for field in swept]
        of_trial = (entry.get("value"), entry.get("chosen"), entry["status"])
        writer.writerow([*cells, *of_trial, entry["name"]])
    write_atomically(path, rows.getvalue())
