r"""FedProto in MH-pFedHN's experiment: five networks on CIFAR-10.

python -m experiments.train --config=configs/fedproto_cifar10.py --workdir=runs/fedproto

See `configs/mh_pfedhn_cifar10.py`.
"""

from configs import mh_pfedhn_cifar10


def get_config(arg: str = ""):
    """Arguments: data, clients, smoke."""
    config = mh_pfedhn_cifar10.federation(arg)
    config.method = dict(
        name="fedproto",
        lam=1.0,
    )
    return config
