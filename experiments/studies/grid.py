"""What studies share: runs of many configs, their means over seeds, a stopped grid."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from hyperjax.engine import log
from hyperjax.engine.checkpoint import write_atomically
from hyperjax.launch import cli, train, workdir


def whole_numbers(flag: str, given: Sequence[str], least: int = 0) -> list[int]:
    """Parses a flag such as --seeds.

    Raises:
      ValueError: something else than whole numbers from `least` on.
    """
    if not given or not all(n.isdigit() and int(n) >= least for n in given):
        raise ValueError(
            f"--{flag}={','.join(given)}: expected whole numbers from {least} on, such "
            f"as {least},{least + 1}"
        )
    return [int(n) for n in given]


def positive_numbers(flag: str, given: Sequence[str]) -> list[float]:
    """Parses a flag such as --rates.

    Raises:
      ValueError: something else than finite numbers above 0.
    """
    try:
        numbers = [float(n) for n in given]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < n < math.inf for n in numbers):
        raise ValueError(
            f"--{flag}={','.join(given)}: expected numbers above 0, such as 0.1,0.03"
        )
    return numbers


def result(config: ml_collections.ConfigDict, folder: Path) -> dict[str, Any] | None:
    """Runs one config, or reads what it gave; None if it diverged.

    Returns:
      The run's summary, its last record under "last", pACC by round under "curve", and
      the commit it was trained at.
    """
    try:
        summary = train.train(config, str(folder), folder.name)
    except FloatingPointError:
        return None
    records = log.read_lines(folder / log.METRICS)
    curve = {r["round"]: r["pacc"] for r in records if r["round"] > 0}
    made_by = workdir.read(folder)
    return {**summary, "last": records[-1], "curve": curve, "commit": made_by["commit"]}


def over_seeds(
    summaries: Iterable[Mapping[str, Any]], names: Iterable[str]
) -> dict[str, list[float] | None]:
    """Returns [mean, standard deviation (n - 1)] of the metrics that are there.

    None for a metric that some seeds have no value of: a mean of the others would be
    one of those where nothing went wrong.
    """
    summaries = list(summaries)
    found: dict[str, list[float] | None] = {}
    for name in names:
        values = [s[name] for s in summaries if s.get(name) is not None]
        if values and len(values) < len(summaries):
            found[name] = None
        elif values:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            found[name] = [float(np.mean(values)), spread]
    return found


def shown(value: Any, digits: str = ".2f") -> Any:
    """Returns "mean ± deviation" for a pair of `over_seeds`, else the value itself."""
    if isinstance(value, list):
        return f"{value[0]:{digits}} ± {value[1]:{digits}}"
    return value


def record(**settings: Any) -> dict[str, Any]:
    """Returns an empty record: settings, machine, versions, no rows yet."""
    return dict(
        settings=settings,
        machine=f"{platform.machine()}, {cli.num_cores()} cores",
        versions={name: workdir.version(name) for name in workdir.PACKAGES},
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        rows=[],
    )


def write(found: Mapping[str, Any], path: Path | None) -> None:
    """Writes a record as JSON, if there is a path."""
    if path:
        write_atomically(path, json.dumps(log.jsonable(found), indent=1) + "\n")


def named(row: Mapping[str, Any]) -> str:
    """Returns the method of a row, and of how many runs it is not, if any."""
    diverged = row.get("diverged")
    return row["method"] + (f" ({diverged} diverged)" if diverged else "")


def short(label: str) -> str:
    """Returns a label as part of a folder's name."""
    return "".join(c if c.isalnum() else "_" for c in label.lower())


def best(rates: Mapping[float, float | None]) -> float:
    """Returns the rate with the highest accuracy; what diverged has none."""
    return max(rates, key=lambda rate: rates[rate] or 0.0)


def commits(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the commit of every run."""
    return [s["commit"] for s in summaries]


def guarded(main: Callable[[], int]) -> Callable[[], int]:
    """Returns `main`, for which to be stopped is no mistake."""

    def run() -> int:
        try:
            return main()
        except train.Stopped as stop:
            print(f"Stopped after round {stop}; the same command continues.")
            return 0

    return run
