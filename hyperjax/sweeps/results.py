"""What a sweep came to: its tables and figures, from `sweep.json` and its runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperjax.launch import workdir
from hyperjax.sweeps.points import SEEDS
from hyperjax.sweeps.record import ENDED, Record

_UNTOLD = (*SEEDS, "start.run")
_ABSENT = "not set"


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
        if not runs:
            return []
        baseline = baseline or found["baseline"]
        fields = telling(found, baseline or "")
        return outputs.write(there.folder, runs, fields, baseline, live=live)


def telling(found: Mapping[str, Any], baseline: str) -> list[str]:
    """Returns the swept settings that tell points apart, or that a baseline names.

    Which run a point goes on from is none: its path has that run's seed.

    Example:
      >>> points = [{"method.mu": mu, "rounds": 5, "seed": 0} for mu in (0.1, 0.3)]
      >>> found = {"fields": list(points[0]), "points": [{"fields": p} for p in points]}
      >>> telling(found, ""), telling(found, "rounds=5")
      (['method.mu'], ['method.mu', 'rounds'])
    """
    named = {part.partition("=")[0].strip() for part in baseline.split(",")}
    changed = [entry["fields"] for entry in found["points"]]
    told = []
    for field in found["fields"]:
        values = {json.dumps(one.get(field, _ABSENT)) for one in changed}
        words = {field, field.rpartition(".")[2]}
        if field not in _UNTOLD and (len(values) > 1 or words & named):
            told.append(field)
    return told or ["method.name"]


def has_ended(found: Mapping[str, Any]) -> bool:
    """Whether nothing of what `sweep.json` holds is left to be run."""
    return all(entry["status"] in ENDED for entry in found["points"])
