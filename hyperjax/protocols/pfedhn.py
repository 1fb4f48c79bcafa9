r"""One network for each of a few clients with two classes: pFedHN's experiment.

python -m experiments.train --config=configs/pfedhn.py --workdir=runs/pfedhn
python -m experiments.train --config=configs/pfedhn.py:pfedhn_pc,clients=50 \
    --workdir=runs/pc

CIFAR-10, or `data=cifar100` with 10 classes a client; `data=mnist5k` comes with the
package (arXiv:2103.04628, section 5.1). Clients hold uneven shares of two classes;
pFedHN's round is 50 local steps of one client, drawn at random. For other methods a
round is one of all clients, and there are fewer, so that there are as many visits.

Published, in % over 3 seeds: 90.83 (1.56) with 10 clients, 88.38 (0.29) with 50, 87.97
(0.70) with 100, at 121,182 numbers each way a round; pFedHN-PC, whose clients keep
their classifiers: 92.47 (1.63), 90.08 (0.63), 88.09 (0.86), at 120,332.

The paper cuts training, validation and official test images (40,000, 10,000 and 10,000)
into the same shares. Here all 60,000 are cut, and each client holds out a sixth of each
of its classes and sets a fifth of the rest aside for validation, which are as many. The
summary has the accuracy of the last round, and, as published, that of the round with
the best validation accuracy (`best_by_validation`).
"""

from typing import Any

from hyperjax.protocols import arguments, common, methods

DEFAULT = "pfedhn"
EXTRA: dict = {}
# Classes of a client are those of MH-pFedHN's experiment where pFedHN's has none.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {"data.split": "train+test"},
    "cifar100": {"data.split": "train+test", "data.classes_per_client": 10},
    "mnist5k": {},
    "tiny_imagenet": {"data.classes_per_client": 20},
    "emnist": {"data.classes_per_client": 6},
    # The 8x8 pixels are too few for the network.
    "digits": {"model.name": "mlp", "model.hidden": (32,)},
}
TUNED = methods.TUNED
# What MH-pFedHN's experiment has from this one.
SETTING: dict[str, Any] = {
    "data.num_novel": 0,
    "data.test_fraction": 0.0,
    "local.batch_size": 64,
    "local.optimizer": "sgd(momentum=0.9)",
    "local.learning_rate": 5e-3,
    "local.learning_rate_decay": 1.0,
    "local.clip_norm": 50.0,
}


def get_config(arg: str = ""):
    """METHOD, data, clients, novel, iid, alpha, smoke."""
    args, config = arguments.begin(
        "pfedhn",
        arg,
        PRESETS,
        method=DEFAULT,
        data="cifar10",
        other="mnist5k",
        **EXTRA,
    )
    common.change(config, SETTING)
    config.data.update(
        partition="class_shares",
        eval_fraction=1 / 6,
        validation_fraction=0.2,
        stratified=True,
    )
    config.model.name = "pfedhn_cnn"
    config.local.update(
        steps=50,
        batches="fresh",
        weight_decay=5e-5,
    )
    visits, every = (300, 50) if args.like == "digits" else (5000, 100)
    clients = config.data.get_ref("num_clients")  # however many a flag sets
    config.rounds = (visits - 1) // clients + 1
    config.evaluation.every = (every - 1) // clients + 1
    config.server.cohort_size = 1
    arguments.apply(config, args, PRESETS, TUNED)
    if args.method in ("pfedhn", "pfedlhn") and args.name != "pfedhn_synchronous":
        config.server.update(sampler="uniform", sequential=False)  # one at a time
        config.evaluation.every = every
        config.rounds = 2 if args.smoke else visits
    return config
