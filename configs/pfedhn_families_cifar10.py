r"""pFedHN for clients with different networks, in MH-pFedHN's experiment on CIFAR-10.

python -m experiments.train --config=configs/pfedhn_families_cifar10.py --workdir=runs/x

One hypernetwork emits the parameters of all five networks, and each client is sent the
slice of its own. See `configs/mh_pfedhn_cifar10.py` for the data and the protocol,
`configs/pfedhn_cifar10.py` for the hypernetwork.
"""

from configs import mh_pfedhn_cifar10, pfedhn_cifar10


def get_config(arg: str = ""):
    """Arguments: data, clients, averaged, smoke."""
    config = mh_pfedhn_cifar10.get_config(arg)
    theirs = pfedhn_cifar10.get_config()
    config.server.update(
        optimizer=theirs.server.optimizer, learning_rate=theirs.server.learning_rate
    )
    config.method = theirs.method
    return config
