r"""Clients whose images are shifted: HyperFedShift, FedAvg as large, and controls.

hyperjax sweep --config=experiments/studies/shift.py --workdir=runs/rotation \
    --config.data.data_dir=... --sweep=rotation --sweep='seed=0..4'
python -m experiments.studies.record runs/rotation --out=experiments/results/NAME.json

40 participants and 20 clients that are never seen, of 300 images of MNIST each, at
14 x 14 pixels (`data=fashion14`: of Fashion-MNIST): seconds a run. A seed draws who has
which images, how they are shifted, and where training starts; methods share its
federation, so differences are paired. The learning rate is one for all methods, chosen
on a federation of another seed by earlier trials whose unseen clients were drawn from
training images.

`scale=paper` is four times as many rounds: there is no paper to be like.

Rows whose labels are skewed are compared with label-shift EM, others without.
"""

import ml_collections

from experiments.studies.study import Rows, Study, add_rows, scale_of, with_default
from hyperjax.protocols import zero_shot

_SHIFT = {"method.name": "hyperfedshift"}
ROWS: Rows = {
    "FedAvg": {"method.name": "fedavg"},
    # Of as many numbers up as the low-rank and the full directions.
    "FedAvg, hidden 196": {"method.name": "fedavg", "model.hidden": (196,)},
    "FedAvg, hidden 560": {"method.name": "fedavg", "model.hidden": (560,)},
    "HyperFedShift": _SHIFT,
    "HyperFedShift, full": {**_SHIFT, "method.form": "full"},
    "control: constant e": {**_SHIFT, "method.embedding": "constant"},
    "control: true shift": {**_SHIFT, "method.embedding": "oracle"},
    "BN-adapt": {
        "method.name": "fedavg",
        "model.name": "mlp_bn",
        "model.hidden": (64,),
        "evaluation.adapt": "bn",
    },
}
THREE = ("FedAvg", "FedAvg, hidden 196", "HyperFedShift")
MAIN = (*THREE, "control: constant e", "BN-adapt")
REST = ("FedAvg", "FedAvg, hidden 560", "HyperFedShift, full", "control: true shift")
COLUMNS = {
    "zacc_mean": "zACC",
    "zacc_em": "zACC + EM",
    "zacc_swapped": "zACC, swapped e",
    "zacc_p10": "worst decile",
    "pacc_mean": "pACC",
    "up_numbers": "numbers up",
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """scale, and METHOD, data, clients, novel, iid, alpha, shift, tuned, smoke."""
    scale, arg = scale_of(arg)
    config = zero_shot.get_config(with_default(arg, "data", "mnist14"))
    if scale == "paper":
        config.rounds = 800
    config.evaluation.every = config.rounds
    config.tensorboard = False
    return config


def sweep_rotation(add):
    """Everybody's images at an angle of 0 to 180 degrees."""
    add_rows(add, ROWS, MAIN, **_fields("rotation"))


def sweep_rotation_at_length(add):
    """Full directions, a FedAvg as large as they are, and the true angle."""
    add_rows(add, ROWS, REST, **_fields("rotation"))


def sweep_hybrid(add):
    """The same, and Dirichlet(0.3) labels."""
    add_rows(add, ROWS, MAIN, **_fields("hybrid"))


def sweep_rotation360(add):
    """At any angle."""
    add_rows(add, ROWS, THREE, **_fields("rotation360"))


def sweep_labels(add):
    """Labels alone, Dirichlet(0.1)."""
    add_rows(add, ROWS, THREE, **_fields("labels"))


def sweep_recipe(add):
    """Turned, inverted, blurred, of few classes: with and without label-free parts."""
    for standardise in ("none", "client"):
        for balanced in (False, True):
            parts = {"data.standardise": standardise, "local.balanced": balanced}
            add_rows(add, ROWS, THREE, **_fields("everything"), **parts)


def _fields(name: str) -> dict:
    return zero_shot.shift_fields(name, mixtures=True)


def _study(asks: str, compared: str) -> Study:
    return Study(asks, COLUMNS, ROWS, baseline="FedAvg", compared=compared)


STUDIES = {
    "rotation": _study(
        "Does a conditioned classifier follow images that are turned?", "zacc_mean"
    ),
    "rotation_at_length": _study(
        "What do directions cost and what does the true angle give?", "zacc_mean"
    ),
    "hybrid": _study("And where labels are skewed as well?", "zacc_em"),
    "rotation360": _study("And where nothing is upright?", "zacc_mean"),
    "labels": _study("What does it cost where nothing is shifted?", "zacc_em"),
    "recipe": _study(
        "What do label-free parts give that need no condition?", "zacc_em"
    ),
}
