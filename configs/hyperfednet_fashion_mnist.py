r"""HyperFedNet on Fashion-MNIST.

python -m experiments.train --config=configs/hyperfednet_fashion_mnist.py \
    --workdir=runs/hfn

See `configs/hyperfednet_mnist.py`.
"""

from configs import hyperfednet_mnist


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    return hyperfednet_mnist.get_config(arg, data="fashion_mnist")
