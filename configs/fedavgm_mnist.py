r"""FedAvgM: a server with momentum, in HyperFedNet's experiment.

Hsu, Qi, Brown 2019 (arXiv:1909.06335). FedAvg's clients, evaluated before and after
fine-tuning as FedAvg-FT's are.

python -m experiments.train --config=configs/fedavgm_mnist.py --workdir=runs/fedavgm

Other data sets: `configs/fedavgm_mnist.py:data=cifar10`, see `common.personalised`.
"""

from configs import fedavg_ft_mnist


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = fedavg_ft_mnist.get_config(arg)
    config.server.optimizer = "fedavgm(beta=0.9)"
    config.server.learning_rate = 1.0
    return config
