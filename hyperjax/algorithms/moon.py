"""MOON: features close to the global model's, far from those of the last local model.

Li, He, Song 2021, "Model-Contrastive Federated Learning", CVPR (arXiv:2103.16257),
equation 3: the loss gains

    mu mean -log( e^{cos(z, z_glob)/T} / (e^{cos(z, z_glob)/T} + e^{cos(z, z_prev)/T}) )

with z the features of the model in training, z_glob and z_prev those of the received
model and of the one the client's last visit ended with, both fixed and in evaluation
mode. On a first visit z_prev = z_glob, so the term is log 2 with gradient zero.
Features are the input of the layer named "head"; the paper's networks have a two-layer
projection in front of it.
"""

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.models.linen import masked_mean
from hyperjax.types import Algorithm, Array, Batch, Model


def moon(
    model: Model,
    *,
    local,
    mu: float = 5.0,
    temperature: float = 0.5,
    keep=None,
    **fedavg_options,
) -> Algorithm:
    """Returns MOON.

    Args:
      model: what is trained; with a layer named "head".
      local: builds a training loop, see `fedavg`.
      mu: weight of the contrast; the paper tunes it among 0.1, 1, 5 and 10.
      temperature: T.
      keep: patterns of variables that stay home.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: mu is negative, the temperature is not positive, or the model has no
        head.
    """
    if not mu >= 0 or not temperature > 0:
        raise ValueError(
            f"mu={mu} must not be negative, temperature={temperature} be positive"
        )

    _check_features(model)

    def split(variables):
        stats = dict(variables["stats"])
        previous = stats.pop("previous")
        return {**variables, "stats": stats}, previous

    def with_previous(variables, previous):
        return {**variables, "stats": {**variables["stats"], "previous": previous}}

    def snapshot(variables):
        """A copy of a model as part of the statistics."""
        return {"params": variables["params"], "stats": variables["stats"]}

    def init(key):
        variables = model.init(key)
        return with_previous(variables, jax.tree.map(jnp.copy, snapshot(variables)))

    def arrive(key, variables):
        ours = model.arrive(key, split(variables)[0])
        return with_previous(ours, snapshot(ours))

    def visit(variables):
        ours, previous = split(variables)
        return with_previous(model.visit(ours), previous)

    def leave(variables):
        ours = model.leave(split(variables)[0])
        return with_previous(ours, snapshot(ours))

    def context(variables, data):
        ours, previous = split(variables)
        return snapshot(ours), previous, model.context(ours, data)

    def loss(key, variables, batch, context):
        received, before, inner = context
        ours, previous = split(variables)
        value, (stats, info) = model.loss(key, ours, batch, inner)
        z = model.features(ours, batch, True)
        fixed = (model.features(v, batch, False) for v in (received, before))
        near, far = (_cosine(z, other) / temperature for other in fixed)
        contrast = masked_mean(jnp.logaddexp(near, far) - near, batch.mask)
        info = {**info, "contrast": contrast}
        return value + mu * contrast, ({**stats, "previous": previous}, info)

    whole = model._replace(
        init=init,
        loss=loss,
        context=context,
        arrive=arrive,
        visit=visit,
        leave=leave,
        predict=lambda variables, x: model.predict(split(variables)[0], x),
        condition=lambda variables, data: model.condition(split(variables)[0], data),
        export=lambda variables: model.export(split(variables)[0]),
        inspect=lambda variables, data: model.inspect(split(variables)[0], data),
        features=lambda variables, *args: model.features(split(variables)[0], *args),
    )
    home = (*tree.as_patterns(keep), r"stats/previous/.*")
    return fedavg(whole, local=local, keep=home, **fedavg_options)


def _check_features(model: Model) -> None:
    """Raises what the model raises if it has no features."""

    def trial(key):
        x = jnp.zeros((1, *model.sample_shape))
        batch = Batch(x, jnp.zeros(1, jnp.int32), jnp.ones(1))
        return model.features(model.init(key), batch, False)

    jax.eval_shape(trial, jax.random.key(0))


def _cosine(a: Array, b: Array) -> Array:
    """Cosine similarity over the last axis, [B, L] x 2 -> [B]."""
    # Not `norm`, whose derivative at zero (all units of a ReLU off) is not a number.
    squares = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    return jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))
