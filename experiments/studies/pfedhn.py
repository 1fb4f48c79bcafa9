r"""pFedHN's study (arXiv:2103.04628): table 1, one network for each of a few clients.

hyperjax sweep --config=experiments/studies/pfedhn.py:data=cifar10 \
    --config.data.data_dir=... --workdir=runs/pfedhn --sweep=table_1 --sweep='seed=0..2'
hyperjax sweep --config=experiments/studies/pfedhn.py:scale=paper,data=cifar10 \
    --config.data.data_dir=... --workdir=runs/pfedhn_paper --sweep=clients \
    --sweep='seed=0..2'

The small scale has CIFAR's images shrunk by two, and 1,000 visits of one client where
the paper has 5,000. Local training is the published one for all methods; no rate is
searched.
"""

from typing import Any

import ml_collections

from experiments.studies.study import (
    Place,
    Study,
    Values,
    add_rows,
    scale_of,
    with_default,
)
from hyperjax.protocols import pfedhn

VISITS = 1000
TABLE_1 = {
    "Local": {"method.name": "local_only"},
    "FedAvg": {"method.name": "fedavg"},
    "Per-FedAvg": {"method.name": "perfedavg"},
    "FedPer": {"method.name": "fedper"},
    "pFedMe": {"method.name": "pfedme"},
    "LG-FedAvg": {"method.name": "lg_fedavg"},
    "pFedHN": {"method.name": "pfedhn"},
    "pFedHN-PC": {"method.name": "pfedhn_pc"},
}
CLIENTS = (10, 50, 100)
# Table 1: CIFAR-10 and CIFAR-100 with each of `CLIENTS`.
ACCURACIES = {
    "Local": (86.46, 68.11, 59.32, 58.98, 19.98, 15.12),
    "FedAvg": (51.42, 47.79, 44.12, 15.96, 15.71, 14.59),
    "Per-FedAvg": (76.65, 83.03, 80.19, 50.14, 45.89, 48.28),
    "FedPer": (87.27, 83.39, 80.99, 55.76, 48.32, 42.08),
    "pFedMe": (87.69, 86.09, 85.23, 51.97, 49.09, 45.57),
    "LG-FedAvg": (89.11, 85.19, 81.49, 53.69, 53.16, 49.99),
    "pFedHN": (90.83, 88.38, 87.97, 65.74, 59.48, 53.24),
    "pFedHN-PC": (92.47, 90.08, 88.09, 68.15, 60.17, 52.40),
}
COLUMNS = {"pacc": "last round", "pacc_mean": "mean of clients", "best": "best"}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """scale, and METHOD, data, clients, novel, iid, alpha, smoke."""
    scale, arg = scale_of(arg)
    if scale == "small":
        arg = with_default(arg, "data", "mnist5k")
    config = pfedhn.get_config(arg)
    config.tensorboard = False
    if scale == "small" and config.rounds > 2:  # smoke
        one_by_one = config.server.sampler == "uniform"
        # However many a point sets.
        clients = 1 if one_by_one else config.data.get_ref("num_clients")
        config.rounds = (VISITS - 1) // clients + 1
        config.evaluation.every = (VISITS // 10 - 1) // clients + 1
        # Of 28x28 the network needs all.
        config.data.shrink = 2 if config.data.name.startswith("cifar") else 1
    return config


def sweep_table_1(add):
    """The paper's methods with ten clients."""
    add_rows(add, TABLE_1)


def sweep_clients(add):
    """The paper's numbers of clients; beside MNIST's 5,000 images 100 are too many."""
    for num in CLIENTS:
        own: dict[str, Any] = {"data.num_clients": num}
        add_rows(add, TABLE_1, **own)


def published(num_clients: int, more: str = "") -> dict[Place, Values]:
    """Returns table 1's column of so many clients for both data sets.

    Args:
      num_clients: one of `CLIENTS`.
      more: what follows labels, where the number of clients is a setting.
    """
    at = CLIENTS.index(num_clients)
    return {
        (data, "class_shares", label + more): {"pacc": values[at + 3 * i]}
        for i, data in enumerate(("cifar10", "cifar100"))
        for label, values in ACCURACIES.items()
    }


STUDIES = {
    "table_1": Study(
        "A network for each of ten clients with two classes",
        COLUMNS,
        TABLE_1,
        baseline="Local",
        published=published(10),
    ),
    "clients": Study(
        "A network for each of 10 to 100 clients with two classes",
        COLUMNS,
        TABLE_1,
        baseline="Local",
        published={
            place: values
            for num in CLIENTS
            for place, values in published(num, f", num_clients={num}").items()
        },
    ),
}
