"""APFL: predictions of a mixture of a personal and the global model.

Deng, Kamani, Mahdavi 2020, "Adaptive Personalized Federated Learning"
(arXiv:2003.13461), algorithm 1: FedAvg trains w on F_k(w), and every client trains its
own v on F_k(a v + (1 - a) w) with w fixed, on the same batches; it predicts with the
mixture. `adaptive` also trains a, by equation 10, kept in [0, 1]. Deviation: a takes a
step of the local optimizer at every step of v, where the paper takes one a round.
"""

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.errors import check_number
from hyperjax.models import personal
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local, check_given
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Model, Visit, cannot_rebuild


@has_traits(base=True)
@hands_on(fedavg)
def apfl(
    model: Model,
    *,
    local: Local,
    alpha: float = 0.5,
    adaptive: bool = True,
    keep: Patterns = (),
    finetune: Patterns = (),
    **fedavg_options,
) -> Algorithm:
    """Returns APFL.

    Args:
      model: what is trained, twice.
      local: how clients train, see `fedavg`.
      alpha: a, the personal model's share of the mixture, at first.
      adaptive: train it.
      keep: patterns of the global model's variables that stay home too.
      finetune: patterns of the parameters that fine-tuning moves, in both models; None:
        all, and the share too.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: alpha is outside [0, 1].
    """
    check_given(model, local)
    check_number(at_least=0, at_most=1, alpha=alpha)
    template = jax.eval_shape(model.init, jax.random.key(0))
    double = personal.doubled(model)

    def init(key):
        variables = double.init(key)
        params = {**variables["params"], "mix": jnp.float32(alpha)}
        return {**variables, "params": params}

    def mixed(variables):
        own = personal.only(variables)
        shared = jax.lax.stop_gradient(personal.without(variables)["params"])
        # A fixed share is no parameter: the optimizer's decay must not move it.
        mix = variables["params"]["mix"] if adaptive else jnp.float32(alpha)
        # Inside [0, 1], yet with a derivative at and beyond its ends.
        mix = mix + jax.lax.stop_gradient(jnp.clip(mix, 0.0, 1.0) - mix)
        blend = jax.tree.map(
            lambda v, w: mix * v + (1 - mix) * w, own["params"], shared
        )
        return {**own, "params": blend}

    def loss(key, variables, batch, context):
        shared = personal.without(variables)
        value, seen = model.loss(key, shared, batch, context)
        own_value, trained = model.loss(key, mixed(variables), batch, context)
        stats = personal.join_stats(seen.stats, trained.stats)
        info = {**seen.info, "personal_loss": own_value}
        return value + own_value, trained._replace(stats=stats, info=info)

    def with_mix(after, variables):
        mix = variables["params"]["mix"] if adaptive else jnp.float32(alpha)
        mix = jnp.clip(mix, 0.0, 1.0)
        return {**after, "params": {**after["params"], "mix": mix}}

    both = double.around(
        "sample_shape",
        init=init,
        loss=loss,
        apply=lambda variables, x: model.apply(mixed(variables), x),
        visit=Visit(
            arrive=lambda key, v: with_mix(double.visit.arrive(key, v), v),
            enter=lambda v: with_mix(double.visit.enter(v), v),
            context=double.visit.context,  # of the shared set
            leave=lambda v: with_mix(double.visit.leave(v), v),
        ),
        serve=model.serve.seen(mixed),
        with_shape=cannot_rebuild,
    )
    home = (*tree.as_patterns(keep), *personal.kept(template), r"params/mix")
    return fedavg(
        both,
        local=local,
        keep=home,
        finetune=personal.both(finetune),
        **fedavg_options,
    )
