"""Ditto: a global model, and a personal one that is pulled towards it.

Li, Hu, Beirami, Smith 2021, "Ditto: Fair and Robust Federated Learning Through
Personalization", ICML (arXiv:2012.04221), algorithm 1: FedAvg trains w, and on the same
batches every client trains its own v on

    F_k(v) + lambda/2 |v - w_received|^2.

So Ditto is FedAvg of a model with two sets of parameters, one of which stays home. The
two share batches and learning rate, nothing else; but gradient clipping in the local
training bounds both together.
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
from hyperjax.types import Algorithm, Model


@has_traits(base=True)
@hands_on(fedavg)
def ditto(
    model: Model,
    *,
    local: Local,
    lam: float = 1.0,
    keep: Patterns = (),
    finetune: Patterns = (),
    **fedavg_options,
) -> Algorithm:
    """Returns Ditto.

    Args:
      model: what is trained, twice.
      local: how clients train, see `fedavg`.
      lam: lambda; the paper's code tunes it among 0.1, 1 and 2.
      keep: patterns of the global model's variables that stay home. They are not
        received, so nothing pulls their personal copies.
      finetune: patterns of the parameters that fine-tuning moves, in both models; None:
        all.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: lam is negative.
    """
    check_given(model, local)
    check_number(at_least=0, lam=lam)
    template = jax.eval_shape(model.init, jax.random.key(0))
    cut = tree.splitter(template, keep)
    double = personal.doubled(model)

    def received(params):
        return cut.split({"params": params, "stats": template["stats"]})[1]

    def context(variables, data):
        anchor = personal.without(variables)["params"]
        return anchor, double.visit.context(variables, data)

    def loss(key, variables, batch, context):
        anchor, inner = context
        value, trained = double.loss(key, variables, batch, inner)
        own = personal.only(variables)
        there, here = received(anchor), received(own["params"])
        pulled, _ = tree.parameters(here)
        distance = sum(jnp.sum(jnp.square(x - there[k])) for k, x in pulled.items())
        return value + 0.5 * lam * distance, trained

    visit = double.visit._replace(context=context)
    both = double._replace(loss=loss, visit=visit)
    home = (*tree.as_patterns(keep), *personal.kept(template))
    return fedavg(
        both,
        local=local,
        keep=home,
        finetune=personal.both(finetune),
        **fedavg_options,
    )
