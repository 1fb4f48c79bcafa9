r"""FedAMP in HyperFedNet's experiment.

python -m experiments.train --config=configs/fedamp_mnist.py --workdir=runs/fedamp

Other data sets: `configs/fedamp_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="fedamp",
        alpha=100.0,  # alpha / sigma is the most that another model can weigh
        sigma=1e4,
        lam=1.0,
        max_table_gb=8.0,
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
