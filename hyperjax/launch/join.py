r"""Lets the unseen clients of a run join it: only what is new is trained.

python -m experiments.join --run=runs/x --workdir=runs/joined [--families=mh_mlp,...] \
    [--rounds=50] [--data_dir=...]

The run's unseen clients (`data.num_novel`) take the place of its participants. What the
server had learned by the newest checkpoint, its hypernetwork, is taken over and does
not move; their embeddings are drawn anew and trained by the same protocol, and with
`--families` (MH-pFedHN) heads for sizes of network that the run had not met
(arXiv:2103.04628, arXiv:2507.22330). They train on what they do not hold out, with
nothing set aside for validation. pACC of the new run is the newcomers' accuracy, to be
compared with `zacc_ft0` of the old one. It is a run like any other: it can be stopped,
continued, and reported, and does not need the old one after its first checkpoint.
"""

import re
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags

from hyperjax import registry
from hyperjax.algorithms.pfedhn import published_size
from hyperjax.launch import build, cli, fields, saved, train, workdir

PHI = "phi/"  # where methods with a hypernetwork on the server keep it
NEW_SEED = 1_000_003  # what newcomers' seeds are apart from the run's


def joining(
    path: str, families: list[str] | None = None, rounds: int | None = None
) -> ml_collections.ConfigDict:
    """Returns the config of the newcomers' run.

    Args:
      path: folder of the run to join.
      families: networks of the newcomers, in equal blocks; None for the run's own.
      rounds: None for as many as the run had.

    Raises:
      ValueError: no such run, it has no unseen clients, its method keeps no
        hypernetwork on the server, or `families` do not go with it.
    """
    run = saved.load(path, "run")
    config, method = run.config, run.config.method.name
    if not registry.traits(method).joins:
        able = [name for name in registry.methods() if registry.traits(name).joins]
        raise ValueError(
            f"run={path!r} was trained by {method!r}, whose server has no hypernetwork "
            f"that newcomers can be embedded in; accepted: {', '.join(able)}. Other "
            "methods report unseen clients as zACC, and with evaluation.finetune_epochs"
        )
    if config.data.newcomers:
        raise ValueError(f"run={path!r} is itself one of newcomers: nobody is left")
    if not config.data.num_novel:
        raise ValueError(f"run={path!r} has no unseen clients: data.num_novel is 0")
    parts = "share_heads", "share_extractor"
    if families and not all(config.method.get(part) for part in parts):
        # Parts of a family's own go by its place and name: others would begin anew.
        now = ", ".join(f"{p}={config.method[p]}" for p in parts if p in config.method)
        raise ValueError(
            f"families={families} with {method!r}{now and f', {now}'}: other networks "
            "join where clients share the extractor, and heads by size, in mh_pfedhn "
            "with share_heads=True and share_extractor=True; without --families "
            "newcomers have the run's own"
        )
    # The same federation, but draws of their own: client 0 is another one now.
    config.data.seed = config.seed if config.data.seed < 0 else config.data.seed
    config.seed = (config.seed + NEW_SEED) % fields.SEEDS
    config.data.newcomers = True
    config.server.cohort_size = min(config.server.cohort_size, config.data.num_novel)
    config.start = dict(run=path, take=(f"{PHI}.*",))
    if method == "pfedhn" and not config.method.get("embedding_size"):
        # As the run's N had it.
        config.method.embedding_size = published_size(config.data.num_clients)
    if families:
        config.families = tuple(families)
    if rounds is not None:
        config.rounds = rounds
    build.check(config)
    shape = tuple(int(n) for n in run.facts["sample_shape"])
    tokens = int(run.facts.get("vocabulary", 0))
    model = build.make_model(config, shape, len(run.facts["label_names"]), tokens)
    algorithm = build.make_algorithm(config, model)
    server = jax.eval_shape(algorithm.server.init, jax.random.key(0))
    known = saved.common_paths(run.restored.carry.server, server, config.start.take)
    # Heads that the run has not met are not among these, and are trained.
    config.method.freeze = tuple(re.escape(part.removeprefix(PHI)) for part in known)
    return config


def continued(folder: str, families: list[str], rounds: int | None) -> Any:
    """Returns the config of a newcomers' run that has begun; None if none has."""
    if not (Path(folder).expanduser() / workdir.CONFIG).exists():
        return None
    config = saved.load_config(folder, "workdir")
    # What is asked for otherwise than it was begun is refused by `train`.
    if families:
        config.families = tuple(families)
    if rounds is not None:
        config.rounds = rounds
    return config


def _check_begun(folder: str, config: ml_collections.ConfigDict, run: str) -> None:
    """Refuses a folder with a run that is none of newcomers to this run."""
    if not config.data.newcomers:
        raise ValueError(
            f"workdir={folder!r} holds a run of other clients than newcomers; give a "
            "new folder"
        )
    # What was joined may have gone since.
    there = [Path(path).expanduser().resolve() for path in (run, config.start.run)]
    if there[0] != there[1] and all((path / workdir.CONFIG).exists() for path in there):
        raise ValueError(
            f"workdir={folder!r} holds newcomers to run={config.start.run!r}, not to "
            f"{run!r}; give a new folder or that run"
        )


def main(
    run: str,
    folder: str,
    families: list[str],
    rounds: int | None,
    data_dir: str | None,
) -> int:
    """Trains the newcomers; returns the exit code."""
    config = continued(folder, families, rounds)
    if config is not None:
        _check_begun(folder, config, run)
    else:
        cli.use_cores(saved.load_config(run, "run").engine.devices)
        config = joining(run, families, rounds)
    if data_dir:
        config.data.data_dir = data_dir
    return train.main(config, folder)


def launch() -> None:
    """Runs the command with what the command line says."""
    run = cli.define_path("run", None, "Folder of the run to join.")
    workdir = cli.define_path("workdir", None, "Folder of the newcomers' run.")
    families = flags.DEFINE_list("families", [], "Networks of the newcomers.")
    rounds = flags.DEFINE_integer("rounds", None, "Rounds; default: the run's own.")
    data_dir = cli.define_path("data_dir", None, "Default: the run's own.")
    cli.run(
        lambda: main(
            str(run.value),
            str(workdir.value),
            families.value,
            rounds.value,
            data_dir.value,
        ),
        needs=("run", "workdir"),
        together=True,
    )
