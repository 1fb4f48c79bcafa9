"""Reads back what a run left in its folder."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from experiments import build, workdir
from hyperjax import tree
from hyperjax.engine import checkpoint, families, schedule
from hyperjax.types import Algorithm, PyTree


class Run(NamedTuple):
    """A run's method and newest intact state."""

    config: ml_collections.ConfigDict
    algorithm: Algorithm
    facts: Any  # arrays of partition.npz
    restored: checkpoint.Restored


def load_config(path: str, field: str) -> ml_collections.ConfigDict:
    """Reads the config of the run in a folder; `field` is what gave the folder.

    Raises:
      ValueError: there is no run.
    """
    file = Path(path).expanduser() / workdir.CONFIG
    if not file.is_file():
        raise ValueError(f"{field}={path!r} holds no run (no {workdir.CONFIG})")
    made_by = json.loads(file.read_text())["config"]
    return ml_collections.ConfigDict(workdir.as_tuples(made_by))


def load(path: str, field: str = "workdir") -> Run:
    """Reads a run's folder; needs neither its data set nor its clients.

    Raises:
      ValueError: there is no run, or no intact checkpoint in it.
    """
    config = load_config(path, field)
    folder = Path(path).expanduser()
    with np.load(folder / "partition.npz") as file:
        facts = dict(file)
    shape = tuple(int(n) for n in facts["sample_shape"])
    model = build.make_model(config, shape, len(facts["label_names"]))
    algorithm = build.make_algorithm(config, model)
    # One client holds all training samples in centralised training.
    num_trainers = int(facts.get("num_trainers", config.data.num_clients))
    members: families.Families | int = num_trainers
    if isinstance(model, dict):
        members = families.families(build.assigned(model, num_trainers))
    template = schedule.abstract_carry(algorithm, members)
    restored = checkpoint.restore(folder / "checkpoints", template)
    if restored is None:
        raise ValueError(f"{field}={path!r} has no checkpoint yet")
    return Run(config, algorithm, facts, restored)


def common_paths(theirs: PyTree, ours: PyTree, take: Sequence[str]) -> list[str]:
    """Returns the paths that two server states share.

    Args:
      theirs: what is taken from; abstract or not, as `ours`.
      ours: what it is put into.
      take: patterns of paths, of which one must match.

    Raises:
      ValueError: shapes or dtypes under one of these paths differ.
    """
    there, here = tree.by_path(theirs), tree.by_path(ours)
    patterns = tree.as_patterns(take)
    found = [
        path
        for path in here
        if path in there and any(re.fullmatch(pattern, path) for pattern in patterns)
    ]
    for path in found:
        a, b = there[path], here[path]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"{path} is {a.dtype}{a.shape} in the run to start from and "
                f"{b.dtype}{b.shape} in this one; leave it out of start.take or "
                "configure both alike"
            )
    return found


def start_from(path: str, take: Sequence[str], server: PyTree) -> PyTree:
    """Returns a server state with parts of another run's in the place of its own.

    Args:
      path: folder of the other run.
      take: patterns of the paths to take, see `common_paths`.
      server: of this run.

    Raises:
      ValueError: as `load`, or the two have nothing in common.
    """
    theirs = load(path, "start.run").restored.carry.server
    taken = common_paths(theirs, server, take)
    if not taken:
        raise ValueError(
            f"start.run={path!r} has nothing that fits under start.take={tuple(take)}; "
            f"its paths: {', '.join(tree.paths(theirs)[:8])}, ...; this run's: "
            f"{', '.join(tree.paths(server)[:8])}, ..."
        )
    found = tree.by_path(server)
    logging.info("From %s: %d of %d arrays.", path, len(taken), len(found))
    there = tree.by_path(theirs)
    for name in taken:
        found[name] = jax.device_put(there[name], found[name].sharding)
    return jax.tree.unflatten(jax.tree.structure(server), list(found.values()))
