r"""FedRep in HyperFedNet's experiment.

python -m experiments.train --config=configs/fedrep_mnist.py --workdir=runs/fedrep

Other data sets: `configs/fedrep_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="fedrep",
        head=r"params/head/.*",
        head_epochs=3,  # of HyperFedNet's 4 epochs; the paper has 10
        body_epochs=1,
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): the head
    )
    config.local.epochs = None  # the method's own count
    return config
