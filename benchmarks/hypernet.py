r"""A client's step of the hypernetwork methods, beside FedAvg and plain PyTorch.

python -m benchmarks.hypernet --torch=PYTHON --json=hypernet.json

Local training as a client has it, an epoch of --steps batches: HyperFedZero emits an
MLP, HyperFedNet the kernels of a ResNet-8, pFedHN's client trains the network that it
is sent, as published (momentum, decay and clipping). Milliseconds are CPU time of a
step, on one core, of the fastest epoch, which other programs change least.

  FedAvg   the same network trained as it is, by the same optimizer
  PyTorch  the same step written plainly, by the interpreter --torch names

The exit code is 0 if every ratio of PyTorch's time to ours meets its bar, 1 if one does
not. Without --torch nothing is judged. Two sweeps follow, of HyperFedZero's step:
chunks of other sizes, all at once and 64 at a time, and inputs that share a network.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks import round_time
from benchmarks.peers.workload import CLASSES, LEARNING_RATE, keep_to_one_core
from hyperjax import compiling, models, native, registry, tree
from hyperjax.data import clients
from hyperjax.errors import check_at_least, check_choice
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table
from hyperjax.training import Local, Phase, no_adjustment, trainer
from hyperjax.types import ClientData


class Case(NamedTuple):
    """What is trained, and how."""

    network: str  # in the zoo
    shape: tuple[int, int, int]
    batch: int
    bar: float  # the least ratio of PyTorch's time to ours
    options: dict[str, Any]  # of the method
    momentum: float = 0.0
    decay: float = 0.0
    clip: float | None = None


CASES = {
    "hyperfedzero": Case("mlp", (28, 28, 1), 128, 1.5, {"hidden": (220, 220)}),
    "hyperfednet": Case("resnet8", (28, 28, 1), 32, 1.2, {}),
    "pfedhn": Case(
        "pfedhn_cnn", (32, 32, 3), 64, 1.1, {"num_clients": 100}, 0.9, 5e-5, 50.0
    ),
}
SWEPT = "hyperfedzero"
CHUNK_SIZES, CHUNK_BATCHES = (144, 576, 2304), (0, 64)
GRANULARITIES = ("batch", "client", "sample")
COLUMNS = (
    ("method", "method"),
    ("parameters", "trained"),
    ("milliseconds", "ms / step"),
    ("fedavg", "FedAvg"),
    ("torch", "PyTorch"),
    ("over_fedavg", "/ FedAvg"),
    ("ratio", "PyTorch / ours"),
    ("bar", "bar"),
)
SWEEP = (
    ("chunk_size", "chunk size"),
    ("chunk_batch_size", "at a time"),
    ("embed_granularity", "share a network"),
    ("milliseconds", "ms / step"),
    ("compile_seconds", "compile s"),
)


def measure(
    name: str, method: str, options: dict[str, Any], steps: int, repeats: int
) -> dict[str, Any]:
    """Times epochs of a method on the network of a case; for a process of its own."""
    keep_to_one_core()
    cli.use_cores(1)
    case = CASES[name]
    optimizer = optax.sgd(LEARNING_RATE, case.momentum or None)
    if case.decay:
        optimizer = optax.chain(optax.add_decayed_weights(case.decay), optimizer)
    local = Local(optimizer, case.batch, (Phase(epochs=1),), clip_norm=case.clip)
    model = models.from_linen(models.ZOO[case.network](CLASSES), case.shape, CLASSES)
    trained = registry.find(method)(model, local=local, **options).client.model
    samples = case.batch * steps
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (samples, *case.shape), np.uint8)
    y = random.integers(0, CLASSES, samples, np.int32)
    pool = clients.make_pool(x, y, np.arange(samples))
    data = ClientData(jnp.arange(samples, dtype=jnp.int32), jnp.int32(samples), pool)
    train = trainer(trained, local)

    def epoch(key, variables, data):
        return train(key, variables, data, jnp.int32(0), no_adjustment)

    variables = compiling.once(trained.init)(jax.random.key(0))
    given = jax.random.key(1), variables, data
    compiled: list[Any] = []
    traced = jax.jit(epoch, **compiling.options()).trace(*given)
    compiling_seconds = round_time.seconds(
        lambda: compiled.append(traced.lower().compile())
    )
    times = [
        round_time.seconds(lambda: jax.block_until_ready(compiled[0](*given)))[1]
        for _ in range(repeats + 1)
    ]
    return {
        "method": method,
        "milliseconds": 1000 * min(times[1:]) / steps,
        "parameters": tree.count(variables["params"]),
        "compile_seconds": float(compiling_seconds[1]),
        "onednn": native.version(),
        **round_time.about(),
    }


def of_torch(python: str, name: str, steps: int, repeats: int) -> dict[str, Any]:
    """Times PyTorch's step in its own interpreter."""
    script = Path(__file__).parent / "peers" / "hypernet_torch.py"
    given = CASES[name]._asdict() | dict(method=name, steps=steps, repeats=repeats)
    command = [python, str(script), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"torch, {name}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(name: str, steps: int, repeats: int, python: str | None) -> dict[str, Any]:
    """Returns a method's record, with the times of the others."""
    case = CASES[name]
    found = round_time.fresh(measure, name, name, case.options, steps, repeats)
    alone = round_time.fresh(measure, name, "fedavg", {}, steps, repeats)
    found["fedavg"] = alone["milliseconds"]
    found["over_fedavg"] = found["milliseconds"] / alone["milliseconds"]
    if python:
        theirs = of_torch(python, name, steps, repeats)
        if theirs["parameters"] != found["parameters"]:
            raise ValueError(
                f"{name}: {theirs['parameters']:,} parameters in PyTorch, ours are "
                f"{found['parameters']:,}"
            )
        found |= {
            "torch": theirs["milliseconds"],
            "torch_version": theirs["version"],
            "ratio": theirs["milliseconds"] / found["milliseconds"],
            "bar": case.bar,
        }
    return found


def sweeps() -> list[dict[str, Any]]:
    """Returns options of HyperFedZero, the default first."""
    chunks = [
        {"chunk_size": size, "chunk_batch_size": batch}
        for size in CHUNK_SIZES
        for batch in CHUNK_BATCHES
    ]
    shared = [{"embed_granularity": name} for name in GRANULARITIES]
    return [*chunks, *shared]


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a record as text."""
    digits = dict.fromkeys(("milliseconds", "fedavg", "torch"), ".2f")
    digits |= {"over_fedavg": ".2f", "ratio": ".2f", "compile_seconds": ".1f"}
    digits["parameters"] = ","
    texts = {k: format(record[k], f) for k, f in digits.items() if k in record}
    return {name: "" for name, _ in (*COLUMNS, *SWEEP)} | record | texts


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_list("methods", list(CASES), "Methods to measure.")
    flags.DEFINE_integer("steps", 20, "Batches of an epoch.")
    flags.DEFINE_integer("repeats", 5, "Epochs, of which the fastest counts.")
    flags.DEFINE_bool("sweeps", True, "Sweep chunks and granularity too.")
    cli.define_path("torch", None, "A Python with PyTorch.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    check_at_least(1, steps=f.steps, repeats=f.repeats)
    for name in f.methods:
        check_choice("--methods", name, CASES)
    records: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        round_time.write(f.json, records)  # what is measured stays if another fails
        print(f"{record['method']}: measured", file=sys.stderr, flush=True)

    for name in f.methods:
        keep(compare(name, f.steps, f.repeats, f.torch))
    compared = len(records)
    for options in sweeps() if f.sweeps else ():
        of = CASES[SWEPT].options | options
        keep(round_time.fresh(measure, SWEPT, SWEPT, of, f.steps, f.repeats) | options)
    lines = [shown(record) for record in records]
    print(text_table(lines[:compared], COLUMNS))
    if lines[compared:]:
        print(f"\n{SWEPT}\n\n{text_table(lines[compared:], SWEEP)}")
    missed = [r for r in records if r.get("ratio", 0) < r.get("bar", 0)]
    for r in missed:
        print(f"{r['method']}: {r['ratio']:.2f} of PyTorch, bar {r['bar']}: missed")
    return 1 if missed else 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
