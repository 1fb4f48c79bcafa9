r"""Memory of a round, and the steps that its plan adds to those that are needed.

python -m benchmarks.cohort --networks=mlp,lenet --cohorts=10,100,1000 \
    --json=cohort.json

One round of FedAvg, compiled and not run: XLA says what it would put aside beside its
arguments and results. Every client has the same few images; a network's parameters, P,
are 4 bytes each. With uplinks kept (`engine.streaming=False`) C x P numbers wait for
the server, with `engine.streaming=True` one sum does.

Clients that train together take the steps of the largest of them. A second table counts
them, run over needed, on partitions of random labels: all of a cohort at once (vmap),
and blocks as `engine.exchange` makes them, of clients sorted by size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks import round_time
from hyperjax import compiling, models, training, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.data import partition
from hyperjax.engine import comm, exchange, sharding
from hyperjax.errors import check_at_least, check_choice
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table
from hyperjax.types import ClientData, Cohort, Pool

SHAPE, CLASSES, IMAGES = (32, 32, 3), 10, 1000
COLUMNS = (
    ("network", "network"),
    ("parameters", "parameters"),
    ("cohort", "clients a round"),
    ("streaming", "summed up"),
    ("temporary_mb", "put aside, MB"),
    ("stack_mb", "C x P, MB"),
)


def measure(
    network: str, cohorts: list[int], samples: int, batch: int
) -> list[dict[str, Any]]:
    """Compiles a round for every cohort; for a process of its own."""
    cli.use_cores(1)
    model = models.from_linen(models.ZOO[network](CLASSES), SHAPE, CLASSES)
    train = training.Local(optimizer=optax.sgd(0.1), batch_size=batch)
    alg = fedavg(model, local=train)
    root = jax.eval_shape(lambda: jax.random.key(0))
    server = jax.eval_shape(alg.server.init, root)
    parameters, kept = tree.count(server.theta), comm.describe(alg).client

    def of(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def temporary(num: int, streaming: bool) -> float:
        one, whole = of((num,)), of((num,), jnp.int32)
        channels = of(SHAPE[-1:])
        pool = Pool(
            of((IMAGES, *SHAPE), jnp.uint8),
            of((IMAGES,), jnp.int32),
            channels,
            channels,
        )
        run = jax.jit(exchange.make_exchange(alg, streaming=streaming))
        lowered = run.lower(
            root,
            server,
            jax.tree.map(lambda x: of((num, *x.shape), x.dtype), kept),
            of((num,), bool),
            ClientData(of((num, samples), jnp.int32), whole, pool),
            Cohort(whole, one, one, of((), jnp.int32), of(())),
        )
        compiled = lowered.compile(**compiling.options())
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    return [
        {
            "network": network,
            "parameters": parameters,
            "cohort": num,
            "streaming": streaming,
            "temporary_mb": temporary(num, streaming),
            "stack_mb": 4 * num * parameters / 2**20,
            **round_time.about(),
        }
        for num in cohorts
        for streaming in (False, True)
    ]


STEP_COLUMNS = (
    ("alpha", "Dirichlet"),
    ("batch", "batch"),
    ("vmap", "vmap"),
    ("as_drawn", "blocks as drawn"),
    ("block", "blocks"),
)


def steps(alpha: float, batch: int, block: int) -> dict[str, Any]:
    """Counts steps of cohorts of 25 of 100 clients, 50,000 samples in ten classes."""
    needed, run = 0, dict.fromkeys(("vmap", "as_drawn", "block"), 0)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        y = rng.permutation(np.arange(50_000) % CLASSES)
        parts = partition.partition("dirichlet", rng, y, 100, alpha=alpha)
        every = np.array([len(part) for part in parts])
        for _ in range(20):
            size = every[np.sort(rng.choice(100, 25, replace=False))]
            count = -(-size // batch)
            needed += count.sum()
            ordered = count[np.asarray(sharding.by_size(jnp.asarray(size)))]
            run["vmap"] += 25 * count.max()
            run["as_drawn"] += _in_blocks(count, block)
            run["block"] += _in_blocks(ordered, block)
    shares = {name: float(num / needed) for name, num in run.items()}
    return dict(alpha=alpha, batch=batch, **shares)


def _in_blocks(count: np.ndarray, block: int) -> int:
    """Steps of all clients where a block's take those of its largest."""
    parts = np.split(count, range(block, len(count), block))
    return sum(len(part) * part.max() for part in parts)


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_list("networks", ["mlp", "lenet"], "Of the package.")
    flags.DEFINE_list("cohorts", ["10", "100", "1000"], "Clients a round.")
    flags.DEFINE_integer("samples", 60, "Samples of a client.")
    flags.DEFINE_integer("batch", 32, "Samples of a step.")
    flags.DEFINE_integer("block", 5, "Clients at a time, for the count of steps.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    check_at_least(1, samples=f.samples, batch=f.batch, block=f.block)
    cohorts = [int(num) for num in f.cohorts]
    for num in cohorts:
        check_at_least(1, cohorts=num)
    for network in f.networks:
        check_choice("networks", network, models.ZOO)
    records = [
        record
        for network in f.networks
        for record in round_time.fresh(measure, network, cohorts, f.samples, f.batch)
    ]
    print(text_table(records, COLUMNS))
    counts = [steps(a, b, f.block) for a in (0.5, 0.1) for b in (32, 128)]
    print(text_table(counts, STEP_COLUMNS))
    round_time.write(f.json, records + counts)
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
