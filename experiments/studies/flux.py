r"""FLUX's protocol (arXiv:2511.22305): clients of four kinds of shift, at eight levels.

hyperjax sweep --config=experiments/studies/flux.py --workdir=runs/flux \
    --sweep=levels --sweep='seed=0..4'
hyperjax sweep --config=experiments/studies/flux.py:scale=paper --sweep=levels:1,4 \
    --config.data.data_dir=... ...
python -m experiments.studies.record runs/flux \
    --out=experiments/results/shift_flux_levels_mnist.json

Ten clients, ten rounds of two epochs, batches of 64, SGD at 0.005 with momentum 0.9, a
LeNet. At level l of eight images are turned by one of l + 1 angles (P(x)), clients have
11 - l of the ten classes (P(y)), the images of l classes are turned (P(x | y)), or the
labels of l + 1 classes have changed places (P(y | x)).

What differs from the published protocol: its unseen clients are participants whose
identity is hidden, here they are ten others of the same law, so that a client has half
as many images; above level 4 its images are of three colours, which grey ones have not,
and P(x) ends there; labels of one class alone cannot change places. Levels are read
from its configuration, figures from its plots, as means over the four kinds. The small
scale is of 5,000 images, a twelfth.
"""

from typing import Any

import ml_collections

from experiments.studies.study import (
    Fields,
    Rows,
    Study,
    add_rows,
    change,
    chosen,
    scale_of,
    with_default,
)
from hyperjax.data import shift
from hyperjax.protocols import zero_shot

ROWS: Rows = {
    "FedAvg": {"method.name": "fedavg"},
    "FLUX": {"method.name": "flux"},
    "FEROMA": {"method.name": "feroma"},
    "HyperFedShift": {"method.name": "hyperfedshift"},
}
LEVELS = range(1, 9)
NUM_CLASSES = 10
COLUMNS = {
    "zacc_mean": "zACC",
    "zacc_swapped": "zACC, swapped e",
    "zacc_p10": "worst decile",
    "pacc_mean": "pACC",
    "up_numbers": "numbers up",
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """scale, and METHOD, data, clients, novel, iid, alpha, shift, tuned, smoke."""
    scale, arg = scale_of(arg)
    data = "mnist" if scale == "paper" else "mnist5k"
    config = zero_shot.get_config(with_default(arg, "data", data))
    fields: Fields = {
        "rounds": 10,
        "data.num_clients": 10,
        "data.num_novel": 10,
        "data.partition": "iid",
        "data.test_fraction": 0.0,
        "model.name": "lenet",
        "model.channels": (6, 16),
        "model.hidden": (120, 84),
        "local.epochs": 2,
        "local.batch_size": 64,
        "local.optimizer": "sgd(momentum=0.9)",
        "local.learning_rate": 0.005,
        "local.learning_rate_decay": 1.0,
        "server.sampler": "full",
    }
    change(config, fields)
    return config


def shifts(level: int) -> dict[str, dict[str, Any]]:
    """Returns {kind of shift: fields} of a level; there is no P(x) above 4."""
    touched = {"data.shift_classes": level / NUM_CLASSES}
    swapped = {"data.shift_classes": (level + 1) / NUM_CLASSES}
    classes = NUM_CLASSES + 1 - level
    found: dict[str, dict[str, Any]] = {
        "P(y)": {
            "data.partition": "pathological",
            "data.classes_per_client": classes,
        },
        "P(x | y)": {"data.shift": "class_rotation", **touched},
        "P(y | x)": {"data.shift": "label_swap", **swapped},
    }
    if level + 1 in shift.TURNS:
        found["P(x)"] = {"data.shift": f"turns{level + 1}"}
    return found


def sweep_levels(add, levels=""):
    """All kinds at all levels; or at some, `levels:1,4`."""
    for level in chosen("levels", levels, LEVELS):
        for fields in shifts(int(level)).values():
            add_rows(add, ROWS, **fields)


STUDIES = {
    "levels": Study(
        "Who serves clients without an identity under FLUX's protocol?",
        COLUMNS,
        ROWS,
        baseline="FedAvg",
        compared="zacc_mean",
    )
}
