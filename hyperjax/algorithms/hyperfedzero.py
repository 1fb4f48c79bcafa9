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

from collections.abc import Callable

import jax

from hyperjax import compiling
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.hypernets import generators, mlp, wrap
from hyperjax.hypernets.embedding import Embedding, distribution_embedding
from hyperjax.registry import hands_on, has_traits, routed
from hyperjax.training import Local, check_given
from hyperjax.types import Algorithm, Model
from hyperjax.wrappers import with_condition_of

# What a method of this kind is put together from, in the order in which options are
# asked whose they are.
PARTS = (
    distribution_embedding,
    wrap.conditioned,
    mlp.chunked_mlp,
    with_condition_of,
    fedavg,
)


@has_traits(per_sample=True)
@hands_on(*PARTS, without=("extractor", "condition_size"))
def hyperfedzero(
    model: Model, *, local: Local, hypernet: str | Callable = "", **options
) -> Algorithm:
    """Returns HyperFedZero for the target `model`.

    Args:
      model: the target classifier; all its parameters are generated.
      local: how clients train, see `fedavg`.
      hypernet: another hypernetwork than the chunked one, whose options then count for
        nothing: "per_tensor(hidden_size=32)" or one of yours, see
        `hypernets.generators`.
      **options: of `embedding.distribution_embedding`, `wrap.conditioned` (all values
        of `enter` but "embedding" are deviations), `mlp.chunked_mlp` (so are "fan_in"
        and an offset of normalisation scales), `wrappers.with_condition_of` and
        `fedavg`.
    """
    check_given(model, local)
    extractor, condition, chunked, source, averaging = routed(options, *PARTS)
    shape, tokens = model.sample_shape, model.vocabulary
    embedding = distribution_embedding(shape, tokens, **extractor)
    whole = emitted(model, embedding, chunked, hypernet, **condition)
    return with_condition_of(fedavg(whole, local=local, **averaging), **source)


def emitted(
    model: Model,
    embedding: Embedding,
    chunked: dict,
    hypernet: str | Callable = "",
    **choices,
) -> Model:
    """Returns `model` with its parameters emitted by a hypernetwork.

    Args:
      model: the target classifier.
      embedding: what the hypernetwork's condition is computed by.
      chunked: options of `mlp.chunked_mlp`.
      hypernet: another one, see `hyperfedzero`.
      **choices: of `wrap.conditioned`.
    """
    key = jax.random.key(0)
    if not hypernet and chunked.get("out_scale") == "fan_in":  # looks at the numbers
        with jax.ensure_compile_time_eval():
            start = compiling.once(model.init)(key)
    else:
        start = jax.eval_shape(model.init, key)
    template = start["params"]
    if hypernet:
        net = generators.generator(hypernet, template, embedding.size)
    else:
        net = mlp.chunked_mlp(template, condition_size=embedding.size, **chunked)
    return wrap.generated_from_input(model, embedding, net, **choices)
