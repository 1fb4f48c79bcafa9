r"""Centralised training: the images of all participants in one place.

python -m experiments.train --config=configs/centre_mnist.py --workdir=runs/centre

The upper bound of HyperFedNet's experiment: one client holds everybody's training
images; evaluation is still per user. A round is one epoch, which is what a quarter of
the users with four epochs each amount to.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="fedavg",
        bn_stats="average",
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    config.data.pooled = True
    config.local.epochs = 1
    config.server.sampler = "full"
    return config
