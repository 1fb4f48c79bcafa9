r"""FedNova in HyperFedNet's experiment.

python -m experiments.train --config=configs/fednova_mnist.py --workdir=runs/fednova

Other data sets: `configs/fednova_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="fednova",
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
