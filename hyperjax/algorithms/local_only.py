"""Local training: every client on its own, nothing is sent.

The baseline without collaboration. All clients start from the same parameters, as the
federated methods do, and train only when they are sampled, which gives every method the
same number of gradient steps.
"""

from collections.abc import Mapping

from hyperjax import over_families
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.registry import hands_on
from hyperjax.training import Local
from hyperjax.types import Algorithm, Model


@hands_on(fedavg, without=("keep",))
def local_only(
    model: Model | Mapping[str, Model],
    *,
    local: Local,
    family_sizes: Mapping[str, int] | None = None,
    **fedavg_options,
) -> Algorithm:
    """Returns FedAvg that keeps everything at home.

    Args:
      model: what is trained; or the network of each family.
      local: how clients train, see `fedavg`.
      family_sizes: given with several networks.
      **fedavg_options: of `fedavg`.
    """
    if isinstance(model, Mapping):
        options = dict(local=local, **fedavg_options)
        return over_families.averaged(
            {k: local_only(m, **options) for k, m in model.items()}
        )
    return fedavg(model, local=local, keep=r".*", **fedavg_options)
