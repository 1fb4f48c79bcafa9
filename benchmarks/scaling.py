r"""A round of a cohort against the number of clients outside it.

python -m benchmarks.scaling --clients=1000,10000,100000,1000000 --json=scaling.json

Methods that keep state on every client (SCAFFOLD, Ditto, HyperFedNet) run cohorts of
100 out of more and more clients, with the host store, on a small network and images of
8x8: little work, so that what grows with the population shows. All clients have 8
samples, drawn with replacement from a pool that they share.

Columns: seconds of a round, median of those after the first; the seconds of building
and initialising the run; the peak of the process, in MB of 2^20 bytes, and what of it
are the tables of who has which sample, 40 bytes a client; with --checkpoint the seconds
and MB of checkpoints after the last rounds, medians of --rounds, one after each round:
what is written are blocks of clients of whom some took part. Each row is measured in a
process of its own.
"""

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import flags

from benchmarks import round_time
from hyperjax import models, registry, training, tree
from hyperjax.data import clients
from hyperjax.engine import checkpoint, comm, schedule
from hyperjax.errors import check_at_least, check_choice
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table

POOL_SIZE, SAMPLES, SHAPE, NUM_CLASSES = 1000, 8, (8, 8, 1), 10
# HyperFedNet generates convolutions.
OPTIONS: dict[str, dict[str, Any]] = {
    "scaffold": {},
    "ditto": {},
    "hyperfednet": dict(embedding_size=4),
}
COLUMNS = (
    ("method", "method"),
    ("clients", "clients"),
    ("milliseconds", "ms / round"),
    ("start_seconds", "start, s"),
    ("peak_mb", "peak, MB"),
    ("tables_mb", "tables, MB"),
    ("state_mb", "client state, all, MB"),
    ("checkpoint_seconds", "checkpoint, s"),
    ("checkpoint_mb", "checkpoint, MB"),
)


def make_model(method: str):
    """Returns a small network of the kind that a method takes."""
    network: Any = models.MLP(NUM_CLASSES, hidden=(4,))
    if method == "hyperfednet":
        network = models.ZOO["resnet8"](NUM_CLASSES, width=4)
    return models.from_linen(network, SHAPE, NUM_CLASSES)


def measure(
    method: str, num_clients: int, cohort: int, rounds: int, save: bool
) -> dict[str, Any]:
    """Times rounds and counts memory; for a process of its own."""
    cli.use_cores(1)
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (POOL_SIZE, *SHAPE), np.uint8)
    y = generator.integers(0, NUM_CLASSES, POOL_SIZE, np.int32)
    rows = generator.integers(0, POOL_SIZE, (num_clients, SAMPLES), np.int32)
    sizes = np.full(num_clients, SAMPLES, np.int32)
    began = time.perf_counter()
    local = training.Local(optimizer=optax.sgd(0.01), batch_size=SAMPLES)
    factory = registry.find(method)
    alg = factory(make_model(method), local=local, **OPTIONS[method])
    sim = schedule.simulator(
        alg,
        clients.Table(rows, sizes),
        clients.make_pool(x, y, np.arange(POOL_SIZE)),
        weight=np.ones(num_clients, np.float32),
        cohort_size=cohort,
        sampler="uniform",
        store="host",
    )
    carry = sim.init(0)
    start = time.perf_counter() - began
    seconds = []
    for t in range(rounds + 1):
        began = time.perf_counter()
        carry, info = sim.run(0, carry, t, 1, donate=True)
        jax.block_until_ready((carry, info))
        seconds.append(time.perf_counter() - began)
    peak = round_time.peak_mb()
    return {
        **(saved(sim, carry, rounds + 1, rounds) if save else {}),
        "method": method,
        "clients": num_clients,
        "milliseconds": 1000 * float(np.median(seconds[1:])),
        "milliseconds_min": 1000 * min(seconds[1:]),
        "start_seconds": start,
        "peak_mb": peak,
        "tables_mb": (rows.nbytes + sizes.nbytes + 4 * num_clients) / 2**20,
        "state_mb": num_clients * tree.num_bytes(comm.describe(alg).client) / 2**20,
        "cohort": cohort,
        **round_time.about(),
    }


def saved(
    sim: schedule.Simulator, carry: schedule.Carry, start: int, rounds: int
) -> dict[str, float]:
    """Times checkpoints in a temporary folder, and counts what they write."""
    seconds, written = [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Saver(folder)
        saver.save(start, carry)
        for t in range(start, start + rounds):
            carry, info = sim.run(0, carry, t, 1, donate=True)
            jax.block_until_ready((carry, info))
            before = {path.name for path in _files(folder)}
            changed = functools.partial(sim.participants, 0, t, 1)
            began = time.perf_counter()
            saver.save(t + 1, carry, changed)
            seconds.append(time.perf_counter() - began)
            # Blocks have names of their own, all else the round in its path.
            new = [
                path
                for path in _files(folder)
                if path.name not in before or f"{t + 1:08d}" in str(path)
            ]
            written.append(sum(path.stat().st_size for path in new) / 2**20)
    return {
        "checkpoint_seconds": float(np.median(seconds)),
        "checkpoint_seconds_min": min(seconds),
        "checkpoint_mb": float(np.median(written)),
    }


def _files(folder: str) -> list[Path]:
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_list("methods", list(OPTIONS), "Methods with state on the clients.")
    counts = ["1000", "10000", "100000", "1000000"]
    flags.DEFINE_list("clients", counts, "Numbers of clients.")
    flags.DEFINE_integer("cohort", 100, "Clients in a round.")
    flags.DEFINE_integer("rounds", 10, "Timed rounds, after one that compiles.")
    flags.DEFINE_bool("checkpoint", False, "Time checkpoints after the rounds.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    check_at_least(1, cohort=f.cohort, rounds=f.rounds)
    records: list[dict[str, Any]] = []
    for method in f.methods:
        check_choice("--methods", method, OPTIONS)
        for count in sorted(map(int, f.clients)):
            sizes = count, f.cohort, f.rounds, f.checkpoint
            record = round_time.fresh(measure, method, *sizes)
            records.append(record)
            round_time.write(f.json, records)
    print(text_table(records, COLUMNS))
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
