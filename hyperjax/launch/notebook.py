"""Runs in folders as objects."""

from pathlib import Path
from typing import NamedTuple

import ml_collections

from hyperjax.data.federation import Federation
from hyperjax.engine import log
from hyperjax.launch import build, origin, saved, workdir
from hyperjax.runs.experiment import Experiment
from hyperjax.runs.loop import State
from hyperjax.runs.run import ABOUT, Run, load_saved
from hyperjax.types import Model


class _Config(NamedTuple):
    """What an experiment of the launcher is made of."""

    config: ml_collections.ConfigDict

    def build(self) -> Experiment:
        return build.build(self.config)

    def networks(self, data: Federation) -> Model | dict[str, Model]:
        """See `runs.recipe.Recipe.networks`."""
        shape = data.pool.x.shape[1:]
        return build.make_model(self.config, shape, data.num_classes, data.vocabulary)


def load_run(path: str | Path, field: str = "path") -> Run:
    """Returns the run in a folder, given by `field`; see `hyperjax.load_run`."""
    folder = Path(path).expanduser()
    if (folder / ABOUT).exists():
        return load_saved(folder)
    if not (folder / workdir.CONFIG).exists():
        raise ValueError(
            f"{field}={str(path)!r} holds no run (neither {ABOUT} nor {workdir.CONFIG})"
        )
    found = saved.load(str(folder), field)
    origin.check_settings(folder, origin.read(folder))
    recipe = _Config(found.config)
    experiment = recipe.build()
    carry = experiment.simulator.load(found.restored.carry)
    state = State(found.restored.round, carry)
    records = [r for r in log.read_lines(folder / log.METRICS)]
    done = tuple(r for r in records if r["round"] <= state.round)
    return Run(found.config.method.name, recipe, experiment, state, done)
