"""What a sweep came to: its tables and figures, from `sweep.json` and its runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperjax.launch import workdir
from hyperjax.sweeps import points
from hyperjax.sweeps.record import ENDED, Record


def write(there: Record, baseline: str | None = None) -> list[Path]:
    """Writes what the points of a sweep came to, one process at a time.

    Args:
      there: the sweep.
      baseline: which settings are compared with; None for the sweep's own.

    Returns:
      The files, see `outputs.write`; none if no point has begun.

    Raises:
      ValueError: a run is damaged, or no point of the baseline has ended.
    """
    from hyperjax.sweeps import outputs  # which takes long to import

    with there.change() as found:
        runs = [there.folder / entry["name"] for entry in found["points"]]
        runs = [run for run in runs if (run / workdir.CONFIG).exists()]
        live = not has_ended(found)
        fields = [field for field in found["fields"] if field not in points.SEEDS]
        if not runs:
            return []
        baseline = baseline or found["baseline"]
        return outputs.write(there.folder, runs, fields, baseline, live=live)


def has_ended(found: Mapping[str, Any]) -> bool:
    """Whether nothing of what `sweep.json` holds is left to be run."""
    return all(entry["status"] in ENDED for entry in found["points"])
