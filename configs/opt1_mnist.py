r"""Opt.1 of HyperFedZero's paper: the embedding as extra input of one classifier.

python -m experiments.train --config=configs/opt1_mnist.py --workdir=runs/opt1
"""

from hyperjax.protocols import common


def get_config(arg: str = ""):
    """Arguments: data, alpha (of the Dirichlet partition), smoke."""
    config, _ = common.zero_shot(arg)
    config.method = dict(
        name="opt1",
        embedding_size=16,
        alpha=0.1,
        beta=0.01,
        cv_mode="batch_mean",
        ent_reduction="sum",
        noise=True,
        noise_net="shared",
        eval_noise=False,
        embed_granularity="batch",
        deploy_granularity="client",
        condition_source="eval_inputs",
        enter="embedding",
    )
    return config
