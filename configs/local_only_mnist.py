r"""Local training in HyperFedNet's experiment.

python -m experiments.train --config=configs/local_only_mnist.py --workdir=runs/local

Other data sets: `configs/local_only_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="local_only",
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
