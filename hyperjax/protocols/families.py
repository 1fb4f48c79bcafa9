r"""Clients with different networks: MH-pFedHN's experiment.

python -m experiments.train --config=configs/families.py --workdir=runs/mh
python -m experiments.train --config=configs/families.py:fedproto,data=digits \
    --workdir=runs/fedproto

Five networks on CIFAR-10, in equal blocks of 50 clients; `--config.families` names
others. As the code of arXiv:2507.22330 runs it: the training split alone, two classes a
client, a quarter of each client's images held out, all clients every round one after
another. Every client draws its classes on its own (`class_draws`): 2 on CIFAR-10, 10 on
CIFAR-100 (`data=cifar100`), 20 on Tiny-ImageNet (`--config.data.shrink=2` halves its
64x64 pixels), 6 on EMNIST; images are 32x32. `averaged` steps once a round
for all clients; `--config.uplink='topk(fraction=0.3)'` sends 30 % of each client's
change.

MH-pFedHNGD's rounds open with the global model: all clients train a copy of it at once,
and the server takes its step on their changes; then they come one after another with
networks of their own, as the authors' code has it. A sparse uplink is of these
networks; the changes of the copies are sent whole.
"""

from typing import Any

from hyperjax.protocols import arguments, common, methods, pfedhn

DEFAULT = "mh_pfedhn"
EXTRA = dict(averaged=False)
FAMILIES = ("mh_cnn", "vgg8", "mh_resnet10", "mh_resnet12", "mh_resnet18")
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "cifar100": {"data.classes_per_client": 10},
    "tiny_imagenet": {"data.classes_per_client": 20},
    "emnist": {"data.classes_per_client": 6, "data.resize": 32},
    "mnist5k": {},
    "digits": {
        "rounds": 20,
        "families": ("mh_mlp", "mh_cnn", "mh_mlp"),
        "data.num_clients": 9,
        "local.epochs": 4,
        "local.batch_size": 16,
    },
}
TUNED = methods.TUNED


def get_config(arg: str = ""):
    """METHOD, data, clients, novel, iid, alpha, averaged, smoke."""
    args, config = arguments.begin(
        "families",
        arg,
        PRESETS,
        method=DEFAULT,
        data="cifar10",
        other="cifar10",
        **EXTRA,
    )
    common.change(config, pfedhn.SETTING)
    config.families = FAMILIES
    config.rounds = 500
    config.data.update(
        num_clients=50,
        partition="class_draws",
        eval_fraction=0.25,
    )
    config.local.update(epochs=1, weight_decay=5e-4)
    config.evaluation.finetune_epochs = (0, 1)
    arguments.apply(config, args, PRESETS, TUNED)
    if args.more["averaged"]:
        if not config.server.sequential:
            raise ValueError(
                "config argument averaged would change nothing: the server of "
                f"{args.name!r} steps once a round in any case"
            )
        config.server.sequential = False
    if args.smoke:
        config.families = ("mh_mlp", "mh_cnn")
    return config
