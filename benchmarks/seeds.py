"""Seeds of one experiment with one program, against one of them as a run of its own.

python -m benchmarks.seeds --seeds=8 --json=benchmarks/results/seeds.json

The experiment is a zero-shot one on the digits with all its evaluations. In "sequence"
programs are compiled for the first seed and serve the others, which take turns; with
"map" and "vmap" all seeds make their rounds in one call (`sweep --plan`), over as many
devices as there are. Each is measured in a process of its own, without programs from
earlier ones. Seconds are those of building (data, method, abstract evaluation), of
compilation and of the rest; *times* is the whole over that of the run alone.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import flags

from benchmarks import round_time
from configs import zero_shot
from hyperjax import rng, tree
from hyperjax.engine import together
from hyperjax.errors import check_at_least, check_choice
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table
from hyperjax.runs import loop
from hyperjax.runs.experiment import Experiment
from hyperjax.sweeps import group

PLANS = ("sequence", *together.PLANS)
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


def side_by_side(experiments: Sequence[Experiment], plan: str) -> list[str]:
    """`run` of all, whose rounds are one program's; returns the digests."""
    mesh = together.point_mesh(len(experiments))
    side = together.Together([e.simulator for e in experiments], plan, mesh)
    settings = experiments[0].settings
    roots = [rng.root_key(e.settings.seed) for e in experiments]
    carries = [loop.start(e).carry for e in experiments]
    round = 0
    while round < settings.rounds:
        stop = loop.next_stop(settings, round)
        everybody = range(len(experiments))
        found = side.run(everybody, roots, carries, round, stop - round)
        carries, round = [carry for carry, _ in found], stop
        for one, carry in zip(experiments, carries, strict=True):
            if loop.is_due(settings, round):
                one.evaluator.evaluate(one.settings.seed, carry, round)
    experiments[0].simulator.program.seconds += side.program.seconds
    return [tree.sha256(jax.device_get(carry)) for carry in carries]


def measure(how: str, configs: Sequence[ml_collections.ConfigDict]) -> dict[str, Any]:
    """Returns the times of building and running the experiments of a group."""
    began = time.perf_counter()
    one_device = how in together.PLANS
    if one_device:
        cli.use_cores(0)
    experiments = group.experiments(configs, one_device)
    building = time.perf_counter() - began
    if one_device:
        digests = side_by_side(experiments, how)
    else:
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
    flags.DEFINE_list("plans", list(PLANS), "How they run together.")
    flags.DEFINE_integer("rounds", 0, "Rounds; 0: those of the config.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    check_at_least(1, seeds=f.seeds)
    for how in f.plans:
        check_choice("plans", how, PLANS)
    configs = []
    for seed in range(f.seeds):
        config = zero_shot.get_config(f"{f.method},data=digits")
        config.seed, config.rounds = seed, f.rounds or config.rounds
        configs.append(config)
    alone = round_time.fresh(measure, "alone", configs[:1])
    records = [alone]
    for how in f.plans:
        records.append(round_time.fresh(measure, how, configs))
    for record in records:
        record["times"] = record["seconds"] / alone["seconds"]
    print(text_table(records, COLUMNS))
    round_time.write(f.json, records)
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
