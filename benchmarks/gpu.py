r"""Rounds on an accelerator: checked, timed, and held against PyTorch's loop.

python -m benchmarks.gpu --torch=PYTHON --json=gpu.json

Whatever accelerator JAX finds runs rounds of FedAvg (plain SGD, uniform sampling, state
and data on the device): each network with each plan of the clients and each precision
of products. On an NVIDIA card "default" is TF32, "highest" is float32, and "bfloat16"
networks that compute in it; parameters are float32 always; programs are those of
`engine.deterministic=True`. The plan "patches" is vmap with convolutions as products of
patches, which stay one product for all clients where XLA's become grouped. Each row is
measured in a process of its own, and checked there:

  equal     two runs of the same rounds ended with the same bits
  distance  of the trained network to that of the plan "map" at "highest", relative to
            how far training moved it

With --torch=PYTHON a plain PyTorch loop of that interpreter does the same work, as it
is (eager), compiled, and replayed as CUDA graphs. On a machine without an accelerator
nothing is run and the rows are listed; --smoke runs them there, in tiny form.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import flags

from benchmarks import round_time
from benchmarks.peers.workload import LEARNING_RATE, Workload
from hyperjax import compiling, models, training, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.data import clients
from hyperjax.engine import compiled, schedule, sharding
from hyperjax.errors import check_at_least, check_choice
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table

NETWORKS = {
    "mlp": Workload("mlp", 32, 480, 25, 4, 5),
    "lenet": Workload("lenet", 32, 480, 25, 4, 5),
    "resnet20": Workload("resnet20", 128, 480, 25, 4, 5),
}
PLANS = ("vmap", "patches", "block", "map")
MAPPERS = {"patches": "vmap"}  # of plans that are more than one
PRECISIONS = ("highest", "default", compiling.BFLOAT16)
WAYS = ("eager", "compiled", "graphs")
CONVOLUTIONAL = ("lenet", "resnet20")
TORCH = ("mlp", "lenet")  # networks that PyTorch's side has too
COLUMNS = (
    ("network", "network"),
    ("plan", "plan"),
    ("precision", "precision"),
    ("milliseconds", "ms / round"),
    ("samples_per_second", "samples / s"),
    ("start_seconds", "first round, s"),
    ("peak_mb", "peak, MB"),
    ("equal", "equal"),
    ("distance", "distance"),
)


def tiny(work: Workload) -> Workload:
    """The same network with next to nothing to do."""
    return work._replace(batch=4, samples=8, cohort=2, epochs=1, rounds=1, clients=3)


def measure(work: Workload, plan: str, precision: str, block: int) -> dict[str, Any]:
    """Times rounds twice over; for a process of its own."""
    backend, device = jax.default_backend(), jax.local_devices()[0].device_kind
    shape = (32, 32, 3) if work.network == "resnet20" else round_time.SHAPE
    network = round_time.make_network(work.network, True)
    if work.network in CONVOLUTIONAL:
        network = network.clone(conv_rule="patches" if plan == "patches" else "xla")
    model = models.from_linen(network, shape, 10, precision=precision)
    random = np.random.default_rng(0)
    y = random.integers(0, 10, (work.clients, work.samples), np.int32)
    x = random.integers(0, 256, (y.size, *shape), np.uint8)
    local = training.Local(
        optimizer=optax.sgd(LEARNING_RATE),
        batch_size=work.batch,
        phases=(training.Phase(epochs=work.epochs),),
    )
    sim = schedule.simulator(
        fedavg(model, local=local),
        clients.Table(
            np.arange(y.size, dtype=np.int32).reshape(y.shape),
            np.full(work.clients, work.samples, np.int32),
        ),
        clients.make_pool(x, y.ravel(), np.arange(y.size)),
        weight=np.ones(work.clients),
        cohort_size=work.cohort,
        sampler="uniform",
        mapper=sharding.resolve_mapper(MAPPERS.get(plan, plan), block, backend),
        program=compiled.Compiled(None, compiling.Numerics(precision, True)),
    )

    def trained() -> tuple[list[float], Any, Any]:
        first, seconds = jax.device_get((carry := sim.init(0)).server), []
        for t in range(work.rounds + 1):
            began = time.perf_counter()
            carry, info = sim.run(0, carry, t, 1, donate=True)
            jax.block_until_ready((carry, info))
            seconds.append(time.perf_counter() - began)
        return seconds, first, jax.device_get(carry.server)

    seconds, first, last = trained()
    again, _, twin = trained()
    fastest = float(np.median(seconds[1:] + again[1:]))
    return {
        "network": work.network,
        "plan": plan,
        "precision": precision,
        "milliseconds": 1000 * fastest,
        "samples_per_second": round(work.cohort * work.steps * work.batch / fastest),
        "start_seconds": seconds[0],
        "peak_mb": round_time.peak_mb(),
        "equal": "yes" if tree.sha256(last) == tree.sha256(twin) else "NO",
        "workload": work._asdict(),
        "first": first.theta,
        "last": last.theta,
        **round_time.about(),
        "device": device,
    }


def distance(record: dict[str, Any], reference: dict[str, Any]) -> float:
    """Returns how far two trained networks are apart, relative to their training."""

    def flat(theta: Any) -> np.ndarray:
        # Without JAX: this process must leave the accelerator to those that measure.
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(theta)])

    last = flat(reference["last"])
    apart = np.linalg.norm(flat(record["last"]) - last)
    return float(apart / np.linalg.norm(last - flat(reference["first"])))


def of_torch(python: str, work: Workload, way: str, precision: str) -> dict[str, Any]:
    """Times PyTorch's loop in its own interpreter."""
    script = Path(__file__).parent / "peers" / "gpu_torch.py"
    command = [python, str(script), json.dumps(work), way, precision]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"torch, {work.network}, {way}: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    samples = work.cohort * work.steps * work.batch
    return {
        "network": work.network,
        "plan": f"torch, {way}",
        "precision": precision,
        "milliseconds": 1000 * found["seconds"],
        "samples_per_second": round(samples / found["seconds"]),
        "workload": work._asdict(),
        **found,
    }


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_list("networks", list(NETWORKS), "What is trained.")
    flags.DEFINE_list("plans", list(PLANS), "How clients are mapped.")
    flags.DEFINE_list("precisions", list(PRECISIONS), "Of products.")
    flags.DEFINE_integer("block_size", 5, "Clients at a time, for the plan block.")
    flags.DEFINE_bool("smoke", False, "Tiny, and on a CPU too.")
    cli.define_path("torch", None, "A Python with PyTorch.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    check_at_least(1, block_size=f.block_size)
    asked: dict[str, Any] = dict(networks=NETWORKS, plans=PLANS)
    asked["precisions"] = compiling.PRECISIONS[1:]
    for name, known in asked.items():
        for given in getattr(f, name):
            check_choice(f"--{name}", given, known)
    # The reference is always measured, and first.
    plans = dict.fromkeys(("map", *f.plans))
    precisions = dict.fromkeys(("highest", *f.precisions))
    rows = [
        (n, p, q)
        for n in f.networks
        for q in precisions
        for p in plans
        if p != "patches" or n in CONVOLUTIONAL
    ]
    sides = [n for n in f.networks if n in TORCH and f.torch]
    loops = [(n, w, q) for n in sides for q in precisions for w in WAYS]
    backend, _ = round_time.fresh(round_time.backend_and_devices)
    if backend == "cpu" and not f.smoke:
        print("JAX finds no accelerator here, so nothing is run. Rows on one:")
        for row in (*rows, *((n, f"torch, {w}", q) for n, w, q in loops)):
            print("  " + ", ".join(row))
        print("--smoke runs them on this machine, in tiny form.")
        return 0
    works = {n: tiny(NETWORKS[n]) if f.smoke else NETWORKS[n] for n in f.networks}
    records: list[dict[str, Any]] = []
    references: dict[str, dict[str, Any]] = {}

    def keep(record: dict[str, Any]) -> None:
        bulk = ("first", "last")
        records.append({k: v for k, v in record.items() if k not in bulk})
        round_time.write(f.json, records)  # what is measured stays if a later row fails
        print(f"{record['network']}, {record['plan']}", file=sys.stderr, flush=True)

    for name, plan, precision in rows:
        found = round_time.fresh(measure, works[name], plan, precision, f.block_size)
        reference = references.setdefault(name, found)
        keep({**found, "distance": f"{distance(found, reference):.1e}"})
    for name, way, precision in loops:
        keep(of_torch(f.torch, works[name], way, precision))
    print(f"{records[0]['device']}\n\n{text_table(records, COLUMNS)}")
    return 0 if all(r.get("equal", "yes") == "yes" for r in records) else 1


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
