"""What a sweep came to: its tables and figures, from `sweep.json` and its runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperjax.launch import origin, workdir
from hyperjax.protocols import common
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
        fields = telling(there.folder, found)
        if not runs:
            return []
        baseline = baseline or found["baseline"]
        return outputs.write(there.folder, runs, fields, baseline, live=live)


def has_ended(found: Mapping[str, Any]) -> bool:
    """Whether nothing of what `sweep.json` holds is left to be run."""
    return all(entry["status"] in ENDED for entry in found["points"])


def telling(folder: Path, found: Mapping[str, Any]) -> list[str]:
    """Returns the fields by which a sweep's settings are told apart in its runs.

    Those that it changes, and where variants have one method's name, such as pfedhn and
    pfedhn_pc, those in which they differ.
    """
    swept = [field for field in found["fields"] if field not in points.SEEDS]
    more: dict[str, None] = {}
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    for entry in found["points"]:
        if not (folder / entry["name"] / workdir.CONFIG).exists():
            continue
        config = common.flat(origin.read(folder / entry["name"])["config"])
        setting = points.key({f: entry["fields"].get(f) for f in swept})
        values = points.key({field: config.get(field) for field in swept})
        other, there = seen.setdefault(values, (setting, config))
        if other != setting:
            fields = sorted(there.keys() | config.keys())
            differing = (f for f in fields if there.get(f) != config.get(f))
            more |= dict.fromkeys(f for f in differing if f not in points.SEEDS)
    return [*swept, *more]
