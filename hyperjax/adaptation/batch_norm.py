"""Adaptation of what normalises: running statistics, scales and biases."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from hyperjax import tree
from hyperjax.adaptation.pieces import descend, entropy, statistics_of, template_of
from hyperjax.algorithms.fedbn import normalisation
from hyperjax.data import clients
from hyperjax.errors import check_at_least, check_number
from hyperjax.models.linen import masked_mean
from hyperjax.types import ClientData, ClientSide, Key, Model, PyTree
from hyperjax.wrappers import adapting


def bn(*, prior: float = 0.0) -> Callable[[ClientSide], ClientSide]:
    """Normalises by the inputs' own moments.

    Schneider et al. 2020 (arXiv:2006.16971), equation 3: moments are means of those of
    training and of the n inputs, weighted N to n. Layer by layer, each after those
    below it. Inputs of few classes have the moments of these classes.

    Args:
      prior: N, how many samples those of training count for; very large: FedAvg.

    Raises:
      ValueError: the prior is negative, or the network has no running statistics.
    """
    check_number(at_least=0, prior=prior)

    def change(side: ClientSide) -> ClientSide:
        _check_statistics(side.model, "bn")

        def adapt(key, variables, inputs):
            return _with_statistics(side.model, key, variables, inputs, prior)

        return adapting(side, adapt)

    return change


def tent(
    *, learning_rate: float = 1e-3, batch_size: int = 200, epochs: int = 1
) -> Callable[[ClientSide], ClientSide]:
    """Descends along the entropy of predictions by scales and biases of batch-norm.

    Tent, Wang et al. 2021 (arXiv:2006.10726): statistics are the inputs' own, the
    optimizer is Adam. With few inputs, or inputs of one class, it collapses.

    Args:
      learning_rate: of Adam.
      batch_size: inputs in a step.
      epochs: passes over the inputs.

    Raises:
      ValueError: a number is out of range, or the network has no batch-norm.
    """
    check_number(above=0, learning_rate=learning_rate)
    check_at_least(1, batch_size=batch_size, epochs=epochs)

    def change(side: ClientSide) -> ClientSide:
        template = _check_statistics(side.model, "tent")
        trained = normalisation(template)
        if not trained:
            raise ValueError("adapt='tent' needs batch-norm with scale and bias")

        def adapt(key, variables, inputs):
            context = side.model.visit.context(variables, inputs)

            def objective(key, variables, batch):
                logits = side.model.loss(key, variables, batch, context)[1].logits
                return masked_mean(entropy(logits), batch.mask)

            moved = descend(
                optax.adam(learning_rate),
                objective,
                tree.splitter({"params": template["params"]}, trained),
                (key, variables, inputs),
                (batch_size, epochs),
            )
            return _with_statistics(side.model, key, moved, inputs, 0.0)

        return adapting(side, adapt)

    return change


def _check_statistics(model: Model, name: str) -> PyTree:
    """Returns abstract variables; refuses a network without running statistics."""
    template = template_of(model)
    if not jax.tree.leaves(template["stats"]):
        raise ValueError(
            f"adapt={name!r} adapts batch-norm, and this network has no running "
            "statistics; accepted: a network with batch-norm, such as mlp_bn, or "
            "another adaptation: t3a, shot"
        )
    return template


def _with_statistics(
    model: Model, key: Key, variables: PyTree, inputs: ClientData, prior: float
) -> PyTree:
    """Variables whose running statistics are those of all inputs at once."""
    context = model.visit.context(variables, inputs)
    order = jnp.arange(inputs.rows.shape[0])
    batch = clients.take(inputs, order, 0, inputs.rows.shape[0])
    stats = statistics_of(model, key, variables, batch, context, prior)
    return {**variables, "stats": stats}
