"""What a run's folder holds, read back for pages and tables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from hyperjax.data.shift import varying
from hyperjax.engine.checkpoint import read_json, read_npz
from hyperjax.engine.log import METRICS, TIMING, TRAINING, read_lines
from hyperjax.launch import embedding_maps, origin, workdir

Row = Mapping[str, Any]

SWEEP, TRIALS = "sweep.json", "tune"  # of a sweep: its record, runs that chose numbers


class Run(NamedTuple):
    """What a run folder holds; parts not written yet are empty or None."""

    folder: str
    about: Row  # config.json
    metrics: list[Row]
    summary: Row
    clients: list[Row]
    partition: tuple[np.ndarray, np.ndarray, list[str]] | None
    unassigned: int = 0  # samples that the partition left to no client
    training: Sequence[Row] = ()  # quantities of every round
    shift: Mapping[str, np.ndarray] = MappingProxyType({})  # of images, by parameter
    embeddings: Sequence[Row] = ()  # of clients, by evaluated round


def read(folder: str) -> Run:
    """Reads a run's folder; files other than `config.json` may be missing.

    Raises:
      FileNotFoundError: the folder holds no `config.json`.
    """
    try:
        about = origin.read(Path(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"no {workdir.CONFIG} in {folder!r}: not a run folder"
        ) from None
    records = read_lines(Path(folder) / METRICS)
    seconds = {
        row["round"]: row["seconds"] for row in read_lines(Path(folder) / TIMING)
    }
    training = read_lines(Path(folder) / TRAINING)
    metrics: list[Row] = [
        {"seconds": seconds.get(row["round"]), **row} for row in records
    ]
    try:
        named = ("label_names", "counts", "participating")
        path, wanted = Path(folder) / workdir.PARTITION, (*named, "unassigned", "shift")
        file = read_npz(path, workdir.AGAIN, wanted, named)
        names = [str(name) for name in file["label_names"]]
        partition = (file["counts"], file["participating"].astype(bool), names)
        unassigned = int(file.get("unassigned", 0))
        shift = varying(file["shift"]) if "shift" in file else {}
    except FileNotFoundError:
        partition, unassigned, shift = None, 0, {}
    summary = _read_json(folder, "summary.json") or {}
    clients = _read_json(folder, "clients.json") or []
    return Run(
        folder,
        about,
        metrics,
        summary,
        clients,
        partition,
        unassigned,
        training,
        shift,
        embedding_maps.read(Path(folder)),
    )


def _read_json(folder: str, name: str) -> Any:
    """The content of a file, or None if there is none."""
    kind = list if name == "clients.json" else dict
    try:
        return read_json(Path(folder) / name, workdir.AGAIN, kind)
    except (FileNotFoundError, NotADirectoryError):
        return None


def latest_of(run: Run) -> dict[str, Any]:
    """The newest value of everything: configuration, last evaluation, then summary."""
    config = run.about.get("config", {})
    data, method = config.get("data", {}), config.get("method", {})
    known = {
        "method": method.get("name"),
        "dataset": data.get("name") or data.get("dataset"),
        "seed": config.get("seed"),
        "rounds": config.get("rounds"),
        "plan": run.about.get("plan"),
    }
    latest = {**known, **(run.metrics[-1] if run.metrics else {}), **run.summary}
    return {key: value for key, value in latest.items() if value is not None}


def find(folders: Iterable[Path]) -> list[Path]:
    """Returns the runs in folders, at any depth, by their real paths and each once.

    Raises:
      FileNotFoundError: one of them is no run and holds none.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        runs = list(_runs(folder.expanduser().resolve()))
        if not runs:
            raise FileNotFoundError(
                f"no {workdir.CONFIG} in {str(folder)!r} or below: not a run folder"
            )
        found |= dict.fromkeys(runs)
    return list(found)


def _runs(folder: Path) -> Iterator[Path]:
    """A run's folder is not searched for others, nor a sweep's for its trials."""
    for path, inner, files in os.walk(folder):
        inner.sort(key=_natural)
        if workdir.CONFIG in files:
            inner.clear()
            yield Path(path)
        elif SWEEP in files:
            inner[:] = [name for name in inner if name != TRIALS]


def _natural(name: str) -> list[tuple[str, int]]:
    """Sorts p10 after p9."""
    return [(rest, int(n or 0)) for rest, n in re.findall(r"(\D*)(\d*)", name)]
