r"""What a round of the published settings must cost, from XLA's own counts.

python -m benchmarks.roofline --json=roofline.json

A step is the gradient of a client's loss by all that it trains, compiled and not run:
XLA counts its operations and the bytes that it reads and writes, before optimisation
(*unfused*: every operation on its own) and after it on this machine (*fused*; another
backend fuses otherwise). The *floor* is less than any backend can do with: operands and
results of products and convolutions, once each, as if all between them stayed on the
chip. Convolutions are XLA's own, so that they count as such. What the server computes,
MH-pFedHN's generator among it, is not in a step.

A card's time for a round is at least the larger of two: operations over what it
multiplies a second, and the floor over what its memory moves a second. Both are of the
makers' figures, which no program reaches; nothing is timed.

  HyperFedZero  MNIST, MLP, 10 clients of 2,560 images, an epoch at batch 128
  HyperFedNet   CIFAR-10, ResNet-20, 25 clients of 480, 4 epochs at batch 128
  MH-pFedHN     CIFAR-10, five networks, 50 clients of 750, an epoch at batch 64, one
                client after another
"""

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax.extend import core

from benchmarks import round_time
from hyperjax import compiling, models, registry, training
from hyperjax.engine import flops
from hyperjax.errors import check_choice
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table
from hyperjax.protocols.families import FAMILIES
from hyperjax.types import Batch, ClientData, Pool

CLASSES = 10


class Setting(NamedTuple):
    """A paper's."""

    networks: tuple[str, ...]  # of equal shares of the clients
    shape: tuple[int, int, int]
    batch: int
    clients: int  # of a round
    samples: int  # of a client
    epochs: int
    options: Mapping[str, Any] = {}  # of the method

    @property
    def steps(self) -> int:
        """Of all clients in a round."""
        return self.clients * self.epochs * -(-self.samples // self.batch)


class Card(NamedTuple):
    """An accelerator at a precision, as its maker gives it."""

    teraflops: float  # 1e12 operations a second
    terabytes: float  # 1e12 bytes a second
    width: int = 4  # bytes of a number that products read or make


SETTINGS = {
    "hyperfedzero": Setting(
        ("mlp",), (28, 28, 1), 128, 10, 2560, 1, {"hidden": (220, 220)}
    ),
    "hyperfednet": Setting(("resnet20",), (32, 32, 3), 128, 25, 480, 4),
    # Its clients train the networks that they are sent, as FedAvg's do.
    "mh_pfedhn": Setting(tuple(FAMILIES), (32, 32, 3), 64, 50, 750, 1),
}
CARDS = {
    "H100, float32": Card(67, 3.35),
    "H100, TF32": Card(495, 3.35),
    "H100, bfloat16": Card(989, 3.35, 2),
    "TPU v5e, bfloat16": Card(197, 0.819, 2),
}
COLUMNS = (
    ("method", "method"),
    ("network", "network"),
    ("batch", "batch"),
    ("gflop", "GFLOP / step"),
    ("unfused_mb", "MB / step, unfused"),
    ("fused_mb", "fused"),
    ("floor_mb", "floor"),
    ("intensity", "FLOP / byte of the floor"),
)
ROUNDS = (
    ("method", "method"),
    ("steps", "steps / round"),
    ("teraflop", "TFLOP / round"),
    ("gigabytes", "GB / round, floor"),
    *((card, card) for card in CARDS),
)


def floor(jaxpr: core.Jaxpr) -> float:
    """Bytes of the operands and results of a traced program's products."""
    moved = 0.0
    for equation in jaxpr.eqns:
        kind = equation.primitive.name
        if kind in ("dot_general", "conv_general_dilated"):
            arrays = [each.aval for each in (*equation.invars, *equation.outvars)]
            moved += sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
        else:
            inside = flops.parts(kind, equation.params)
            moved += sum(times * floor(part) for part, times in inside)
    return moved


def step(name: str, network: str) -> dict[str, Any]:
    """Counts a step of a setting's clients; its own process frees XLA's memory."""
    _, shape, batch, *_, options = SETTINGS[name]
    chosen = {} if network == "mlp" else {"conv_rule": "xla"}
    made = models.ZOO[network](CLASSES, **chosen)
    model = models.from_linen(made, shape, CLASSES)
    local = training.Local(optimizer=optax.sgd(0.1), batch_size=batch)
    method = "fedavg" if name == "mh_pfedhn" else name
    trained = registry.find(method)(model, local=local, **options).client.model
    variables = jax.eval_shape(trained.init, jax.random.key(0))

    def gradient(key, variables, rows: ClientData, batch: Batch):
        context = trained.visit.context(variables, rows)

        def loss(params):
            value, out = trained.loss(
                key, variables | {"params": params}, batch, context
            )
            return value, (out.stats, out.info)

        return jax.grad(loss, has_aux=True)(variables["params"])

    def of(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    channels = of(shape[-1:])
    pool = Pool(
        of((batch, *shape), jnp.uint8), of((batch,), jnp.int32), *[channels] * 2
    )
    held = ClientData(of((batch,), jnp.int32), of((), jnp.int32), pool)
    given = Batch(of((batch, *shape)), of((batch,), jnp.int32), of((batch,)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = jax.jit(gradient).trace(key, variables, held, given)
    lowered = traced.lower()
    before = lowered.cost_analysis()
    after = lowered.compile(**compiling.options()).cost_analysis()
    return {
        "network": network,
        "batch": batch,
        "flops": before["flops"],
        "unfused_bytes": before["bytes accessed"],
        "fused_bytes": after["bytes accessed"],
        "floor_bytes": floor(traced.jaxpr.jaxpr),
        **round_time.about(),
    }


def bound(operations: float, num_bytes: float, card: Card) -> tuple[float, str]:
    """Returns the least seconds on a card, and on what; bytes are those of float32.

    Example:
      >>> bound(67e12, 3.35e9, Card(67, 3.35))
      (1.0, 'arithmetic')
    """
    arithmetic = operations / card.teraflops / 1e12
    memory = num_bytes * card.width / 4 / card.terabytes / 1e12
    return max((arithmetic, "arithmetic"), (memory, "memory"))


def of_round(name: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums a round up, and says what each card needs for it at least."""
    setting = SETTINGS[name]
    each = setting.steps / len(steps)
    operations = each * sum(record["flops"] for record in steps)
    num_bytes = each * sum(record["floor_bytes"] for record in steps)
    return {
        "method": name,
        "steps": setting.steps,
        "flops": operations,
        "bytes": num_bytes,
        "bounds": {
            card: bound(operations, num_bytes, made) for card, made in CARDS.items()
        },
        "of_steps": steps,
    }


def shown(record: dict[str, Any]) -> dict[str, str]:
    """A round's numbers as text."""
    return {
        "method": record["method"],
        "steps": f"{record['steps']:,}",
        "teraflop": f"{record['flops'] / 1e12:.3g}",
        "gigabytes": f"{record['bytes'] / 1e9:.3g}",
        **{
            card: f"{1000 * least:.3g} ms, {spent}"
            for card, (least, spent) in record["bounds"].items()
        },
    }


def shown_step(method: str, record: dict[str, Any]) -> dict[str, str]:
    """A step's numbers as text."""
    return {
        "method": method,
        "network": record["network"],
        "batch": str(record["batch"]),
        "gflop": f"{record['flops'] / 1e9:.3g}",
        "unfused_mb": f"{record['unfused_bytes'] / 1e6:,.0f}",
        "fused_mb": f"{record['fused_bytes'] / 1e6:,.0f}",
        "floor_mb": f"{record['floor_bytes'] / 1e6:,.0f}",
        "intensity": f"{record['flops'] / record['floor_bytes']:.1f}",
    }


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_list("settings", list(SETTINGS), "Whose rounds.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    for name in f.settings:
        check_choice("--settings", name, SETTINGS)
    records: list[dict[str, Any]] = []
    for name in f.settings:
        steps = []
        for network in SETTINGS[name].networks:
            print(f"{name}, {network}", file=sys.stderr, flush=True)
            steps.append(round_time.fresh(step, name, network))
        records.append(of_round(name, steps))
        round_time.write(f.json, records)  # stays if a later one fails
    lines = [shown_step(r["method"], each) for r in records for each in r["of_steps"]]
    print(text_table(lines, COLUMNS))
    print(f"\n{text_table([shown(record) for record in records], ROUNDS)}")
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
