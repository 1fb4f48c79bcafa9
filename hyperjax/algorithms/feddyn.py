"""FedDyn: clients' losses are corrected until their optima agree.

Acar, Zhao, Matas, Mattina, Whatmough, Saligrama 2021, "Federated Learning Based on
Dynamic Regularization", ICLR (arXiv:2111.04263), algorithm 1. The paper averages
uniformly (`weights="uniform"` in a config). Deviation: alpha is not divided by the
client's relative size, as the authors' code does and the paper does not.
"""

from hyperjax import corrections
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local
from hyperjax.types import Algorithm, Model


@has_traits(base=True, weights="uniform")
@hands_on(fedavg, without=("correction",))
def feddyn(
    model: Model, *, local: Local, alpha: float = 0.01, **fedavg_options
) -> Algorithm:
    """Returns FedDyn.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`.
      alpha: weight of the dynamic regulariser; the paper tunes it among 0.1, 0.01 and
        0.001. It does not vanish with alpha: the server's shift h/alpha is the mean of
        all changes so far, whatever alpha is.
      **fedavg_options: of `fedavg`.
    """
    return fedavg(
        model, local=local, correction=corrections.dyn(alpha), **fedavg_options
    )
