r"""MH-pFedHNGD: MH-pFedHN with a global model that teaches.

python -m experiments.train --config=configs/mh_pfedhngd_cifar10.py --workdir=runs/gd

See `configs/mh_pfedhn_cifar10.py`. A sparse uplink is of the clients' own networks;
the changes of their copies of the global model are sent whole.
"""

from configs import mh_pfedhn_cifar10


def get_config(arg: str = ""):
    """Arguments: data, clients, averaged, smoke."""
    config = mh_pfedhn_cifar10.get_config(arg)
    config.method.update(
        name="mh_pfedhngd",
        lam=0.2,
        temperature=15.0,
        teacher="stale",  # or fresh
        global_step_touches_idle=False,  # as the authors' code: momentum moves them
        clip_global=False,
    )
    return config
