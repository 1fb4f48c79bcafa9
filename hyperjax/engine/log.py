"""What a run leaves to read: JSON lines, TensorBoard events, and a tracker's own.

`metrics.jsonl` holds evaluations and `training.jsonl` the quantities of every round;
both are the same however often a run was interrupted. Wall-clock times are in
`timing.jsonl`.
"""

import importlib
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperjax.engine.checkpoint import write_atomically
from hyperjax.errors import first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

    def __init__(
        self,
        workdir: Path,
        finished_rounds: int,
        tensorboard: bool = True,
        tracker: str = "",
        settings: Mapping[str, Any] | None = None,
    ):
        """Keeps records up to `finished_rounds`; -1 for a fresh run.

        Args:
          workdir: the run's folder.
          finished_rounds: what a checkpoint goes on from.
          tensorboard: whether events are written.
          tracker: a package with init, log and finish, such as wandb or trackio; ""
            for none.
          settings: of the run, {"group.field": value}, for both.
        """
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
        self._settings = {
            # Both take what is no number as text.
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in (settings or {}).items()
        }
        self._events = _event_writer(workdir, finished_rounds) if tensorboard else None
        self._tracker = importlib.import_module(tracker) if tracker else None
        if self._tracker is not None:
            self._tracker.init(
                project="hyperjax", name=workdir.resolve().name, config=self._settings
            )

    def picture(self, name: str, figure: "Figure") -> None:
        """Shows a matplotlib figure, which has a canvas of pixels, beside events."""
        if self._events is not None:
            canvas: Any = figure.canvas
            canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            self._events.add_image(name, pixels, 0, dataformats="HWC")

    def evaluation(
        self,
        record: Mapping[str, Any],
        seconds: float,
        clients: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Writes the record of one evaluation, which names its "round".

        `seconds` are those of this process; `clients` are values [N] to be shown as
        histograms.
        """
        self._append(METRICS, jsonable(record))
        seconds = round(self._seconds_before + seconds, 3)
        self._append(TIMING, {"round": record["round"], "seconds": seconds})
        self._show(record["round"], "eval", record)
        if self._events is not None:
            for name, values in (clients or {}).items():
                finite = values[np.isfinite(values)]
                if finite.size:
                    self._events.add_histogram(
                        f"clients/{name}", finite, record["round"]
                    )
            self._events.flush()

    def rounds(
        self, start: int, info: Mapping[str, np.ndarray], rate: float | None = None
    ) -> None:
        """Writes training quantities [R] of rounds start + 1, ...

        `rate` is how many samples a second these rounds went through.
        """
        scalars = {k: v for k, v in info.items() if np.ndim(v) == 1}
        num = max(map(len, scalars.values()), default=0)
        for i in range(num):
            row = {name: values[i] for name, values in scalars.items()}
            self._append(TRAINING, {"round": start + i + 1, **jsonable(row)})
            self._show(start + i + 1, "train", row)
        if rate is not None:
            self._show(start + num, "train", {"samples_per_second": rate})

    def summary(self, found: Mapping[str, Any]) -> None:
        """Shows what the run came to beside its settings."""
        numbers = {k: float(v) for k, v in _finite(found)}
        if self._events is not None and self._settings:
            # A name of its own, and not the hour, so that a repeat replaces nothing.
            self._events.add_hparams(self._settings, numbers, name="hparams")
        if self._tracker is not None:
            self._tracker.log({f"summary/{k}": v for k, v in numbers.items()})

    def close(self) -> None:
        """Flushes and closes what is open."""
        if self._events is not None:
            self._events.close()
        if self._tracker is not None:
            self._tracker.finish()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with open(self._workdir / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _show(self, round: int, group: str, row: Mapping[str, Any]) -> None:
        """Numbers of one round as events, and to the tracker."""
        numbers = {f"{group}/{k}": float(v) for k, v in _finite(row) if k != "round"}
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, round)
        if self._tracker is not None and numbers:
            self._tracker.log(numbers, step=round)


def check_tracker(name: str) -> None:
    """Refuses a tracker that is not installed.

    Raises:
      ValueError: naming the field and the package.
    """
    try:
        there = not name or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a dotted name of what is not there; ""
        there = False
    if not there:
        raise ValueError(
            f"tracker={name!r}: no such package is installed; pip install {name}, or "
            "tracker='' (accepted: wandb, trackio, or another with their init, log and "
            "finish)"
        )


def _finite(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is a finite number, and no truth value."""
    for name, value in row.items():
        is_number = isinstance(value, (int, float, np.number))
        if is_number and not isinstance(value, bool) and math.isfinite(value):
            yield name, value


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
