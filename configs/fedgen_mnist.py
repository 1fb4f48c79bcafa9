r"""FedGen in HyperFedNet's experiment.

python -m experiments.train --config=configs/fedgen_mnist.py --workdir=runs/fedgen

Other data sets: `configs/fedgen_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="fedgen",
        head=r"params/head/.*",
        noise_size=32,
        hidden_size=32,
        alpha=10.0,
        beta=10.0,
        decay=0.98,
        generator_steps=5,
        generator_batch_size=32,
        generator_learning_rate=3e-4,
        teacher_weight=1.0,
        diversity_weight=0.0,
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    return config
