"""Opt.1 of HyperFedZero's paper: one classifier that sees the embedding as extra input.

The ablation the paper argues against (arXiv:2508.12673): same extractor, NoisyEmbed and
Balancing Penalty, but e joins the input of a classifier trained by FedAvg instead of
generating its parameters.
"""

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.hypernets import wrap
from hyperjax.hypernets.embedding import distribution_embedding
from hyperjax.registry import hands_on, has_traits, routed
from hyperjax.training import Local, check_given
from hyperjax.types import Algorithm, Model
from hyperjax.wrappers import with_condition_of

PARTS = (distribution_embedding, wrap.conditioned, with_condition_of, fedavg)


@has_traits(per_sample=True)
@hands_on(*PARTS, without=("extractor",))
def opt1(model: Model, *, local: Local, **options) -> Algorithm:
    """Returns the control.

    Args:
      model: the classifier, which is rebuilt for wider inputs.
      local: how clients train, see `fedavg`.
      **options: of `embedding.distribution_embedding`, `wrap.conditioned`,
        `wrappers.with_condition_of` and `fedavg`, as in `hyperfedzero`.
    """
    check_given(model, local)
    extractor, condition, source, averaging = routed(options, *PARTS)
    shape, tokens = model.sample_shape, model.vocabulary
    embedding = distribution_embedding(shape, tokens, **extractor)
    whole = wrap.concatenated_to_input(model, embedding, **condition)
    return with_condition_of(fedavg(whole, local=local, **averaging), **source)
