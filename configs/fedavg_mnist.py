r"""FedAvg on HyperFedZero's first experiment: MNIST, MLP, 10 + 5 clients.

python -m experiments.train --config=configs/fedavg_mnist.py --workdir=runs/fedavg

`:tuned` uses the learning rate chosen for FedAvg itself (README.md). FedAvgM and its
relatives: `--config.server.optimizer=fedavgm`, fedadam, fedyogi, fedadagrad.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, alpha (of the Dirichlet partition), tuned, smoke."""
    config, args = common.zero_shot(arg, tuned=False)
    config.method = dict(name="fedavg", keep=())  # keep: patterns of what stays home
    if args.tuned:
        config.local.learning_rate = 0.3
    return config
