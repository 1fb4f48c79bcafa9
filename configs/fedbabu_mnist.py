r"""FedBABU in HyperFedNet's experiment.

python -m experiments.train --config=configs/fedbabu_mnist.py --workdir=runs/fedbabu

Other data sets: `configs/fedbabu_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="fedbabu",
        head=r"params/head/.*",
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
