r"""ATP's protocol (arXiv:2310.18816): unseen clients of other images, labels, or both.

hyperjax sweep --config=experiments/studies/atp.py --workdir=runs/atp \
    --config.data.data_dir=... --sweep=protocol --sweep='seed=0..4'
hyperjax sweep --config=experiments/studies/atp.py:scale=paper ...
python -m experiments.studies.record runs/atp \
    --out=experiments/results/shift_atp_protocol_cifar10.json

CIFAR-10's 60,000 images, 240 participants and 60 unseen clients of 200 each. *feature*:
a client's images are corrupted, an unseen one's in a way that no participant has;
*label*: two of a client's classes are 16 times as frequent as the others (`majors`);
*hybrid*: both. Participants set a fifth aside, on which ATP learns its rates.

What differs from the published protocol, at both scales: four kinds of corruption and
two others for unseen clients, where there are fifteen and four; unseen clients are
tested on a fifth of their images and adapt to the others; ATP adapts once to all of
them, which is where its online form arrives. The network's pools and rates of decay
are not described. The small scale has an eighth of the clients (30 and 8), images of
16 x 16 pixels and 60 rounds of 200: its numbers are beside the published ones for
their order.
"""

from typing import Any

import ml_collections

from experiments.studies.study import (
    Place,
    Rows,
    Study,
    Values,
    add_rows,
    change,
    chosen,
    scale_of,
    with_default,
)
from hyperjax.protocols import zero_shot

_FEDAVG = {"method.name": "fedavg"}
ROWS: Rows = {
    "FedAvg": _FEDAVG,
    "FedAvg + calibrated EM": {**_FEDAVG, "evaluation.adapt": "em"},
    "BN-adapt": {**_FEDAVG, "evaluation.adapt": "bn"},
    "Tent": {**_FEDAVG, "evaluation.adapt": "tent"},
    "ATP": {**_FEDAVG, "evaluation.adapt": "atp"},
    "HyperFedShift": {"method.name": "hyperfedshift"},
}
_CORRUPTED = {"data.shift": "corruptions", "data.shift_novel": "outside"}
SHIFTS: dict[str, dict[str, Any]] = {
    "feature": {**_CORRUPTED, "data.ratio": 1.0},
    "label": {"data.shift": "none", "data.ratio": 16.0},
    "hybrid": {**_CORRUPTED, "data.ratio": 16.0},
}
# Their shallow network; of ATP the online form.
_PUBLISHED = {
    "FedAvg": (64.36, 69.15, 61.87),
    "ATP": (67.22, 78.38, 70.86),
}
COLUMNS = {
    "zacc_mean": "zACC",
    "zacc_em": "zACC + EM",
    "zacc_p10": "worst decile",
    "pacc_mean": "pACC",
    "fit_up_bytes_total": "bytes up of a fit",
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """scale, and METHOD, data, clients, novel, iid, alpha, shift, tuned, smoke."""
    scale, arg = scale_of(arg)
    config = zero_shot.get_config(with_default(arg, "data", "cifar10"))
    paper = scale == "paper"
    fields = {
        "rounds": 200 if paper else 60,
        "data.split": "train+test" if config.data.name == "cifar10" else "train",
        "data.shrink": 1 if paper else 2,
        "data.num_clients": 240 if paper else 30,
        "data.num_novel": 60 if paper else 8,
        "data.partition": "majors",
        "data.samples_per_client": 200,
        "data.test_fraction": 0.0,
        "data.validation_fraction": 0.2,
        "model.name": "cnn_bn",
        "local.batch_size": 20,
        "local.learning_rate": 0.1,
        "local.learning_rate_decay": 1.0,
    }
    change(config, fields)
    return config


def sweep_protocol(add, shift=""):
    """All methods under all three shifts; or under one, `protocol:hybrid`."""
    for name in chosen("shift", shift, SHIFTS):
        add_rows(add, ROWS, **SHIFTS[name])


def _published() -> dict[Place, Values]:
    """By label and settings, as records have these."""
    found: dict[Place, Values] = {}
    for label, values in _PUBLISHED.items():
        for fields, value in zip(SHIFTS.values(), values, strict=True):
            said = [f"{k.removeprefix('data.')}={v}" for k, v in fields.items()]
            name = ", ".join([label, *said])
            found["cifar10", "majors", name] = {"zacc_mean": value}
    return found


STUDIES = {
    "protocol": Study(
        "Who serves unseen clients under ATP's protocol?",
        COLUMNS,
        ROWS,
        baseline="FedAvg",
        compared="zacc_mean",
        published=_published(),
    )
}
