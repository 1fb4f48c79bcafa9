r"""FedBN in HyperFedNet's experiment.

python -m experiments.train --config=configs/fedbn_mnist.py --workdir=runs/fedbn

Other data sets: `configs/fedbn_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="fedbn",
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
