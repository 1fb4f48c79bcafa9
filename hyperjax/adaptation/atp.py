"""Adaptation at rates that participants have learned."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.adaptation.pieces import entropy, moving, statistics_of, template_of
from hyperjax.data import clients
from hyperjax.errors import check_at_least, check_number
from hyperjax.models.linen import cross_entropy, masked_mean
from hyperjax.types import ClientSide, Fit
from hyperjax.wrappers import adapting

LEAST = 0.01  # share of itself that a variance keeps, or outputs explode, then rates


def atp(
    *,
    learning_rate: float = 0.1,
    rounds: int = 200,
    share: float = 0.25,
    batch_size: int = 20,
    clip: float = 0.1,
) -> Callable[[ClientSide], ClientSide]:
    """Moves every tensor at a rate of its own, which participants have learned.

    ATP, Bao, Wei, Wang, He 2023 (NeurIPS, arXiv:2310.18816): tensor l of a network, its
    running statistics among them, goes to w_l - a_l u_l with u_l the gradient of the
    inputs' mean entropy, or the statistic minus that of the inputs. Participants
    descend along a_l by the labelled loss of what they adapted to a batch, step
    `learning_rate` over the root of the tensor's size; the server takes plain means.
    Rates begin at 0 and may become negative, as labels that are skewed want it.

    Without batch-norm there are only weights to move. An unseen client adapts once, by
    the mean u over batches of all its inputs, which is where the paper's online form
    arrives. Deviations: what normalises below a layer is the batch's, not the running
    one; a variance keeps a hundredth of itself, whatever its rate; steps of rates are
    bounded, or they explode where some inputs have no contrast.

    Args:
      learning_rate: of rates.
      rounds: of learning them, an epoch each.
      share: of participants in a round.
      batch_size: inputs in a u.
      clip: bound on the norm of a step of all rates, as a share of `learning_rate`.

    Raises:
      ValueError: a number is out of range.
    """
    check_number(above=0, learning_rate=learning_rate, clip=clip)
    check_number(above=0, at_most=1, share=share)
    check_at_least(0, rounds=rounds)
    check_at_least(1, batch_size=batch_size)

    def change(side: ClientSide) -> ClientSide:
        model = side.model
        template = moving(template_of(model))
        split = tree.splitter(template, r".*")
        tensors = {
            path: leaf
            for path, leaf in split.split(template)[0].items()
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        }

        def directions(key, variables, batch, context):
            def uncertain(params):
                logits = model.predict({**variables, "params": params}, batch.x)
                return masked_mean(entropy(logits), batch.mask)

            found = {"params": jax.grad(uncertain)(variables["params"])}
            if jax.tree.leaves(variables["stats"]):
                own = statistics_of(model, key, variables, batch, context, 0.0)
                found["stats"] = tree.sub(variables["stats"], own)
            every = split.split({**moving(variables), **found})[0]
            return {path: every[path] for path in tensors}

        def moved(variables, rates, along):
            before, rest = split.split(moving(variables))
            after = {k: before[k] - rates[k] * along[k] for k in tensors}
            after |= {
                k: jnp.maximum(w, LEAST * before[k])
                for k, w in after.items()
                if k.endswith("/var")
            }
            return {**variables, **split.merge({**before, **after}, rest)}

        def send(key, rates, variables, held):
            context = model.visit.context(variables, held)
            key_order, key_steps = jax.random.split(key)
            order = clients.shuffled(key_order, held)

            def step(i, rates):
                batch = clients.take(held, order, i, batch_size)
                key = jax.random.fold_in(key_steps, i)
                along = directions(key, variables, batch, context)

                def loss(rates):
                    logits = model.predict(moved(variables, rates, along), batch.x)
                    return cross_entropy(logits, batch)

                grads = jax.grad(loss)(rates)
                steps = {k: g / math.sqrt(tensors[k].size) for k, g in grads.items()}
                factor = clip / jnp.maximum(tree.norm(steps), clip)
                return tree.sub(rates, tree.scale(steps, learning_rate * factor))

            num = clients.num_batches(held.size, batch_size)
            return jax.lax.fori_loop(0, num, step, rates)

        def adapt(key, variables, inputs, rates):
            context = model.visit.context(variables, inputs)

            def step(total, batch):
                along = directions(key, variables, batch, context)
                return tree.add(total, tree.scale(along, jnp.sum(batch.mask)))

            total = clients.fold(step, tree.zeros_like(tensors), inputs, batch_size)
            mean = tree.scale(total, 1 / jnp.maximum(inputs.size, 1))
            return moved(variables, rates, mean)

        def start():
            return {path: jnp.float32(0) for path in tensors}

        def absorb(rates, sent):
            return {k: jnp.mean(a) for k, a in sent.items()}

        return adapting(side, adapt, Fit(start, send, absorb, rounds, share))

    return change
