"""Scores one client's outputs, and the controls that they are held against.

Beside the plain accuracy a client gets that of two controls which need nothing but the
model's own outputs: label-shift EM, and its oracle.

A client has no accuracy, which is NaN here and null in files, if the outputs for any of
its samples are not finite: the class of NaN would be class 0, and right now and then.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.data.clients import Table
from hyperjax.engine import deploy
from hyperjax.priors import prior_em
from hyperjax.types import Array, ClientData, Model, Pool, PyTree


def usable(logits: Array) -> Array:
    """Returns whether logits [..., K] say anything, [...] bool.

    They do without NaN and positive infinity; minus infinity rules a class out, but not
    all of them.
    """
    return jnp.all(logits < jnp.inf, -1) & jnp.any(jnp.isfinite(logits), -1)


def _mean_if_finite(values, logits, mask):
    """Mean of real samples' values [n], 0 without any; NaN if some are not `usable`."""
    finite = jnp.all(usable(logits) | (mask <= 0))
    total = jnp.sum(jnp.where(mask > 0, values.astype(jnp.float32), 0.0))
    return jnp.where(finite, total / jnp.maximum(jnp.sum(mask), 1.0), jnp.nan)


class Samples(NamedTuple):
    """All samples, and the class prior of those that were trained on."""

    labelled: Pool
    unlabelled: Pool
    source: Array  # [K], positive


class Exam(NamedTuple):
    """One client's inputs and what is right; n is a multiple of the batch size."""

    data: ClientData  # labels withheld
    batch_size: int
    labels: Array  # [n] int32
    mask: Array  # [n] float32, 1 for real samples
    source: Array  # [K]

    def logits(self, model: Model, variables: PyTree) -> Array:
        """Returns outputs for all inputs, [n, K]."""
        num_classes = len(self.source)
        return deploy.predict_all(
            model, variables, self.data, num_classes, self.batch_size
        )

    def accuracy(self, logits: Array, prior: Array) -> Array:
        """Returns the share of right answers after moving to another prior [K], [].

        NaN if the logits of any real sample are not finite.
        """
        # Floored: a class the client does not hold must lose, yet stay finite.
        shift = jnp.log(jnp.maximum(prior, 1e-30)) - jnp.log(self.source)
        right = jnp.argmax(logits + shift, -1) == self.labels
        return self.mean(right, logits)

    def loss(self, logits: Array) -> Array:
        """Returns the mean negative log-likelihood, []; NaN as accuracies are."""
        log_probs = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_probs, self.labels[:, None], 1)[:, 0]
        return self.mean(nll, logits)

    def mean(self, values: Array, logits: Array) -> Array:
        """Returns the mean of a value [n] of each input, []; NaN as accuracies are."""
        return _mean_if_finite(values, logits, self.mask)


def exam(inputs: Table, samples: Samples, batch_size: int) -> Exam:
    """Returns what one client, with rows [n_max] and a size [], is asked."""
    data = ClientData(*inputs, samples.unlabelled)
    data, width = deploy.in_batches(data, batch_size)
    mask = (jnp.arange(len(data.rows)) < data.size).astype(jnp.float32)
    return Exam(data, width, samples.labelled.y[data.rows], mask, samples.source)


def own(exam: Exam, model: Model, variables: PyTree) -> dict[str, Array]:
    """Returns a client's accuracy, those of the two controls, and its loss, all [].

    And two means over its inputs that need no label: how sure the outputs are, as the
    largest probability ("confidence") and as minus log sum exp ("energy").
    """
    logits, source = exam.logits(model, variables), exam.source
    count = jnp.maximum(exam.data.size, 1)
    truth = jnp.zeros_like(source).at[exam.labels].add(exam.mask) / count
    estimate = prior_em(jax.nn.softmax(logits), exam.mask, source)
    return {
        "accuracy": exam.accuracy(logits, source),
        "accuracy_em": exam.accuracy(logits, estimate),
        "accuracy_oracle": exam.accuracy(logits, truth),
        "loss": exam.loss(logits),
        "confidence": exam.mean(jnp.max(jax.nn.softmax(logits), -1), logits),
        "energy": exam.mean(-jax.nn.logsumexp(logits, -1), logits),
    }


def swapped(
    exam: Exam, model: Model, variables: PyTree, other: PyTree
) -> dict[str, Array]:
    """Returns a client's accuracy with another one's network, and their distance.

    The distance is that of the exported networks, relative to the client's own.
    """
    logits = exam.logits(model, other)
    mine, theirs = model.serve.export(variables), model.serve.export(other)
    return {
        "accuracy_swapped": exam.accuracy(logits, exam.source),
        "distance_swapped": tree.norm(tree.sub(mine, theirs)) / tree.norm(mine),
    }
