r"""MH-pFedHN's studies (arXiv:2507.22330): one hypernetwork, clients' own networks.

hyperjax sweep --config=experiments/studies/mh_pfedhn.py --workdir=runs/networks \
    --sweep=networks --sweep='seed=0..2'
hyperjax sweep --config=experiments/studies/mh_pfedhn.py --workdir=runs/newcomers \
    --sweep=newcomers:runs/networks
hyperjax sweep --config=experiments/studies/mh_pfedhn.py:scale=paper,data=cifar10 \
    --config.data.data_dir=... --workdir=runs/lambda_tau --sweep=lambda_tau \
    --sweep='seed=0..2'

The small scale has 20 clients and 5 unseen ones with two classes each on images shrunk
by two, and three networks: two MLPs and a CNN. Local training is the published one, the
same for all methods; no learning rate is searched. The paper's tables were not
available: nothing is published to compare with.
"""

from pathlib import Path

import ml_collections

from experiments.studies.study import Rows, Study, add_rows, scale_of, with_default
from hyperjax import models
from hyperjax.launch import fields, join, saved, workdir
from hyperjax.protocols import common, families


class SlimMLP(models.MLP):
    """A network that the package does not have, with as many features as its others."""

    hidden: tuple[int, ...] = (96, 64)


# 25,770, 34,122 and 43,638 parameters for 14x14 pixels and ten classes.
THREE = ("experiments.studies.mh_pfedhn:SlimMLP", "mh_mlp", "mh_cnn")
NEW = ("zenkenet", "attack_lenet")  # that a run has not met
# With so many outputs two networks have equally many embeddings, and share a head.
WIDE = {"small": 16_384, "paper": 65_536}
ALPHAS = {"small": (0.1, 0.5, 1.0), "paper": (0.01, 0.1, 0.5, 1.0)}

NETWORKS = {
    "Local": {"method.name": "local_only"},
    "LG-FedAvg": {"method.name": "lg_fedavg"},
    "FedProto": {"method.name": "fedproto"},
    "FML": {"method.name": "fml"},
    "pFedHN, slices": {"method.name": "pfedhn_families"},
    "pFedLHN, slices": {"method.name": "pfedlhn"},
    "MH-pFedHN": {"method.name": "mh_pfedhn"},
    "MH-pFedHNGD": {"method.name": "mh_pfedhngd"},
}
TWO = ("MH-pFedHN", "MH-pFedHNGD")
COLUMNS = {
    "pacc": "last round",
    "pacc_mean": "mean of clients",
    "zacc_ft0": "unseen",
    "zacc_ft1": "unseen, 1 epoch",
    "up_bytes": "bytes up",
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """scale, and METHOD, data, clients, novel, iid, alpha, averaged, smoke."""
    scale, arg = scale_of(arg)
    if scale == "paper":
        config = families.get_config(arg)
        config.tensorboard = False
        return config
    arg = with_default(arg, "data", "mnist5k")
    for name, number in (("clients", "20"), ("novel", "5")):
        arg = with_default(arg, name, number)
    config = families.get_config(arg)
    config.families = THREE
    config.rounds = min(config.rounds, 40)
    config.data.shrink = 1 if config.data.name == "digits" else 2
    if config.data.name not in ("digits", "mnist5k"):
        config.data.split = "train[:10000]"
    config.evaluation.every = 10
    config.tensorboard = False
    return config


def sweep_networks(add):
    """All methods that networks of different sizes allow."""
    add_rows(add, NETWORKS)


def sweep_homogeneous(add):
    """One network for all against several."""
    for networks in (("mh_cnn",), THREE):
        add_rows(add, NETWORKS, families=networks)


def sweep_homogeneous_five(add):
    """One network for all against the paper's five."""
    for networks in (("mh_cnn",), families.FAMILIES):
        add_rows(add, NETWORKS, families=networks)


def sweep_clients(add):
    """N."""
    for num in (10, 20, 50, 100, 200):
        add_rows(add, NETWORKS, TWO, **{"data.num_clients": num})


def sweep_skew(add, scale="small"):
    """Classes dealt out by Dirichlet(alpha), and by the paper's own draws.

    With `skew:paper` also the alpha of sets with many classes: of ten, 0.01 would leave
    most of 25 clients without a sample.
    """
    for alpha in ALPHAS[scale]:
        skewed = {"data.partition": "dirichlet", "data.alpha": alpha}
        add_rows(add, NETWORKS, TWO, **skewed)
    add_rows(add, NETWORKS, TWO, **{"data.partition": "class_draws"})


def sweep_split(add):
    """The three ways in which clients come to have a few classes."""
    for name in ("class_draws", "class_shares", "pathological"):
        add_rows(add, NETWORKS, TWO, **{"data.partition": name})


def sweep_lambda_tau(add):
    """The grid of the authors' code: weight and temperature of the distillation."""
    for lam in (0.01, 0.05, 0.1, 0.15, 0.2):
        for tau in (5.0, 10.0, 15.0, 20.0, 25.0):
            add({**_GD, "method.lam": lam, "method.temperature": tau})


def sweep_lambda(add):
    """A line of that grid, and more weight than it has."""
    for lam in (0.0, 0.01, 0.05, 0.2, 0.5, 0.8):
        add({**_GD, "method.lam": lam})


def sweep_tau(add):
    """A column of that grid, and none."""
    for tau in (1.0, 5.0, 15.0, 25.0):
        add({**_GD, "method.temperature": tau})


_GD = {"method.name": "mh_pfedhngd"}


def sweep_heads(add, scale="small"):
    """Two networks that share a head, and heads apart; `heads:paper` for five."""
    for share in (True, False):
        add({"method.output_size": WIDE[scale], "method.share_heads": share})


def sweep_extractor(add):
    """An extractor that all networks share, and one for each network."""
    for share in (True, False):
        add({"method.share_extractor": share})


def sweep_topk(add):
    """Which part of a client's change is sent: 0.3 is the authors' choice."""
    add_rows(add, SENT)


def sweep_newcomers(add, runs):
    """Unseen clients join the runs in a folder: with known and with new networks.

    See `hyperjax join`. MH-pFedHNGD's server teaches no newcomers, as published.
    """
    for path in sorted(Path(runs).glob(f"*/{workdir.CONFIG}")):
        before = saved.load_config(str(path.parent), "runs")
        for own in NEWCOMERS.values():
            if own["method.name"] != before.method.name:
                continue
            config = join.joining(str(path.parent), own.get("families"))
            there, idle = common.flat(before), fields.idle(config)
            changed = {
                field: value
                for field, value in common.flat(config).items()
                if value != there[field] and field not in idle
            }
            add({**changed, **own})


SENT: Rows = {
    "all of it": {"uplink": ""},
    "a hundredth": {"uplink": "topk(fraction=0.01)"},
    "a tenth": {"uplink": "topk(fraction=0.1)"},
    "three tenths": {"uplink": "topk(fraction=0.3)"},
}
NEWCOMERS: Rows = {
    "pFedHN, slices: embeddings": {"method.name": "pfedhn"},
    "MH-pFedHN: embeddings": {"method.name": "mh_pfedhn"},
    "MH-pFedHN: new networks, heads too": {
        "method.name": "mh_pfedhn",
        "families": NEW,
    },
}


STUDIES = {
    "networks": Study(
        "Which method serves clients with networks of three sizes best?",
        COLUMNS,
        NETWORKS,
        baseline="Local",
    ),
    "homogeneous": Study(
        "Does one network for all do better than several?", COLUMNS, NETWORKS
    ),
    "homogeneous_five": Study(
        "Does one network for all do better than five?", COLUMNS, NETWORKS
    ),
    "clients": Study("How many clients?", COLUMNS, NETWORKS),
    "skew": Study("How rare may classes be?", COLUMNS, NETWORKS),
    "split": Study("Does it matter how classes are dealt out?", COLUMNS, NETWORKS),
    "lambda_tau": Study("How much distillation, and how soft?", COLUMNS),
    "lambda": Study("How much distillation?", COLUMNS),
    "tau": Study("How soft a teacher?", COLUMNS),
    "heads": Study("Do shared heads matter?", COLUMNS),
    "extractor": Study("Does a shared extractor matter?", COLUMNS),
    "topk": Study(
        "How much of a change must be sent?", COLUMNS, SENT, baseline="all of it"
    ),
    "newcomers": Study(
        "Can clients join what was learned without them?",
        {"pacc": "newcomers", "up_bytes": "bytes up"},
        NEWCOMERS,
    ),
}
