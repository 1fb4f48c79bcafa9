"""pFedMe: clients step on the Moreau envelope of their loss.

Dinh, Tran, Nguyen 2020, "Personalized Federated Learning with Moreau Envelopes",
NeurIPS (arXiv:2006.08848), algorithm 1. On every batch a client solves

    u ~ argmin f(u; batch) + lambda/2 |u - w|^2

by gradient steps from w, and then steps on w with the envelope's gradient lambda (w -
u). The last u is its personal model. The server's beta is `server_opt`'s learning rate.
Deviations: u starts at w on every batch (the authors' code goes on from the last u, and
adds a weight decay of 0.001 to it), w's optimizer may have a decay of its own, only
sampled clients train, and u is deployed with w's running statistics.
"""

import jax
import jax.numpy as jnp

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.errors import check_at_least, check_number, surely
from hyperjax.models import memory
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local, check_given
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Model

NAME = "personal"  # model's parameters, in a client's memory


@has_traits(base=True)
@hands_on(fedavg)
def pfedme(
    model: Model,
    *,
    local: Local,
    lam: float = 15.0,
    inner_steps: int = 5,
    inner_learning_rate: float = 0.05,
    finetune: Patterns = (),
    **fedavg_options,
) -> Algorithm:
    """Returns pFedMe.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`; its learning rate is w's (eta).
      lam: lambda, 15 to 30 in the paper's runs.
      inner_steps: gradient steps for u (K).
      inner_learning_rate: their learning rate; times lambda it must stay below 2.
      finetune: None; fine-tuning moves w and with it all of u.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: a number is out of range, or fine-tuning is to move only a part.
    """
    check_given(model, local)
    check_at_least(1, inner_steps=inner_steps)
    if finetune:
        raise ValueError(
            f"finetune={finetune!r}: pfedme cannot tune a part of its personal model, "
            "which follows from all of w; leave it empty"
        )
    check_number(at_least=0, lam=lam, inner_learning_rate=inner_learning_rate)
    if surely(inner_learning_rate * lam >= 2):
        raise ValueError(
            f"inner_learning_rate={inner_learning_rate} times lam={lam} must be below "
            "2, or the inner steps diverge"
        )
    rate = inner_learning_rate

    def arrive(key, variables):
        shared = model.visit.arrive(key, memory.without(variables, NAME))
        return memory.put(shared, NAME, shared["params"])

    def loss(key, variables, batch, context):
        shared = memory.without(variables, NAME)
        w = shared["params"]

        def objective(u):
            return model.loss(key, {**shared, "params": u}, batch, context)

        def step(_, u):
            grads = jax.grad(objective, has_aux=True)(u)[0]
            return jax.tree.map(
                lambda u, g, w: u - rate * (g + lam * (u - w)), u, grads, w
            )

        fixed = jax.lax.stop_gradient(w)
        u = jax.lax.stop_gradient(jax.lax.fori_loop(0, inner_steps, step, fixed))
        value, trained = objective(u)
        # Squares, not the norm's: its derivative is not a number where u is w.
        squares = jax.tree.map(lambda w, u: jnp.sum(jnp.square(w - u)), w, u)
        envelope = value + 0.5 * lam * sum(jax.tree.leaves(squares))
        return envelope, trained._replace(memory={**dict(trained.memory), NAME: u})

    inner = memory.with_entry(
        model,
        NAME,
        lambda key, shared: jax.tree.map(jnp.copy, shared["params"]),
        deployed=lambda shared, own: {**shared, "params": own},
    )
    whole = inner._replace(loss=loss, visit=inner.visit._replace(arrive=arrive))
    return fedavg(whole, local=local, **fedavg_options)
