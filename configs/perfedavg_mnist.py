r"""Per-FedAvg in HyperFedNet's experiment.

python -m experiments.train --config=configs/perfedavg_mnist.py --workdir=runs/perfedavg

Other data sets: `configs/perfedavg_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="perfedavg",
        inner_learning_rate=0.01,
        order="first",  # or exact
        draws="thirds",  # or same
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
