r"""HyperFedNet's studies (arXiv:2402.18445): tables II to IV, figures 4, 5 and 7.

hyperjax sweep --config=experiments/studies/hyperfednet.py:data=mnist5k \
    --workdir=runs/table_iv --sweep=table_iv --sweep='seed=0..2' \
    --tune='local.learning_rate=0.1,0.03,0.01' --by=pacc_ft4 --tune_seed=100
hyperjax sweep --config=experiments/studies/hyperfednet.py:scale=paper,data=cifar10 \
    --config.data.data_dir=... --workdir=runs/table_ii --sweep=table_ii \
    --sweep='seed=0..2'

Figure 4 is `figures/curves_round` and `curves_bytes` of table_ii's folder, figure 5 the
picture beside the record of `similarity`, figure 6 `studies.gradient_inversion`, and
figure 7 `figures/by_method_embedding_size` of embedding_size's folder. The small scale
has 20 users and 5 unseen ones on images shrunk by two, the 8-layer network for all
sets, 5 users a round and 30 rounds; of sets larger than `mnist5k` 2,500 images. Every
method has the same budget and the same search of its learning rate.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.studies.study import (
    Group,
    Place,
    Rows,
    Study,
    Values,
    add_rows,
    scale_of,
)
from hyperjax import tree
from hyperjax.data import picture
from hyperjax.engine import families, log
from hyperjax.engine.checkpoint import read_json
from hyperjax.launch import saved, workdir
from hyperjax.protocols import personalised
from hyperjax.types import Cohort

EPOCHS = 4  # of fine-tuning, as published
TUNED = f"pacc_ft{EPOCHS}"
HFN = {"method.name": "hyperfednet"}
TABLE_II: Rows = {
    "Centre": {"method.name": "centre"},
    "FedAvg": {"method.name": "fedavg"},
    "Local": {"method.name": "local_only"},
    "FedBABU": {"method.name": "fedbabu"},
    "FedProx": {"method.name": "fedprox"},
    "FedGen": {"method.name": "fedgen"},
    "FedDyn": {"method.name": "feddyn"},
    "pFedSim": {"method.name": "pfedsim"},
    "FedPer": {"method.name": "fedper"},
    "FedBN": {"method.name": "fedbn"},
    "FedRep": {"method.name": "fedrep"},
    "pFedLA": {"method.name": "pfedla"},
    "FedFomo": {"method.name": "fedfomo"},
    "HFN": HFN,
}
# HyperFedNet is FedAvg of the generator already; the paper has two rows of it.
FUSIONS: Rows = {
    "HFN": HFN,
    "HFN+FedProx": {**HFN, "method.base": "fedprox(mu=0.1)"},
    "HFN+FedDyn": {
        **HFN,
        "method.base": "feddyn(alpha=0.01)",
        "server.weights": "uniform",
        "local.clip_norm": 10.0,
    },
    "HFN+FedBN": {**HFN, "method.share_aux": "convs"},
    "HFN+pFedLA": {**HFN, "method.base": "pfedla", "server.sequential": True},
    "HFN+FedFomo": {**HFN, "method.base": "fedfomo"},
}
# Beyond the paper: other methods, and what else could be shared.
OTHERS: Rows = {
    "SCAFFOLD": {"method.name": "scaffold"},
    "FedNova": {"method.name": "fednova"},
    "FedAvgM": {"method.name": "fedavgm"},
    "FedAdagrad": {"method.name": "fedadagrad"},
    "FedAdam": {"method.name": "fedadam"},
    "FedYogi": {"method.name": "fedyogi"},
    "LG-FedAvg": {"method.name": "lg_fedavg"},
    "Ditto": {"method.name": "ditto"},
    "APFL": {"method.name": "apfl"},
    "pFedMe": {"method.name": "pfedme"},
    "Per-FedAvg": {"method.name": "perfedavg"},
    "MOON": {"method.name": "moon"},
    "FedAMP": {"method.name": "fedamp"},
    "HFN aux shared": {
        **HFN,
        "method.share_aux": "convs_and_bn",
        "method.bn_stats": "average",
    },
    "HFN+SCAFFOLD": {
        **HFN,
        "method.base": "scaffold",
        "server.weights": "uniform",
    },
    "HFN+Ditto": {**HFN, "method.base": "ditto(lam=1.0)"},
}
ALL: Rows = {**TABLE_II, **FUSIONS, **OTHERS}
UNFUSED = {
    "HFN": "FedAvg",
    "HFN+FedProx": "FedProx",
    "HFN+FedDyn": "FedDyn",
    "HFN+FedBN": "FedBN",
    "HFN+pFedLA": "pFedLA",
    "HFN+FedFomo": "FedFomo",
}
SIZES: Rows = {
    f"n = {n}": {**HFN, "method.embedding_size": n}
    for n in (1, 2, 4, 8, 16, 32, 64, 128)
}
PARTITIONS = ("dirichlet", "iid")
SETS = ("mnist", "fashion_mnist", "cifar10", "cifar100")

# Table II, after fine-tuning: non-iid and iid of each of `SETS`.
_ACCURACIES = {
    "Centre": (99.49, 99.49, 93.6, 93.6, 84.78, 84.78, 54.78, 54.78),
    "FedAvg": (98.67, 98.96, 92.40, 90.12, 69.95, 62.12, 33.85, 33.67),
    "Local": (94.82, 93.35, 86.94, 76.74, 57.05, 30.45, 20.15, 6.98),
    "FedBABU": (98.94, 98.81, 94.12, 91.04, 73.34, 64.39, 43.79, 36.67),
    "FedProx": (98.85, 99.04, 93.10, 90.39, 69.89, 60.88, 31.14, 34.17),
    "FedGen": (97.63, 98.18, 91.78, 89.36, 67.06, 62.75, 26.32, 16.06),
    "FedDyn": (98.73, 99.01, 93.20, 90.64, 67.76, 61.60, 29.23, 34.37),
    "pFedSim": (98.92, 99.01, 92.41, 90.47, 70.45, 65.66, 43.74, 37.3),
    "FedPer": (99.05, 98.84, 92.36, 89.59, 72.67, 62.63, 31.15, 17.1),
    "FedBN": (99.14, 98.94, 91.64, 89.74, 69.16, 33.77, 35.39, 32.08),
    "FedRep": (98.10, 98.01, 92.36, 87.18, 75.44, 65.59, 28.77, 12.38),
    "pFedLA": (98.40, 98.49, 92.78, 88.64, 66.18, 56.98, 29.54, 26.17),
    "FedFomo": (93.95, 92.02, 86.09, 76.06, 56.29, 24.85, 17.71, 12.02),
    "HFN": (97.91, 98.59, 93.33, 91.64, 76.78, 77.95, 47.92, 45.6),
}
# Table IV, points gained over the method that is fused; HFN's row is HFN+FedAvg's.
_GAINS = {
    "HFN": (-1.02, -0.75, 0.98, 1.41, 13.38, 15.33, 13.13, 13.63),
    "HFN+FedProx": (-0.90, -0.55, 0.25, 1.02, 8.14, 16.98, 16.19, 12.51),
    "HFN+FedDyn": (-0.82, -0.55, -0.34, 1.22, 9.30, 16.38, 18.18, 11.67),
    "HFN+FedBN": (-0.86, -1.29, -0.89, 1.23, 0.16, 36.67, 4.58, 5.29),
    "HFN+pFedLA": (-0.38, -0.21, 0.22, 3.13, 10.92, 20.17, 16.52, 19.51),
    "HFN+FedFomo": (3.95, 6.47, 6.49, 15.53, 17.19, 50.23, 20.87, 28.54),
}
# Table IV, communication up to the final accuracy, % of the unfused method's. Those of
# CIFAR-100 were counted with the prices of CIFAR-10, it seems.
_COMMUNICATION = {
    "HFN": (15.15, 13.46, 50.14, 61.29, 51.95, 74.60, 78.80, 48.98),
    "HFN+FedProx": (18.27, 19.41, 54.32, 71.31, 78.88, 50.55, 164.75, 48.98),
    "HFN+FedDyn": (22.08, 18.55, 60.64, 50.14, 140.62, 70.93, 172.58, 51.34),
    "HFN+FedBN": (18.40, 12.84, 71.45, 50.14, 51.07, 94.83, 158.78, 49.55),
    "HFN+pFedLA": (12.00, 15.86, 54.32, 71.31, 119.78, 50.14, 152.66, 34.52),
    "HFN+FedFomo": (24.43, 32.10, 21.88, 35.00, 71.62, 33.12, 34.04, 11.40),
}
# Table III, CIFAR-10 dealt out evenly: millions of numbers to 10, 20, ... 70 %.
REACHED = range(10, 80, 10)
_COSTS = {
    "HFN": (0.00, 1.13, 7.92, 10.75, 15.84, 23.19, 35.63),
    "FedAvg": (1.13, 5.64, 15.79, 46.24, 46.24, 91.36, None),
    "FedBABU": (1.13, 2.25, 7.89, 25.91, 46.19, 46.19, None),
    "FedProx": (1.13, 14.66, 46.24, 46.24, 72.18, 92.48, None),
    "FedGen": (1.13, 28.29, 39.60, 46.39, 89.38, 91.65, None),
    "FedDyn": (1.13, 3.38, 14.66, 34.96, 46.24, 91.36, None),
    "pFedSim": (1.13, 5.64, 15.79, 46.24, 46.24, 109.40, None),
    "FedPer": (1.13, 6.76, 16.90, 28.16, 46.19, 91.25, None),
    "FedBN": (1.13, 4.51, 15.79, 46.24, 46.24, 91.36, None),
    "FedRep": (0.00, 9.01, 15.77, 40.56, 78.86, None, None),
    "pFedLA": (0.00, 16.92, 27.07, 46.24, 91.36, None, None),
    "FedFomo": (0.00, 15.79, 35.53, 221.06, 307.91, None, None),
}


# Numbers per round trip by n, of the 8-layer network: in the text on figure 7, and from
# table III.
_ROUND_TRIPS = {1: 640, 128: 565_536}


def by_set(metric: str, rows: dict[str, tuple]) -> dict[Place, Values]:
    """Returns {(data set, partition, label): {metric: value}} of rows as printed."""
    places = [(data, partition) for data in SETS for partition in PARTITIONS]
    return {
        (*place, label): {metric: value}
        for label, values in rows.items()
        for place, value in zip(places, values, strict=True)
    }


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """scale, and METHOD, data, clients, novel, iid, alpha, smoke."""
    scale, arg = scale_of(arg)
    config = personalised.get_config(arg)
    config.evaluation.every = 1  # costs are known to the round
    config.evaluation.finetune_epochs = (0, EPOCHS)
    config.evaluation.thresholds = tuple(range(10, 100, 10))
    config.tensorboard = False
    if scale == "small":
        if config.rounds != 2:  # smoke
            config.rounds = 30
        if config.data.name != "digits":
            config.model.name = "resnet8"
            config.data.shrink = 2
        if config.data.name not in ("digits", "mnist5k"):
            config.data.split = "train[:2500]"
        config.data.update(num_clients=20, num_novel=5)
        config.local.update(batch_size=32, milestones=(1 / 3, 2 / 3))
        config.evaluation.every = 2
        if config.method.name == "hyperfednet":
            config.method.embedding_size = 64
    return config


def sweep_table_ii(add, partition=None):
    """The paper's methods; `table_ii:iid` is half of it."""
    for name in [partition] if partition else PARTITIONS:
        add_rows(add, TABLE_II, **{"data.partition": name})


def sweep_all(add, partition=None):
    """Every method that takes HyperFedNet's place, and every fusion."""
    for name in [partition] if partition else PARTITIONS:
        add_rows(add, ALL, **{"data.partition": name})


def sweep_table_iii(add):
    """What it costs to reach an accuracy, evenly dealt out."""
    add_rows(add, TABLE_II, _COSTS, **{"data.partition": "iid"})


def sweep_table_iv(add, partition=None):
    """Methods, and HyperFedNet fused with them."""
    for name in [partition] if partition else PARTITIONS:
        for fused, alone in UNFUSED.items():
            add_rows(add, ALL, (alone, fused), **{"data.partition": name})


def sweep_similarity(add):
    """20 users in five groups, who alone have two classes (CIFAR-100: ten)."""
    add(
        {
            **HFN,
            "data.partition": "groups",
            "data.num_groups": 5,
            "data.num_clients": 20,
            "data.num_novel": 0,
            "server.sampler": "full",
        }
    )


def sweep_embedding_size(add, partition=None):
    """n, dealt out unevenly and evenly."""
    for name in [partition] if partition else PARTITIONS:
        add_rows(add, SIZES, **{"data.partition": name})


# What runs do not say themselves ----------------------------------------------------


def spent(folder: Path) -> Values:
    """Returns what a participant had sent and received in all, and by the end.

    `round_trip` are the numbers of one; `to_final`, in millions, those until the
    accuracy of the last round was first met, of which the first round is the first.
    """
    curve = [
        (record["round"], record["pacc"])
        for record in log.read_lines(folder / log.METRICS)
        if record["round"] > 0 and record["pacc"] is not None
    ]
    summary = read_json(folder / workdir.SUMMARY, workdir.AGAIN)
    numbers = summary["up_numbers"] + summary["down_numbers"]
    final = curve[-1][1]
    first = next(round for round, accuracy in curve if accuracy >= final)
    found = {"round_trip": numbers, "to_final": first * numbers / 1e6}
    for reach in summary["reach"]:
        found[f"to_{reach['threshold']:g}"] = reach["cost"] / 1e6
    return found


def fused(found: dict[Group, dict[int, Values]]) -> None:
    """Adds table IV's columns: points gained, and what was sent in % of the other."""
    for (label, rest), seeds in found.items():
        alone = found.get((UNFUSED.get(label, ""), rest), {})
        for seed, values in seeds.items():
            if seed not in alone:
                continue
            other = alone[seed]
            values["gain"] = values[TUNED] - other[TUNED]
            if other["to_final"]:
                values["communication"] = 100 * values["to_final"] / other["to_final"]


def similarity(folder: Path) -> Values:
    """Returns how alike the generated parameters of users are, see `alike`.

    Cosines of all generated kernels together, as figure 5 has them; "centred": after
    the mean over users, which is the same for all, is taken off; "embeddings": of what
    they are generated from.
    """
    kernels, embeddings, groups = generated(folder)
    found = alike(cosines(kernels), groups)
    for name, rows in (
        ("centred", kernels - kernels.mean(0)),
        ("embeddings", embeddings - embeddings.mean(0)),
    ):
        values = alike(cosines(rows), groups)
        found |= {f"{name}_{k}": v for k, v in values.items()}
    return found


def generated(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns users' generated kernels and embeddings, [N, numbers], and groups [N]."""
    run = saved.load(str(folder))
    alg, carry = run.algorithm, run.restored.carry
    rows, num = carry.rows[families.ALONE], run.config.data.num_clients
    ones = jnp.ones(num)
    cohort = Cohort(
        jnp.arange(num), ones, ones, jnp.int32(run.restored.round), jnp.float32(num)
    )
    down = alg.server.downlink(jax.random.key(0), carry.server, cohort)

    def network(client):
        """Its kernels by path, and its embeddings."""
        variables = alg.client.deploy(down, client)
        whole = tree.by_path(alg.client.model.serve.export(variables)["params"])
        embeddings = variables["params"]["embed"]
        return {path: whole[path] for path in embeddings}, embeddings

    def flat(rows):
        return np.hstack(
            [np.reshape(leaf, (num, -1)) for leaf in jax.tree.leaves(rows)]
        )

    kernels, embeddings = jax.vmap(network)(rows)
    groups = np.arange(num) // (num // run.config.data.num_groups)
    return flat(kernels), flat(embeddings), groups


def heat_map(folders: Sequence[Path]) -> str:
    """Returns figure 5, cosines of every two users' generated kernels, as SVG text.

    Means over the runs; on the right after the mean over users is taken off.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every = [generated(folder)[0] for folder in folders]
    plain = np.mean([cosines(rows) for rows in every], axis=0)
    centred = np.mean([cosines(rows - rows.mean(0)) for rows in every], axis=0)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, values, title in zip(
        figure.subplots(1, 2),
        (plain, centred),
        ("generated parameters", "without the mean over users"),
        strict=True,
    ):
        shown = axis.imshow(values, cmap="cividis", interpolation="none")
        axis.set(title=title, xlabel="user", ylabel="user")
        axis.set(xticks=range(0, len(values), 4), yticks=range(0, len(values), 4))
        figure.colorbar(shown, ax=axis, label="cosine")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return picture.figure_svg(figure)


def cosines(rows: np.ndarray) -> np.ndarray:
    """Returns the cosine of every two rows, [N, N]."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def alike(cosine: np.ndarray, groups: np.ndarray, draws: int = 9_999) -> Values:
    """Returns mean cosines within and between groups, and how chance would do.

    Args:
      cosine: [N, N].
      groups: [N], who belongs together.
      draws: of the permutation test, in which users are put into groups at random.

    Returns:
      "within", "between", their difference "gap", and "p", the share of all draws, the
      true one among them, with a gap as large.
    """
    others = ~np.eye(len(groups), dtype=bool)

    def gap(labels):
        same = labels[:, None] == labels[None]
        return cosine[same & others].mean(), cosine[~same].mean()

    within, between = gap(groups)
    rng = np.random.default_rng(0)
    drawn = [np.subtract(*gap(rng.permutation(groups))) for _ in range(draws)]
    larger = np.sum(np.array(drawn) >= within - between - 1e-12)
    return dict(
        within=float(within),
        between=float(between),
        gap=float(within - between),
        p=float((larger + 1) / (draws + 1)),
    )


SCORES = {
    TUNED: "tuned",
    f"{TUNED}_mean": "mean of clients",
    "pacc_ft0": "before",
    f"zacc_ft{EPOCHS}": "unseen, tuned",
    "round_trip": "numbers per round trip",
}
ALIKE = ("within", "between", "gap", "p")
PUBLISHED = by_set(TUNED, _ACCURACIES)
STUDIES = {
    "table_ii": Study(
        "How good is each user's own model, after fine-tuning?",
        SCORES,
        TABLE_II,
        baseline="FedAvg",
        compared=TUNED,
        published=PUBLISHED,
        measure=spent,
    ),
    "all": Study(
        "How good is each user's own model with any method?",
        SCORES,
        ALL,
        baseline="FedAvg",
        compared=TUNED,
        published=PUBLISHED,
        measure=spent,
    ),
    "table_iii": Study(
        "How many million numbers does an accuracy cost?",
        {"round_trip": "numbers per round trip"}
        | {f"to_{x}": f"to {x} %" for x in REACHED},
        TABLE_II,
        compared="to_50",
        published={
            ("cifar10", "iid", label): {
                f"to_{x}": cost
                for x, cost in zip(REACHED, costs, strict=True)
                if cost is not None
            }
            for label, costs in _COSTS.items()
        },
        measure=spent,
    ),
    "table_iv": Study(
        "What does a method gain by sharing a generator instead of a network?",
        {
            TUNED: "tuned",
            f"{TUNED}_mean": "mean of clients",
            "gain": "points gained",
            "communication": "numbers to the final accuracy, %",
            "to_final": "millions to the final accuracy",
        },
        ALL,
        compared="gain",
        published={
            place: {**gain, **by_set("communication", _COMMUNICATION)[place]}
            for place, gain in by_set("gain", _GAINS).items()
        },
        measure=spent,
        derive=fused,
    ),
    "similarity": Study(
        "Are the parameters generated for users with the same classes alike?",
        {TUNED: "tuned"}
        | {name: name for name in ALIKE}
        | {f"centred_{name}": f"centred: {name}" for name in ALIKE}
        | {f"embeddings_{name}": f"embeddings: {name}" for name in ALIKE},
        {"HFN": HFN},
        measure=similarity,
        picture=heat_map,
    ),
    "embedding_size": Study(
        "How good is how large an embedding, and what does it cost?",
        SCORES,
        SIZES,
        published={
            (*place, f"n = {n}"): {"round_trip": numbers}
            for place in (("cifar10", name) for name in PARTITIONS)
            for n, numbers in _ROUND_TRIPS.items()
        },
        measure=spent,
    ),
}
