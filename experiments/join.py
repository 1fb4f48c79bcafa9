"""Lets the unseen clients of a finished run join it: only what is new is trained.

python -m experiments.join --run=runs/x --workdir=runs/joined [--families=mh_mlp,...] \
    [--rounds=50]

The run's unseen clients (`data.num_novel`) take the place of its participants. What the
server learned, its hypernetwork, is taken over and does not move; their embeddings are
drawn anew and trained by the same protocol, and with `--families` heads for sizes of
network that the run had not met (arXiv:2103.04628, arXiv:2507.22330). pACC
of the new run is the newcomers' accuracy; it is a run like any other: it can be
stopped, continued, and reported.
"""

import inspect
import re

import jax
import ml_collections
from absl import flags

from experiments import build, cli, factories, saved, train
from hyperjax.algorithms import pfedhn

PHI = "phi/"  # where methods with a hypernetwork on the server keep it


def joining(
    path: str, families: list[str] | None = None, rounds: int | None = None
) -> ml_collections.ConfigDict:
    """Returns the config of the newcomers' run.

    Args:
      path: folder of the run to join.
      families: networks of the newcomers, in equal blocks; None for the run's own.
      rounds: None for as many as the run had.

    Raises:
      ValueError: no such run, it has no unseen clients, or its method keeps no
        hypernetwork on the server.
    """
    run = saved.load(path, "run")
    config = run.config
    name = config.method.name
    able = [
        method
        for method in factories.method_names()
        if "freeze" in inspect.signature(factories.find_method(method)).parameters
    ]
    if name not in able:
        raise ValueError(
            f"run={path!r} was trained by {name!r}, which has no hypernetwork for "
            f"newcomers to be embedded in; accepted: {', '.join(able)}. Other methods "
            "report unseen clients as zACC, and with evaluation.finetune_epochs"
        )
    if not config.data.num_novel:
        raise ValueError(f"run={path!r} has no unseen clients: data.num_novel is 0")
    config.data.newcomers = True
    config.start = dict(run=path, take=(f"{PHI}.*",))
    if config.method.get("embedding_size") == 0:  # as the run's N had it
        config.method.embedding_size = pfedhn.published_size(config.data.num_clients)
    if families:
        config.families = tuple(families)
    if rounds is not None:
        config.rounds = rounds
    build.check(config)
    shape = tuple(int(n) for n in run.facts["sample_shape"])
    model = build.make_model(config, shape, len(run.facts["label_names"]))
    algorithm = build.make_algorithm(config, model)
    server = jax.eval_shape(algorithm.server.init, jax.random.key(0))
    known = saved.common_paths(run.restored.carry.server, server, (f"{PHI}.*",))
    # Heads that the run has not met are not among these, and are trained.
    config.method.freeze = tuple(re.escape(name.removeprefix(PHI)) for name in known)
    return config


def main() -> int:
    """Trains the newcomers; returns the exit code."""
    run, path = str(_RUN.value), str(_WORKDIR.value)
    cli.use_cores(saved.load_config(run, "run").engine.devices)
    return train.main(joining(run, _FAMILIES.value, _ROUNDS.value), path)


if __name__ == "__main__":
    _RUN = flags.DEFINE_string("run", None, "Folder of the run to join.")
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the newcomers' run.")
    _FAMILIES = flags.DEFINE_list("families", [], "Networks of the newcomers.")
    _ROUNDS = flags.DEFINE_integer("rounds", None, "Rounds; default: the run's own.")
    cli.run(main, needs=("run", "workdir"))
