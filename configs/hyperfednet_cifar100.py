r"""HyperFedNet on CIFAR-100.

python -m experiments.train --config=configs/hyperfednet_cifar100.py --workdir=runs/hfn

See `configs/hyperfednet_mnist.py`.
"""

from configs import hyperfednet_mnist


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    return hyperfednet_mnist.get_config(arg, data="cifar100")
