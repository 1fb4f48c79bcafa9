"""From a flax.linen module to a `Model`."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from hyperjax.errors import first_line
from hyperjax.types import Array, Batch, Model


def masked_mean(values: Array, mask: Array) -> Array:
    """Returns the mean of values [B] where mask [B] is 1; 0 if it is nowhere."""
    return jnp.sum(jnp.where(mask > 0, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1.0)


def cross_entropy(logits: Array, batch: Batch) -> Array:
    """Returns the mean cross-entropy over the real samples of a batch, []."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
    return masked_mean(losses, batch.mask)


def from_linen(
    module: nn.Module, input_shape: tuple[int, ...], num_classes: int
) -> Model:
    """Returns a classification `Model` of a linen module.

    The module maps [B, *input_shape] float32 to logits [B, num_classes]. If its
    `__call__` has an argument `train`, it is set accordingly; collections other than
    "params" become `variables["stats"]`; a "dropout" stream is supplied in training.

    Raises:
      ValueError: the module does not accept the shape, or does not return logits of
        shape [B, num_classes].
    """
    takes_train = "train" in inspect.signature(type(module).__call__).parameters
    name = type(module).__name__

    def apply(variables, x, train, key=None):
        rngs = {} if key is None else {"dropout": key}
        collections = {"params": variables["params"], **variables["stats"]}
        flags = {"train": train} if takes_train else {}
        if train and variables["stats"]:
            return module.apply(
                collections, x, rngs=rngs, mutable=list(variables["stats"]), **flags
            )
        return module.apply(collections, x, rngs=rngs, **flags), variables["stats"]

    def init(key):
        flags: dict[str, Any] = {"train": False} if takes_train else {}
        collections = dict(module.init(key, jnp.zeros((1, *input_shape)), **flags))
        return {"params": collections.pop("params"), "stats": collections}

    def loss(key, variables, batch, context):
        logits, stats = apply(variables, batch.x, True, key)
        value = cross_entropy(logits, batch)
        return value, (stats, {"loss": value})

    def predict(variables, x):
        return apply(variables, x, False)[0]

    def trial(key):
        return predict(init(key), jnp.zeros((2, *input_shape)))

    try:
        logits = jax.eval_shape(trial, jax.random.key(0))
    except Exception as error:  # whatever a user's module raises on a wrong shape
        raise ValueError(
            f"model {name} does not accept inputs of shape {tuple(input_shape)}: "
            f"{first_line(error)}"
        ) from error
    if logits.shape != (2, num_classes):
        raise ValueError(
            f"model {name} returns {logits.shape} for a batch of 2 inputs of shape "
            f"{tuple(input_shape)}; logits of shape (2, {num_classes}) are expected"
        )
    return Model(
        sample_shape=tuple(input_shape),
        init=init,
        loss=loss,
        predict=predict,
        with_shape=lambda shape: from_linen(module, shape, num_classes),
    )
