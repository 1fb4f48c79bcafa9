"""Reads back what a run left in its folder."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from hyperjax import tree
from hyperjax.data.federation import Federation
from hyperjax.engine import checkpoint, compiled, families, schedule
from hyperjax.launch import build, origin, workdir
from hyperjax.runs.experiment import Experiment, blocks
from hyperjax.types import Algorithm, PyTree


class Run(NamedTuple):
    """A run's method and newest intact state."""

    config: ml_collections.ConfigDict
    algorithm: Algorithm
    facts: Any  # arrays of partition.npz
    restored: checkpoint.Restored
    folder: Path
    pixels: str | None  # digest of the data set's; old runs do not know


def load_config(path: str, field: str) -> ml_collections.ConfigDict:
    """Reads the config of the run in a folder; `field` is what gave the folder.

    Raises:
      ValueError: there is no run, its config.json is damaged, or an older version made
        it.
    """
    return as_config(_record(path, field))


def as_config(record: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config in the content of a config.json."""
    return ml_collections.ConfigDict(origin.as_tuples(record["config"]))


def _record(path: str, field: str) -> dict[str, Any]:
    """Reads the config.json of the run in a folder."""
    folder = Path(path).expanduser()
    if not (folder / workdir.CONFIG).is_file():
        raise ValueError(f"{field}={path!r} holds no run (no {workdir.CONFIG})")
    record = origin.read(folder)
    origin.check_format(f"{field}={path!r}", record)
    return record


def load(path: str, field: str = "workdir") -> Run:
    """Reads a run's folder; needs neither its data set nor its clients.

    Raises:
      ValueError: there is no run, no intact checkpoint in it, or a damaged file, or an
        older version made it.
    """
    compiled.check_jax()
    record = _record(path, field)
    config, folder = as_config(record), Path(path).expanduser()
    if not (folder / workdir.PARTITION).is_file():
        raise ValueError(f"{field}={path!r} stopped before it began")
    names, file = (*_FACTS, *_MORE), folder / workdir.PARTITION
    facts = checkpoint.read_npz(file, workdir.AGAIN, names, need=_FACTS)
    try:
        algorithm, restored = _restore(config, folder, facts)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{error}{_made_by(record)}") from error
    if restored is None:
        raise ValueError(f"{field}={path!r} has no checkpoint yet")
    pixels = record.get("data", {}).get("pixels")
    return Run(config, algorithm, facts, restored, folder, pixels)


_NOVEL = ("novel", "novel_train", "novel_held_out")
# Not who has which sample: of a million participants that is much.
_MORE = (
    *("num_trainers", "vocabulary", "shift", "shift_names", "sample_dtype"),
    *("source_prior", "unassigned"),
    *(f"{name}_{what}" for name in _NOVEL for what in ("rows", "size")),
)
_FACTS = ("sample_shape", "label_names", "participating", "counts", "mean", "std")


def _restore(config: ml_collections.ConfigDict, folder: Path, facts: Any):
    """Returns a run's method and its newest intact checkpoint, None without any."""
    shape = tuple(int(n) for n in facts["sample_shape"])
    tokens = int(facts.get("vocabulary", 0))
    model = build.make_model(config, shape, len(facts["label_names"]), tokens)
    algorithm = build.make_algorithm(config, model)
    # One client holds all training samples in centralised training.
    num_trainers = int(facts.get("num_trainers", config.data.num_clients))
    members: families.Families | int = num_trainers
    if isinstance(model, dict):
        members = families.families(blocks(model, num_trainers))
    template = schedule.abstract_carry(algorithm, members)
    return algorithm, checkpoint.restore(folder / workdir.CHECKPOINTS, template)


def _made_by(record: dict[str, Any]) -> str:
    """Returns words on the version of a run, if it is not this one; else nothing."""
    commit, now = record.get("commit"), origin.commit()
    if commit == now:
        return ""
    return (
        f" (the run was made by an older or another version of hyperjax, commit "
        f"{commit}; this one is {now})"
    )


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


def lent(
    path: str, take: Sequence[str], newcomers: bool, experiment: Experiment
) -> dict[str, Any]:
    """Returns by path what the run in a folder lends to another one.

    Args:
      path: the folder, `start.run`; "" lends nothing.
      take: see `common_paths`.
      newcomers: the other one trains the run's unseen clients.
      experiment: the other one.

    Raises:
      ValueError: see `load`, `check_newcomers` and `parts_to_take`.
    """
    if not path:
        return {}
    run = load(path, "start.run")
    if newcomers:
        check_newcomers(run, experiment.federation)
    server = jax.eval_shape(experiment.algorithm.server.init, jax.random.key(0))
    return parts_to_take(run, take, server)


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
