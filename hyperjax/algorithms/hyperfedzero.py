"""HyperFedZero: classifiers for clients never seen in training, without fine-tuning.

Zhou, Lv, Tian, Si, Ye, Lv 2025, "Deploying Models to Non-participating Clients in
Federated Learning without Fine-tuning: A Hypernetwork-based Approach"
(arXiv:2508.12673). A distribution extractor maps inputs to an embedding e (NoisyEmbed),
a chunked hypernetwork maps e to all parameters of the classifier, and both are trained
by federated averaging of

    cross-entropy + alpha var(P e) / mean(P e) + beta E(-e log e)      (equation 4).

So the method is FedAvg of a model whose parameters depend on its inputs. What the
paper leaves open is an argument with the most defensible default: what the penalty is
taken over and how the extractor looks (`hypernets.embedding`), how many inputs share a
classifier and whether noise stays on at evaluation (`hypernets.wrap.conditioned`), how
generated tensors are scaled (`hypernets.mlp`).
"""

import jax

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.hypernets import mlp, wrap
from hyperjax.hypernets.embedding import Embedding, distribution_embedding
from hyperjax.registry import hands_on, has_traits
from hyperjax.types import Algorithm, Model


@has_traits(per_sample=True)
@hands_on(fedavg)
def hyperfedzero(
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
    chunk_size: int = 576,
    chunk_embedding_size: int = 16,
    hidden: tuple[int, ...] = (300, 300),
    out_scale: str = "none",
    norm_scale_offset: float = 0.0,
    chunk_batch_size: int = 0,
    **fedavg_options,
) -> Algorithm:
    """Returns HyperFedZero for the target `model`.

    Args:
      model: the target classifier; all its parameters are generated.
      local: builds a training loop, see `fedavg`.
      embedding_size: P.
      alpha: weight of the dispersion of the mean embedding.
      beta: weight of the embeddings' entropy.
      cv_mode: "batch_mean" or "per_sample", see `embedding.balancing_penalty`.
      ent_reduction: "sum" or "mean" over dimensions.
      noise: NoisyEmbed on (its ablation drops the noise head too).
      noise_net: "shared" trunk or a "separate" one.
      eval_noise: keep the noise on at evaluation.
      embed_granularity: "sample", "batch" or "client", see `wrap.conditioned`.
      deploy_granularity: "client" or "sample".
      enter: how e enters the hypernetwork; all but "embedding" are deviations.
      chunk_size: S.
      chunk_embedding_size: d_c.
      hidden: widths of the hypernetwork's hidden layers.
      out_scale: "none" or "fan_in" (deviation), see `mlp.chunked_mlp`.
      norm_scale_offset: added to generated normalisation scales (deviation if 1).
      chunk_batch_size: chunks generated at a time; 0 for all.
      **fedavg_options: `server_opt`, `condition_source`, ... of `fedavg`.
    """
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
    whole = emitted(
        model,
        embedding,
        hypernet=dict(
            chunk_size=chunk_size,
            chunk_embedding_size=chunk_embedding_size,
            hidden=hidden,
            out_scale=out_scale,
            norm_scale_offset=norm_scale_offset,
            chunk_batch_size=chunk_batch_size,
        ),
        eval_noise=eval_noise,
        embed_granularity=embed_granularity,
        deploy_granularity=deploy_granularity,
        enter=enter,
    )
    return fedavg(whole, local=local, **fedavg_options)


def emitted(model: Model, embedding: Embedding, hypernet: dict, **choices) -> Model:
    """Returns `model` with its parameters emitted by a chunked hypernetwork."""
    template = jax.jit(model.init)(jax.random.key(0))["params"]
    net = mlp.chunked_mlp(template, condition_size=embedding.size, **hypernet)
    return wrap.generated_from_input(model, embedding, net, **choices)
