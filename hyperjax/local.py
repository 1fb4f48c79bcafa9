"""The one local-training loop: epochs or steps, any optax optimizer, phases, clipping.

Every loop has a traced number of iterations, so a client trains for exactly its own
number of steps; under `vmap` clients that are done wait, their carry untouched.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax import rng, tree
from hyperjax.data import clients
from hyperjax.errors import check_at_least
from hyperjax.types import Array, ClientData, Model, PyTree


class Phase(NamedTuple):
    """A stretch of local training of one part of the parameters.

    Attributes:
      epochs: passes over the client's samples; or
      steps: minibatch steps, cycling through reshuffled passes.
      train: patterns on paths of trained leaves ("params/..."); None trains all. The
        rest is absent from gradient and optimizer: neither momentum nor decay moves it.
    """

    epochs: int | None = None
    steps: int | None = None
    train: Sequence[str] | str | None = None


def trainer(
    model: Model,
    *,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    phases: Sequence[Phase] = (Phase(epochs=1),),
    clip_norm: float | None = None,
    schedule: Callable[[Array], Array] = lambda round: jnp.float32(1.0),
) -> Callable:
    """Builds the function that trains one client.

    Args:
      model: what is trained.
      optimizer: made anew at every visit; its learning rate is that of round 0.
      batch_size: B; the last batch of a pass is masked, not dropped.
      phases: run in order.
      clip_norm: bound on the global norm of the (corrected) gradient.
      schedule: round [] int32 -> factor [] on every update, which is a factor on the
        learning rate for all optimizers that end in a multiplication by it.

    Returns:
      `train(key, variables, data, round, adjust) -> (variables, info)`, where
      `adjust(grads, params) -> grads` adds corrections (both are dicts from path to
      leaf, of the leaves being trained) and info holds sample-weighted means over the
      visit of what `model.loss` reports, with "steps" and "samples" [] float32.

    Raises:
      ValueError: a size is not positive, or a phase has not exactly one length.
    """
    check_at_least(1, batch_size=batch_size)
    if clip_norm is not None:
        if clip_norm <= 0:
            raise ValueError(f"clip_norm={clip_norm} must be positive, or None")
        optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    for phase in phases:
        lengths = [n for n in (phase.epochs, phase.steps) if n is not None]
        if len(lengths) != 1 or lengths[0] < 0:
            raise ValueError(
                f"a phase has either epochs or steps, 0 or more; got {phase}"
            )

    def train(key, variables, data: ClientData, round, adjust):
        context = model.context(variables, data)
        factor = schedule(round)
        totals = _zero_totals(model, variables, data, batch_size, context)
        for number, phase in enumerate(phases):
            variables, totals = run_phase(
                rng.stream(key, f"phase_{number}"),
                phase,
                variables,
                totals,
                data,
                context,
                factor,
                adjust,
            )
        samples = jnp.maximum(totals["samples"], 1.0)
        means = {name: x / samples for name, x in totals["sums"].items()}
        return variables, {
            **means,
            "steps": totals["steps"],
            "samples": totals["samples"],
        }

    def run_phase(key, phase, variables, totals, data, context, factor, adjust):
        params = {"params": variables["params"]}
        split = tree.splitter(params, (r".*",) if phase.train is None else phase.train)
        active, frozen = split.split(params)

        def loss(active, stats, key, batch):
            params = split.merge(active, frozen)
            return model.loss(key, {**params, "stats": stats}, batch, context)

        def step(i, carry, order, key):
            active, stats, opt, totals = carry
            batch = clients.take(data, order, i, batch_size)
            (_, (stats, info)), grads = jax.value_and_grad(loss, has_aux=True)(
                active, stats, jax.random.fold_in(key, i), batch
            )
            updates, opt = optimizer.update(adjust(grads, active), opt, active)
            active = optax.apply_updates(active, tree.scale(updates, factor))
            return active, stats, opt, _count(totals, info, batch)

        def one_pass(epoch, carry):
            key_order, key_steps = jax.random.split(jax.random.fold_in(key, epoch))
            order = clients.shuffled(key_order, data)
            length = per_pass
            if phase.steps is not None:
                length = jnp.minimum(per_pass, phase.steps - epoch * per_pass)
            return jax.lax.fori_loop(
                0, length, lambda i, c: step(i, c, order, key_steps), carry
            )

        per_pass = clients.num_batches(data.size, batch_size)
        passes = phase.epochs
        if phase.steps is not None:
            # A client without samples takes no step.
            full = clients.num_batches(phase.steps, jnp.maximum(per_pass, 1))
            passes = jnp.where(per_pass > 0, full, 0)
        carry = (active, variables["stats"], optimizer.init(active), totals)
        active, stats, _, totals = jax.lax.fori_loop(0, passes, one_pass, carry)
        return {**split.merge(active, frozen), "stats": stats}, totals

    return train


def _zero_totals(model, variables, data, batch_size, context) -> PyTree:
    """Running sums of what the loss reports, found by abstract evaluation."""

    def report(variables, data, context):
        batch = clients.take(data, jnp.arange(data.rows.shape[0]), 0, batch_size)
        return model.loss(jax.random.key(0), variables, batch, context)[1][1]

    info = jax.eval_shape(report, variables, data, context)
    zero = jnp.float32(0)
    return {"sums": {k: zero for k in info}, "steps": zero, "samples": zero}


def _count(totals: PyTree, info: dict[str, Array], batch) -> PyTree:
    size = jnp.sum(batch.mask)
    return {
        "sums": {k: totals["sums"][k] + size * info[k] for k in info},
        "steps": totals["steps"] + 1.0,
        "samples": totals["samples"] + size,
    }


def no_adjustment(grads: PyTree, params: PyTree) -> PyTree:
    """The `adjust` of plain training."""
    return grads
