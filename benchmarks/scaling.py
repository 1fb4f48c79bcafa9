r"""A round against the clients outside its cohort, and in it, devices and processes.

python -m benchmarks.scaling --clients=1000,10000,100000,1000000 --json=scaling.json
python -m benchmarks.scaling --methods=fedavg,scaffold --clients=1000 \
    --cohorts=10,100,1000 --layouts=1x1,1x2,2x1 --hidden=200,200 --samples=480

Methods that keep state on every client (SCAFFOLD, Ditto, HyperFedNet) run cohorts of
100 out of more and more clients, with the host store, on a small network and images of
8x8: little work, so that what grows with the population shows. All clients have 8
samples, drawn with replacement from a pool that they share. --hidden and --samples give
them more to do, which devices and processes can share: a layout 2x1 is two processes on
this machine with one device each, joined as those of several hosts are.

Columns: seconds of a round, median of those after the first; the seconds of building
and initialising the run; the peak of the process, in MB of 2^20 bytes, and what of it
are the tables of who has which sample, 40 bytes a client; with --checkpoint the seconds
and MB of checkpoints after the last rounds, medians of --rounds, one after each round:
what is written are blocks of clients of whom some took part. Each row is measured in
processes of its own; of several, the peak is that of process 0.
"""

import functools
import itertools
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags

from benchmarks import round_time
from hyperjax import hosts, models, registry, training, tree
from hyperjax.data import clients
from hyperjax.engine import checkpoint, comm, schedule, sharding
from hyperjax.errors import check_at_least, check_choice
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table

POOL_SIZE, BATCH, SHAPE, NUM_CLASSES = 1000, 8, (8, 8, 1), 10
# HyperFedNet generates convolutions.
OPTIONS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "scaffold": {},
    "ditto": {},
    "hyperfednet": dict(embedding_size=4),
}
COLUMNS = (
    ("method", "method"),
    ("clients", "clients"),
    ("cohort", "cohort"),
    ("layout", "processes x devices"),
    ("milliseconds", "ms / round"),
    ("start_seconds", "start, s"),
    ("peak_mb", "peak, MB"),
    ("tables_mb", "tables, MB"),
    ("state_mb", "client state, all, MB"),
    ("checkpoint_seconds", "checkpoint, s"),
    ("checkpoint_mb", "checkpoint, MB"),
)


class Work(NamedTuple):
    """What a row runs."""

    method: str
    clients: int
    cohort: int
    processes: int
    devices: int  # of each process
    hidden: tuple[int, ...]
    samples: int  # of a client
    rounds: int
    save: bool


def make_model(method: str, hidden: tuple[int, ...]):
    """Returns a small network of the kind that a method takes."""
    network: Any = models.MLP(NUM_CLASSES, hidden=hidden)
    if method == "hyperfednet":
        network = models.ZOO["resnet8"](NUM_CLASSES, width=4)
    return models.from_linen(network, SHAPE, NUM_CLASSES)


def measure(work: Work) -> dict[str, Any]:
    """Times rounds and counts memory; in each of the processes of a row."""
    method, num_clients, rounds = work.method, work.clients, work.rounds
    devices = work.processes * work.devices
    cli.use_cores(devices)
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (POOL_SIZE, *SHAPE), np.uint8)
    y = generator.integers(0, NUM_CLASSES, POOL_SIZE, np.int32)
    rows = generator.integers(0, POOL_SIZE, (num_clients, work.samples), np.int32)
    sizes = np.full(num_clients, work.samples, np.int32)
    began = time.perf_counter()
    local = training.Local(optimizer=optax.sgd(0.01), batch_size=BATCH)
    factory = registry.find(method)
    model = make_model(method, work.hidden)
    alg = factory(model, local=local, **OPTIONS[method])
    sim = schedule.simulator(
        alg,
        clients.Table(rows, sizes),
        clients.make_pool(x, y, np.arange(POOL_SIZE)),
        weight=np.ones(num_clients, np.float32),
        cohort_size=work.cohort,
        sampler="uniform",
        store="host",
        mesh=sharding.client_mesh(work.cohort, devices),
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
        **(saved(sim, carry, rounds + 1, rounds) if work.save else {}),
        **work._asdict(),
        "layout": f"{work.processes}x{work.devices}",
        "milliseconds": 1000 * float(np.median(seconds[1:])),
        "milliseconds_min": 1000 * min(seconds[1:]),
        "start_seconds": start,
        "peak_mb": peak,
        "tables_mb": (rows.nbytes + sizes.nbytes + 4 * num_clients) / 2**20,
        "state_mb": num_clients * tree.num_bytes(comm.describe(alg).client) / 2**20,
        **round_time.about(),
    }


def of_processes(work: Work) -> dict[str, Any]:
    """Returns the record of process 0, of as many as the work has."""
    if work.processes == 1:
        return round_time.fresh(measure, work)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(work.processes, mp_context=context) as pool:
        members = [
            pool.submit(_member, coordinator, i, work) for i in range(work.processes)
        ]
        first, *_ = [member.result() for member in members]
        return first


def _member(coordinator: str, index: int, work: Work) -> dict[str, Any]:
    with hosts.joined(coordinator, work.processes, index):
        return measure(work)


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
    own = [name for name in OPTIONS if name != "fedavg"]  # that keep state on clients
    flags.DEFINE_list("methods", own, f"Of {', '.join(OPTIONS)}.")
    counts = ["1000", "10000", "100000", "1000000"]
    flags.DEFINE_list("clients", counts, "Numbers of clients.")
    flags.DEFINE_list("cohorts", ["100"], "Clients in a round.")
    flags.DEFINE_list("layouts", ["1x1"], "Processes x devices of each.")
    flags.DEFINE_list("hidden", ["4"], "Widths of the MLP.")
    flags.DEFINE_integer("samples", BATCH, "Samples of a client.")
    flags.DEFINE_integer("rounds", 10, "Timed rounds, after one that compiles.")
    flags.DEFINE_bool("checkpoint", False, "Time checkpoints after the rounds.")
    cli.define_path("json", None, "File for the records.")


def _whole(name: str, values: Sequence[str]) -> list[int]:
    """Reads whole numbers of 1 and more from a flag."""
    try:
        numbers = [int(value) for value in values]
    except ValueError as error:
        raise ValueError(
            f"--{name}={','.join(values)} must be whole numbers"
        ) from error
    for number in numbers:
        check_at_least(1, **{name: number})
    return numbers


def main() -> int:
    f = flags.FLAGS
    check_at_least(1, rounds=f.rounds, samples=f.samples)
    layouts = [_whole("layouts", layout.split("x")) for layout in f.layouts]
    for method in f.methods:
        check_choice("--methods", method, OPTIONS)
    for layout in layouts:
        if len(layout) != 2:
            raise ValueError(f"--layouts={f.layouts} must be PROCESSESxDEVICES, as 2x1")
    rows = itertools.product(
        f.methods,
        sorted(_whole("clients", f.clients)),
        sorted(_whole("cohorts", f.cohorts)),
        layouts,
    )
    records: list[dict[str, Any]] = []
    given = tuple(_whole("hidden", f.hidden)), f.samples, f.rounds, f.checkpoint
    for method, count, cohort, (processes, devices) in rows:
        work = Work(method, count, cohort, processes, devices, *given)
        records.append(of_processes(work))
        round_time.write(f.json, records)
    print(text_table(records, COLUMNS))
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
