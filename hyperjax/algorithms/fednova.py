"""FedNova: clients that take more steps do not get more say.

Wang, Liu, Liang, Joshi, Poor 2020, "Tackling the Objective Inconsistency Problem in
Heterogeneous Federated Optimization", NeurIPS (arXiv:2007.07481), equation 8 with
tau_eff = sum_k p_k |a_k|:

    theta += (sum_k p_k |a_k|) sum_k p_k delta_k / |a_k|,

where |a_k| is the weight that client k's change gives to its gradients. It is measured,
not typed in: the local optimizer is run on a constant gradient (`training.trainer`'s
probe), which is exact for SGD with any momentum, Nesterov's too, and any schedule.
"""

import jax.numpy as jnp

from hyperjax import aggregators, corrections, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local
from hyperjax.types import Algorithm, Model


@has_traits(base=True)
@hands_on(fedavg, without=("correction", "aggregator"))
def fednova(model: Model, *, local: Local, **fedavg_options) -> Algorithm:
    """Returns FedNova; the uplink holds one number more than FedAvg's.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`; its optimizer must be linear in the
        gradients (SGD with or without momentum) and start anew at every visit.
      **fedavg_options: of `fedavg`.
    """
    report = corrections.none()._replace(
        finish=lambda theta, anchor, sent, c, info: (c, info["displacement"]),
        probe=True,
    )
    return fedavg(
        model,
        local=local,
        correction=report,
        aggregator=normalised_mean(),
        **fedavg_options,
    )


def normalised_mean() -> aggregators.Aggregator:
    """The mean of changes per unit of displacement, times the mean displacement.

    Combines (delta, displacement [C]); delta's statistics are averaged plainly.
    """

    def by_unit(displacement, weight):
        moved = displacement > 0
        return jnp.where(moved, weight / jnp.where(moved, displacement, 1.0), 0.0)

    def combine(key, stacked, weight, state):
        delta, displacement = stacked
        per_unit = by_unit(displacement, weight)
        # Where nobody takes part all sums are 0: any divisor leaves the mean at 0.
        total = jnp.maximum(jnp.sum(weight), 1e-30)
        effective = jnp.sum(weight * displacement) / total
        mean = aggregators.mean_over_clients(delta, weight)
        normalised = aggregators.mean_over_clients(tree.parameters(delta)[0], per_unit)
        mean |= tree.scale(normalised, effective * jnp.sum(per_unit) / total)
        return (mean, ()), state

    def sums(stacked, weight):
        delta, displacement = stacked
        per_unit = by_unit(displacement, weight)
        return {
            "mean": aggregators.sum_over_clients(delta, weight),
            "normalised": aggregators.sum_over_clients(
                tree.parameters(delta)[0], per_unit
            ),
            "displacement": jnp.sum(weight * displacement),
            "weight": jnp.sum(weight),
        }

    def of_sums(sums):
        # The mean per unit times its weight, which is that of the sum, cancels.
        total = jnp.maximum(sums["weight"], 1e-30)
        mean = aggregators.over(sums["mean"], sums["weight"])
        factor = sums["displacement"] / total / total
        return mean | tree.scale(sums["normalised"], factor), ()

    return aggregators.Aggregator(
        init=lambda spec: (), combine=combine, sums=sums, of_sums=of_sums
    )
