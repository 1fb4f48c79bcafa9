"""FML: a small model that all share and each client's own teach each other.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu 2020, "Federated Mutual Learning"
(arXiv:2006.16765), equations 4 and 5. A client trains both on the same batches,

    own:    alpha CE(own, y) + (1 - alpha) KL(shared || own)
    shared: beta CE(shared, y) + (1 - beta) KL(own || shared),

each with the other's predictions fixed. Only the shared one is averaged: clients
may have different networks of their own, and the shared one is the smallest of theirs.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hyperjax import over_families
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.errors import check_number
from hyperjax.models.linen import check_gives, distillation
from hyperjax.registry import hands_on
from hyperjax.training import Local, check_given
from hyperjax.types import Algorithm, Model, Visit, cannot_rebuild

PARTS = ("params", "stats")


@hands_on(fedavg, without=("keep",))
def fml(
    models: Mapping[str, Model],
    *,
    local: Local,
    family_sizes: Mapping[str, int],
    alpha: float = 0.5,
    beta: float = 0.5,
    **fedavg_options,
) -> Algorithm:
    """Returns FML.

    Args:
      models: the network of each family of clients.
      local: how clients train, see `fedavg`.
      family_sizes: clients of each family.
      alpha: weight of the labels in the own model's loss.
      beta: weight of the labels in the shared model's loss.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: a weight is outside [0, 1].
    """
    check_given(models, local)
    check_number(at_least=0, at_most=1, alpha=alpha, beta=beta)
    small = over_families.smallest(models)

    def one(own):
        both = mutual(own, small, alpha, beta)
        template = jax.eval_shape(both.init, jax.random.key(0))
        keep = [r"params/own/.*"]
        if jax.tree.leaves(template["stats"]["own"]):
            keep.append(r"stats/own/.*")
        return fedavg(both, local=local, keep=keep, **fedavg_options)

    return over_families.averaged({name: one(own) for name, own in models.items()})


def mutual(own: Model, shared: Model, alpha: float, beta: float) -> Model:
    """Returns both networks in one, which predicts with its own.

    Raises:
      ValueError: one does not give its logits in training.
    """

    for model in (own, shared):
        check_gives(model, "logits")

    def part(variables, name):
        return {**variables, **{k: variables[k][name] for k in PARTS}}

    def whole(variables, own, shared):
        parts = {k: {"own": own[k], "shared": shared[k]} for k in PARTS}
        return {**variables, **parts}

    def init(key):
        key_own, key_shared = jax.random.split(key)
        return whole({}, own.init(key_own), shared.init(key_shared))

    def loss(key, variables, batch, context):
        first, second = context
        value, trained = own.loss(key, part(variables, "own"), batch, first)
        other, others = shared.loss(key, part(variables, "shared"), batch, second)
        z, z_shared = trained.logits, others.logits
        to_own = distillation(z, jax.lax.stop_gradient(z_shared), batch)
        to_shared = distillation(z_shared, jax.lax.stop_gradient(z), batch)
        # Equations 4 and 5. No gradient of one reaches the other, so both are trained
        # by their sum.
        total = alpha * value + (1 - alpha) * to_own
        total += beta * other + (1 - beta) * to_shared
        stats = {"own": trained.stats, "shared": others.stats}
        info = {**trained.info, "shared_loss": jnp.asarray(other)}
        return total, trained._replace(stats=stats, info=info)

    def mine(variables):
        return part(variables, "own")

    def each(*hooks):
        def run(variables):
            parts = (part(variables, name) for name in ("own", "shared"))
            return whole(variables, *(h(v) for h, v in zip(hooks, parts, strict=True)))

        return run

    def arrive(key, variables):
        hooks = (functools.partial(model.visit.arrive, key) for model in (own, shared))
        return each(*hooks)(variables)

    def context(variables, data):
        theirs = shared.visit.context(part(variables, "shared"), data)
        return own.visit.context(mine(variables), data), theirs

    return own.around(
        "sample_shape",
        init=init,
        loss=loss,
        apply=lambda variables, x: own.apply(mine(variables), x),
        visit=Visit(
            arrive=arrive,
            enter=each(own.visit.enter, shared.visit.enter),
            context=context,
            leave=each(own.visit.leave, shared.visit.leave),
        ),
        serve=own.serve.seen(mine),
        with_shape=cannot_rebuild,
    )
