r"""Memory of the two stores of client state, against the number of clients.

python -m benchmarks.memory --clients=1000,100000 --json=memory.json

FedAvg on the MLP keeps its last layer on the clients (8 KB each) and trains cohorts of
ten for a few exchanges. With the host store, state lies in memory-mapped files in a
temporary folder, and only the cohort's rows come to the device. Images are drawn from
a small pool that all clients share, so that only state and tables grow with clients.

Columns, in MB of 2^20 bytes: all client state; the table of row numbers (clients x
samples, int32), which is in host memory with either store; the arrays alive on the
device after the run; peak memory of the process (on an accelerator: of the device).
Resident memory includes the touched pages of the table of row numbers, and with the
host store those of the memory-mapped files, which the system may drop. With the host
store the device still holds one aggregation weight per client, 4 bytes, and while a
cohort is drawn from up to 4,096 clients a permutation of all of them.

The device store is measured at the smallest number of clients, and computed for the
others: what the host store has on the device, plus state, row numbers and sizes of all.
"""

import tempfile
from typing import Any

import jax
import numpy as np
import optax
from absl import flags

from benchmarks import round_time
from hyperjax import training, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.data import clients
from hyperjax.engine import comm, schedule
from hyperjax.errors import check_at_least
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table

KEEP = r"params/head/.*"  # the MLP's last layer
POOL_SIZE = 1000
COLUMNS = (
    ("store", "store"),
    ("clients", "clients"),
    ("state_mb", "all client state, MB"),
    ("table_mb", "row numbers, MB"),
    ("device_mb", "on the device, MB"),
    ("peak_mb", "peak, MB"),
    ("how", ""),
)


def measure(
    num_clients: int, cohort: int, samples: int, exchanges: int, store: str
) -> dict[str, Any]:
    """Runs a few exchanges and counts memory; for a process of its own."""
    cli.use_cores(1)
    generator = np.random.default_rng(0)
    rows = generator.integers(0, POOL_SIZE, (num_clients, samples), np.int32)
    model = round_time.make_model("mlp", peer_lenet=True)
    train = training.Local(optimizer=optax.sgd(round_time.LEARNING_RATE), batch_size=32)
    alg = fedavg(model, local=train, keep=KEEP)
    with tempfile.TemporaryDirectory() as folder:
        sim = schedule.simulator(
            alg,
            clients.Table(rows, np.full(num_clients, samples, np.int32)),
            round_time.make_pool(POOL_SIZE),
            weight=np.ones(num_clients),
            cohort_size=cohort,
            sampler="uniform",
            store=store,
            store_dir=folder if store == "host" else None,
        )
        root = jax.random.key(0)
        carry, _ = sim.run(root, sim.init(root), 0, exchanges, donate=True)
        jax.block_until_ready(carry)
        peak = round_time.peak_mb()
        on_device = sum(x.nbytes for x in jax.live_arrays())
        del carry
    return {
        "store": store,
        "clients": num_clients,
        "state_mb": num_clients * tree.num_bytes(comm.describe(alg).client) / 2**20,
        "table_mb": rows.nbytes / 2**20,
        "device_mb": on_device / 2**20,
        "peak_mb": peak,
        "how": "measured",
        **round_time.about(),
    }


def device_store(host: dict[str, Any]) -> dict[str, Any]:
    """Returns what the device store would put on the device, from a host record."""
    per_client = 4 + 1  # number of samples, and whether it was seen
    grows = host["state_mb"] + host["table_mb"] + host["clients"] * per_client / 2**20
    computed = {"store": "device", "peak_mb": None, "how": "computed"}
    return {**host, **computed, "device_mb": host["device_mb"] + grows}


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_list("clients", ["1000", "100000"], "Numbers of clients.")
    flags.DEFINE_integer("cohort", 10, "Clients per exchange.")
    flags.DEFINE_integer("samples", 60, "Samples of a client.")
    flags.DEFINE_integer("exchanges", 3, "Exchanges.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    counts = sorted(map(int, f.clients))
    sizes = (f.cohort, f.samples, f.exchanges)
    check_at_least(1, cohort=f.cohort, samples=f.samples, exchanges=f.exchanges)
    host = [round_time.fresh(measure, n, *sizes, "host") for n in counts]
    device = [round_time.fresh(measure, counts[0], *sizes, "device")]
    records = host + device + [device_store(record) for record in host[1:]]
    print(text_table(records, COLUMNS))
    round_time.write(f.json, records)
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
