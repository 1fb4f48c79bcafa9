r"""FedYogi: an adaptive server, in HyperFedNet's experiment.

Reddi et al. 2021 (arXiv:2003.00295), algorithm 2. FedAvg's clients, evaluated before
and after fine-tuning as FedAvg-FT's are.

python -m experiments.train --config=configs/fedyogi_mnist.py --workdir=runs/fedyogi

Other data sets: `configs/fedyogi_mnist.py:data=cifar10`, see `common.personalised`.
"""

from configs import fedavg_ft_mnist


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = fedavg_ft_mnist.get_config(arg)
    config.server.optimizer = "fedyogi(b1=0.9, b2=0.99, tau=1e-3)"
    config.server.learning_rate = 0.01
    return config
