"""FedBABU: only the body is trained; the head stays at its common random draw.

Oh, Kim, Yun 2022, "FedBABU: Towards Enhanced Representation for Federated Image
Classification", ICLR (arXiv:2106.06042). The head is absent from the gradient and from
the optimizer, so neither momentum nor weight decay moves it; fine-tuning before
evaluation moves the whole network.
"""

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.models import HEAD
from hyperjax.registry import hands_on
from hyperjax.training import Local, check_given
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Model


@hands_on(fedavg, without=("keep",))
def fedbabu(
    model: Model, *, local: Local, head: Patterns = HEAD, **fedavg_options
) -> Algorithm:
    """Returns FedBABU.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`.
      head: patterns of the parameters that are neither trained nor sent.
      **fedavg_options: of `fedavg`.
    """
    check_given(model, local)
    frozen = local._replace(freeze=head)
    return fedavg(model, local=frozen, keep=head, **fedavg_options)
