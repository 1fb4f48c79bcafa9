r"""Local training in MH-pFedHN's experiment: five networks on CIFAR-10.

python -m experiments.train --config=configs/local_only_cifar10.py --workdir=runs/local

See `configs/mh_pfedhn_cifar10.py`.
"""

from configs import mh_pfedhn_cifar10


def get_config(arg: str = ""):
    """Arguments: data, clients, smoke."""
    config = mh_pfedhn_cifar10.federation(arg)
    config.method = dict(
        name="local_only",
    )
    return config
