r"""FedProx in HyperFedNet's experiment.

python -m experiments.train --config=configs/fedprox_mnist.py --workdir=runs/fedprox

Other data sets: `configs/fedprox_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="fedprox",
        mu=0.1,  # HyperFedNet tries 1, 0.1 and 0.01
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
