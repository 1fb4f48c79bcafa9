r"""LG-FedAvg in MH-pFedHN's experiment: five networks on CIFAR-10.

python -m experiments.train --config=configs/lg_fedavg_cifar10.py --workdir=runs/lg

See `configs/mh_pfedhn_cifar10.py`.
"""

from configs import mh_pfedhn_cifar10


def get_config(arg: str = ""):
    """Arguments: data, clients, smoke."""
    config = mh_pfedhn_cifar10.federation(arg)
    config.method = dict(
        name="lg_fedavg",
        share=r"params/head/.*",
    )
    return config
