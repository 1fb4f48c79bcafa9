"""FedRep: first the head on the received body, then the body under the new head.

Collins, Hassani, Mokhtari, Shakkottai 2021, "Exploiting Shared Representations for
Personalized Federated Learning", ICML (arXiv:2102.07078), algorithm 1. Bodies are
averaged, heads stay home. Running statistics of the body's batch-norm go on moving
while the head trains. The paper ends with tuning of the head alone, and so does
fine-tuning here.
"""

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.errors import check_at_least
from hyperjax.models import HEAD
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local, Phase, check_given
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Model


@has_traits(own_length=True)
@hands_on(fedavg, without=("keep",))
def fedrep(
    model: Model,
    *,
    local: Local,
    head: Patterns = HEAD,
    head_epochs: int = 10,
    body_epochs: int = 1,
    finetune: Patterns = (),
    **fedavg_options,
) -> Algorithm:
    """Returns FedRep.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`; its length is that of the phases.
      head: patterns of the parameters that stay on the client.
      head_epochs: local epochs of the head (10 for CIFAR-10).
      body_epochs: local epochs of the body (1 for CIFAR-10, 5 for CIFAR-100).
      finetune: patterns of the parameters that fine-tuning moves; None: the head.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: a number of epochs is no whole number of at least 0.
    """
    check_given(model, local)
    check_at_least(0, head_epochs=head_epochs, body_epochs=body_epochs)
    phases = (
        Phase(epochs=head_epochs, train=head),
        Phase(epochs=body_epochs, freeze=head),
    )
    return fedavg(
        model,
        local=local._replace(phases=phases),
        keep=head,
        finetune=finetune or head,
        **fedavg_options,
    )
