"""HyperFedNet and the client-side methods over seeds: accuracy against communication.

python -m experiments.studies.personalised --workdir=runs/personalised --data_dir=... \
    [--data=mnist,fashion_mnist] [--methods=FedAvg,HFN] [--seeds=0,1,2] [--json=FILE]

HyperFedNet's experiment (`protocols.personalised`) at a size for two cores: see
`scaled`. Every method gets the same budget and the same search for its learning rate,
among `--rates`, by participants' accuracy after fine-tuning on another seed's
federation of the first data set; the seeds reported choose nothing. A single rate is
taken as it is. A study that was stopped continues.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import flags

from experiments.studies import grid
from hyperjax.errors import check_choice
from hyperjax.launch import cli, outputs
from hyperjax.launch.pages import text_table
from hyperjax.protocols import personalised as experiment
from hyperjax.runs import reach

RATES = (0.1, 0.03, 0.01)
SEARCH_SEED = 100
THRESHOLDS = (30, 40, 50, 60, 70, 80, 90)
TUNED = 4  # epochs of fine-tuning, as published
# Label -> method under the experiment, and fields that differ from it.
HFN = "hyperfednet"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "Centre": ("centre", {}),
    "Local": ("local_only", {}),
    "FedAvg": ("fedavg_ft", {}),
    "FedProx": ("fedprox", {}),
    "FedDyn": ("feddyn", {}),
    "SCAFFOLD": ("scaffold", {}),
    "FedNova": ("fednova", {}),
    "FedAvgM": ("fedavgm", {}),
    "FedAdagrad": ("fedadagrad", {}),
    "FedAdam": ("fedadam", {}),
    "FedYogi": ("fedyogi", {}),
    "FedPer": ("fedper", {}),
    "FedRep": ("fedrep", {}),
    "FedBABU": ("fedbabu", {}),
    "FedBN": ("fedbn", {}),
    "LG-FedAvg": ("lg_fedavg", {}),
    "Ditto": ("ditto", {}),
    "APFL": ("apfl", {}),
    "pFedMe": ("pfedme", {}),
    "Per-FedAvg": ("perfedavg", {}),
    "MOON": ("moon", {}),
    "FedGen": ("fedgen", {}),
    "pFedSim": ("pfedsim", {}),
    "pFedLA": ("pfedla", {}),
    "FedFomo": ("fedfomo", {}),
    "FedAMP": ("fedamp", {}),
    "HFN": (HFN, {}),
    "HFN aux shared": (
        HFN,
        {"method.share_aux": "convs_and_bn", "method.bn_stats": "average"},
    ),
    "HFN+FedBN": (HFN, {"method.share_aux": "convs"}),
    "HFN+FedProx": (HFN, {"method.base": "fedprox(mu=0.1)"}),
    "HFN+FedDyn": (
        HFN,
        {
            "method.base": "feddyn(alpha=0.01)",
            "server.weights": "uniform",
            "local.clip_norm": 10.0,
        },
    ),
    "HFN+SCAFFOLD": (HFN, {"method.base": "scaffold", "server.weights": "uniform"}),
    "HFN+Ditto": (HFN, {"method.base": "ditto(lam=1.0)"}),
    "HFN+pFedLA": (HFN, {"method.base": "pfedla", "server.sequential": True}),
    "HFN+FedFomo": (HFN, {"method.base": "fedfomo"}),
}
# arXiv:2402.18445, table II: after fine-tuning, (non-iid, iid); table IV for fusions.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "mnist": {
        "Centre": (99.49, 99.49),
        "FedAvg": (98.67, 98.96),
        "Local": (94.82, 93.35),
        "FedBABU": (98.94, 98.81),
        "FedProx": (98.85, 99.04),
        "FedDyn": (98.73, 99.01),
        "FedPer": (99.05, 98.84),
        "FedBN": (99.14, 98.94),
        "FedRep": (98.10, 98.01),
        "FedGen": (97.63, 98.18),
        "pFedSim": (98.92, 99.01),
        "pFedLA": (98.40, 98.49),
        "FedFomo": (93.95, 92.02),
        "HFN": (97.91, 98.59),
        "HFN+FedProx": (97.95, 98.49),
        "HFN+FedDyn": (97.91, 98.46),
        "HFN+FedBN": (98.28, 97.65),
        "HFN+pFedLA": (98.02, 98.28),
        "HFN+FedFomo": (97.90, 98.49),
    },
    "fashion_mnist": {
        "Centre": (93.6, 93.6),
        "FedAvg": (92.40, 90.12),
        "Local": (86.94, 76.74),
        "FedBABU": (94.12, 91.04),
        "FedProx": (93.10, 90.39),
        "FedDyn": (93.20, 90.64),
        "FedPer": (92.36, 89.59),
        "FedBN": (91.64, 89.74),
        "FedRep": (92.36, 87.18),
        "FedGen": (91.78, 89.36),
        "pFedSim": (92.41, 90.47),
        "pFedLA": (92.78, 88.64),
        "FedFomo": (86.09, 76.06),
        "HFN": (93.33, 91.64),
        "HFN+FedProx": (93.35, 91.41),
        "HFN+FedDyn": (92.86, 91.86),
        "HFN+FedBN": (90.75, 90.97),
        "HFN+pFedLA": (93.00, 91.77),
        "HFN+FedFomo": (92.58, 91.59),
    },
    "cifar10": {
        "Centre": (84.78, 84.78),
        "FedAvg": (69.95, 62.12),
        "Local": (57.05, 30.45),
        "FedBABU": (73.34, 64.39),
        "FedProx": (69.89, 60.88),
        "FedDyn": (67.76, 61.60),
        "FedPer": (72.67, 62.63),
        "FedBN": (69.16, 33.77),
        "FedRep": (75.44, 65.59),
        "FedGen": (67.06, 62.75),
        "pFedSim": (70.45, 65.66),
        "pFedLA": (66.18, 56.98),
        "FedFomo": (56.29, 24.85),
        "HFN": (76.78, 77.95),
        "HFN+FedProx": (78.03, 77.86),
        "HFN+FedDyn": (77.06, 77.98),
        "HFN+FedBN": (69.32, 70.44),
        "HFN+pFedLA": (77.10, 77.15),
        "HFN+FedFomo": (73.48, 75.08),
    },
}


class Scale(NamedTuple):
    """How small the experiment is made."""

    rounds: int = 30
    images: int = 2500
    batch_size: int = 32
    shrink: int = 2
    embedding_size: int = 64
    data_dir: str | None = None


def scaled(
    label: str, data: str, iid: bool, seed: int, learning_rate: float, scale: Scale
) -> ml_collections.ConfigDict:
    """Returns the config of one run.

    20 users and 5 unseen ones on images shrunk by two (14x14, or 16x16), 2,500 by
    default: about 80 each to train on and 20 to be scored on. The 8-layer network, 5
    users a round, milestones after a third and two thirds of the rounds.
    """
    method, fields = METHODS[label]
    config = experiment.get_config(
        f"{method},data={data},novel=5" + (",iid" if iid else "")
    )
    config.seed, config.rounds, config.model.name = seed, scale.rounds, "resnet8"
    config.data.update(
        data_dir=scale.data_dir,
        split=f"train[:{scale.images}]",
        num_clients=20,
        shrink=scale.shrink,
    )
    if data == "mnist5k":
        config.data.split = "train"
    config.local.update(
        batch_size=scale.batch_size,
        learning_rate=learning_rate,
        milestones=(1 / 3, 2 / 3),
    )
    config.evaluation.update(every=2, finetune_epochs=(0, TUNED))
    config.tensorboard = False
    config.update_from_flattened_dict(fields)
    if config.method.name == "hyperfednet":
        config.method.embedding_size = scale.embedding_size
    return config


def search(
    label: str, data: str, scale: Scale, root: Path, rates: Sequence[float] = RATES
) -> dict[float, float | None]:
    """Returns accuracy after fine-tuning by learning rate, on a federation apart."""
    if len(rates) == 1:
        return {rates[0]: None}
    found: dict[float, float | None] = {}
    for rate in rates:
        config = scaled(label, data, False, SEARCH_SEED, rate, scale)
        summary = grid.result(config, root / f"{grid.short(label)}_rate{rate}")
        found[rate] = summary[f"pacc_ft{TUNED}"] if summary else None
    return found


def row_of(
    label: str, data: str, iid: bool, rates: Mapping, summaries: Sequence[Any]
) -> dict[str, Any]:
    """Returns the record of one method on one federation over seeds."""
    done = [s for s in summaries if s is not None]
    row: dict[str, Any] = dict(
        data=data,
        partition="iid" if iid else "Dirichlet(0.5)",
        method=label,
        learning_rate=grid.best(rates),
        search={str(rate): value for rate, value in rates.items()},
        paper=PUBLISHED.get(data, {}).get(label, (None, None))[int(iid)],
        diverged=len(summaries) - len(done),
    )
    if not done:
        return row
    first = done[0]
    keys = [f"{m}_ft{k}" for m in ("pacc", "zacc") for k in (0, TUNED)]
    row |= grid.over_seeds(done, [*keys, f"pacc_ft{TUNED}_mean"])
    row["cpr"] = first["up_numbers"] + first["down_numbers"]
    # NaN where a seed has no accuracy.
    every = np.array([list(s["curve"].values()) for s in done], float).mean(0).tolist()
    curve = {int(t): x for t, x in zip(first["curve"], every, strict=True)}
    row["reach"] = [r._asdict() for r in reach.of_curve(curve, row["cpr"], THRESHOLDS)]
    row["curve"] = {t - 1: round(x, 2) for t, x in curve.items()}
    row["per_seed"] = [s[f"pacc_ft{TUNED}"] for s in done]
    row["seconds"] = [s["seconds"] for s in done]
    row["commits"] = grid.commits(done)
    return row


def main(
    workdir: str,
    scale: Scale,
    data_sets: Sequence[str],
    partitions: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[str],
    rates: Sequence[str],
    json: str | None,
) -> int:
    """Runs the grid; prints and writes the table."""
    cli.use_cores(0)
    labels = methods or list(METHODS)
    for label in labels:
        check_choice("methods", label, METHODS)
    for name in partitions:
        check_choice("partitions", name, ("dirichlet", "iid"))
    for name in data_sets:
        check_choice("data", name, experiment.PRESETS)
    numbers = grid.whole_numbers("seeds", seeds)
    tried = grid.positive_numbers("rates", rates)
    root = outputs.folder("workdir", workdir)
    file = outputs.files(json=json).get("json")
    record = grid.record(
        **scale._asdict(), seeds=numbers, rates=tried, search_seed=SEARCH_SEED
    )
    del record["settings"]["data_dir"]  # says nothing to others
    first = data_sets[0]
    searched = {label: search(label, first, scale, root, tried) for label in labels}
    parts = [name == "iid" for name in partitions]
    for data, iid in itertools.product(data_sets, parts):
        for label, found in searched.items():
            name = f"{grid.short(label)}_{data}_{'iid' if iid else 'dir'}"
            summaries = [
                grid.result(
                    scaled(label, data, iid, seed, grid.best(found), scale),
                    root / f"{name}_{seed}",
                )
                for seed in numbers
            ]
            record["rows"].append(row_of(label, data, iid, found, summaries))
            grid.write(record, file)
    print(as_text(record))
    return 0


COLUMNS = (
    ("data", "data"),
    ("partition", "partition"),
    ("method", "method"),
    ("learning_rate", "rate"),
    ("paper", "paper"),
    (f"pacc_ft{TUNED}", "tuned"),
    ("pacc_ft0", "before"),
    (f"zacc_ft{TUNED}", "unseen, tuned"),
    ("zacc_ft0", "unseen, before"),
    ("cpr", "numbers/round"),
    ("reached", "millions to 50 %"),
)


def as_text(record: Mapping[str, Any]) -> str:
    """Returns the table: mean and deviation over seeds."""
    rows = []
    for row in record["rows"]:
        shown = {k: grid.shown(row.get(k)) for k, _ in COLUMNS}
        shown["method"] = grid.named(row)
        for r in row.get("reach", ()):
            if r["threshold"] == 50 and r["cost"] is not None:
                least, most = (f"{r[k] / 1e6:.2f}" for k in ("least_cost", "cost"))
                shown["reached"] = most if least == most else f"{least} to {most}"
        rows.append(shown)
    rows.sort(key=lambda row: (row["data"], row["partition"]))
    return (
        f"{text_table(rows, COLUMNS)}\n\nmillions to 50 %: as if reached in the round "
        "after the last evaluation that was below,\nto the first that was not."
    )


if __name__ == "__main__":
    _WORKDIR = cli.define_path("workdir", "runs/personalised", "Folder of runs.")
    _DATA = flags.DEFINE_list("data", ["mnist", "fashion_mnist"], "Data sets.")
    _PARTITIONS = flags.DEFINE_list("partitions", ["dirichlet", "iid"], "Partitions.")
    _DATA_DIR = cli.define_path("data_dir", None, "Folder of prepared TFDS sets.")
    _METHODS = flags.DEFINE_list("methods", [], "Labels of methods; default: all.")
    _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    _RATES = flags.DEFINE_list("rates", [str(r) for r in RATES], "Learning rates.")
    _ROUNDS = flags.DEFINE_integer("rounds", 30, "Rounds.")
    _IMAGES = flags.DEFINE_integer("images", 2500, "Images of the training split.")
    _BATCH = flags.DEFINE_integer("batch_size", 32, "Images of a batch.")
    _SHRINK = flags.DEFINE_integer("shrink", 2, "Factor by which images shrink.")
    _EMBEDDING = flags.DEFINE_integer("embedding_size", 64, "Of HyperFedNet.")
    _JSON = cli.define_path("json", None, "File for the results.")
    cli.run(
        grid.guarded(
            lambda: main(
                _WORKDIR.value,
                Scale(
                    rounds=_ROUNDS.value,
                    images=_IMAGES.value,
                    batch_size=_BATCH.value,
                    shrink=_SHRINK.value,
                    embedding_size=_EMBEDDING.value,
                    data_dir=_DATA_DIR.value,
                ),
                data_sets=_DATA.value,
                partitions=_PARTITIONS.value,
                methods=_METHODS.value,
                seeds=_SEEDS.value,
                rates=_RATES.value,
                json=_JSON.value,
            )
        )
    )
