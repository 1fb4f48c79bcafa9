"""What adaptations are made of."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from hyperjax import tree
from hyperjax.data import clients
from hyperjax.types import Array, Batch, ClientData, Key, Model, PyTree


def template_of(model: Model) -> PyTree:
    return jax.eval_shape(model.init, jax.random.key(0))


def moving(variables: PyTree) -> PyTree:
    """Parameters and running statistics."""
    return {k: variables[k] for k in ("params", "stats") if k in variables}


def statistics_of(
    model: Model,
    key: Key,
    variables: PyTree,
    batch: Batch,
    context: PyTree,
    prior: float,
) -> PyTree:
    """Running statistics mixed with those of a batch, which count for its samples."""

    def after(stats):
        return model.loss(key, {**variables, "stats": stats}, batch, context)[1].stats

    # A training step leaves m s + (1 - m) b of statistics s and the batch's b. What
    # normalises in it is b, whatever s is: two steps tell m and b apart.
    from_zero = after(jax.tree.map(jnp.zeros_like, variables["stats"]))
    from_one = after(jax.tree.map(jnp.ones_like, variables["stats"]))
    size = jnp.sum(batch.mask)

    def one(own, zero, first):
        kept = first - zero
        batch_own = zero / jnp.maximum(1 - kept, 1e-12)
        mixed = (prior * own + size * batch_own) / jnp.maximum(prior + size, 1e-12)
        moves = (kept < 1) & (size > 0)
        return jnp.where(moves, mixed, own).astype(own.dtype)

    return jax.tree.map(one, variables["stats"], from_zero, from_one)


def descend(
    optimizer: optax.GradientTransformation,
    objective: Callable[[Key, PyTree, Batch], Array],
    split: tree.Splitter,
    of: tuple[Key, PyTree, ClientData],
    length: tuple[int, int],
) -> PyTree:
    """Minimises an objective over a client's inputs; returns its variables.

    `split` divides {"params": ...} into what moves and the rest; `length` is the size
    of a batch and the number of passes.
    """
    key, variables, inputs = of
    batch_size, epochs = length
    moving, still = split.split({"params": variables["params"]})

    def whole(moving):
        return {**variables, **split.merge(moving, still)}

    def step(key, carry, batch):
        moving, state = carry
        grads = jax.grad(lambda m: objective(key, whole(m), batch))(moving)
        updates, state = optimizer.update(grads, state, moving)
        return optax.apply_updates(moving, updates), state

    def one_pass(epoch, carry):
        key_order, key_steps = jax.random.split(jax.random.fold_in(key, epoch))
        order = clients.shuffled(key_order, inputs)

        def one(i, carry):
            batch = clients.take(inputs, order, i, batch_size)
            return step(jax.random.fold_in(key_steps, i), carry, batch)

        num = clients.num_batches(inputs.size, batch_size)
        return jax.lax.fori_loop(0, num, one, carry)

    start = moving, optimizer.init(moving)
    return whole(jax.lax.fori_loop(0, epochs, one_pass, start)[0])


def entropy(logits: Array) -> Array:
    """Of predictions, in nats, [B]."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
