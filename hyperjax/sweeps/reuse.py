"""Points that differ in how they are evaluated alone: one is trained for all.

Fields of `evaluation` touch no training (`origin.compare` lets a run go on with other
values), so a point may begin with what a finished one has trained, and is evaluated.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import ml_collections
from absl import logging

from hyperjax.engine import checkpoint, log
from hyperjax.launch import workdir
from hyperjax.protocols import common
from hyperjax.sweeps.points import Point

# What a run's training leaves. Its summary is another point's: whoever reads the folder
# before this one has been evaluated must not find it there.
_TRAINED = (workdir.CONFIG, workdir.PARTITION, workdir.CHECKPOINTS, log.TRAINING)

Training: TypeAlias = tuple[tuple[str, str], ...]
Alike: TypeAlias = dict[Training, list[Point]]


def by_training(points: Sequence[Point]) -> Alike:
    """Returns points by what their training follows from, fields and values."""
    found: Alike = {}
    for point in points:
        found.setdefault(_training(point.config), []).append(point)
    return found


def once(points: Sequence[Point]) -> list[list[Point]]:
    """Returns points of which the first is trained and the others are evaluated."""
    late = [p for p in points if _is_served_late(common.filled(p.config))]
    return [alike for alike in by_training(late).values() if len(alike) > 1]


def begin(folder: Path, point: Point, alike: Alike) -> str | None:
    """Copies what a finished point has trained to one that has not begun.

    Nothing is copied where rounds before the last are to be evaluated, whose states are
    gone.

    Args:
      folder: the sweep's.
      point: to begin.
      alike: points, `by_training`.

    Returns:
      The name of the point whose training it has; None if it has nobody's.
    """
    place, config = folder / point.name, common.filled(point.config)
    if place.exists() or not _is_served_late(config):
        return None
    for other in alike[_training(point.config)]:
        if _is_trained(folder / other.name, config.rounds):
            return other.name if _copied(folder / other.name, place) else None
    return None


def _is_served_late(config: ml_collections.ConfigDict) -> bool:
    """Whether no round between the first state and the last is evaluated."""
    return config.evaluation.every >= config.rounds


def _training(config: ml_collections.ConfigDict) -> Training:
    fields = common.flat(common.filled(config)).items()
    return tuple((k, repr(v)) for k, v in fields if not k.startswith("evaluation."))


def _is_trained(run: Path, rounds: int) -> bool:
    """Whether a run is finished and has a checkpoint of its last round."""
    found = checkpoint.finished(run / workdir.CHECKPOINTS)
    last = bool(found) and int(found[-1].name[-8:]) == rounds
    return last and (run / workdir.SUMMARY).exists()


def _copied(run: Path, place: Path) -> bool:
    """Copies a run's training; False if that cannot be, or another process did."""
    part = place.with_name(f".{place.name}.part")  # no run before it is whole
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name in _TRAINED:
            if (run / name).is_dir():
                shutil.copytree(run / name, part / name)
            elif (run / name).exists():
                shutil.copy2(run / name, part / name)
        summary = checkpoint.read_json(run / workdir.SUMMARY, workdir.AGAIN)
        took = {name: summary.get(name) for name in workdir.SPENT}
        text = json.dumps({"run": run.name, **took}, indent=2) + "\n"
        (part / workdir.TRAINED).write_text(text, encoding="utf-8")
        part.rename(place)
    except (OSError, ValueError):  # such as of a damaged summary
        logging.debug("copying %s", run, exc_info=True)
        shutil.rmtree(part, ignore_errors=True)
        return False
    return True
