r"""pFedLA in HyperFedNet's experiment.

python -m experiments.train --config=configs/pfedla_mnist.py --workdir=runs/pfedla

Other data sets: `configs/pfedla_mnist.py:data=cifar10`, see `common.personalised`.
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, iid, novel, smoke."""
    config = common.personalised(arg)
    config.method = dict(
        name="pfedla",
        embedding_size=100,
        hidden_size=100,
        generator_learning_rate=5e-3,
        sign=1,  # -1: the sign of public reproductions
        max_table_gb=8.0,
        bn_stats="average",  # or local
        finetune=(),  # patterns of what fine-tuning moves; (): everything
    )
    # One client after another, as in public reproductions; False: synchronous.
    config.server.sequential = True
    return config
