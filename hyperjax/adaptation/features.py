"""Adaptation by features: where they lie around the classes that are predicted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hyperjax import tree
from hyperjax.adaptation.pieces import descend, entropy, template_of
from hyperjax.errors import check_at_least, check_number
from hyperjax.models import memory
from hyperjax.models.linen import masked_mean, sizes
from hyperjax.priors import outputs_of
from hyperjax.types import Array, ClientSide, Model, Outputs, PyTree
from hyperjax.wrappers import adapting

SUPPORTS = "supports"  # in memory: T3A's classifier, [K, L]
_HEAD = r"params/(.*/)?head/.*"


def shot(
    *,
    learning_rate: float = 1e-2,
    batch_size: int = 64,
    epochs: int = 15,
    beta: float = 0.3,
) -> Callable[[ClientSide], ClientSide]:
    """Trains all but the head for certain, diverse predictions.

    SHOT, Liang et al. 2020 (arXiv:2002.08546), equations 3 to 6: mean entropy minus the
    entropy of the mean, and beta times the cross-entropy with the class of the nearest
    of the features' class centroids, which are found once, as is then refined once. The
    diversity assumes that all classes are equally frequent.

    Deviations: no bottleneck with batch-norm, no weight normalisation; pseudo-labels
    are found once; one rate for all layers.

    Args:
      learning_rate: of SGD with momentum 0.9.
      batch_size: inputs in a step.
      epochs: passes over the inputs.
      beta: weight of pseudo-labels.

    Raises:
      ValueError: a number is out of range, or the network has no head.
    """
    check_number(above=0, learning_rate=learning_rate)
    check_number(at_least=0, beta=beta)
    check_at_least(1, batch_size=batch_size, epochs=epochs)

    def change(side: ClientSide) -> ClientSide:
        model = side.model
        template = _check_head(model, "shot")
        # The head stays, and all else moves.
        rest = tree.splitter({"params": template["params"]}, r".*", without=_HEAD)

        def adapt(key, variables, inputs):
            mask, seen = outputs_of(model, variables, inputs)
            pseudo = _pseudo_labels(seen, mask)
            # By row of the pool, as batches know samples.
            labels = jnp.zeros(inputs.pool.y.shape, jnp.int32)
            labels = labels.at[jnp.where(mask > 0, inputs.rows, len(labels))].set(
                pseudo, mode="drop"
            )
            known = inputs._replace(pool=inputs.pool._replace(y=labels))

            def objective(key, variables, batch):
                logits = model.predict(variables, batch.x)
                probs = jax.nn.softmax(logits)
                mean = _masked_rows(probs, batch.mask)
                diversity = -jnp.sum(mean * jnp.log(mean + 1e-12))
                nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
                uncertain = masked_mean(entropy(logits) + beta * nll, batch.mask)
                return uncertain - diversity

            return descend(
                optax.sgd(learning_rate, momentum=0.9),
                objective,
                rest,
                (key, variables, known),
                (batch_size, epochs),
            )

        return adapting(side, adapt)

    return change


def t3a(*, keep: int = 20) -> Callable[[ClientSide], ClientSide]:
    """Classifies by the mean direction of the features that were surest of a class.

    T3A, Iwasawa, Matsuo 2021 (NeurIPS): supports of a class are its row of the
    classifier, and inputs that were predicted as it, of which those of least entropy
    are kept. Outputs are features times the normalised sum of normalised supports, so
    the head's bias is gone.

    Args:
      keep: supports of a class; 0: all.

    Raises:
      ValueError: the number is out of range, or the network has no head.
    """
    check_at_least(0, keep=keep)

    def change(side: ClientSide) -> ClientSide:
        model = side.model
        _check_head(model, "t3a")

        def adapt(key, variables, inputs):
            mask, seen = outputs_of(model, variables, inputs)
            head = model.serve.export(variables)["params"]["head"]
            rows = head["kernel"].T
            logits = rows @ head["kernel"] + head.get("bias", 0.0)
            features: Any = seen.features
            found = Outputs(
                jnp.concatenate([logits, seen.logits]),
                jnp.concatenate([rows, features]),
            )
            mask = jnp.concatenate([jnp.ones(len(rows)), mask])
            return memory.put(variables, SUPPORTS, _supports(found, mask, keep))

        def apply(variables, x):
            supports = memory.get(variables, SUPPORTS)
            outputs = model.apply(memory.without(variables, SUPPORTS), x)
            if isinstance(supports, tuple):
                return outputs
            return outputs._replace(logits=outputs.features @ supports.T)

        changed = adapting(side, adapt)
        return changed._replace(model=model._replace(apply=apply))

    return change


def _check_head(model: Model, name: str) -> PyTree:
    """Returns abstract variables; refuses a network without a linear head."""
    template = template_of(model)
    try:
        sizes(model)
        head = jax.eval_shape(model.serve.export, template)["params"]["head"]
        head["kernel"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"adapt={name!r} needs a network whose last layer is linear and is named "
            "'head'"
        ) from error
    return template


def _masked_rows(values: Array, mask: Array) -> Array:
    """Mean of real rows, [B, K] -> [K]."""
    total = jnp.sum(jnp.where(mask[:, None] > 0, values, 0.0), 0)
    return total / jnp.maximum(jnp.sum(mask), 1.0)


def _normalised(rows: Any) -> Array:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _pseudo_labels(seen: Outputs, mask: Array) -> Array:
    """Classes [n] of the nearest centroid by cosine, refined once."""
    z = _normalised(seen.features)
    share = jax.nn.softmax(seen.logits) * mask[:, None]
    for _ in range(2):
        centroids = _normalised(share.T @ z / (share.sum(0)[:, None] + 1e-8))
        # A class of no sample has no centroid that anything is near.
        near = jnp.where(share.sum(0) > 0, z @ centroids.T, -2.0)
        labels = jnp.argmax(near, -1)
        share = jax.nn.one_hot(labels, share.shape[1]) * mask[:, None]
    return labels


def _supports(seen: Outputs, mask: Array, keep: int) -> Array:
    """Directions of classes, [K, L], of the surest real rows predicted as each."""
    num_classes = seen.logits.shape[1]
    predicted = jnp.argmax(seen.logits, -1)
    one_hot = jax.nn.one_hot(predicted, num_classes) * mask[:, None]
    if keep:
        order = jnp.argsort(jnp.where(mask > 0, entropy(seen.logits), jnp.inf))
        rank = jnp.cumsum(one_hot[order], 0)  # 1 for the surest of its class
        kept = jnp.zeros_like(one_hot).at[order].set(rank <= keep)
        one_hot = one_hot * kept
    return _normalised(one_hot.T @ _normalised(seen.features))
