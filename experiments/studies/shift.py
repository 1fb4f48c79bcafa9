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

`rivals`, `rivals_hybrid` and `cross` are methods and adaptations that were made for
unseen clients; that rate is not everybody's, so that each is to have its own:
`--tune=local.learning_rate=0.3,0.6 --by=pacc --tune_seed=100`. Participants set a fifth
of their training images aside in all rows, since some adaptations are learned on these.
PeFLL needs labels of an unseen client: its column is that of clients who have some, and
its zACC that of one network for all. Where an adaptation has found the classes' prior
already, zACC + EM counts it twice.
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

_SHIFT = {"method.name": "hyperfedshift"}
# Most of its numbers are the network's.
_LIGHT: Fields = {
    **_SHIFT,
    "method.num_directions": 4,
    "method.extractor_size": 16,
    "method.even": True,
}
ROWS: Rows = {
    "FedAvg": {"method.name": "fedavg"},
    # Of as many numbers up as the low-rank and the full directions.
    "FedAvg, hidden 196": {"method.name": "fedavg", "model.hidden": (196,)},
    "FedAvg, hidden 560": {"method.name": "fedavg", "model.hidden": (560,)},
    "HyperFedShift": _SHIFT,
    "HyperFedShift, full": {**_SHIFT, "method.form": "full"},
    # As many numbers up as these.
    "HyperFedShift, hidden 128": {**_LIGHT, "model.hidden": (128,)},
    "control: constant e": {**_SHIFT, "method.embedding": "constant"},
    "control: true shift": {**_SHIFT, "method.embedding": "oracle"},
    "BN-adapt": {
        "method.name": "fedavg",
        "model.name": "mlp_bn",
        "model.hidden": (64,),
        "evaluation.adapt": "bn",
    },
}
_FEDAVG, _BN = {"method.name": "fedavg"}, ROWS["BN-adapt"]
# Of 1e-3 and 4e-3, by participants' accuracy on a federation of seed 100.
_PEFLL = {"method.name": "pefll", "server.learning_rate": 4e-3}
RIVALS: Rows = {
    "FedAvg": _FEDAVG,
    "FedAvg, balanced": {**_FEDAVG, "local.balanced": True},
    "FedAvg + calibrated EM": {**_FEDAVG, "evaluation.adapt": "em"},
    "FedAvg + BBSE": {**_FEDAVG, "evaluation.adapt": "bbse"},
    "FedAvg + T3A": {**_FEDAVG, "evaluation.adapt": "t3a"},
    "FedAvg + SHOT": {**_FEDAVG, "evaluation.adapt": "shot"},
    "FedAvg + MEMO": {**_FEDAVG, "evaluation.adapt": "memo"},
    "FedAvg + ATP": {**_BN, "evaluation.adapt": "atp"},
    "BN-adapt": _BN,
    "Tent": {**_BN, "evaluation.adapt": "tent"},
    "FedRoD": {"method.name": "fedrod"},
    "FedTHE": {"method.name": "fedthe"},
    "FedTHE+": {"method.name": "fedthe", "evaluation.adapt": "memo"},
    "FLUX": {"method.name": "flux"},
    "FEROMA": {"method.name": "feroma"},
    "FLowDUP": {"method.name": "flowdup"},
    "ODPFL-HN": {**_PEFLL, "method.name": "odpfl_hn"},
    "PeFLL": _PEFLL,
    "PeFLL, no mask": {**_PEFLL, "method.mask_absent": "none"},
    "HyperFedZero": {"method.name": "hyperfedzero"},
    "HyperFedShift": _SHIFT,
}
EQUAL = ("FedAvg, hidden 196", "HyperFedShift, hidden 128")
# Rivals that send as many numbers as these.
EQUAL_RIVALS: Rows = {
    **{label: ROWS[label] for label in EQUAL},
    "FedAvg + SHOT, hidden 196": {**RIVALS["FedAvg + SHOT"], "model.hidden": (196,)},
    "BN-adapt, hidden 192": {**_BN, "model.hidden": (192,)},
    "FedRoD, hidden 107": {**RIVALS["FedRoD"], "model.hidden": (107,)},
    "FLUX, hidden 195": {**RIVALS["FLUX"], "model.hidden": (195,)},
    "FEROMA, hidden 195": {**RIVALS["FEROMA"], "model.hidden": (195,)},
    "FLowDUP, hidden 130": {**RIVALS["FLowDUP"], "model.hidden": (130,)},
}
_PARTS: Fields = {"data.standardise": "signed", "local.balanced": True}
# Everybody's table. Rows of one training stand together.
CROSS: Rows = {
    "FedAvg": _FEDAVG,
    **{
        f"FedAvg + {name}": RIVALS[f"FedAvg + {name}"]
        for name in ("calibrated EM", "T3A")
    },
    "FedAvg, standardised": {**_FEDAVG, "data.standardise": "signed"},
    "FedAvg, balanced": RIVALS["FedAvg, balanced"],
    "FedAvg, both, hidden 196": {**ROWS["FedAvg, hidden 196"], **_PARTS},
    **{label: RIVALS[label] for label in ("BN-adapt", "Tent", "FedAvg + ATP")},
    **{label: RIVALS[label] for label in ("FedRoD", "FEROMA", "FLUX", "PeFLL")},
    **{label: RIVALS[label] for label in ("ODPFL-HN", "HyperFedZero")},
    "control: constant e": ROWS["control: constant e"],
    "HyperFedShift": _SHIFT,
    "HyperFedShift, both, hidden 128": {**ROWS["HyperFedShift, hidden 128"], **_PARTS},
}
# Whose participants train as clients at any angle would.
_TURNED: Fields = {"local.augment": "rotation360"}
AUGMENTED: Rows = {
    **{label: ROWS[label] for label in EQUAL},
    **{f"{label}, turned": {**ROWS[label], **_TURNED} for label in EQUAL},
    "FedAvg, hidden 196, each image turned": {
        **ROWS["FedAvg, hidden 196"],
        "local.augment": "rotation360(each='image')",
    },
}
# Of colour images, `data=cifar16`, likewise.
LENETS: Rows = {
    "FedAvg, hidden 184-100": {**_FEDAVG, "model.hidden": (184, 100)},
    "HyperFedShift, hidden 96-64": {**_LIGHT, "model.hidden": (96, 64)},
}
_RESNET: Fields = {"model.name": "resnet8", "model.width": 22}
RESNETS: Rows = {
    "FedAvg, 22 channels": {**_FEDAVG, **_RESNET},
    "BN-adapt, 22 channels": {**_FEDAVG, **_RESNET, "evaluation.adapt": "bn"},
    "HyperFedShift, 16 channels": {**_LIGHT, **_RESNET, "model.width": 16},
}
THREE = ("FedAvg", "FedAvg, hidden 196", "HyperFedShift")
KINDS: Rows = {
    **{label: ROWS[label] for label in THREE},
    **{label: RIVALS[label] for label in ("FLUX", "FEROMA")},
}
EVERY = (
    *("none", "rotation", "rotation360", "contrast", "contrast_off_zero", "blur"),
    *("noise", "labels", "hybrid", "hybrid360", "contrast_hybrid", "everything"),
    "outside",
)
# Of everybody's table.
CROSS_KINDS = (
    *("none", "labels", "labels_1", "rotation", "rotation360", "contrast", "blur"),
    *("hybrid", "everything", "outside"),
)
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


# Strength of a shift, and Dirichlet's alpha of labels.
LEVELS = {"low": (1 / 3, 3.0), "medium": (2 / 3, 1.0), "high": (1.0, 0.1)}
_SET_ASIDE: dict[str, Any] = {"data.validation_fraction": 0.2}
_TOLD = {
    "auroc_embedding": "AUROC of the embedding",
    "auroc_confidence": "of the confidence",
    "auroc_energy": "of the energy",
}
_OF_RIVALS = {
    **COLUMNS,
    "zacc_ft0_mean": "zACC of clients with labels",
    "fit_up_bytes_total": "bytes up of a fit",
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """scale, and METHOD, data, clients, novel, iid, alpha, shift, tuned, smoke."""
    scale, arg = scale_of(arg)
    config = zero_shot.get_config(with_default(arg, "data", "mnist14"))
    change(config, {"rounds": 800} if scale == "paper" else {})
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


def sweep_every_shift(add):
    """Each shift, with both label-free parts."""
    parts = {"data.standardise": "client", "local.balanced": True}
    for kind in EVERY:
        add_rows(add, ROWS, THREE, **_fields(kind), **parts)


def sweep_equal_bytes(add):
    """The same shifts, negatives like positives; methods that send 41,000 numbers."""
    for kind in EVERY:
        add_rows(add, ROWS, EQUAL, **_fields(kind), **_PARTS)


def sweep_lenet(add, kinds=""):
    """The same of LeNets that send 70,000, with data=cifar16; or `lenet:rotation`."""
    for kind in chosen("kinds", kinds, EVERY):
        add_rows(add, LENETS, **_fields(kind), **_PARTS)


def sweep_resnet(add, kinds=""):
    """The same of ResNet-8 that send 145,000, with data=cifar16."""
    for kind in chosen("kinds", kinds, EVERY):
        add_rows(add, RESNETS, **_fields(kind), **_PARTS)


def sweep_rivals_equal_bytes(add, kinds=""):
    """Rivals at those bytes; `rivals_equal_bytes:rotation,hybrid` for these shifts."""
    for kind in chosen("kinds", kinds, EVERY):
        add_rows(add, EQUAL_RIVALS, **_fields(kind), **_PARTS)


def sweep_augmented(add):
    """Clients outside the range, and what it costs inside to train for them."""
    for kind in ("rotation", "outside"):
        add_rows(add, AUGMENTED, **_fields(kind), **_PARTS)


def sweep_rivals(add):
    """Methods and adaptations for unseen clients; images at an angle of 0 to 180."""
    add_rows(add, RIVALS, **_fields("rotation"), **_SET_ASIDE)


def sweep_rivals_hybrid(add):
    """The same, and Dirichlet(0.3) labels."""
    add_rows(add, RIVALS, **_fields("hybrid"), **_SET_ASIDE)


def sweep_cross(add, kinds=""):
    """Everybody under every shift; or `cross:rotation,hybrid` under these."""
    for kind in chosen("kinds", kinds, CROSS_KINDS):
        add_rows(add, CROSS, **_fields(kind), **_SET_ASIDE)


def sweep_context(add):
    """An unseen client's classifier from few of its inputs; 0: from all."""
    add_rows(add, ROWS, ("FedAvg",), **_fields("rotation"))
    for num in (1, 4, 16, 64, 0):
        few = {"evaluation.context": num}
        add_rows(add, ROWS, ("HyperFedShift", "BN-adapt"), **few, **_fields("rotation"))


def sweep_strangers(add):
    """Unseen clients like participants, at the edge of their range and outside."""
    for kind in ("rotation", "corruptions"):
        for where in shift.NOVEL:
            fields = {**_fields(kind), "data.shift_novel": where}
            add_rows(add, ROWS, ("FedAvg", "HyperFedShift"), **fields)


def sweep_kinds(add, level=""):
    """P(x), P(y), P(x | y), P(y | x) at all levels, as FLUX's own; or `kinds:low`."""
    for strength, alpha in (LEVELS[name] for name in chosen("level", level, LEVELS)):
        for kind in ("rotation", "class_rotation", "label_swap"):
            fields = {**_fields(kind), "data.shift_strength": strength}
            add_rows(add, KINDS, **fields)
        add_rows(add, KINDS, **{**_fields("labels"), "data.alpha": alpha})


def sweep_groups(add):
    """Two to five angles: groups of clients, for which FLUX and FEROMA were made."""
    for num in shift.TURNS:
        add_rows(add, KINDS, **_fields(f"turns{num}"))


def sweep_writers(add, ids):
    """Who wrote the digits; `writers:FILE.npz:KEY` names the writer of every image."""
    written = {"data.partition": "by_client_id", "data.client_ids": ids}
    add_rows(add, ROWS, (*THREE, "BN-adapt"), **written)


def _fields(name: str) -> dict:
    """Fields of a shift; `labels_1`: labels of Dirichlet(1)."""
    if name == "labels_1":
        return {**_fields("labels"), "data.alpha": 1.0}
    return zero_shot.shift_fields(name, mixtures=True)


def _study(
    asks: str, compared: str, columns=COLUMNS, rows: Rows = ROWS, baseline="FedAvg"
) -> Study:
    return Study(asks, columns, rows, baseline=baseline, compared=compared)


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
    "rivals": _study(
        "What do others make of an unseen client?", "zacc_mean", _OF_RIVALS, RIVALS
    ),
    "rivals_hybrid": _study(
        "And where labels are skewed as well?", "zacc_mean", _OF_RIVALS, RIVALS
    ),
    "cross": _study(
        "And everybody, wherever clients may differ?", "zacc_em", _OF_RIVALS, CROSS
    ),
    "context": _study(
        "How many unlabelled inputs does an unseen client need?", "zacc_mean"
    ),
    "strangers": _study(
        "Does an unseen client's embedding say that it is unlike the others?",
        "zacc_mean",
        {**COLUMNS, **_TOLD},
    ),
    "kinds": _study(
        "Which shifts can be followed from inputs alone?", "zacc_mean", rows=KINDS
    ),
    "groups": _study("And where clients are of a few kinds?", "zacc_mean", rows=KINDS),
    "writers": _study("And where clients are people?", "zacc_mean"),
    "every_shift": _study(
        "Where does a condition pay, beside parts that need none?", "zacc_em"
    ),
    "equal_bytes": _study(
        "And at equal bytes, where most of them are the network's?",
        "zacc_em",
        baseline="FedAvg, hidden 196",
    ),
    "augmented": _study(
        "Can clients outside the range be trained for?",
        "zacc_em",
        {**COLUMNS, **_TOLD},
        AUGMENTED,
        "FedAvg, hidden 196",
    ),
    "lenet": _study(
        "And of images in colour, with convolutions?",
        "zacc_em",
        rows=LENETS,
        baseline="FedAvg, hidden 184-100",
    ),
    "resnet": _study(
        "And of deeper networks?",
        "zacc_em",
        rows=RESNETS,
        baseline="FedAvg, 22 channels",
    ),
    "rivals_equal_bytes": _study(
        "And beside rivals at those bytes, with those parts?",
        "zacc_em",
        rows=EQUAL_RIVALS,
        baseline="FedAvg, hidden 196",
    ),
    "recipe": _study(
        "What do label-free parts give that need no condition?", "zacc_em"
    ),
}
