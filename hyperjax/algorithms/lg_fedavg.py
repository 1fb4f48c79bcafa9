"""LG-FedAvg: local representations, a global head.

Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency 2020, "Think Locally,
Act Globally: Federated Learning with Local and Global Representations"
(arXiv:2001.01523): the mirror image of FedPer. Deviation: the paper's runs start from a
model that FedAvg has trained; here all clients start from the same draw.
"""

import re
from collections.abc import Mapping

import jax

from hyperjax import over_families, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.models import HEAD
from hyperjax.registry import hands_on
from hyperjax.training import Local, check_given
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Model


@hands_on(fedavg, without=("keep",))
def lg_fedavg(
    model: Model | Mapping[str, Model],
    *,
    local: Local,
    share: Patterns = HEAD,
    family_sizes: Mapping[str, int] | None = None,
    **fedavg_options,
) -> Algorithm:
    """Returns LG-FedAvg.

    Args:
      model: what is trained; or the network of each family, with equal heads.
      local: how clients train, see `fedavg`.
      share: patterns of the parameters that are federated.
      family_sizes: given with several networks.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: `share` matches no parameter, or families do not share the same.
    """
    check_given(model, local)
    if isinstance(model, Mapping):
        options = dict(local=local, share=share, **fedavg_options)
        return over_families.averaged(
            {k: lg_fedavg(m, **options) for k, m in model.items()}
        )
    template = jax.eval_shape(model.init, jax.random.key(0))
    _, rest = tree.splitter(template, share).split(template)
    keep = [re.escape(path) for path in rest]
    return fedavg(model, local=local, keep=keep, **fedavg_options)
