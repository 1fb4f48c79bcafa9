r"""APFL in HyperFedNet's experiment.

python -m experiments.train --config=configs/apfl_mnist.py --workdir=runs/apfl

Other data sets: `configs/apfl_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="apfl",
        alpha=0.5,
        adaptive=True,
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
