"""Local training: every client on its own, nothing is sent.

The baseline without collaboration. All clients start from the same parameters, as the
federated methods do, and train only when they are sampled, which gives every method the
same number of gradient steps.
"""

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.types import Algorithm, Model


def local_only(model: Model, *, local, **fedavg_options) -> Algorithm:
    """Returns FedAvg that keeps everything at home.

    Args:
      model: what is trained.
      local: builds a training loop, see `fedavg`.
      **fedavg_options: of `fedavg`.
    """
    return fedavg(model, local=local, keep=r".*", **fedavg_options)
