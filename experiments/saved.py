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
from hyperjax.data.federation import Federation
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
    if not (folder / "partition.npz").is_file():
        raise ValueError(f"{field}={path!r} stopped before it began")
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
      ValueError: a pattern matches none of our paths, or shapes or dtypes under one of
        these paths differ.
    """
    there, here = tree.by_path(theirs), tree.by_path(ours)
    tree.splitter(here, take)  # refuses patterns that match nothing
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


def parts_to_take(run: Run, take: Sequence[str], server: PyTree) -> dict[str, Any]:
    """Returns by path what a run's server has for another one to start from.

    Args:
      run: the run to take from.
      take: patterns of the paths to take, see `common_paths`.
      server: the abstract state of the other one.

    Raises:
      ValueError: as `common_paths`, or the two have nothing in common.
    """
    theirs = run.restored.carry.server
    taken = common_paths(theirs, server, take)
    if not taken:
        raise ValueError(
            f"start.run has nothing that fits under start.take={tuple(take)}; its "
            f"paths: {', '.join(tree.paths(theirs)[:8])}, ...; this run's: "
            f"{', '.join(tree.paths(server)[:8])}, ..."
        )
    there = tree.by_path(theirs)
    return {path: there[path] for path in taken}


def put(parts: dict[str, Any], server: PyTree) -> PyTree:
    """Returns a server state with `parts` in the place of its own."""
    found = tree.by_path(server)
    logging.info("Started with %d of %d arrays.", len(parts), len(found))
    for name, x in parts.items():
        found[name] = jax.device_put(x, found[name].sharding)
    return jax.tree.unflatten(jax.tree.structure(server), list(found.values()))


def check_newcomers(run: Run, federation: Federation) -> None:
    """Refuses newcomers who are not the unseen clients of a run.

    Raises:
      ValueError: the data set is not what it was when the run began.
    """
    pairs = {
        "novel_train": federation.train,
        "novel_held_out": federation.held_out,
    }
    same = all(
        np.array_equal(run.facts[f"{name}_{part}"], getattr(table, part))
        for name, table in pairs.items()
        for part in ("rows", "size")
    ) and all(
        np.array_equal(run.facts[name], np.asarray(getattr(federation.pool, name)))
        for name in ("mean", "std")
    )
    if not same:
        raise ValueError(
            "the unseen clients or the pixel moments are not those of start.run: its "
            "data set, or the way it was dealt out, has changed since"
        )
