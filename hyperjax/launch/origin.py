"""What a run depends on, as config.json has it; compared when a run goes on.

A config is here as JSON, with every field: what `as_json` makes of a filled one.
"""

import functools
import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging

from hyperjax import native, registry
from hyperjax.engine import checkpoint
from hyperjax.engine.checkpoint import read_json, write_atomically
from hyperjax.engine.compiled import setting
from hyperjax.launch.workdir import (
    AGAIN,
    CHECKPOINTS,
    CLIENTS,
    CONFIG,
    PARTITION,
    REPORT,
    SUMMARY,
)
from hyperjax.protocols import common

PACKAGES = ("hyperjax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
# Of a folder; those of format 1 do not say so. Before 3, checkpoints had no names.
FORMAT = 3

# Fields that do not touch the training, so that a run may go on with others.
_FREE = re.compile(
    r"data\.(data_dir|download)|engine\.devices|evaluation\..*|checkpoint\..*|tensorboard|tracker"
)
# Those among them that a summary depends on: a finished run is summed up anew.
_SUMMED_UP = re.compile(r"rounds|evaluation\.(?!every$).*")

# Settings of JAX that say which random numbers are drawn and how products are rounded.
_SETTINGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_high_dynamic_range_gumbel",
    "jax_default_matmul_precision",
    "jax_enable_x64",
)
# What changes results by rounding only, if at all: told, not refused.
_CIRCUMSTANCES = re.compile(
    r"commit|versions\..*|flags\..*|device|"
    r"plan\.(backend|device|devices|processes|mapper|points_at_once|conv_rule)"
)


def read(workdir: Path) -> dict[str, Any]:
    """Returns config.json; fields that an older version did not have: their defaults.

    Raises:
      ValueError: it is damaged, of a newer version, or not a run's.
      FileNotFoundError: it is not there.
    """
    path = workdir / CONFIG
    record = read_json(
        path, "put a copy back; without it a run can be neither continued nor served"
    )
    if not isinstance(record.get("format", 1), int) or record.get("format", 1) > FORMAT:
        raise ValueError(
            f"{str(path)!r} was written by a newer version of hyperjax, format "
            f"{record['format']}; this version knows formats up to {FORMAT}"
        )
    config = record.get("config")
    method = config.get("method") if isinstance(config, dict) else None
    if not isinstance(method, dict) or "name" not in method:
        raise ValueError(f"{str(path)!r} is not that of a run: it names no method")
    return {**record, "config": _with_defaults(config)}


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config, as JSON, with every field that all configs have."""

    def fill(given, known):
        if not isinstance(known, dict) or not isinstance(given, dict):
            return given
        filled = {k: fill(given[k], v) if k in given else v for k, v in known.items()}
        return {**given, **filled}

    found = fill(config, as_json(common.defaults()))
    # Format 1 had an epoch for default: of two lengths steps counted, and a method's
    # own phases before both.
    name, local = found["method"].get("name"), found["local"]
    own = name in registry.methods() and registry.traits(name).own_length
    if own or local["steps"] is not None or local["epochs"] == 1:
        local["epochs"] = None
    return found


def compare(workdir: Path, config: Mapping[str, Any]) -> None:
    """Refuses to go on with a run that would become another one.

    Raises:
      ValueError: it was made by another config, by an older version, or under other
        settings of JAX.
    """
    record = read(workdir)
    check_format(f"workdir={str(workdir)!r}", record)
    differing = changes(workdir, config)
    refused = {
        field: values
        for field, values in differing.items()
        if not _FREE.fullmatch(field)
    }
    # A run may be made longer, and one that was to be may end earlier after all.
    done = [int(p.name[-8:]) for p in checkpoint.finished(workdir / CHECKPOINTS)]
    if "rounds" in refused and config["rounds"] >= max(done, default=0):
        del refused["rounds"]
    if refused:
        raise ValueError(
            f"workdir={str(workdir)!r} was made by another config; give a new folder "
            f"or the same values. Differing: {_listed(refused, 'given')}"
        )
    check_settings(workdir, record)


def check_format(where: str, record: Mapping[str, Any]) -> None:
    """Refuses a run whose state is laid out as in older versions.

    Raises:
      ValueError: naming `where`; `record` is the content of its config.json.
    """
    if record.get("format", 1) < FORMAT:
        raise ValueError(f"{where} {checkpoint.OLDER}")


def check_settings(workdir: Path, record: Mapping[str, Any]) -> None:
    """Refuses settings of JAX that draw or multiply otherwise than a run's did.

    Raises:
      ValueError: naming the settings; `record` is the content of its config.json.
    """
    other = _differing(record.get("settings", {}), settings(), only_known=True)
    if other:
        hints = ", ".join(f"{k.upper()}={v[0]}" for k, v in other.items())
        raise ValueError(
            f"workdir={str(workdir)!r} was made under other settings of JAX, with "
            "which random numbers and products are others. Differing: "
            f"{_listed(other, 'now')}. Set {hints}, or give a new folder"
        )


def changes(workdir: Path, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the fields of a config that are not what a run was last given."""
    there = read(workdir)["config"]
    return _differing(common.flat(there), common.flat(_with_defaults(config)))


def _differing(
    there: Mapping[str, Any], now: Mapping[str, Any], only_known: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Returns {name: (there, now)}; `only_known`: of what is in both."""
    names = there.keys() & now.keys() if only_known else there.keys() | now.keys()
    absent = "(absent)"
    pairs = {k: (there.get(k, absent), now.get(k, absent)) for k in sorted(names)}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def _listed(differing: Mapping[str, tuple[Any, Any]], now: str) -> str:
    return "; ".join(f"{k}: {a} there, {b} {now}" for k, (a, b) in differing.items())


def result(workdir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the summary of a finished run; None if there is something left to do.

    That is also to write files that are missing, which takes a checkpoint.

    Raises:
      ValueError: the summary is damaged.
    """
    if not (workdir / SUMMARY).exists():
        return None
    summary = read_json(workdir / SUMMARY, AGAIN)
    if not {"method", "dataset", "finished", "state_sha256"} <= summary.keys():
        raise ValueError(f"{str(workdir / SUMMARY)!r} is not that of a run; {AGAIN}")
    asked = [f for f in changes(workdir, config) if _SUMMED_UP.fullmatch(f)]
    if not checkpoint.finished(workdir / CHECKPOINTS):
        if asked:
            raise ValueError(
                f"workdir={str(workdir)!r} is finished and has no checkpoint left, so "
                f"that {', '.join(asked)} can not be changed any more; give the values "
                "it was made with, or a new folder"
            )
        return summary
    return summary if not asked and _whole(workdir) else None


def _whole(workdir: Path) -> bool:
    """Whether the files beside a summary are there and can be read."""
    try:
        read_json(workdir / CLIENTS, AGAIN, list)
    except (OSError, ValueError):
        return False
    return (workdir / PARTITION).exists()


def describe(
    workdir: Path,
    config: Mapping[str, Any],
    plan: dict[str, Any],
    data: dict[str, str],
    round: int = 0,
) -> None:
    """Writes config.json, or brings that of a run which goes on up to date.

    Args:
      workdir: the folder.
      config: as JSON, all fields.
      plan: how the run is computed, see `build.build`.
      data: digests of its data, see `federation.digests`.
      round: of the checkpoint it goes on from. What is no longer as it was is kept
        under "history", and told where it may change results by rounding.

    Raises:
      ValueError: the data are others, or the rounds done would not have been the same
        with as many rounds as there are to be now.
    """
    record = dict(
        format=FORMAT,
        config=config,
        commit=commit(),
        versions={name: version(name) for name in PACKAGES},
        settings=settings(),
        flags=flags(),
        data=data,
        device=plan["device"],
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=plan,
        history=[],
    )
    if (workdir / CONFIG).exists():
        before = read(workdir)
        record["started"] = before.get("started", "")  # when that was
        other = _differing(before.get("data", {}), data, only_known=True)
        if other:
            raise ValueError(
                f"workdir={str(workdir)!r} was made from other data: "
                f"{', '.join(other)} differ from what it was trained on. Give back "
                "the data set, or a new folder"
            )
        _check_marks(workdir, before.get("plan", {}), plan, round)
        there, now = (
            common.flat({k: v for k, v in r.items() if k != "history"})
            for r in (before, record)
        )
        differing = _differing(there, now, only_known=True)
        told = {k: v for k, v in differing.items() if _CIRCUMSTANCES.fullmatch(k)}
        if told:
            logging.warning(
                "%s goes on under other circumstances, which may change results by "
                "rounding: %s.",
                workdir,
                _listed(told, "now"),
            )
        history = before.get("history", [])
        if differing:
            history = [*history, dict(round=round, changed=differing)]
        record["history"] = history
        if config["rounds"] == before["config"]["rounds"] == round:
            # Nothing is trained any more: what the training was done with stays.
            kept = ("commit", "versions", "flags", "device", "plan")
            record |= {k: before[k] for k in kept if k in before}
        if any(map(_SUMMED_UP.fullmatch, changes(workdir, config))):
            # They belong to the run as it was.
            for name in (SUMMARY, REPORT):
                (workdir / name).unlink(missing_ok=True)
    write_atomically(workdir / CONFIG, json.dumps(record, indent=2) + "\n")


def _check_marks(
    workdir: Path, before: Mapping[str, Any], plan: Mapping[str, Any], round: int
) -> None:
    """Refuses a plan under which the rounds done would have been others."""

    def done(plan):
        marks = plan.get("marks", {}).items()
        passed = {field: [r for r in rounds if r < round] for field, rounds in marks}
        return {field: rounds for field, rounds in passed.items() if rounds}

    other = _differing(done(before), done(plan))
    if "marks" in before and other:
        raise ValueError(
            f"workdir={str(workdir)!r} has done {round} rounds that would have been "
            "others with as many rounds in all as are given. Rounds that follow from "
            f"their number: {_listed(other, 'now')}. Give the same rounds, give these "
            "fields as whole numbers of rounds, or a new folder"
        )


def circumstances(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what all processes of a run must have in common, by name."""
    fields = common.flat(config)
    return {
        **{k: v for k, v in fields.items() if k != "data.data_dir"},
        **{name: version(name) for name in PACKAGES},
        **settings(),
        **flags(),
        "commit": commit(),
        "oneDNN": native.version(),
    }


def settings() -> dict[str, Any]:
    """Returns the settings of JAX that a run's bits depend on."""
    return {name: setting(name) for name in _SETTINGS if hasattr(jax.config, name)}


def flags() -> dict[str, Any]:
    """Returns what this process tells the compiler."""
    names = ("jax_disable_jit", "jax_disable_most_optimizations")
    found = {name: setting(name) for name in names}
    return {**found, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns a config as it comes back from JSON (tuples as lists)."""
    return json.loads(json.dumps(config.to_dict()))


def as_tuples(value: Any) -> Any:
    """Undoes what JSON does to tuples."""
    if isinstance(value, dict):
        return {k: as_tuples(v) for k, v in value.items()}
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


@functools.cache  # of what was loaded, whatever is checked out meanwhile
def commit() -> str | None:
    """Returns the commit of the code, "+" if changed since; None without git."""
    here = Path(__file__).parent

    def git(*args):
        return subprocess.run(
            ["git", *args],
            cwd=here,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # not of another repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    """Returns an installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
