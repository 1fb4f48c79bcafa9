r"""pFedSim in HyperFedNet's experiment.

python -m experiments.train --config=configs/pfedsim_mnist.py --workdir=runs/pfedsim

Other data sets: `configs/pfedsim_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="pfedsim",
        warmup=0.5,  # fraction of the rounds that are FedAvg's
        head=r"params/head/.*",
        max_table_gb=8.0,
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
