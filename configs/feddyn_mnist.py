r"""FedDyn in HyperFedNet's experiment.

python -m experiments.train --config=configs/feddyn_mnist.py --workdir=runs/feddyn

Other data sets: `configs/feddyn_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="feddyn",
        alpha=0.01,
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    config.server.weights = "uniform"
    config.local.clip_norm = 10.0  # as the authors' code
    return config
