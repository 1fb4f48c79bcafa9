"""pFedLHN: a hypernetwork on the server that mixes a row of shared bases per tensor.

"Layer-wise personalized federated learning with hypernetwork", Neural Processing
Letters 2023, after the authors' code. The server holds bases E [5, 40], and for client
i a matrix A_i [T, 5] with a row for each of the T tensors of its network:

    theta_i,l = W_l (W (A_i,l E) + b) + b_l

without a nonlinearity. It is trained as pFedHN is: a client's change is pulled back
through the generator to E, W, W_l and A_i. A newcomer tunes A alone, from labels.

Deviations: the authors' code divides the changes of a cohort by its size twice and
multiplies clients' changes with others' generators; here each change goes through its
own client's, and the mean is taken once. With one client a round, as published, they
are the same. The start of E, N(0, 1), and the server's decay are not known.
"""

from collections.abc import Mapping

import optax

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.pfedhn import Emitter, emitting
from hyperjax.errors import check_at_least
from hyperjax.hypernets import heads
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Model

SPREAD = 0.002  # of clients' matrices at the start


@has_traits(joins=True)
@hands_on(fedavg)
def pfedlhn(
    model: Model | Mapping[str, Model],
    *,
    local: Local,
    num_clients: int,
    family_sizes: Mapping[str, int] | None = None,
    num_bases: int = 5,
    basis_size: int = 40,
    hidden_size: int = 128,
    one_row: bool = False,
    server_opt: optax.GradientTransformation | None = None,
    clip_norm: float = 30.0,
    freeze: Patterns = (),
    bn_stats: str = "local",
    **fedavg_options,
) -> Algorithm:
    """Returns pFedLHN.

    Args:
      model: the target network, or one for each family of clients.
      local: how clients train, see `fedavg`.
      num_clients: N, of all families together.
      family_sizes: clients of each family, if there are any.
      num_bases, basis_size, hidden_size: see `heads.per_layer`.
      one_row: a client mixes the bases alike for all tensors (the paper's ablation).
      server_opt: default AdamW at 3e-4.
      clip_norm: bound on the norm of the server's gradient.
      freeze: patterns of paths in phi that do not move.
      bn_stats: "local"; what a hypernetwork emits has no running statistics.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: as `pfedhn`.
    """
    check_at_least(1, num_clients=num_clients)

    def emitter(template):
        net, size = heads.per_layer(
            template,
            num_bases=num_bases,
            basis_size=basis_size,
            hidden_size=hidden_size,
            one_row=one_row,
        )
        return Emitter(net, size, SPREAD)

    return emitting(
        model,
        emitter,
        local=local,
        num_clients=num_clients,
        family_sizes=family_sizes,
        optimizer=server_opt or optax.adamw(3e-4),
        clip_norm=clip_norm,
        freeze=freeze,
        **{"bn_stats": bn_stats, **fedavg_options},
    )
