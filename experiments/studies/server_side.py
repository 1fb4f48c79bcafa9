"""Server-side hypernetworks and their competitors over seeds: the results tables.

python -m experiments.studies.server_side --study=pfedhn --workdir=runs/server_side \
    --data_dir=... [--methods=pFedHN,Local] [--seeds=0,1,2] [--json=FILE]

pfedhn: CIFAR-10 at 16x16, 10 clients with two classes each (arXiv:2103.04628, table 1),
  1,000 visits of one client, about 100 of each, where the paper has 5,000; a visit is
  50 local steps. Where all clients take part in a round there are 100 rounds.
families: two MLPs and a CNN over Fashion-MNIST at 14x14, 20 clients with two classes
  each (arXiv:2507.22330's protocol, but for `class_shares`, which deals classes out
  evenly), 120 rounds of one epoch. Then five clients that were never seen join the runs
  of the methods that can embed them, with known and with new networks.
heads: MH-pFedHN when two of these networks share a head, and when they do not.

A study that was stopped continues. Local training is the published one, the same for
all methods; no learning rate was searched.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from absl import flags

from experiments.studies import grid
from hyperjax import models
from hyperjax.errors import check_choice
from hyperjax.launch import cli, join, outputs
from hyperjax.launch.pages import text_table
from hyperjax.protocols import families, pfedhn

# Study -> label -> method, and fields that differ from the experiment's.
Methods = Mapping[str, tuple[str, dict[str, Any]]]
STUDIES: dict[str, Methods] = {
    "pfedhn": {
        "Local": ("local_only", {}),
        "FedAvg": ("fedavg", {}),
        "FedPer": ("fedper", {}),
        "pFedHN": ("pfedhn", {}),
        "pFedHN-PC": ("pfedhn_pc", {}),
    },
    "families": {
        "Local": ("local_only", {}),
        "LG-FedAvg": ("lg_fedavg", {}),
        "FedProto": ("fedproto", {}),
        "FML": ("fml", {}),
        "pFedHN, slices": ("pfedhn_families", {}),
        "MH-pFedHN": ("mh_pfedhn", {}),
        "MH-pFedHNGD": ("mh_pfedhngd", {}),
    },
    "heads": {
        "shared head": ("mh_pfedhn", {"method.output_size": 16_384}),
        "heads apart": (
            "mh_pfedhn",
            {"method.output_size": 16_384, "method.share_heads": False},
        ),
    },
}
# arXiv:2103.04628, table 1, CIFAR-10 with 10 clients.
PUBLISHED = {
    "Local": 86.46,
    "FedAvg": 51.42,
    "FedPer": 87.27,
    "pFedHN": 90.83,
    "pFedHN-PC": 92.47,
}


class SlimMLP(models.MLP):
    """A network that the package does not have, with as many features as its others."""

    hidden: tuple[int, ...] = (96, 64)


# 25,770, 34,122 and 43,638 parameters for 14x14 pixels and ten classes.
FAMILIES = ("experiments.studies.server_side:SlimMLP", "mh_mlp", "mh_cnn")
NEW_FAMILIES = ("zenkenet", "attack_lenet")
NEWCOMERS = 5
METRICS = ("pacc", "pacc_mean", "best", "vacc")


class Scale(NamedTuple):
    """How small a study is made, and on what; None for the study's own."""

    rounds: int | None = None
    images: int = 10_000
    data: str | None = None
    data_dir: str | None = None


def configure(
    study: str, label: str, seed: int, scale: Scale
) -> ml_collections.ConfigDict:
    """Returns the config of one run."""
    method, fields = STUDIES[study][label]
    if study == "pfedhn":
        config = _with_visits(pfedhn.get_config(method), scale.rounds or 1000)
    else:
        config = families.get_config(method)
        config.families = FAMILIES
        config.rounds, config.evaluation.every = scale.rounds or 120, 10
        config.evaluation.finetune_epochs = (0, 1)
        config.data.update(
            name="fashion_mnist",
            split=f"train[:{scale.images}]",
            shrink=2,
            num_clients=20,
            num_novel=NEWCOMERS,
            partition="class_shares",
            validation_fraction=0.2,
        )
    config.seed, config.data.data_dir = seed, scale.data_dir
    config.tensorboard = False
    if scale.data:
        config.data.update(name=scale.data, split="train", shrink=1)
    config.update_from_flattened_dict(fields)
    return config


def _with_visits(
    config: ml_collections.ConfigDict, visits: int
) -> ml_collections.ConfigDict:
    """The config with so many visits of clients in all."""
    one_by_one = config.server.sampler == "uniform"
    a_round = config.server.cohort_size if one_by_one else config.data.num_clients
    config.rounds = max(1, visits // a_round)
    config.evaluation.every = max(1, config.rounds // 10)
    config.data.shrink = 2
    return config


def row_of(study: str, label: str, found: list[dict | None]) -> dict[str, Any]:
    """Returns the record of one method over seeds."""
    done = [s for s in found if s is not None]
    for summary in done:
        best = summary.get("best_by_validation") or {}
        summary |= {"best": best.get("pacc"), "vacc": best.get("vacc")}
    row: dict[str, Any] = dict(study=study, method=label)
    row["paper"] = PUBLISHED.get(label) if study == "pfedhn" else None
    row["diverged"] = len(found) - len(done)
    if not done:
        return row
    tuned = [k for k in done[0] if k.startswith(("zacc_ft", "pacc_ft"))]
    row |= grid.over_seeds(done, [*METRICS, "zacc", *tuned])
    for way in ("up_bytes", "down_bytes"):  # of an exchange, over all clients
        row[way] = round(done[0][way])
    row["families"] = done[0].get("families")
    row["per_seed"] = [s["pacc"] for s in done]
    row["seconds"] = [s["seconds"] for s in done]
    row["commits"] = grid.commits(done)
    return row


def rows_of(
    study: str, label: str, root: Path, seeds: list[int], scale: Scale
) -> list[dict]:
    """Runs one method over seeds, and newcomers after it."""
    name = f"{study}_{grid.short(label)}"
    folders = [root / f"{name}_{seed}" for seed in seeds]
    pairs = list(zip(seeds, folders, strict=True))
    found = [
        grid.result(configure(study, label, seed, scale), folder)
        for seed, folder in pairs
    ]
    rows = [row_of(study, label, found)]
    if study != "families" or not label.startswith(("pFedHN", "MH-pFedHN")):
        return rows
    if label == "MH-pFedHNGD":  # its server teaches no newcomers, as published
        return rows
    kinds: dict[str, list[str] | None] = {"newcomers, embedding": None}
    if label == "MH-pFedHN":
        kinds["newcomers with new networks, heads too"] = list(NEW_FAMILIES)
    for kind, networks in kinds.items():
        joined = []
        for (_, folder), summary in zip(pairs, found, strict=True):
            if summary is None:
                continue
            config = join.joining(str(folder), networks)
            there = folder.with_name(f"{folder.name}_{grid.short(kind)}")
            joined.append(grid.result(config, there))
        rows.append(row_of(study, f"{label}: {kind}", joined))
    return rows


def main(
    workdir: str,
    study: str,
    scale: Scale,
    methods: Sequence[str],
    seeds: Sequence[str],
    json: str | None,
) -> int:
    """Runs a study; prints and writes its table."""
    cli.use_cores(0)
    check_choice("study", study, STUDIES)
    labels = methods or list(STUDIES[study])
    for label in labels:
        check_choice("methods", label, STUDIES[study])
    numbers = grid.whole_numbers("seeds", seeds)
    root = outputs.folder("workdir", workdir)
    file = outputs.files(json=json).get("json")
    settings = scale._asdict() | {"data_dir": None}  # says nothing to others
    record = grid.record(study=study, seeds=numbers, **settings)
    for label in labels:
        record["rows"] += rows_of(study, label, root, numbers, scale)
        grid.write(record, file)
    print(as_text(record))
    return 0


COLUMNS = (
    ("method", "method"),
    ("paper", "paper"),
    ("pacc", "last round"),
    ("best", "best by validation"),
    ("pacc_mean", "mean of clients"),
    ("zacc_ft0", "unseen"),
    ("zacc_ft1", "unseen, 1 epoch"),
    ("up_bytes", "bytes up"),
)


def as_text(record: Mapping[str, Any]) -> str:
    """Returns the table: mean and deviation over seeds."""
    rows = [
        {k: grid.shown(row.get(k)) for k, _ in COLUMNS} | {"method": grid.named(row)}
        for row in record["rows"]
    ]
    return text_table(rows, COLUMNS)


if __name__ == "__main__":
    _STUDY = flags.DEFINE_string("study", "pfedhn", "pfedhn, families or heads.")
    _WORKDIR = cli.define_path("workdir", "runs/server_side", "Folder of runs.")
    _DATA = flags.DEFINE_string("data", None, "Another data set, for a try.")
    _DATA_DIR = cli.define_path("data_dir", None, "Folder of prepared TFDS sets.")
    _METHODS = flags.DEFINE_list("methods", [], "Labels of methods; default: all.")
    _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    _ROUNDS = flags.DEFINE_integer("rounds", None, "Rounds (pfedhn: visits).")
    _IMAGES = flags.DEFINE_integer("images", 10_000, "Images, for families and heads.")
    _JSON = cli.define_path("json", None, "File for the results.")
    cli.run(
        grid.guarded(
            lambda: main(
                _WORKDIR.value,
                _STUDY.value,
                Scale(_ROUNDS.value, _IMAGES.value, _DATA.value, _DATA_DIR.value),
                _METHODS.value,
                _SEEDS.value,
                _JSON.value,
            )
        )
    )
