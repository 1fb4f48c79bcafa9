"""FedProx: FedAvg with a pull towards the received parameters.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith 2020, "Federated Optimization in
Heterogeneous Networks", MLSys (arXiv:1812.06127), equation 2. Deviation: clients are
drawn uniformly and averaged by `cohort.weight`, as in the authors' code; the paper
draws them by size and averages uniformly.
"""

from hyperjax import corrections
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local
from hyperjax.types import Algorithm, Model


@has_traits(base=True)
@hands_on(fedavg, without=("correction",))
def fedprox(
    model: Model, *, local: Local, mu: float = 0.1, **fedavg_options
) -> Algorithm:
    """Returns FedProx.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`.
      mu: weight of the proximal term on shared parameters; the paper tunes it among
        0.001, 0.01, 0.1 and 1. Statistics of batch-norm are not pulled.
      **fedavg_options: of `fedavg`.
    """
    return fedavg(model, local=local, correction=corrections.prox(mu), **fedavg_options)
