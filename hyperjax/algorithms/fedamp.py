"""FedAMP: each client is sent a mixture of all models, the nearer ones more.

Huang, Chu, Zhou, Wang, Liu, Pei, Zhang 2021, "Personalized Cross-Silo Federated
Learning on Non-IID Data", AAAI (arXiv:2007.03797), equations 5 to 8 with the attention
function A(d) = 1 - exp(-d / sigma) of squared distances d:

    u_i = sum_j w_ij theta_j,   w_ij = alpha A'(|theta_i - theta_j|^2) for j != i,

w_ii the rest to one, and client i, starting at u_i, minimises

    F_i(theta) + lambda/(2 alpha) |theta - u_i|^2.

Deviation: alpha and sigma as in the formula; public code normalises
cosine similarities instead.
"""

import jax
import jax.numpy as jnp

from hyperjax import corrections, mixing, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.calls import Fixed
from hyperjax.errors import check_at_least, check_number, surely
from hyperjax.registry import hands_on
from hyperjax.training import Local
from hyperjax.types import Algorithm, Model


@hands_on(fedavg, without=("correction",))
def fedamp(
    model: Model,
    *,
    local: Local,
    num_clients: int,
    alpha: float = 100.0,
    sigma: float = 1e4,
    lam: float = 1.0,
    max_table_gb: Fixed = mixing.MAX_TABLE_GB,
    **fedavg_options,
) -> Algorithm:
    """Returns FedAMP.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`.
      num_clients: N.
      alpha: step of the attentive mixing; (N - 1) alpha / sigma must be at most 1.
      sigma: scale of squared distances.
      lam: lambda.
      max_table_gb: largest size of the server's models.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: the models would not fit, a number is not positive, or a client's own
        weight could be negative.
    """
    check_at_least(1, num_clients=num_clients)
    check_number(above=0, alpha=alpha, sigma=sigma)
    check_number(at_least=0, lam=lam)
    if surely((num_clients - 1) * alpha > sigma):
        raise ValueError(
            f"alpha={alpha} is too large: (num_clients - 1) alpha / sigma = "
            f"{(num_clients - 1) * alpha / sigma:.3g} must be at most 1"
        )
    inner = fedavg(
        model, local=local, correction=corrections.prox(lam / alpha), **fedavg_options
    )

    def weights(models, ids):
        """Mixing weights [C, N]; they sum to one."""
        own = mixing.take(models, ids)

        def apart(path):
            gap = own[path][:, None] - models[path][None]
            return jnp.sum(jnp.square(gap), tuple(range(2, gap.ndim)))

        distance = sum(apart(path) for path in tree.parameters(own)[0])
        # alpha A'(d), the derivative of 1 - exp(-d / sigma).
        near = alpha / sigma * jnp.exp(-distance / sigma)
        itself = jax.nn.one_hot(ids, num_clients)
        near = jnp.where(itself > 0, 0.0, near)
        return near + itself * (1.0 - jnp.sum(near, 1, keepdims=True))

    def send(state, cohort):
        known = jnp.minimum(cohort.ids, num_clients - 1)
        share = weights(state.models, known)
        mixed = jax.tree.map(lambda x: mixing.combine(share, x), state.models)
        return mixing.or_mean(mixed, state.models, cohort.ids)

    server = mixing.server(inner, num_clients, send, max_table_gb=max_table_gb)
    return Algorithm(server, wrappers.own_as_shared(inner.client))
