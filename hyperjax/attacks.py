"""Gradient inversion: what a client's update tells about the image it was made from.

Zhu, Liu, Han 2019, "Deep Leakage from Gradients" (DLG, arXiv:1906.08935); Zhao, Mopuri,
Bilen 2020, "iDLG" (arXiv:2001.02610). The attacker knows a network and the gradient of
the shared part of its parameters for one image, and looks for an image whose gradient
is that one:

    min over x, and whatever else is unknown, of |g(x) - g|^2.

Deviation: L-BFGS with a line search, where the published code takes whole steps.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax import tree
from hyperjax.types import Array, Key, Model, PyTree

MOST_DB = 100.0


class Guess(NamedTuple):
    """What an attacker looks for; None is not looked for.

    Attributes:
      x: [H, W, c] image, in [0, 1] when it is found.
      label: [K] logits of the image's label.
      private: {path: leaf} parameters that were not sent.
    """

    x: Array
    label: Array | None = None
    private: PyTree | None = None


class Found(NamedTuple):
    """The best guess, its mismatch [], and the mismatch after every step [steps]."""

    guess: Any
    mismatch: Array
    history: Array


class Victim(NamedTuple):
    """A network whose parameters are shared in part.

    `gradient(shared, private, x, target)` returns the gradient of one image's
    cross-entropy in the shared part, for x [H, W, c] and a target [K] of shares of
    classes; `step(shared, private, x, target, rate)` both parts after a step of
    gradient descent; `split(params)` cuts them.
    """

    split: Callable
    gradient: Callable
    step: Callable


def victim(model: Model, shared: Sequence[str] | str = r".*") -> Victim:
    """Builds a `Victim` of a model without running statistics.

    Args:
      model: the network.
      shared: patterns of the parameters that are sent, as paths in "params".

    Raises:
      ValueError: the model has running statistics, or a pattern matches nothing.
    """
    template = jax.eval_shape(model.init, jax.random.key(0))
    if jax.tree.leaves(template["stats"]):
        raise ValueError(
            "gradient inversion takes a network without running statistics, not one "
            f"with {', '.join(tree.paths(template['stats'])[:4])}"
        )
    cut = tree.splitter(template["params"], shared)

    def loss(shared, private, x, target):
        variables = {"params": cut.merge(shared, private), "stats": template["stats"]}
        return optax.softmax_cross_entropy(model.predict(variables, x[None])[0], target)

    def step(shared, private, x, target, rate):
        grads = jax.grad(loss, (0, 1))(shared, private, x, target)
        return tree.sub((shared, private), tree.scale(grads, rate))

    return Victim(cut.split, jax.grad(loss), step)


def label_of(gradient: Array) -> Array:
    """Returns the label of one image, [], from the last kernel's gradient [L, K].

    Its column is the only one with a negative sum where features are not negative
    (iDLG, section 3).
    """
    return jnp.argmin(jnp.sum(gradient, 0))


def distance(a: PyTree, b: PyTree) -> Array:
    """Returns the sum of squared differences over all leaves, []."""
    return jnp.square(tree.norm(tree.sub(a, b)))


def invert(mismatch: Callable, start: PyTree, *, steps: int = 300) -> Found:
    """Minimises `mismatch(guess) -> []` from `start` by L-BFGS.

    Args:
      mismatch: differentiable.
      start: the first guess.
      steps: iterations, each with a line search of at most 20 evaluations.
    """
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=20)
    optimizer = optax.lbfgs(memory_size=100, linesearch=search)
    value_and_grad = optax.value_and_grad_from_state(mismatch)

    def iterate(carry, _):
        guess, state, best, least = carry
        value, grad = value_and_grad(guess, state=state)
        better = value < least  # never of what is not a number
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), guess, best)
        least = jnp.where(better, value, least)
        updates, state = optimizer.update(
            grad, state, guess, value=value, grad=grad, value_fn=mismatch
        )
        return (optax.apply_updates(guess, updates), state, best, least), least

    first = (start, optimizer.init(start), start, jnp.float32(jnp.inf))
    carry, history = jax.lax.scan(iterate, first, length=steps)
    guess, _, best, least = carry
    last = mismatch(guess)
    better = last < least
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), guess, best)
    return Found(best, jnp.where(better, last, least), history)


def first_guess(key: Key, like: Guess) -> Guess:
    """Returns standard normal draws in place of image and label; `private` as given."""
    keys = jax.random.split(key)
    label = like.label
    return Guess(
        jax.random.normal(keys[0], like.x.shape),
        None if label is None else jax.random.normal(keys[1], label.shape),
        like.private,
    )


def psnr(x: Array, y: Array) -> Array:
    """Returns the peak signal-to-noise ratio of images with values in [0, 1], [] dB.

    20 log10(255 / root mean squared error in grey levels), `y` cut off at 0 and 1; 100
    at most, which is what equal images get.
    """
    error = jnp.mean(jnp.square(255.0 * (x - jnp.clip(y, 0.0, 1.0))))
    value = 20.0 * jnp.log10(255.0 / jnp.sqrt(jnp.maximum(error, 1e-12)))
    return jnp.minimum(value, MOST_DB)
