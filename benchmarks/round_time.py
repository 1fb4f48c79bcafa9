r"""Seconds per round of federated averaging, and what the simulation itself costs.

python -m benchmarks.round_time --models=mlp,lenet --mappers=auto,map,vmap,block \
    --devices=1,0 --json=rounds.json

The real engine runs rounds of FedAvg (plain SGD, uniform sampling, state and data on
the device, nothing evaluated) on synthetic 28x28x1 images. The *simulation tax* of a
plan is the federated time per sample over the central one. The centre is the same local
training, compiled, on one client that holds as many samples as the whole cohort, for as
many epochs: one stream of steps with the same batch size, without sampling, exchange
and aggregation. Calls of the engine and central runs alternate, and the tax is the
median of their ratios, so that a busy machine slows both. The *CPU tax* is the same
ratio of CPU seconds of all threads: the work, which other programs hardly change; it
says nothing about an accelerator.

One stream of steps keeps one device busy, so the centre runs on one device, with the
threads that XLA gives it. At one device the tax compares like with like; a plan with
several devices may beat the centre, with a tax below 1, and its row repeats the tax of
the same plan at one device.

Every plan is measured in a process of its own. Peak memory is that of the process, up
to the end of the first round and so with compilation, on the CPU, and the peak in use
on an accelerator's memory.

Clients have equal sizes unless --alpha says otherwise: then their shares of all samples
are drawn from Dirichlet(alpha), and all take part, so that a round and the centre train
on as many samples as with equal sizes.

The engine's call is one round unless --rounds_per_call says otherwise. A call has a
fixed cost, on Linux mostly that of fresh pages for its temporary arrays where they take
more than 32 MB: malloc returns those after every call.
"""

import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from absl import flags

from hyperjax import models, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.data import clients
from hyperjax.engine import schedule, sharding
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table
from hyperjax.training import Local, Phase, no_adjustment, trainer
from hyperjax.types import ClientData, Model

SHAPE, NUM_CLASSES = (28, 28, 1), 10
LEARNING_RATE = 0.01
COLUMNS = (
    ("model", "model"),
    ("mapper", "mapper"),
    ("auto", "auto"),
    ("devices", "devices"),
    ("seconds_median", "s/round, median"),
    ("seconds_min", "min"),
    ("samples_per_second", "samples/s"),
    ("central_samples_per_second", "centre"),
    ("tax", "tax"),
    ("tax_one_device", "tax, 1 device"),
    ("cpu_tax", "CPU tax"),
    ("peak_mb", "peak MB"),
    ("compile_seconds", "compile s"),
)


class Workload(NamedTuple):
    """What is trained in a round: a `cohort` of `clients` with `samples` each."""

    model: str  # "mlp" or "lenet"
    peer_lenet: bool  # channels 6 and 16, as other simulators' benchmarks have it
    batch: int
    epochs: int
    clients: int
    cohort: int
    samples: int  # of a client; the mean where sizes differ
    alpha: float  # of the Dirichlet distribution of sizes; 0: equal
    rounds: int  # timed calls, after one that is not
    rounds_per_call: int


class Plan(NamedTuple):
    """How it is run; `mapper` as `sharding.map_clients` has it."""

    mapper: str | int
    devices: int


def fresh(fn: Callable, *args: Any) -> Any:
    """Calls a module's function in a new process, which is also what memory needs."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(fn, *args).result()


def peak_mb() -> float:
    """Returns the most memory used so far: of the accelerator, or of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if jax.default_backend() != "cpu" and stats:
        return stats["peak_bytes_in_use"] / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def about() -> dict[str, Any]:
    """Returns what a figure depends on besides the workload."""
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "machine": {"cores": cli.num_cores(), "platform": platform.platform()},
        "backend": jax.default_backend(),
        "device": jax.local_devices()[0].device_kind,
    }


def backend_and_devices() -> tuple[str, int]:
    """Returns the backend and how many devices it has when every core is one."""
    cli.use_cores(0)
    return jax.default_backend(), jax.local_device_count()


def make_model(name: str, peer_lenet: bool) -> Model:
    """Returns a network on 28x28x1 images."""
    check_choice("model", name, ("mlp", "lenet"))
    network = make_network(name, peer_lenet)
    return models.from_linen(network, SHAPE, NUM_CLASSES)


def make_network(name: str, peer_lenet: bool) -> Any:
    """Returns a linen module; of LeNet's, perhaps that of the peers."""
    if name == "lenet" and peer_lenet:
        return models.LeNet(NUM_CLASSES, channels=(6, 16), hidden=(120, 84))
    if name == "cnn":  # pfl-research's
        wide = dict(channels=(32, 64), hidden=(512,))
        return models.LeNet(NUM_CLASSES, padding="SAME", **wide)
    return models.ZOO[name](NUM_CLASSES)


def make_pool(num_samples: int):
    """Returns random images with random labels."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (num_samples, *SHAPE), np.uint8)
    y = generator.integers(0, NUM_CLASSES, num_samples, np.int32)
    return clients.make_pool(x, y, np.arange(num_samples))


def sizes_of(work: Workload) -> np.ndarray:
    """Returns how many samples each client has, at least one."""
    whole = work.clients * work.samples
    if not work.alpha:
        return np.full(work.clients, work.samples, np.int32)
    shares = np.random.default_rng(0).dirichlet(np.full(work.clients, work.alpha))
    ends = np.rint(np.cumsum(shares) * (whole - work.clients)).astype(np.int32)
    return 1 + np.diff(ends, prepend=0)


def rounds_of(work: Workload, plan: Plan, pool) -> tuple[Callable, Callable]:
    """Returns `call(t) -> info` of rounds t, t + 1, ..., and `compile_seconds()`."""
    num, sizes = work.clients, sizes_of(work)
    rows = np.zeros((num, sizes.max()), np.int32)
    rows[np.arange(sizes.max()) < sizes[:, None]] = np.arange(sizes.sum())
    sim = schedule.simulator(
        fedavg(make_model(work.model, work.peer_lenet), local=training(work)),
        clients.Table(rows, sizes),
        pool,
        weight=np.ones(num),
        cohort_size=work.cohort,
        sampler="uniform",
        mapper=plan.mapper,
        mesh=sharding.client_mesh(work.cohort, plan.devices),
    )
    root = jax.random.key(0)
    carry = sim.init(root)

    def call(t: int):
        nonlocal carry
        carry, info = sim.run(root, carry, t, work.rounds_per_call, donate=True)
        return jax.block_until_ready((carry, info))[1]

    return call, lambda: sim.program.seconds


def centre_of(work: Workload, pool) -> Callable:
    """Returns `run()`: the same training of one client with the cohort's samples."""
    model = make_model(work.model, work.peer_lenet)
    train = trainer(model, training(work))
    size = work.cohort * work.samples
    data = ClientData(jnp.arange(size, dtype=jnp.int32), jnp.int32(size), pool)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(key, variables, data):
        return train(key, variables, data, jnp.int32(0), no_adjustment)

    variables = model.init(jax.random.key(0))

    def run():
        nonlocal variables
        variables, info = step(jax.random.key(1), variables, data)
        return jax.block_until_ready((variables, info))[1]

    return run


def training(work: Workload) -> Local:
    """Returns how clients train, and the centre."""
    return Local(
        optimizer=optax.sgd(LEARNING_RATE),
        batch_size=work.batch,
        phases=(Phase(epochs=work.epochs),),
    )


def measure(work: Workload, plan: Plan) -> dict[str, Any]:
    """Times rounds and central runs in turns; sets the devices of this process."""
    cli.use_cores(plan.devices)
    pool = make_pool(work.clients * work.samples)
    call, compile_seconds = rounds_of(work, plan, pool)
    samples = int(call(0)["samples"][0])
    peak = peak_mb()
    centre = centre_of(work, pool)
    if int(centre()["samples"]) != samples:
        raise ValueError("a round and the centre must train on as many samples")
    rows = []
    for t in range(1, work.rounds + 1):
        of_call = seconds(call, t * work.rounds_per_call)
        rows.append((of_call / work.rounds_per_call, seconds(centre)))
    times = np.array(rows)  # [rounds, (federated, central), (wall, CPU)]
    tax, cpu_tax = np.median(times[:, 0] / times[:, 1], axis=0)
    federated, central = times[:, 0, 0], times[:, 1, 0]
    size = tree.count(jax.eval_shape(make_model(*work[:2]).init, jax.random.key(0)))
    return {
        "model": work.model,
        "parameters": size,
        "workload": work._asdict(),
        "mapper": str(plan.mapper),
        "devices": plan.devices,
        "conv_rule": "auto" if work.model == "lenet" else None,
        "seconds_median": float(np.median(federated)),
        "seconds_min": float(federated.min()),
        "samples_per_second": round(samples / np.median(federated)),
        "central_samples_per_second": round(samples / np.median(central)),
        "tax": float(tax),
        "tax_of_minima": float(federated.min() / central.min()),
        "cpu_tax": float(cpu_tax),
        "peak_mb": peak,
        "compile_seconds": compile_seconds(),
        **about(),
    }


def seconds(fn: Callable, *args: Any) -> np.ndarray:
    """Returns wall and CPU seconds [2] of a call that waits for its result."""
    began = time.perf_counter(), time.process_time()
    fn(*args)
    return np.subtract((time.perf_counter(), time.process_time()), began)


def write(path: str | None, records: list[dict[str, Any]]) -> None:
    """Writes records as JSON, if a path is given."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(records, file, indent=2)
            file.write("\n")


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_list("models", ["mlp", "lenet"], "Networks to train.")
    flags.DEFINE_integer("batch", 32, "Samples per step.")
    flags.DEFINE_integer("epochs", 4, "Local epochs.")
    flags.DEFINE_integer("clients", 100, "Clients in the population.")
    flags.DEFINE_integer("cohort", 25, "Clients per round.")
    flags.DEFINE_integer("samples", 480, "Samples of a client.")
    flags.DEFINE_float("alpha", 0.0, "Dirichlet's alpha of sizes; 0: equal sizes.")
    flags.DEFINE_integer("rounds", 5, "Timed calls, after one that compiles.")
    flags.DEFINE_integer("rounds_per_call", 1, "Rounds in one compiled call.")
    flags.DEFINE_list("mappers", list(sharding.MAPPERS), "How clients are mapped.")
    flags.DEFINE_integer("block_size", 5, "Clients per block of the mapper 'block'.")
    flags.DEFINE_list("devices", ["1", "0"], "Devices to use; 0: every core or device.")
    flags.DEFINE_bool("peer_lenet", True, "Small LeNet (6, 16), or (20, 50) if not.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    numbers: dict[str, Any] = {
        name: f[name].value for name in Workload._fields if name != "model"
    }
    other = ("peer_lenet", "alpha")
    check_at_least(1, **{k: n for k, n in numbers.items() if k not in other})
    check_number(at_least=0, alpha=f.alpha)
    if f.alpha and f.cohort != f.clients:
        raise ValueError(
            f"cohort={f.cohort} must be clients={f.clients} with --alpha={f.alpha}, "
            "where sizes differ"
        )
    backend, available = fresh(backend_and_devices)
    resolve = functools.partial(
        sharding.resolve_mapper, block_size=f.block_size, backend=backend
    )
    mappers = dict.fromkeys(resolve(mapper) for mapper in f.mappers)
    devices = sorted({min(int(d) or available, available) for d in f.devices})
    records: list[dict[str, Any]] = []
    for name, mapper in itertools.product(f.models, mappers):
        alone = None  # the tax at one device, which comes first
        for count in devices:
            record = fresh(measure, Workload(name, **numbers), Plan(mapper, count))
            alone = record["tax"] if count == 1 else alone
            record["tax_one_device"] = alone
            record["auto"] = "*" if mapper == resolve("auto") else ""
            records.append(record)
            write(f.json, records)  # what is measured stays if a later plan fails
            print(f"{name}, {mapper}, devices: {count}", file=sys.stderr, flush=True)
    first = records[0]
    where = f"{first['backend']} ({first['device']}), {first['machine']['cores']} cores"
    print(f"JAX {first['jax']} on {where}\n\n{text_table(records, COLUMNS)}")
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
