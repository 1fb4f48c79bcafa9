"""All that a run asks of its config, asked once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from hyperjax.engine import log
from hyperjax.launch import build, origin, saved
from hyperjax.protocols import common
from hyperjax.runs.experiment import Experiment, Settings


class Resolved(NamedTuple):
    """A checked config in a run's words; nobody looks at the config itself again."""

    config: dict[str, Any]  # as JSON, every field: what config.json keeps
    method: str
    dataset: str
    settings: Settings
    keep: int  # newest checkpoints
    tensorboard: bool
    tracker: str  # a package, or ""
    # The experiment; of the folder for a host store in files.
    make: Callable[[str], Experiment]
    # What another run's server lends to a fresh run, by path.
    lend: Callable[[Experiment], dict[str, Any]]


def resolve(config: ml_collections.ConfigDict) -> Resolved:
    """Checks a config, which stays as it is; no data are read.

    Args:
      config: see `protocols.common.defaults`; with `config.method`.

    Raises:
      ValueError, TypeError, ImportError: naming the field, what was given and what is
        accepted.
    """
    config = common.filled(config)
    build.check(config)
    log.check_tracker(config.tracker)
    start = config.start
    return Resolved(
        config=origin.as_json(config),
        method=config.method.name,
        dataset=config.data.name,
        settings=build.settings(config),
        keep=config.checkpoint.keep,
        tensorboard=config.tensorboard,
        tracker=config.tracker,
        make=functools.partial(build.make_experiment, config),
        lend=functools.partial(
            saved.lent, start.run, start.take, config.data.newcomers
        ),
    )
