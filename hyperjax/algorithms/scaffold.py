"""SCAFFOLD: control variates take the drift out of local gradients.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, "SCAFFOLD: Stochastic Controlled
Averaging for Federated Learning", ICML (arXiv:1910.06378), algorithm 1, option II. The
paper averages uniformly (`weights="uniform"` in a config) and trains with plain SGD;
`corrections.scaffold` says what momentum and schedules make of it.
"""

from hyperjax import corrections
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local
from hyperjax.types import Algorithm, Model


@has_traits(base=True, weights="uniform")
@hands_on(fedavg, without=("correction",))
def scaffold(model: Model, *, local: Local, **fedavg_options) -> Algorithm:
    """Returns SCAFFOLD; it sends twice what FedAvg sends, both ways.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`.
      **fedavg_options: of `fedavg`; the server's learning rate is `server_opt`'s.
    """
    return fedavg(
        model, local=local, correction=corrections.scaffold(), **fedavg_options
    )
