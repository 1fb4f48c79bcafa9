r"""MH-pFedHNGD: MH-pFedHN with a global model that teaches.

python -m experiments.train --config=configs/mh_pfedhngd_cifar10.py --workdir=runs/gd

See `configs/mh_pfedhn_cifar10.py`. A round opens with the global model: all clients
train a copy of it at once, and the server takes its step on their changes; then they
come one after another with networks of their own, as the authors' code has it. A sparse
uplink is of these networks; the changes of the copies are sent whole.
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
        global_step_touches_idle=False,  # the authors' code: True
        clip_global=False,
    )
    return config
