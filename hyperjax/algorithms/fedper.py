"""FedPer: the body is federated, the head stays home.

Arivazhagan, Aggarwal, Singh, Choudhary 2019, "Federated Learning with Personalization
Layers" (arXiv:1912.00818). All heads start from the same draw.
"""

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.models import HEAD
from hyperjax.registry import hands_on
from hyperjax.training import Local
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Model


@hands_on(fedavg, without=("keep",))
def fedper(
    model: Model, *, local: Local, head: Patterns = HEAD, **fedavg_options
) -> Algorithm:
    """Returns FedPer.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`.
      head: patterns of the parameters that stay on the client.
      **fedavg_options: of `fedavg`.
    """
    return fedavg(model, local=local, keep=head, **fedavg_options)
