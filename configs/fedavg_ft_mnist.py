r"""FedAvg with fine-tuning, in HyperFedNet's experiment.

Collins, Hassani, Mokhtari, Shakkottai 2022 (arXiv:2205.13692): FedAvg, evaluated after
local epochs on a copy. `*_ft0` in the summary is FedAvg, `*_ft4` its fine-tuned copies.

python -m experiments.train --config=configs/fedavg_ft_mnist.py --workdir=runs/fedavg_ft

Other data sets: `configs/fedavg_ft_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="fedavg",
        bn_stats="average",  # or local
        finetune=(),  # patterns; (): all parameters, (r"params/head/.*",): the head
        correction="none",  # or prox(mu=0.1), ...; several: ("prox(mu=0.1)", ...)
    )
    return config
