"""Per-FedAvg: a starting point that one gradient step adapts well.

Fallah, Mokhtari, Ozdaglar 2020, "Personalized Federated Learning with Theoretical
Guarantees: A Model-Agnostic Meta-Learning Approach", NeurIPS (arXiv:2002.07948),
equation 8: clients minimise F_k(theta - a grad F_k(theta)) with

    (I - a H(theta; D3)) g(theta - a g(theta; D1); D2).

`order="first"` drops the Hessian H. D1, D2 and D3 are disjoint thirds of a batch, so
choose `local.batch_size` three times that of a draw. What is deployed is the starting
point; fine-tuning takes plain steps of SGD at the inner rate a.
"""

import jax
import jax.numpy as jnp
import optax

from hyperjax import tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.errors import check_choice, check_number
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local, check_given, constant, tuner
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Batch, Model

ORDERS = ("first", "exact")
DRAWS = ("thirds", "same")


@has_traits(base=True)
@hands_on(fedavg)
def perfedavg(
    model: Model,
    *,
    local: Local,
    inner_learning_rate: float = 0.01,
    order: str = "first",
    draws: str = "thirds",
    finetune: Patterns = (),
    **fedavg_options,
) -> Algorithm:
    """Returns Per-FedAvg.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`; its learning rate is b of the paper,
        its batches hold at least 3 samples if `draws` is "thirds".
      inner_learning_rate: a.
      order: "first" or "exact" (one Hessian-vector product a step).
      draws: D1, D2 and D3 are "thirds" of a batch, or all the "same" whole batch, which
        biases the gradient.
      finetune: patterns of the parameters that fine-tuning moves; (): all.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: a rate is negative, an unknown choice, or batches are too small.
    """
    check_given(model, local)
    check_choice("order", order, ORDERS)
    check_choice("draws", draws, DRAWS)
    check_number(at_least=0, inner_learning_rate=inner_learning_rate)
    rate = inner_learning_rate

    def loss(key, variables, batch, context):
        theta = variables["params"]
        first, second, third = _draws(batch, draws)

        def objective(params, batch):
            return model.loss(key, {**variables, "params": params}, batch, context)

        def gradient(params, batch):
            return jax.grad(objective, has_aux=True)(params, batch)[0]

        fixed = jax.lax.stop_gradient(theta)
        step = gradient(fixed, first)
        adapted = jax.tree.map(lambda x, g: x - rate * g, fixed, step)
        (value, aux), grads = jax.value_and_grad(objective, has_aux=True)(
            adapted, second
        )
        if order == "exact":
            # H is symmetric, and convolutions have reverse derivatives only.
            _, product = jax.vjp(lambda x: gradient(x, third), fixed)
            grads = jax.tree.map(lambda g, h: g - rate * h, grads, product(grads)[0])
        # A function of theta with just this value and this gradient.
        moved = tree.sub(theta, fixed)
        products = jax.tree.map(
            lambda x, g: (x * jax.lax.stop_gradient(g)).sum(), moved, grads
        )
        # Outputs are of the adapted parameters, for a part of the batch.
        aux = aux._replace(logits=(), features=())
        return sum(jax.tree.leaves(products), jax.lax.stop_gradient(value)), aux

    if draws == "thirds" and local.batch_size < 3:
        raise ValueError(
            f"batches of {local.batch_size} cannot be cut in three; use draws='same'"
        )
    alg = fedavg(model._replace(loss=loss), local=local, **fedavg_options)
    # The step that the starting point was trained for: plain, at a, unclipped.
    inner = local._replace(optimizer=optax.sgd(rate), schedule=constant, clip_norm=None)
    client = alg.client._replace(tune=tuner(model, inner, finetune))
    return alg._replace(client=client)


def _draws(batch: Batch, draws: str) -> list[Batch]:
    """Three batches, D1 to D3; padding, at the end of a batch, is dealt out evenly.

    A draw that would be padding alone, of a batch with fewer than three samples, is D1.
    """
    if draws == "same":
        return [batch] * 3
    missing = max(0, 3 - len(batch.mask))  # of a client with fewer samples
    batch = jax.tree.map(
        lambda x: jnp.pad(x, ((0, missing), *(((0, 0),) * (x.ndim - 1)))), batch
    )
    samples = batch._replace(prior=())
    parts = (jax.tree.map(lambda x, i=i: x[i::3], samples) for i in range(3))
    first, *others = (part._replace(prior=batch.prior) for part in parts)

    def filled(draw):
        some = jnp.any(draw.mask > 0)
        return jax.tree.map(lambda x, y: jnp.where(some, x, y[: len(x)]), draw, first)

    return [first, *map(filled, others)]
