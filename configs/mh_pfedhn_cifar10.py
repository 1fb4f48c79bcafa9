r"""MH-pFedHN: five networks on CIFAR-10, one hypernetwork.

python -m experiments.train --config=configs/mh_pfedhn_cifar10.py --workdir=runs/mh

The experiment of arXiv:2507.22330 as its code runs it: the training split alone, two
classes a client, a quarter of each client's images held out, all clients every round
one after another. Every client draws its classes on its own (`class_draws`): 2 on
CIFAR-10, 10 on CIFAR-100 (`:data=cifar100`), 20 on Tiny-ImageNet, 6 on EMNIST, whose
images the code scales to 32x32 (`--config.data.shrink=2` halves 64x64). `:averaged`
steps once a round for all clients; `--config.uplink='topk(fraction=0.3)'` sends 30 % of
each client's change.
"""

from hyperjax.protocols import common

FAMILIES = ("mh_cnn", "vgg8", "mh_resnet10", "mh_resnet12", "mh_resnet18")


def federation(arg: str = "", **extra):
    """Returns everything but the method. Arguments: data, clients, smoke, and `extra`.

    Clients have the networks in equal blocks; `--config.families` names others.
    """
    args = common.parse_arg(arg, data="cifar10", clients=50, smoke=False, **extra)
    config = common.defaults()
    config.families = ("mh_mlp", "mh_cnn") if args.smoke else FAMILIES
    config.rounds = 2 if args.smoke else 500
    config.data.update(
        name=args.data,
        num_clients=args.clients,
        num_novel=0,
        partition="class_draws",
        classes_per_client=common.classes_per_client(args.data),
        test_fraction=0.0,
        eval_fraction=0.25,
    )
    config.local.update(
        epochs=1,
        batch_size=64,
        optimizer="sgd(momentum=0.9)",
        learning_rate=5e-3,
        learning_rate_decay=1.0,
        weight_decay=5e-4,
        clip_norm=50.0,
    )
    config.evaluation.finetune_epochs = (0, 1)
    if args.get("averaged") is not None:
        config.server.sequential = not args.averaged
    return config


def get_config(arg: str = ""):
    """Arguments: data, clients, averaged, smoke."""
    config = federation(arg, averaged=False)
    config.server.update(optimizer="adam", learning_rate=2e-4)
    config.method = dict(
        name="mh_pfedhn",
        output_size=3072,
        embedding_size=64,
        hidden_size=128,
        num_layers=3,
        embedding_deviation=0.002,
        clip_norm=50.0,
        refresh_stats=False,  # statistics see the generated network before it predicts
        share_heads=True,  # False: every family has a head of its own
        freeze=(),  # patterns of paths in the hypernetwork that do not move
    )
    return config
