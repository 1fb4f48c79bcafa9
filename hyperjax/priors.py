"""Class priors of a client from what a model says of its inputs, without labels.

Saerens, Latinne, Decaestecker 2002, "Adjusting the Outputs of a Classifier to New a
Priori Probabilities", Neural Computation 14(1): `prior_em` is their equation 2.4.
"""

import functools

import jax
import jax.numpy as jnp

from hyperjax.data import clients
from hyperjax.types import Array, ClientData, Model, Outputs, PyTree

EM_STEPS = 1000  # upper bound, as it may go round in the last places of float32
SETTLED = 1e-6  # it stops once the prior moves by less, 8 units in float32's last place
_AT_ONCE = 256  # inputs at a time


def prior_em(probs: Array, mask: Array, source: Array) -> Array:
    """Estimates a client's class prior from a model's outputs on unlabelled inputs.

    Args:
      probs: [n, K] predicted probabilities of a model trained under `source`.
      mask: [n] float32, 1 for real samples.
      source: [K] class prior of the training data.

    Returns:
      [K] prior at which expectation maximisation converged; `source` if n is 0.
    """
    total = jnp.maximum(jnp.sum(mask), 1.0)
    expected = _expected
    # Tables are as wide as the largest client's. A core goes through what is real, in
    # blocks; an accelerator is faster with all at once.
    if jax.default_backend() == "cpu" and len(mask) > _AT_ONCE:
        short = -len(mask) % _AT_ONCE
        probs, mask = jnp.pad(probs, ((0, short), (0, 0))), jnp.pad(mask, (0, short))
        last = jnp.max(jnp.where(mask > 0, jnp.arange(len(mask)), -1))
        expected = functools.partial(_expected_in, last // _AT_ONCE + 1)

    def step(state):
        prior, _, count = state
        new = expected(prior / source, probs, mask) / total
        return new, jnp.max(jnp.abs(new - prior)), count + 1

    def moving(state):
        return (state[1] > SETTLED) & (state[2] < EM_STEPS)

    start = (source, jnp.float32(jnp.inf), jnp.int32(0))
    prior = jax.lax.while_loop(moving, step, start)[0]
    return jnp.where(jnp.sum(mask) > 0, prior, source)


def _expected(odds: Array, probs: Array, mask: Array) -> Array:
    """How many of the inputs are of each class [K], if it has these odds [K]."""
    joint = probs * odds
    # 0, not 0 / 0, for an input whose classes the prior has all ruled out.
    posterior = joint / jnp.maximum(jnp.sum(joint, -1, keepdims=True), 1e-30)
    return jnp.sum(jnp.where(mask[:, None] > 0, posterior, 0.0), 0)


def _expected_in(num_blocks: Array, odds: Array, probs: Array, mask: Array) -> Array:
    """The same of the inputs in so many blocks, the first ones."""

    def add(i, total):
        at = i * _AT_ONCE
        blocks = (jax.lax.dynamic_slice_in_dim(x, at, _AT_ONCE) for x in (probs, mask))
        return total + _expected(odds, *blocks)

    return jax.lax.fori_loop(0, num_blocks, add, jnp.zeros_like(odds))


def outputs_of(
    model: Model, variables: PyTree, inputs: ClientData
) -> tuple[Array, Outputs]:
    """Returns a mask [n_max] and outputs of all inputs in stored order.

    Rows of padding are 0, or what the last batch had there: the mask is 0.
    """
    n_max = inputs.rows.shape[0]
    width = min(_AT_ONCE, n_max)
    wide = inputs._replace(rows=jnp.pad(inputs.rows, (0, -n_max % width)))
    x = jax.ShapeDtypeStruct((width, *model.sample_shape), jnp.float32)
    shapes = jax.eval_shape(model.apply, variables, x)
    blank = jax.tree.map(lambda s: jnp.zeros((len(wide.rows), *s.shape[1:])), shapes)

    def step(state, batch):
        i, found = state
        new = model.apply(variables, batch.x)
        place = i * width
        found = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, place, 0), found, new
        )
        return i + 1, found

    found = clients.fold(step, (jnp.int32(0), blank), wide, width)[1]
    mask = (jnp.arange(n_max) < inputs.size).astype(jnp.float32)
    return mask, jax.tree.map(lambda x: x[:n_max], found)
