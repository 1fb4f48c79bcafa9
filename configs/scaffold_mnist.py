r"""SCAFFOLD in HyperFedNet's experiment.

python -m experiments.train --config=configs/scaffold_mnist.py --workdir=runs/scaffold

Other data sets: `configs/scaffold_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="scaffold",
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    config.server.weights = "uniform"
    return config
