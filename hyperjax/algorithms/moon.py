"""MOON: features close to the global model's, far from those of the last local model.

Li, He, Song 2021, "Model-Contrastive Federated Learning", CVPR (arXiv:2103.16257),
equation 3: the loss gains

    mu mean -log( e^{cos(z, z_glob)/T} / (e^{cos(z, z_glob)/T} + e^{cos(z, z_prev)/T}) )

with z the features of the model in training (dropout on), z_glob and z_prev those of
the received model and of the one the client's last visit ended with, both fixed and in
evaluation mode. On a first visit z_prev = z_glob, so the term is log 2 with gradient
zero. Features are the input of the layer named "head"; the paper's networks have a
two-layer projection in front of it.
"""

import jax
import jax.numpy as jnp

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.errors import check_number
from hyperjax.models import memory
from hyperjax.models.linen import masked_mean, sizes
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local, check_given
from hyperjax.types import Algorithm, Array, Model

NAME = "previous"  # model, in a client's memory


@has_traits(base=True)
@hands_on(fedavg)
def moon(
    model: Model,
    *,
    local: Local,
    mu: float = 5.0,
    temperature: float = 0.5,
    **fedavg_options,
) -> Algorithm:
    """Returns MOON.

    Args:
      model: what is trained; with a layer named "head".
      local: how clients train, see `fedavg`.
      mu: weight of the contrast; the paper tunes it among 0.1, 1, 5 and 10.
      temperature: T.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: mu is negative, the temperature is not positive, or the model has no
        head.
    """
    check_given(model, local)
    check_number(at_least=0, mu=mu)
    check_number(above=0, temperature=temperature)
    sizes(model)  # raises where there are no features

    def snapshot(ours):
        return {"params": ours["params"], "stats": ours["stats"]}

    def renewed(variables):
        return memory.put(variables, NAME, snapshot(variables))

    inner = memory.with_entry(
        model, NAME, lambda key, ours: jax.tree.map(jnp.copy, snapshot(ours))
    )

    def context(variables, data):
        previous = memory.get(variables, NAME)
        return snapshot(variables), previous, inner.visit.context(variables, data)

    def loss(key, variables, batch, context):
        received, before, rest = context
        value, trained = inner.loss(key, variables, batch, rest)
        fixed = (model.features(v, batch.x) for v in (received, before))
        near, far = (_cosine(trained.features, z) / temperature for z in fixed)
        contrast = masked_mean(jnp.logaddexp(near, far) - near, batch.mask)
        info = {**trained.info, "contrast": contrast}
        return value + mu * contrast, trained._replace(info=info)

    whole = inner._replace(
        loss=loss,
        visit=inner.visit._replace(
            arrive=lambda key, variables: renewed(inner.visit.arrive(key, variables)),
            context=context,
            leave=lambda variables: renewed(inner.visit.leave(variables)),
        ),
    )
    return fedavg(whole, local=local, **fedavg_options)


def _cosine(a: Array, b: Array) -> Array:
    """Cosine similarity over the last axis, [B, L] x 2 -> [B]."""
    # Not `norm`, whose derivative at zero (all units of a ReLU off) is not a number. As
    # in PyTorch's cosine_similarity the product of both norms is 1e-8 at least.
    squares = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    return jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))
