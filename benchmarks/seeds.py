"""Seeds of one experiment with one program, against one of them as a run of its own.

python -m benchmarks.seeds --seeds=8 --json=benchmarks/results/seeds.json

The experiment is a zero-shot one on the digits with all its evaluations. "together" is
what a sweep does: programs are compiled for the first seed and serve the others, which
take turns. Both are measured in processes of their own, without programs from earlier
ones. Seconds are those of building (data, method, abstract evaluation), of compilation
and of the rest; *times* is the whole over that of the run alone.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import flags

from benchmarks import round_time
from configs import zero_shot
from hyperjax import tree
from hyperjax.errors import check_at_least
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table
from hyperjax.runs import loop
from hyperjax.runs.experiment import Experiment
from hyperjax.sweeps import group

COLUMNS = (
    ("how", "how"),
    ("runs", "runs"),
    ("build_seconds", "build s"),
    ("compile_seconds", "compile s"),
    ("run_seconds", "run s"),
    ("seconds", "s"),
    ("times", "times"),
)


def run(experiment: Experiment) -> str:
    """Trains and evaluates as `train` does; returns the digest of the last state."""
    settings, state = experiment.settings, loop.start(experiment)
    for call in loop.rounds(experiment, state, donate=True):
        state = call.state
        if loop.is_due(settings, state.round):
            experiment.evaluator.evaluate(settings.seed, state.carry, state.round)
    return tree.sha256(jax.device_get(state.carry))


def measure(how: str, configs: Sequence[ml_collections.ConfigDict]) -> dict[str, Any]:
    """Returns the times of building and running the experiments of a group."""
    began = time.perf_counter()
    experiments = group.experiments(configs)
    building = time.perf_counter() - began
    digests = [run(experiment) for experiment in experiments]
    whole = time.perf_counter() - began
    parts = experiments[0].simulator, experiments[0].evaluator
    compiling = sum(part.program.seconds for part in parts)
    return dict(
        how=how,
        method=configs[0].method.name,
        rounds=configs[0].rounds,
        runs=len(digests),
        build_seconds=building,
        compile_seconds=compiling,
        run_seconds=whole - building - compiling,
        seconds=whole,
        state_sha256=digests,
        **round_time.about(),
    )


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_string("method", "hyperfedzero", "Of configs/zero_shot.py.")
    flags.DEFINE_integer("seeds", 8, "Runs together.")
    flags.DEFINE_integer("rounds", 0, "Rounds; 0: those of the config.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    check_at_least(1, seeds=f.seeds)
    configs = []
    for seed in range(f.seeds):
        config = zero_shot.get_config(f"{f.method},data=digits")
        config.seed, config.rounds = seed, f.rounds or config.rounds
        configs.append(config)
    alone = round_time.fresh(measure, "alone", configs[:1])
    together = round_time.fresh(measure, "together", configs)
    records = [alone, together]
    for record in records:
        record["times"] = record["seconds"] / alone["seconds"]
    print(text_table(records, COLUMNS))
    round_time.write(f.json, records)
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
