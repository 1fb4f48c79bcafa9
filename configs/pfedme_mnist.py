r"""pFedMe in HyperFedNet's experiment.

python -m experiments.train --config=configs/pfedme_mnist.py --workdir=runs/pfedme

Other data sets: `configs/pfedme_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="pfedme",
        lam=15.0,
        inner_steps=5,
        inner_learning_rate=0.05,
        bn_stats="average",  # or local
    )
    config.local.optimizer = "sgd"
    config.local.learning_rate = 0.005  # the paper's eta
    config.server.learning_rate = 1.0  # beta
    return config
