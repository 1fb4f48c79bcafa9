"""HyperFedZero, FedAvg and the controls over seeds and skews: the results table.

python -m experiments.studies.study --workdir=runs/study --data=mnist --data_dir=... \
    [--alphas=1.0,0.1] [--seeds=0,1,2] [--rounds=100] [--json=results.json]

FedAvg's own learning rate is chosen per alpha on the participants' held-out samples
(pACC at the first seed); unseen clients never choose anything. A study that was stopped
continues.

pACC and zACC are weighted by samples; the paper's are, as far as is known, means over
clients, so its zACC stands beside that.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags

from experiments.studies import grid
from hyperjax.launch import cli, outputs
from hyperjax.launch.pages import text_table
from hyperjax.protocols import zero_shot

LEARNING_RATES = (0.03, 0.1, 0.3, 1.0)
OWN_RATE = "FedAvg, own learning rate"
METHODS = {
    "FedAvg": "fedavg",
    OWN_RATE: "fedavg",
    "HyperFedZero": "hyperfedzero",
    "constant embedding": "constant_embedding",
    "Opt.1": "opt1",
}
PUBLISHED = {"HyperFedZero": 95.49, "FedAvg": 93.06}  # zACC at alpha 1.0
METRICS = (
    ("gacc", "gACC"),
    ("pacc", "pACC"),
    ("pacc_mean", "pACC, mean"),
    ("zacc", "zACC"),
    ("zacc_mean", "zACC, mean"),
    ("paper", "paper"),
    ("zacc_em", "zACC + EM"),
    ("zacc_oracle", "zACC oracle"),
    ("zacc_swapped", "zACC swapped"),
    ("collapse_novel", "I (nats)"),
    ("zacc_distance", "distance"),
    ("noise_scale", "noise"),
    ("seconds", "seconds"),
)


class Scale(NamedTuple):
    """On what a study is made, and for how long."""

    data: str = "mnist"
    data_dir: str | None = None
    rounds: int = 100


def configure(
    method: str,
    alpha: float,
    seed: int,
    scale: Scale,
    learning_rate: float | None = None,
) -> ml_collections.ConfigDict:
    """Returns the config of one run of the study."""
    config = zero_shot.get_config(f"{method},alpha={alpha}")
    config.seed = seed
    config.rounds = scale.rounds
    config.data.name = scale.data
    config.data.data_dir = scale.data_dir
    config.evaluation.every = min(10, max(1, scale.rounds))
    config.tensorboard = False
    if learning_rate is not None:
        config.local.learning_rate = learning_rate
    return config


def main(
    workdir: str,
    scale: Scale,
    alphas: Sequence[str],
    seeds: Sequence[str],
    json: str | None,
) -> int:
    """Runs the grid; prints and writes the table."""
    cli.use_cores(0)
    numbers = grid.whole_numbers("seeds", seeds)
    skews = grid.positive_numbers("alphas", alphas)
    root = outputs.folder("workdir", workdir)
    file = outputs.files(json=json).get("json")
    record = grid.record(data=scale.data, rounds=scale.rounds, seeds=numbers)
    for alpha in skews:
        rates = {}
        for rate in LEARNING_RATES:
            config = configure("fedavg", alpha, numbers[0], scale, rate)
            summary = grid.result(config, root / f"rate{rate}_a{alpha}")
            rates[rate] = summary["pacc"] if summary else None
        best = grid.best(rates)
        for label, method in METHODS.items():
            own_rate = best if label == OWN_RATE else None
            found = [
                grid.result(
                    configure(method, alpha, seed, scale, own_rate),
                    root / f"{grid.short(label)}_a{alpha}_s{seed}",
                )
                for seed in numbers
            ]
            summaries = [
                {**s, "noise_scale": s["last"].get("noise_scale")} for s in found if s
            ]
            row = dict(
                alpha=alpha,
                method=label,
                learning_rate=own_rate
                or configure(method, alpha, 0, scale).local.learning_rate,
                diverged=len(found) - len(summaries),
                up_numbers=summaries[0]["up_numbers"] if summaries else None,
                published_zacc=PUBLISHED.get(label) if alpha == 1.0 else None,
                **grid.over_seeds(summaries, dict(METRICS)),
                per_seed=[s["zacc"] for s in summaries],
                per_seed_mean=[s["zacc_mean"] for s in summaries],
                seconds_per_seed=[s["seconds"] for s in summaries],
                commits=grid.commits(summaries),
            )
            if label == OWN_RATE:
                row["pacc_by_learning_rate"] = rates
            record["rows"].append(row)
            grid.write(record, file)
    print(as_text(record))
    return 0


def as_text(record: Mapping[str, Any]) -> str:
    """Returns the table, mean and deviation over seeds."""
    rows = [
        dict(alpha=row["alpha"], method=grid.named(row), paper=row["published_zacc"])
        | {k: grid.shown(row[k], ".4g") for k, _ in METRICS if k in row}
        for row in record["rows"]
    ]
    table = text_table(rows, [("alpha", "alpha"), ("method", "method"), *METRICS])
    return (
        f"{table}\n\nAccuracies are weighted by samples but for means over clients "
        '("mean"), which are what\nthe paper\'s zACC is compared with.'
    )


if __name__ == "__main__":
    _WORKDIR = cli.define_path("workdir", "runs/study", "Folder of the runs.")
    _DATA = flags.DEFINE_string("data", "mnist", "Data set.")
    _DATA_DIR = cli.define_path("data_dir", None, "Folder of prepared TFDS sets.")
    _ALPHAS = flags.DEFINE_list("alphas", ["1.0", "0.1"], "Dirichlet parameters.")
    _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    _ROUNDS = flags.DEFINE_integer("rounds", 100, "Rounds.")
    _JSON = cli.define_path("json", None, "File for the results.")
    cli.run(
        grid.guarded(
            lambda: main(
                _WORKDIR.value,
                Scale(_DATA.value, _DATA_DIR.value, _ROUNDS.value),
                _ALPHAS.value,
                _SEEDS.value,
                _JSON.value,
            )
        )
    )
