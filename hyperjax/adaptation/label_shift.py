"""Adaptation to other class frequencies by what participants know of the classifier.

Both move a client's logits by the logarithm of its class prior over that of the
participants. The prior is found among its unlabelled inputs; what the classifier makes
of labelled samples that it was not trained on, participants find out first: "em" how
sure it should be, "bbse" what it takes for what.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.models import memory
from hyperjax.models.linen import num_classes
from hyperjax.priors import outputs_of, prior_em
from hyperjax.types import Array, ClientSide, Fit, PyTree
from hyperjax.wrappers import adapting

CALIBRATIONS = ("none", "ts", "bcts", "vs")
MOVED = "label_shift"  # in memory: {"calibration": [P], "shift": [K]} of logits
_RIDGE = 1e-4  # pulls a calibration towards none, where samples do not tell
_FLOOR = 1e-6  # of a participants' class


def em(
    *, calibration: str = "bcts", rounds: int = 20
) -> Callable[[ClientSide], ClientSide]:
    """Finds a client's class prior by expectation maximisation on calibrated outputs.

    Saerens et al. 2002, see `priors.prior_em`, after calibration: Alexandari, Kundaje,
    Shrikumar 2020 (ICML, arXiv:1901.06852). Logits z become z / T ("ts"), z / T + b
    ("bcts", bias-corrected) or W z + b with W diagonal ("vs"). The participants' prior
    is the mean of what the calibrated classifier says of their samples, so that there
    is no shift where there is none. The paper fits by L-BFGS; here a round is a step of
    Newton's method, for which participants send sums of loss, gradient and Hessian, and
    which is halved if the loss went up.

    A client's accuracy then is the adapted one, and that with EM ("zacc_em") counts
    the shift twice.

    Args:
      calibration: one of `CALIBRATIONS`.
      rounds: of fitting it.

    Raises:
      ValueError: an unknown calibration, or rounds below 1.
    """
    check_choice("calibration", calibration, CALIBRATIONS)
    check_at_least(1, rounds=rounds)

    def change(side: ClientSide) -> ClientSide:
        classes = num_classes(side.model)

        def send(key, fitted, variables, held):
            mask, seen = outputs_of(side.model, variables, held)
            labels = held.pool.y[held.rows]
            return told_of(fitted.trial, seen.logits, labels, mask)

        def adapt(key, variables, inputs, fitted):
            mask, seen = outputs_of(side.model, variables, inputs)
            probs = jax.nn.softmax(calibrated(fitted.at, seen.logits))
            prior = prior_em(probs, mask, fitted.prior)
            return _move(variables, fitted.at, prior, fitted.prior)

        def start():
            return untouched(calibration, classes)

        return _moving(adapting(side, adapt, Fit(start, send, improved, rounds)))

    return change


def bbse(*, smoothing: float = 1e-3) -> Callable[[ClientSide], ClientSide]:
    """Finds a client's class prior from how often each class is predicted.

    Black-box shift estimation, Lipton, Wang, Smola 2018 (ICML, arXiv:1802.03916):
    participants send their confusion counts, K^2 numbers, once. With P(predicted j |
    y) from their sum, q = P^+ (shares of predictions among the client's inputs), the
    nearest point of the simplex, and smoothed with the uniform prior.

    Args:
      smoothing: share of the uniform prior, in [0, 1).

    Raises:
      ValueError: it is out of range.
    """
    check_number(at_least=0, below=1, smoothing=smoothing)

    def change(side: ClientSide) -> ClientSide:
        classes = num_classes(side.model)

        def send(key, fitted, variables, held):
            mask, seen = outputs_of(side.model, variables, held)
            labels = jnp.where(mask > 0, held.pool.y[held.rows], classes)
            counts = jnp.zeros((classes, classes))
            predicted = jnp.argmax(seen.logits, -1)
            return counts.at[predicted, labels].add(1.0, mode="drop")

        def adapt(key, variables, inputs, confusion):
            mask, seen = outputs_of(side.model, variables, inputs)
            one_hot = jax.nn.one_hot(jnp.argmax(seen.logits, -1), classes)
            shares = mask @ one_hot / jnp.maximum(jnp.sum(mask), 1.0)
            found, source = priors_of(confusion, shares)
            found = jnp.where(inputs.size > 0, found, source)
            found, source = (
                (1 - smoothing) * p + smoothing / classes for p in (found, source)
            )
            return _move(variables, jnp.zeros(0), found, source)

        def start():
            return jnp.zeros((classes, classes))

        total = Fit(start, send, lambda fitted, sent: jnp.sum(sent, 0))
        return _moving(adapting(side, adapt, total))

    return change


def priors_of(confusion: Array, shares: Array) -> tuple[Array, Array]:
    """Returns a client's class prior by BBSE and that of the participants, [K] each.

    Args:
      confusion: [K, K] counts, of predicted j and true y at [j, y].
      shares: [K] of what is predicted of the client's inputs.
    """
    labels = jnp.sum(confusion, 0)
    given = confusion / jnp.maximum(labels, 1.0)
    # A class that participants have none of has a column of zeros, and so no share.
    found = jnp.linalg.pinv(given) @ shares
    source = labels / jnp.maximum(jnp.sum(labels), 1.0)
    return optax.projections.projection_simplex(found), source


# Calibration -------------------------------------------------------------------------


class Calibration(NamedTuple):
    """The best calibration [P] so far, the next to try, and what is known of the first.

    P is 0 for "none", 1 for "ts", 1 + K for "bcts", 2 K for "vs".
    """

    at: Array
    loss: Array  # [], of `at`
    prior: Array  # [K], the mean of what is predicted by `at`
    trial: Array


class Told(NamedTuple):
    """What a participant sends of a calibration: sums over its samples."""

    loss: Array  # []
    gradient: Array  # [P]
    hessian: Array  # [P, P]
    probs: Array  # [K]
    samples: Array  # []


def untouched(calibration: str, classes: int) -> Calibration:
    """Returns that which leaves logits as they are."""
    number = {"none": 0, "ts": 1, "bcts": 1 + classes, "vs": 2 * classes}[calibration]
    start = _identity(number, classes)
    nothing = jnp.full(classes, 1 / classes)
    return Calibration(start, jnp.float32(jnp.inf), nothing, start)


def calibrated(at: Array, logits: Array) -> Array:
    """Returns calibrated logits [..., K]."""
    classes = logits.shape[-1]
    if len(at) == 0:
        return logits
    number = classes if len(at) == 2 * classes else 1
    logits = logits * at[:number]
    return logits + at[number:] if len(at) > 1 else logits


def told_of(at: Array, logits: Array, labels: Array, mask: Array) -> Told:
    """Returns what samples [n] say of a calibration; `mask` is 1 for real ones."""

    def loss(at):
        z = calibrated(at, logits)
        each = optax.softmax_cross_entropy_with_integer_labels(z, labels)
        return jnp.sum(jnp.where(mask > 0, each, 0.0))

    probs = jax.nn.softmax(calibrated(at, logits))
    probs = jnp.sum(jnp.where(mask[:, None] > 0, probs, 0.0), 0)
    derivatives = jax.grad(loss)(at), jax.hessian(loss)(at)
    return Told(loss(at), *derivatives, probs, jnp.sum(mask))


def improved(fitted: Calibration, sent: Told) -> Calibration:
    """Returns the calibration after all participants' sums, leaves [C, ...]."""
    total = jax.tree.map(lambda x: jnp.sum(x, 0), sent)
    loss, gradient, hessian, probs = (
        x / jnp.maximum(total.samples, 1.0) for x in total[:4]
    )
    away = fitted.trial - _identity(len(fitted.trial), len(probs))
    loss = loss + _RIDGE / 2 * jnp.sum(away**2)
    better = loss <= fitted.loss
    at = jnp.where(better, fitted.trial, fitted.at)
    prior = probs + _FLOOR
    prior = jnp.where(better, prior / jnp.sum(prior), fitted.prior)
    trial = at
    if len(at):
        ridge = _RIDGE * jnp.eye(len(at))
        newton = jnp.linalg.solve(hessian + ridge, gradient + _RIDGE * away)
        trial = at - jnp.where(better, newton, (at - fitted.trial) / 2)
    return Calibration(at, jnp.where(better, loss, fitted.loss), prior, trial)


def _identity(number: int, classes: int) -> Array:
    factors = classes if number == 2 * classes else min(number, 1)
    return (jnp.arange(number) < factors).astype(jnp.float32)


# Deployed ----------------------------------------------------------------------------


def _move(variables: PyTree, at: Array, prior: Array, source: Array) -> PyTree:
    # Floored: a class that the client does not hold must lose, yet stay finite.
    shift = jnp.log(jnp.maximum(prior, 1e-30)) - jnp.log(jnp.maximum(source, 1e-30))
    return memory.put(variables, MOVED, {"calibration": at, "shift": shift})


def _moving(side: ClientSide) -> ClientSide:
    """A client whose logits are moved as its memory says."""
    model = side.model

    def apply(variables, x):
        moved = memory.get(variables, MOVED)
        outputs = model.apply(memory.without(variables, MOVED), x)
        if isinstance(moved, tuple):
            return outputs
        logits = calibrated(moved["calibration"], outputs.logits) + moved["shift"]
        return outputs._replace(logits=logits)

    return side._replace(model=model._replace(apply=apply))
