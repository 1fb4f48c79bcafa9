"""What a run leaves to read: JSON lines and TensorBoard events.

`metrics.jsonl` holds evaluations and `training.jsonl` the quantities of every round;
both are the same however often a run was interrupted. Wall-clock times are in
`timing.jsonl`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyperjax.engine.checkpoint import write_atomically
from hyperjax.errors import first_line

METRICS, TIMING, TRAINING = "metrics.jsonl", "timing.jsonl", "training.jsonl"
EVENTS = "events"


def jsonable(value: Any) -> Any:
    """Turns arrays and NumPy scalars into JSON values; floats keep 6 digits."""
    if isinstance(value, Mapping):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_lines(path: Path) -> list[dict]:
    """Returns the records of a JSON-lines file, without a torn last one.

    Raises:
      ValueError: an earlier line is broken, which no kill explains.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "round" not in record:
                raise ValueError("it names no round")
            records.append(record)
        except ValueError as error:  # JSON's errors and those of UTF-8 are such
            if number < len(lines):
                raise ValueError(
                    f"{str(path)!r}: line {number} is not JSON of a round "
                    f"({first_line(error)}); put a copy back, or start again in a new "
                    "workdir"
                ) from error
    return records


class Recorder:
    """Appends the records of one run, cutting off what a kill left behind."""

    def __init__(self, workdir: Path, finished_rounds: int, tensorboard: bool = True):
        """Keeps records up to `finished_rounds`; -1 for a fresh run."""
        self._workdir = workdir
        self._seconds_before = 0.0  # of processes that this one continues
        for name in (METRICS, TIMING, TRAINING):
            kept = [
                record
                for record in read_lines(workdir / name)
                if record["round"] <= finished_rounds
            ]
            if name == TIMING and kept:
                self._seconds_before = kept[-1].get("seconds", 0.0)
            text = "".join(json.dumps(record) + "\n" for record in kept)
            write_atomically(workdir / name, text)
        self._events = _event_writer(workdir, finished_rounds) if tensorboard else None

    def evaluation(self, record: Mapping[str, Any], seconds: float) -> None:
        """Writes the record of one evaluation, which names its "round".

        `seconds` are those of this process.
        """
        self._append(METRICS, jsonable(record))
        seconds = round(self._seconds_before + seconds, 3)
        self._append(TIMING, {"round": record["round"], "seconds": seconds})
        if self._events is not None:
            for name, value in record.items():
                is_number = isinstance(value, (int, float, np.number))
                if name != "round" and is_number and math.isfinite(value):
                    self._events.add_scalar(f"eval/{name}", value, record["round"])
            self._events.flush()

    def rounds(self, start: int, info: Mapping[str, np.ndarray]) -> None:
        """Writes training quantities [R] of rounds start + 1, ..."""
        scalars = {k: v for k, v in info.items() if np.ndim(v) == 1}
        for i in range(max(map(len, scalars.values()), default=0)):
            row = {name: values[i] for name, values in scalars.items()}
            self._append(TRAINING, {"round": start + i + 1, **jsonable(row)})
            if self._events is not None:
                for name, value in row.items():
                    at = start + i + 1
                    self._events.add_scalar(f"train/{name}", float(value), at)

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._events is not None:
            self._events.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with open(self._workdir / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _event_writer(workdir: Path, finished_rounds: int):
    from tensorboardX import SummaryWriter

    purge = finished_rounds + 1 if finished_rounds >= 0 else None
    return SummaryWriter(str(workdir / EVENTS), purge_step=purge)


def duration(seconds: float) -> str:
    """Returns 42s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(num_bytes: float) -> str:
    """Returns a number of bytes in readable units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:  # what three digits round up belongs to the next unit
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"
