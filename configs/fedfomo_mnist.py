r"""FedFomo in HyperFedNet's experiment.

python -m experiments.train --config=configs/fedfomo_mnist.py --workdir=runs/fedfomo

Other data sets: `configs/fedfomo_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="fedfomo",
        num_models=5,
        epsilon=0.3,
        epsilon_decay=0.05,
        validation_fraction=0.2,
        max_table_gb=8.0,
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
