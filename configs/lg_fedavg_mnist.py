r"""LG-FedAvg in HyperFedNet's experiment.

python -m experiments.train --config=configs/lg_fedavg_mnist.py --workdir=runs/lg_fedavg

Other data sets: `configs/lg_fedavg_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="lg_fedavg",
        share=r"params/head/.*",
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
