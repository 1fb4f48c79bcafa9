"""Opt.1 of HyperFedZero's paper: one classifier that sees the embedding as extra input.

The ablation the paper argues against (arXiv:2508.12673): same extractor, NoisyEmbed and
Balancing Penalty, but e joins the input of a classifier trained by FedAvg instead of
generating its parameters.
"""

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.hypernets import wrap
from hyperjax.hypernets.embedding import distribution_embedding
from hyperjax.registry import hands_on, has_traits
from hyperjax.types import Algorithm, Model


@has_traits(per_sample=True)
@hands_on(fedavg)
def opt1(
    model: Model,
    *,
    local,
    embedding_size: int = 16,
    alpha: float = 0.1,
    beta: float = 0.01,
    cv_mode: str = "batch_mean",
    ent_reduction: str = "sum",
    noise: bool = True,
    noise_net: str = "shared",
    eval_noise: bool = False,
    embed_granularity: str = "batch",
    deploy_granularity: str = "client",
    enter: str = "embedding",
    **fedavg_options,
) -> Algorithm:
    """Returns the control; arguments as in `hyperfedzero`."""
    embedding = distribution_embedding(
        model.sample_shape,
        embedding_size=embedding_size,
        alpha=alpha,
        beta=beta,
        cv_mode=cv_mode,
        ent_reduction=ent_reduction,
        noise=noise,
        noise_net=noise_net,
    )
    whole = wrap.concatenated_to_input(
        model,
        embedding,
        embed_granularity=embed_granularity,
        deploy_granularity=deploy_granularity,
        eval_noise=eval_noise,
        enter=enter,
    )
    return fedavg(whole, local=local, **fedavg_options)
