r"""Ditto in HyperFedNet's experiment.

python -m experiments.train --config=configs/ditto_mnist.py --workdir=runs/ditto

Other data sets: `configs/ditto_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="ditto",
        lam=1.0,
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
