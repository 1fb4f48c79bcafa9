r"""Numbers on the wire per client and round, next to those HyperFedNet's paper charged.

python -m benchmarks.comm_table --json=comm.json

Every method of the package on the four networks of arXiv:2402.18445, HyperFedNet's
fusions and what it shares beside the generator. All counts are those of messages, by
abstract evaluation of one exchange; none is a formula. As in the paper the running
statistics of batch-norm stay on the clients; one row of FedAvg shows what they add.

The second table repeats the paper's Table III, what a client had sent and received when
the global accuracy on CIFAR-10 first met 10, 20, ... percent: a round index, which is
the paper's result, times the numbers per round trip, which are ours.

Where a protocol leaves a choice, the package sends what the paper charged: clients of
pFedSim are sent their own heads back (after the warm-up they could keep them), those of
FedFomo their own model beside the M others (they could keep that too); what that would
save is said. FedGen's label counts and FedFomo's scores count, as everything that is
sent does.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags

from benchmarks import round_time
from hyperjax import models, registry, server_optimizers, training
from hyperjax.engine import comm, families
from hyperjax.errors import check_choice, first_line
from hyperjax.launch import cli, outputs
from hyperjax.launch.pages import text_table
from hyperjax.models import HEAD
from hyperjax.types import Algorithm, Model, Outputs, Trained


class Network(NamedTuple):
    """A network of the paper and the embedding size it was used with."""

    name: str  # in models.ZOO
    shape: tuple[int, int, int]
    num_classes: int
    embedding_size: int


class Row(NamedTuple):
    """A line of the table: a method with arguments."""

    label: str
    method: str
    options: Mapping[str, Any]


NETWORKS = {
    "mnist": Network("resnet8", (28, 28, 1), 10, 64),
    "fashion_mnist": Network("resnet38", (28, 28, 1), 10, 128),
    "cifar10": Network("resnet38", (32, 32, 3), 10, 128),
    "cifar100": Network("resnet38x2", (32, 32, 3), 100, 128),
}
NUM_CLIENTS = 100  # for methods whose server keeps something of every client

# Methods that are not counted, and why.
LEFT_OUT: dict[str, str] = {"centralised": "trained in one place, nothing is sent"}

AVERAGED = "fedavg, statistics averaged"
SMALLEST = "hyperfednet, n=1"
_BOTH = dict(share_aux="convs_and_bn")
EXTRA = (
    Row(AVERAGED, "fedavg", dict(bn_stats="average")),
    Row(SMALLEST, "hyperfednet", dict(embedding_size=1)),
    *(
        Row(f"fedavg + {name}", "fedavg", dict(server_opt=optimizer()))
        for name, optimizer in server_optimizers.FEDOPT.items()
    ),
    Row("pfedhn, PC", "pfedhn", dict(keep=HEAD, persist_optimizer="kept")),
    # HyperFedNet + FedBN.
    Row("hyperfednet, share_aux=convs", "hyperfednet", dict(share_aux="convs")),
    Row("hyperfednet, share_aux=convs_and_bn", "hyperfednet", _BOTH),
    Row(
        "hyperfednet, convs_and_bn, statistics averaged",
        "hyperfednet",
        dict(bn_stats="average", **_BOTH),
    ),
    *(
        Row(f"hyperfednet + {base}", "hyperfednet", dict(base=base))
        for base in ("fedprox", "feddyn", "scaffold", "ditto")
    ),
    *(
        Row(
            f"hyperfednet + {base}",
            "hyperfednet",
            dict(base=base, num_clients=NUM_CLIENTS),
        )
        for base in ("pfedla", "fedfomo")
    ),
)

# What the paper charged. It prints CIFAR-10's figures to 10,000; these are the ones
# that reproduce all of its products with round indices. FedAvg's on other networks are
# printed in thousands. With embeddings of one number HyperFedNet costs 640 everywhere.
_FULL = ("fedavg", "fedprox", "feddyn", "fedbn", "pfedsim", "pfedla")
_WITHOUT_HEAD = ("fedbabu", "fedper", "fedrep")
PUBLISHED = {
    ("mnist", "fedavg"): 155_000,
    ("fashion_mnist", "fedavg"): 1_127_000,
    ("cifar100", "fedavg"): 4_519_000,
    **{("cifar10", method): 1_127_860 for method in _FULL},
    **{("cifar10", method): 1_126_560 for method in _WITHOUT_HEAD},
    ("cifar10", "fedgen"): 1_131_422,
    ("cifar10", "fedfomo"): 3_947_510,
    ("cifar10", "hyperfednet"): 565_536,
    **{(network, SMALLEST): 640 for network in NETWORKS},
}
# Why a count of ours differs from the paper's.
WHY = {
    "fedbn": "scales and biases of batch-norm stay home; the paper charged all of P",
    "fedfomo": "the scores of five models; the paper charged own and five down, own up",
}
# Methods that the paper charged as if they were another one.
CHARGED_AS = {"fedbn": "fedavg"}

# Table III of the paper, CIFAR-10 iid: (round index, millions as printed) at which 10,
# 20, ... percent were met.
TABLE_III = {
    "hyperfednet": "0 0.00, 2 1.13, 14 7.92, 19 10.75, 28 15.84, 41 23.19, 63 35.63",
    "fedavg": "1 1.13, 5 5.64, 14 15.79, 41 46.24, 41 46.24, 81 91.36",
    "fedbabu": "1 1.13, 2 2.25, 7 7.89, 23 25.91, 41 46.19, 41 46.19",
    "fedprox": "1 1.13, 13 14.66, 41 46.24, 41 46.24, 64 72.18, 82 92.48",
    "fedgen": "1 1.13, 25 28.29, 35 39.60, 41 46.39, 79 89.38, 81 91.65",
    "feddyn": "1 1.13, 3 3.38, 13 14.66, 31 34.96, 41 46.24, 81 91.36",
    "pfedsim": "1 1.13, 5 5.64, 14 15.79, 41 46.24, 41 46.24, 97 109.40",
    "fedper": "1 1.13, 6 6.76, 15 16.90, 25 28.16, 41 46.19, 81 91.25",
    "fedbn": "1 1.13, 4 4.51, 14 15.79, 41 46.24, 41 46.24, 81 91.36",
    "fedrep": "0 0.00, 8 9.01, 14 15.77, 36 40.56, 70 78.86",
    "pfedla": "0 0.00, 15 16.92, 24 27.07, 41 46.24, 81 91.36",
    "fedfomo": "0 0.00, 4 15.79, 9 35.53, 56 221.06, 78 307.91",
}
COLUMNS = (
    ("method", "method"),
    ("down", "down"),
    ("up", "up"),
    ("cpr", "round trip"),
    ("down_bytes", "bytes down"),
    ("up_bytes", "bytes up"),
    ("published", "paper"),
    ("note", ""),
)
COST_COLUMNS = (
    ("method", "method"),
    ("cpr", "round trip"),
    ("same", "cells as printed"),
    ("cells", "millions (round index)"),
)


def rows() -> list[Row]:
    """Returns every method of the package with its defaults, and the extra lines."""
    plain = [Row(name, name, {}) for name in registry.methods() if name not in LEFT_OUT]
    return plain + list(EXTRA)


def make_model(network: Network) -> Model:
    """Returns the paper's network."""
    module = models.ZOO[network.name](num_classes=network.num_classes)
    return models.from_linen(module, network.shape, network.num_classes)


def hollow(model: Model) -> Model:
    """Returns a model with the same shapes that computes nothing.

    Messages have the shapes of variables and features, and those do not depend on how
    a loss comes about; so it is counted as `model` is, without tracing 38 layers.
    """
    one = jax.ShapeDtypeStruct((1, *model.sample_shape), jnp.float32)

    def trial(key, x):
        variables = model.init(key)
        return variables, model.apply(variables, x)

    variables, outputs = jax.eval_shape(trial, jax.random.key(0), one)

    def apply(variables, x):
        return Outputs(*(jnp.zeros((x.shape[0], rows.shape[1])) for rows in outputs))

    def loss(key, variables, batch, context):
        info = {"loss": jnp.float32(0)}
        given = apply(variables, batch.x)
        return jnp.float32(0), Trained(variables["stats"], info, *given)

    return model._replace(
        init=lambda key: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables),
        loss=loss,
        apply=apply,
        with_shape=lambda shape: hollow(model.with_shape(shape)),
    )


def make_method(row: Row, network: Network, model: Model) -> Algorithm:
    """Builds a line's method; those that know the size of a run are told."""
    factory = registry.find(row.method)
    known = inspect.signature(factory).parameters
    options: dict[str, Any] = {"bn_stats": "local"}
    if row.method == "hyperfednet":
        options["embedding_size"] = network.embedding_size
    told = dict(num_clients=NUM_CLIENTS, num_rounds=1)
    options |= {name: number for name, number in told.items() if name in known}
    options |= row.options
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        options = {name: x for name, x in options.items() if name in known}
    train = training.Local(optimizer=optax.sgd(0.1), batch_size=3)
    families_only = known.get("family_sizes")
    if families_only is None or families_only.default is None:
        return factory(model, local=train, **options)
    sizes = {"all": NUM_CLIENTS}  # one family: every client has the paper's network
    alg = factory({"all": model}, local=train, family_sizes=sizes, **options)
    return families.view(alg, "all")


def measure(
    network_name: str, lines: Sequence[Row] | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Counts methods on one network.

    Args:
      network_name: in `NETWORKS`.
      lines: what to count; None: all of `rows()`.

    Returns:
      The records of the JSON file, and label -> reason of methods that refuse.

    Raises:
      ValueError: an unknown network.
    """
    check_choice("network", network_name, NETWORKS)
    network = NETWORKS[network_name]
    model = hollow(make_model(network))
    records, refused = [], {}
    for row in rows() if lines is None else lines:
        try:
            cost = comm.cost(comm.describe(make_method(row, network, model)))
        except (TypeError, ValueError) as error:
            refused[row.label] = first_line(error)
            continue
        record = {
            "method": row.label,
            "network": network_name,
            "down": cost.down_numbers,
            "up": cost.up_numbers,
            "cpr": cost.down_numbers + cost.up_numbers,
            "down_bytes": cost.down_bytes,
            "up_bytes": cost.up_bytes,
            "published": PUBLISHED.get((network_name, row.label)),
        }
        records.append(record)
    return records, refused


def savings(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns, by method, what clients of one network could keep instead of receive."""
    ours = {r["method"]: r["cpr"] for r in records}
    if not {"fedavg", "fedper", "pfedsim", "fedfomo"} <= set(ours):
        return {}
    model, head = ours["fedavg"] // 2, (ours["fedavg"] - ours["fedper"]) // 2
    return {
        "pfedsim": f"{ours['pfedsim'] - head:,} if heads stayed home after the warm-up",
        "fedfomo": f"{ours['fedfomo'] - model:,} if clients kept their own model",
    }


def note(record: Mapping[str, Any]) -> str:
    """Returns why a count differs from the paper's; nothing if it does not."""
    published = record["published"]
    if published is None or published == record["cpr"]:
        return ""
    if published % 1000 == 0 and round(record["cpr"], -3) == published:
        return ""
    method = record["method"]
    return f"{record['cpr'] - published:+,}: {WHY.get(method, 'not explained')}"


def printed_costs(method: str) -> list[tuple[int, str]]:
    """Returns the paper's cells of a method: round index and millions as printed."""
    cells = (cell.split() for cell in TABLE_III[method].split(", "))
    return [(int(index), cost) for index, cost in cells]


def costs(method: str, cpr: int) -> list[str]:
    """Returns the method's cells of Table III for a number per round trip."""
    return [f"{index * cpr / 1e6:.2f}" for index, _ in printed_costs(method)]


def table_iii(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the paper's Table III from our counts on CIFAR-10, a record a line.

    "same" of "of" cells are as printed. A method that the paper charged as another one
    has a second line, with our count of that one; methods that are not in the package
    have no count.
    """
    ours = {r["method"]: r["cpr"] for r in records if r["network"] == "cifar10"}
    found = []
    for method, printed in ((m, printed_costs(m)) for m in TABLE_III):
        charges = {method: ours.get(method)}
        if method in CHARGED_AS and method in ours:
            other = CHARGED_AS[method]
            charges[f"{method}, charged as {other}"] = ours[other]
        for label, cpr in charges.items():
            cells = [] if cpr is None else costs(method, cpr)
            pairs = zip(cells, (cost for _, cost in printed), strict=False)
            found.append(
                {
                    "method": label,
                    "cpr": cpr,
                    "cells": cells,
                    "same": sum(a == b for a, b in pairs),
                    "of": len(printed),
                }
            )
    return found


def tally(table: list[dict[str, Any]]) -> str:
    """Returns in words how many cells of Table III our own counts reproduce."""
    ours = [line for line in table if line["method"] in TABLE_III]
    same, of = (sum(line[key] for line in ours) for key in ("same", "of"))
    text = f"{same} of {of} cells as printed from our own counts"
    for line in table:
        if line["method"] not in TABLE_III:
            text += f"; {line['same']} of {line['of']} of {line['method']}"
    return text


def cost_rows(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines of the table as text."""
    lines = []
    for line in table:
        printed = printed_costs(line["method"].split(",")[0])
        if line["cpr"] is None:
            lines.append({"method": line["method"], "cells": "not in the package"})
            continue
        pairs = zip(line["cells"], printed, strict=True)
        cells = [
            f"{cell} ({index})" + ("" if cell == cost else f" [printed {cost}]")
            for cell, (index, cost) in pairs
        ]
        same = f"{line['same']} of {line['of']}"
        lines.append(line | {"same": same, "cells": "  ".join(cells)})
    return lines


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_list("networks", list(NETWORKS), "Networks to count.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    if not f.networks:
        raise ValueError(f"--networks= names none (accepted: {', '.join(NETWORKS)})")
    for name in f.networks:
        check_choice("network", name, NETWORKS)
    outputs.files(json=f.json)
    records = []
    for name in f.networks:
        found, refused = measure(name)
        records += found
        network = NETWORKS[name]
        title = f"{name}: {network.name}, {network.shape}, n={network.embedding_size}"
        saved = savings(found)
        notes = [(note(r), saved.get(r["method"], "")) for r in found]
        lines = [
            r | {"note": "; ".join(filter(None, pair))}
            for r, pair in zip(found, notes, strict=True)
        ]
        print(title, "", text_table(lines, COLUMNS), "", sep="\n")
        for label, why in (LEFT_OUT | refused).items():
            print(f"{label} does not apply: {why}\n")
    if "cifar10" in f.networks:
        table = table_iii(records)
        print("Table III, CIFAR-10 iid", "", sep="\n")
        print(text_table(cost_rows(table), COST_COLUMNS), "", tally(table), sep="\n")
    round_time.write(f.json, records)
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
