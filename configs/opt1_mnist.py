r"""Opt.1 of HyperFedZero's paper: the embedding as extra input of one classifier.

python -m experiments.train --config=configs/opt1_mnist.py --workdir=runs/opt1
"""

from configs import common


def get_config(arg: str = ""):
    """Arguments: data, alpha (of the Dirichlet partition), smoke."""
    args = common.parse_arg(arg, data="mnist5k", alpha=1.0, smoke=False)
    config = common.defaults()
    config.data.name = args.data
    config.data.alpha = args.alpha
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
    config.rounds = 2 if args.smoke else 100
    return config
