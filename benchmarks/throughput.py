r"""Samples a second of a method on a fixed workload, as a run trains them.

python -m benchmarks.throughput --preset=A32q --methods=fedavg,scaffold,hyperfedzero

Presets are those of `benchmarks.peers`: A is a LeNet (6 and 16 channels), B an MLP
(784-200-200-10), C a ResNet-20; the number is the batch size, "q" means one local epoch
instead of four. Unlike there, where a side is one process on one core, the engine has
every core or accelerator (--devices) and the plan that it chooses itself
(--mapper=auto), and runs all timed rounds in one call; nothing is evaluated. Every
method is measured in a process of its own; one that refuses the network is left out,
and the exit code is 1.

GFLOP/s are of the products and convolutions alone, counted in the traced program
(`engine.flops`), so that they can be held against what the machine multiplies:

  share     of the GFLOP/s of one product of two 2048x2048 matrices, float32, in the
            same process
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks import round_time
from benchmarks.peers.workload import LEARNING_RATE, PRESETS, Workload, images
from hyperjax import registry
from hyperjax.data.federation import Federation, federate
from hyperjax.engine import sharding
from hyperjax.errors import check_at_least, check_choice
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table
from hyperjax.runs import loop
from hyperjax.runs.experiment import Settings
from hyperjax.runs.recipe import Recipe
from hyperjax.training import Local, Phase

HELD_OUT = 0.2  # of what a client has, beside what it trains on
NUM_NOVEL = 1
SIDE = 2048
COLUMNS = (
    ("preset", "preset"),
    ("method", "method"),
    ("mapper", "mapper"),
    ("devices", "devices"),
    ("samples_per_second", "samples / s"),
    ("seconds", "s / round"),
    ("gflops_per_second", "GFLOP/s"),
    ("share", "share"),
    ("compile_seconds", "compile s"),
    ("peak_mb", "peak MB"),
)


def federation(work: Workload) -> Federation:
    """Returns clients who train on so many samples, and one who never trains."""
    num = work.clients + NUM_NOVEL
    whole = round(work.samples / (1 - HELD_OUT))
    x, y = images(work._replace(clients=num, samples=whole))
    return federate(
        x.reshape(-1, *work.shape),
        y.ravel(),
        client_ids=np.repeat(np.arange(num), whole),
        num_novel=NUM_NOVEL,
        test_fraction=0.0,
        eval_fraction=HELD_OUT,
    )


def measure(preset: str, method: str, mapper: str, devices: int) -> dict[str, Any]:
    """Times a method; sets the devices of this process."""
    cli.use_cores(devices)
    work = PRESETS[preset]
    network = round_time.make_network(
        {"resnet": "resnet20"}.get(work.network, work.network), True
    )
    experiment = Recipe(
        method,
        network,
        federation(work),
        Local(
            optax.sgd(LEARNING_RATE), work.batch, phases=(Phase(epochs=work.epochs),)
        ),
        None,
        "",
        Settings(rounds=2 * work.rounds, every=work.rounds),
        {},
        dict(
            sampler="uniform",
            cohort_size=work.cohort,
            mapper=mapper,
            devices=devices,
            weights=registry.weights(method, {}),
        ),
    ).build()
    # The first call compiles, the second is timed.
    _, call = loop.rounds(experiment, loop.start(experiment), donate=True)
    counted = experiment.simulator.program.work
    steps = float(np.sum(call.info["steps"]))
    flops = counted.round * work.rounds + counted.step * steps if counted else 0.0
    best = peak()
    return {
        "preset": preset,
        "method": method,
        "mapper": str(experiment.plan["mapper"]),
        "devices": experiment.plan["devices"],
        "samples_per_second": call.samples / call.seconds,
        "seconds": call.seconds / work.rounds,
        "gflops_per_second": flops / call.seconds / 1e9,
        "peak_gflops_per_second": best,
        "share": flops / call.seconds / 1e9 / best,
        "compile_seconds": experiment.simulator.program.seconds,
        "peak_mb": round_time.peak_mb(),
        "workload": work._asdict(),
        **round_time.about(),
    }


def peak() -> float:
    """GFLOP/s of one large product on all of this process's first device."""
    product = jax.jit(jnp.dot)
    a = jnp.ones((SIDE, SIDE), jnp.float32)
    times = [
        round_time.seconds(lambda: product(a, a).block_until_ready())[0]
        for _ in range(6)
    ]
    return 2 * SIDE**3 / min(times[1:]) / 1e9


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a record as text."""
    digits = dict(samples_per_second=",.0f", seconds=".3f", gflops_per_second=".1f")
    digits |= dict(share=".0%", compile_seconds=".1f", peak_mb=",.0f")
    return record | {name: format(record[name], form) for name, form in digits.items()}


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_list("preset", ["A32q"], "What is trained; several make more rows.")
    flags.DEFINE_list("methods", ["fedavg"], "Who trains it.")
    flags.DEFINE_string("mapper", "auto", "How clients are mapped.")
    flags.DEFINE_integer("devices", 0, "Devices to use; 0: every core or device.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    check_at_least(0, devices=f.devices)
    check_choice("--mapper", f.mapper, sharding.MAPPERS)
    for preset in f.preset:
        check_choice("--preset", preset, PRESETS)
    for method in f.methods:
        registry.find(method, "--methods")
    records: list[dict[str, Any]] = []
    refused: list[str] = []
    for preset in f.preset:
        for method in f.methods:
            row = f"{preset}, {method}"
            print(row, file=sys.stderr, flush=True)
            given = preset, method, f.mapper, f.devices
            try:
                records.append(round_time.fresh(measure, *given))
            except ValueError as error:  # a network that is none for the method
                refused.append(f"{row} is left out: {error}")
            round_time.write(f.json, records)  # stays if a later row fails
    for line in refused:
        print(line, file=sys.stderr)
    if not records:
        return 1
    first = records[0]
    where = f"{first['backend']} ({first['device']}), {first['machine']['cores']} cores"
    table = text_table([shown(record) for record in records], COLUMNS)
    print(f"JAX {first['jax']} on {where}\n\n{table}")
    return 1 if refused else 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
