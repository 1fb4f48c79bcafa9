"""Results of runs as one long table: a row per point, round and metric.

A point is a run with the settings that set it apart from the others. Nothing is
averaged here: what is made of the table, a reader can make anew.
"""

from __future__ import annotations

import contextlib
import json
import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hyperjax.engine.checkpoint import read_json
from hyperjax.launch import finished
from hyperjax.launch.finished import Run
from hyperjax.protocols import common
from hyperjax.sweeps.points import SEEDS

Folders = str | os.PathLike | Iterable[str | os.PathLike]

# Columns that say which point a row is of, beside its settings.
POINT = ("point", "method", "seed", "finished")
# Settings that say where a run is made, and not what comes out.
_ANYWHERE = re.compile(
    r"data\.(data_dir|download)|engine\..*|checkpoint\..*|tensorboard|tracker"
)
# Numbers of a summary that are settings or facts of the data.
_NO_SCORES = ("seed", "rounds", "unassigned", "finished")


def table(folders: Folders, fields: Sequence[str] = ()) -> pd.DataFrame:
    """Returns the results of runs, finished or not, by round.

    Args:
      folders: a run's folder, one that holds runs at any depth, or several of these.
      fields: settings to have as columns, such as "data.alpha"; if none are given,
        those in which runs of one method differ. What a run does not have is None.

    Returns:
      Columns: point (the folder's name, told apart), method (as the sweep names it,
      if the run is of one), seed, finished, the settings, round, seconds and bytes (of
      all clients, both ways, since the start; NaN between evaluations), metric, value.
      Metrics are those of metrics.jsonl and training.jsonl; those of summary.json alone
      stand at the last round, as do numbers_to_<X> and bytes_to_<X>: what one client
      had sent and received when pACC first met X %.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: a file of a run is damaged.

    Example:
      Mean pACC by round, over all points of a sweep::

        table = hyperjax.table("runs/sweep")
        table[table.metric == "pacc"].groupby("round").value.mean()
    """
    return table_of(points(folders, fields))


def clients(folders: Folders, fields: Sequence[str] = ()) -> pd.DataFrame:
    """Returns what finished runs know of each client after their last round.

    Args:
      folders: as for `table`.
      fields: as for `table`.

    Returns:
      Columns: those of `table` up to round, then client, participating, partition
      (digest of who has which sample: clients are the same where it is), metric, value.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: a file of a run is damaged.
    """
    return clients_of(points(folders, fields))


def points(
    folders: Folders, fields: Sequence[str] = ()
) -> list[tuple[dict[str, Any], Run]]:
    """Returns the columns that tell a point, and its run, for every run there is.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: a file of a run is damaged.
    """
    if isinstance(folders, (str, os.PathLike)):
        folders = [folders]
    found = finished.find([Path(folder) for folder in folders])
    runs = [finished.read(str(folder)) for folder in found]
    configs = [run.about.get("config", {}) for run in runs]
    flat = [common.flat(config) for config in configs]
    methods = _methods(found, flat)
    chosen = [field for field in fields if field not in (*SEEDS, "method.name")]
    if not fields:
        several = differing(configs).items()
        chosen = [field for field, values in several if _beside_method(methods, values)]
        chosen = [field for field in chosen if field not in SEEDS]
    heads = [
        {
            "point": name,
            "method": method,
            "seed": config.get("seed"),
            "finished": run.summary.get("finished") is True,
            **{field: _scalar(config.get(field)) for field in chosen},
        }
        for name, method, config, run in zip(
            names(found), methods, flat, runs, strict=True
        )
    ]
    return list(zip(heads, runs, strict=True))


def names(folders: Sequence[Path]) -> list[str]:
    """Returns a name for every run: its path from the folder that they share."""
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    return [folder.relative_to(shared).as_posix() for folder in folders]


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the settings in which runs differ beside their method, by field.

    Args:
      configs: as config.json has them. Options of a method are compared among its own
        runs.

    Returns:
      {"group.field": a value for each run, None where it has none of it}.
    """
    flat = [common.flat(config) for config in configs]
    found = {}
    for field in dict.fromkeys(field for config in flat for field in config):
        if field in ("method.name", "experiment") or _ANYWHERE.fullmatch(field):
            continue
        seen: dict[Any, set[str]] = {}
        for config in flat:
            own = config.get("method.name") if field.startswith("method.") else None
            seen.setdefault(own, set()).add(json.dumps(config.get(field)))
        if any(len(values) > 1 for values in seen.values()):
            found[field] = [config.get(field) for config in flat]
    return found


def _methods(
    found: Sequence[Path], flat: Sequence[Mapping[str, Any]]
) -> list[str | None]:
    """Methods of runs, by a sweep's word for a variant: pfedhn_pc, and not pfedhn."""
    known: dict[Path, str] = {}
    for folder in {path.parent for path in found}:
        with contextlib.suppress(FileNotFoundError):
            sweep = read_json(folder / finished.SWEEP, "start the sweep again")
            for entry in sweep.get("points", ()):
                if name := entry.get("fields", {}).get("method.name"):
                    known[folder / entry["name"]] = name
    pairs = zip(found, flat, strict=True)
    return [known.get(path, config.get("method.name")) for path, config in pairs]


def _beside_method(methods: Sequence[str | None], values: Sequence[Any]) -> bool:
    """Whether runs of one method have several values of a setting."""
    seen: dict[str | None, set[str]] = {}
    for method, value in zip(methods, values, strict=True):
        seen.setdefault(method, set()).add(json.dumps(value))
    return any(len(of_one) > 1 for of_one in seen.values())


def table_of(found: Sequence[tuple[Mapping[str, Any], Run]]) -> pd.DataFrame:
    """Returns `table` of points that were read."""
    return _joined(found, _by_round, ["round", "seconds", "bytes", "metric", "value"])


def clients_of(found: Sequence[tuple[Mapping[str, Any], Run]]) -> pd.DataFrame:
    """Returns `clients` of points that were read."""
    columns = ["round", "client", "participating", "partition", "metric", "value"]
    return _joined(found, _by_client, columns)


def last(
    found: Sequence[tuple[Mapping[str, Any], Run]], table: pd.DataFrame
) -> pd.DataFrame:
    """Returns a row per point, with the newest value of every metric as a column.

    Args:
      found: as from `points`.
      table: `table_of` these.
    """
    heads = pd.DataFrame([head for head, _ in found])
    known = table.groupby(["point", "metric"], sort=False)["value"].last()
    return heads.join(known.unstack("metric"), on="point")


def _joined(found, rows_of, columns: list[str]) -> pd.DataFrame:
    parts = [rows_of(run) for _, run in found]
    lengths = [len(part) for part in parts]
    if not any(lengths):
        heads = list(found[0][0]) if found else list(POINT)
        return pd.DataFrame(columns=[*heads, *columns])
    heads = pd.DataFrame([head for head, _ in found], dtype=object)
    # Where some points have none, whole numbers would become floats.
    heads = heads.apply(lambda own: own if own.isna().any() else own.infer_objects())
    heads = heads.loc[heads.index.repeat(lengths)].reset_index(drop=True)
    rows = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return pd.concat([heads, rows[columns]], axis=1)


def _by_round(run: Run) -> pd.DataFrame:
    """Rows of one run: round, seconds, bytes, metric, value."""
    rounds: dict[int, dict[str, Any]] = {}
    for row in (*run.training, *run.metrics):
        rounds.setdefault(row["round"], {}).update(row)
    rows = [rounds[t] for t in sorted(rounds)]
    for row in rows:
        up, down = (row.get(f"{way}_bytes_total") for way in ("up", "down"))
        row["bytes"] = None if up is None or down is None else up + down
    if rows:
        rows[-1] = {**_final(run), **rows[-1]}
    wide = pd.DataFrame(rows, columns=list(_numeric(rows)))
    return _melted(wide, ["round", "seconds", "bytes"])


def _final(run: Run) -> dict[str, Any]:
    """What is known at the end alone."""
    found = {k: v for k, v in run.summary.items() if k not in _NO_SCORES}
    # The whole run's, and not those of the last round.
    for name in ("seconds", "flops"):
        found[f"run_{name}"] = found.pop(name, None)
    kinds = ("numbers", "bytes")
    sent: dict[str, list[Any]]
    sent = {k: [run.summary.get(f"{way}_{k}") for way in ("up", "down")] for k in kinds}
    known = None not in (*sent["numbers"], *sent["bytes"])
    for reach in run.summary.get("reach", ()):
        name = f"{reach['threshold']:g}"
        found[f"numbers_to_{name}"] = reach["cost"]
        if known and any(sent["numbers"]):
            per_number: Any = sum(sent["bytes"]) / sum(sent["numbers"])
            found[f"bytes_to_{name}"] = reach["cost"] * per_number
    return found


def _numeric(rows: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    """Names of what is a number in some row, in order; "round" is first."""
    return dict.fromkeys(
        ["round", "seconds", "bytes"]
        + [
            name
            for row in rows
            for name, value in row.items()
            if isinstance(value, numbers.Real) and not isinstance(value, bool)
        ]
    )


def _by_client(run: Run) -> pd.DataFrame:
    by = ["client", "participating"]
    rows = [
        {k: v for k, v in row.items() if k in by or isinstance(v, numbers.Real)}
        for row in run.clients
    ]
    wide = pd.DataFrame(rows, columns=None if rows else by)
    wide["round"] = run.summary.get("rounds")
    wide["partition"] = run.about.get("data", {}).get("partition")
    return _melted(wide, ["round", *by, "partition"])


def _melted(wide: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Rows of `by`, metric and value, metric by metric; as `melt` at a tenth of it."""
    metrics = [name for name in wide if name not in by]
    values = wide[metrics].to_numpy(float, na_value=np.nan).T
    of, at = np.nonzero(~np.isnan(values))
    rows = wide[list(by)].take(at).reset_index(drop=True)
    return rows.assign(metric=np.array(metrics, object)[of], value=values[of, at])


def _scalar(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
