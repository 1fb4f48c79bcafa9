"""What every config shares: parsing of `config.py:name=value` and default fields."""

import ast
import re
from typing import Any

import ml_collections
from ml_collections import config_dict


def parse_arg(arg: str | None, **defaults) -> Any:
    """Parses the part after the colon of `--config=file.py:a=1,b`.

    A bare name means True. Unknown, empty and repeated names, and values of another
    type than the default's, raise ValueError.
    """
    values = dict(defaults)
    seen = set()
    for item in arg.split(",") if arg else ():
        name, equals, text = item.strip().partition("=")
        if name not in defaults:
            raise ValueError(
                f"unknown config argument {name!r}; accepted: {', '.join(defaults)}"
            )
        if name in seen:
            raise ValueError(f"config argument {name!r} is given twice in {arg!r}")
        if equals and not text:
            raise ValueError(f"config argument {item!r} has no value")
        seen.add(name)
        try:
            value = ast.literal_eval(text) if text else True
        except (ValueError, SyntaxError):
            value = text
        kind = type(defaults[name])
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise ValueError(
                f"config argument {item!r}: {name} must be {kind.__name__}"
            )
        values[name] = value
    return ml_collections.ConfigDict(values)


def defaults() -> ml_collections.ConfigDict:
    """Returns every field that does not depend on the method, with its default.

    The schedule is HyperFedZero's: SGD without momentum, learning rate 0.01 times
    0.99 each round, batches of 128, one local epoch, all clients every round.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.rounds = 100
    config.data = dict(
        name="mnist5k",  # mnist5k, digits, synthetic, or any TFDS image set
        data_dir=config_dict.placeholder(str),  # prepared TFDS sets; None: TFDS's own
        split="train",
        shrink=1,  # images averaged over squares of so many pixels
        download=False,  # let TFDS download and prepare a missing set
        seed=-1,  # of splits and partition; -1: config.seed
        num_clients=10,  # N, take part in training
        num_novel=5,  # M, never seen in training; 0: none
        newcomers=False,  # these M take part instead of the others
        pooled=False,  # centralised training: one client has all participants' samples
        # iid, dirichlet, pathological, class_shares, class_draws, by_client_id
        partition="dirichlet",
        alpha=1.0,  # dirichlet
        min_size=10,  # dirichlet: samples of the smallest client
        capped=False,  # dirichlet: whoever has a fair share gets no further class
        classes_per_client=2,  # pathological, class_shares, class_draws
        client_ids=config_dict.placeholder(str),  # by_client_id: ids.npy or f.npz:key
        test_fraction=0.2,  # global test set; 0: none
        eval_fraction=0.2,  # held out by each client
        validation_fraction=0.0,  # of the rest, set aside to choose a round by; 0: none
        stratified=False,  # held-out parts have each class of a client in proportion
    )
    config.model = dict(
        name="mlp",  # mlp, lenet_s, lenet, zenkenet, resnet8, resnet38, resnet20, ...
        hidden=(),  # hidden layers; (): the model's own
    )
    # Networks of clients in equal blocks, for methods that take several; (): one.
    config.families = ()
    config.local = dict(
        epochs=config_dict.placeholder(int),  # None: one, or as many as make
        steps=config_dict.placeholder(int),  # so many batches
        batch_size=128,
        batches="passes",  # or fresh: every step draws from all samples
        optimizer="sgd",  # any of optax, with options: "sgd(momentum=0.9)"
        learning_rate=0.01,
        learning_rate_decay=0.99,  # factor per round
        # Where the rate is multiplied by milestone_factor: rounds (whole numbers), or
        # fractions of all rounds.
        milestones=(),
        milestone_factor=0.1,
        weight_decay=0.0,  # added to the gradient
        clip_norm=config_dict.placeholder(float),
    )
    config.server = dict(
        optimizer="sgd",  # optax, or fedavgm, fedadagrad, fedadam, fedyogi
        learning_rate=1.0,
        weights="size",  # size or uniform
        sampler="full",  # full or uniform
        cohort_size=10,  # for the sampler "uniform"
        sequential=False,  # the server steps after every client of a round
    )
    # Another run whose server state this one starts from: what both have under paths
    # that match `take`.
    config.start = dict(run="", take=(".*",))
    config.uplink = ""  # what clients send goes through: "topk(fraction=0.3)"
    config.engine = dict(
        mapper="auto",  # map, vmap, block
        block_size=5,
        devices=0,  # 0: all; on the CPU one per core, at most 8
        store="device",  # client state and index tables: device or host
        memory_map=False,  # host store: files in the workdir instead of memory
        rounds_per_call=0,  # 0: as many as lie between evaluations
        conv_rule="auto",  # or xla, scan, patches
    )
    config.evaluation = dict(
        every=5,
        batch_size=256,
        clients_per_call=64,
        finetune_epochs=(),  # at the end, also after each of these numbers of epochs
        thresholds=(50, 60, 70, 80, 90, 95),  # % pACC whose cost is in the summary
        sample_level=False,  # at the end, also one classifier per input
    )
    config.checkpoint = dict(keep=2)
    config.tensorboard = True
    return config


def zero_shot(arg: str | None, **more) -> tuple[Any, Any]:
    """Returns HyperFedZero's first experiment (arXiv:2508.12673), without method.

    MNIST, an MLP, 10 clients and 5 never seen in training, Dirichlet(1), 100 rounds.

    Args:
      arg: after the colon of `--config`: data, alpha (of the partition), smoke.
      **more: further arguments, with their defaults.

    Returns:
      The config, and the parsed arguments.
    """
    args = parse_arg(arg, data="mnist5k", alpha=1.0, smoke=False, **more)
    config = defaults()
    config.data.update(name=args.data, alpha=args.alpha)
    config.rounds = 2 if args.smoke else 100
    return config, args


# Classes a client in the experiments of pFedHN (arXiv:2103.04628) and MH-pFedHN
# (arXiv:2507.22330), by the data set's name without configuration and version.
_CLASSES = {"cifar10": 2, "cifar100": 10, "tiny_imagenet": 20, "emnist": 6}


def classes_per_client(data: str) -> int:
    """Returns how many classes a client holds where each holds a few, as published.

    2 for sets that nothing is published for: a run warns if that leaves images out.
    """
    return _CLASSES.get(re.split("[/:]", data)[0], 2)


# Network, rounds, and clients of HyperFedNet's experiments, by data set. "mnist5k" is
# their small version on the embedded images.
_NETWORKS = {
    "mnist5k": ("resnet8", 90),
    "mnist": ("resnet8", 90),
    "fashion_mnist": ("resnet38", 90),
    "cifar10": ("resnet38", 150),
    "cifar100": ("resnet38x2", 150),
}
# Where the learning rate falls: after 30 and 60 of 90 rounds, 40 and 80 of 150.
_MILESTONES = {90: (1 / 3, 2 / 3), 150: (4 / 15, 8 / 15)}


def personalised(arg: str | None, data: str = "mnist5k") -> Any:
    """Returns HyperFedNet's experiment (arXiv:2402.18445, section 5), without method.

    Training and test images are merged and dealt out to 100 users, Dirichlet(0.5) with
    at least 40 images each or evenly; each holds out a fifth. 25 users a round, 4 local
    epochs of SGD with Nesterov momentum, fine-tuning for 4 epochs before evaluation.
    The paper tunes the learning rate per method (0.1 with drops, 0.1, 0.01, 0.001).

    Args:
      arg: after the colon of `--config`: data (one of the paper's four, or "mnist5k":
        20 users, 5 a round and 5 unseen), iid, novel (unseen users), smoke.
      data: the data set if `arg` names none.
    """
    args = parse_arg(arg, data=data, iid=False, novel=-1, smoke=False)
    if args.novel < -1:
        raise ValueError(f"config argument novel={args.novel} must be at least 0")
    if args.data not in _NETWORKS:
        raise ValueError(
            f"data={args.data!r} is not among HyperFedNet's experiments; accepted: "
            f"{', '.join(_NETWORKS)}"
        )
    small = args.data == "mnist5k"
    config = defaults()
    config.model.name, config.rounds = _NETWORKS[args.data]
    config.data.update(
        name=args.data,
        split="train" if small else "train+test",
        num_clients=20 if small else 100,
        num_novel=args.novel if args.novel >= 0 else 5 * small,
        partition="iid" if args.iid else "dirichlet",
        alpha=0.5,
        min_size=40,
        capped=True,
        test_fraction=0.0,
    )
    config.local.update(
        epochs=4,
        optimizer="sgd(momentum=0.9, nesterov=True)",
        learning_rate=0.1,
        learning_rate_decay=1.0,
        milestones=_MILESTONES[config.rounds],
        weight_decay=5e-4,
    )
    config.server.sampler = "uniform"
    # A reference: a quarter of however many clients a flag or a study sets.
    config.server.cohort_size = (config.data.get_ref("num_clients") + 3) // 4
    config.evaluation.finetune_epochs = (0, 4)
    if args.smoke:
        config.rounds, config.local.epochs = 2, 1
    return config
