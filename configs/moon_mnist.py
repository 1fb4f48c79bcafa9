r"""MOON in HyperFedNet's experiment.

python -m experiments.train --config=configs/moon_mnist.py --workdir=runs/moon

Other data sets: `configs/moon_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="moon",
        mu=5.0,
        temperature=0.5,
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
