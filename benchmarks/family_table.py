r"""Numbers and bytes on the wire per client and round where networks differ.

python -m benchmarks.family_table [--data=cifar100] [--methods=fml,mh_pfedhn] \
    [--json=families.json]

Every method that takes families on the five networks of arXiv:2507.22330, next to what
the authors' code sends. All counts are those of messages, by abstract evaluation of one
exchange; none is a formula.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import optax
from absl import flags

from benchmarks import comm_table, round_time
from hyperjax import models, registry, training
from hyperjax.engine import comm, families
from hyperjax.errors import check_choice
from hyperjax.launch import build, cli
from hyperjax.launch.pages import text_table
from hyperjax.protocols.families import FAMILIES
from hyperjax.types import Algorithm

NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
SIZES = {name: 10 for name in FAMILIES}  # clients of each family
TOP_K = "topk(fraction=0.3)"
# Parameters of each network on CIFAR-100, as the repository of the paper lists them. A
# round trip of MH-pFedHN is twice that; its GD adds the CNN's both ways.
_CNN = 239_856
PUBLISHED = dict(zip(FAMILIES, (_CNN, 274_664, 353_028, 529_092, 571_236), strict=True))
COLUMNS = (
    ("method", "method"),
    ("family", "network"),
    ("down", "down"),
    ("up", "up"),
    ("down_bytes", "bytes down"),
    ("up_bytes", "bytes up"),
    ("published", "paper, down"),
)


def published(method: str, family: str) -> int | None:
    """Returns the numbers that the paper's code sends to a client, on CIFAR-100."""
    if not method.startswith("mh_pfedhn"):
        return None
    return PUBLISHED[family] + _CNN * method.startswith("mh_pfedhngd")


def able() -> list[str]:
    """Returns the names of methods that take families."""
    return [name for name in registry.methods() if registry.families(name) != "one"]


def methods(num_classes: int, names: Iterable[str]) -> dict[str, Algorithm]:
    """Returns some methods, and top-k variants."""
    networks = {
        name: comm_table.hollow(
            models.from_linen(models.ZOO[name](num_classes), (32, 32, 3), num_classes)
        )
        for name in FAMILIES
    }
    train = training.Local(optimizer=optax.sgd(0.1), batch_size=3)
    found = {}
    for name in names:
        factory = registry.find(name)
        number = "num_clients" in inspect.signature(factory).parameters
        options = dict(num_clients=sum(SIZES.values())) if number else {}
        found[name] = factory(networks, local=train, family_sizes=SIZES, **options)
    for name in sorted({"mh_pfedhn", "mh_pfedhngd"} & found.keys()):
        found[f"{name}, {TOP_K}"] = build.through_channel(found[name], TOP_K)
    return found


def measure(data: str, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Counts methods, by default all of them, on every network.

    Raises:
      ValueError: an unknown data set or method.
    """
    check_choice("data", data, NUM_CLASSES)
    for name in names:
        check_choice("methods", name, able())
    records = []
    for label, alg in methods(NUM_CLASSES[data], names or able()).items():
        for family in FAMILIES:
            cost = comm.cost(comm.describe(families.view(alg, family)))
            records.append(
                {
                    "method": label,
                    "data": data,
                    "family": family,
                    "down": cost.down_numbers,
                    "up": cost.up_numbers,
                    "down_bytes": cost.down_bytes,
                    "up_bytes": cost.up_bytes,
                    "published": published(label, family)
                    if data == "cifar100"
                    else None,
                }
            )
    return records


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_string("data", "cifar100", "cifar10 or cifar100.")
    flags.DEFINE_list("methods", [], "Names of methods; default: all.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    records = measure(flags.FLAGS.data, flags.FLAGS.methods)
    print(text_table(records, COLUMNS))
    round_time.write(flags.FLAGS.json, records)
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
