"""FLUX: clusters of clients whose inputs look alike, and FedAvg inside each.

Fenoglio et al. 2025, NeurIPS (arXiv:2511.22305), after the authors' code. FedAvg for a
share of the rounds; then clients send a profile (see `feroma`), the server clusters
them by DBSCAN with two samples a cluster, whose radius is at the elbow of the sorted
distances to the nearest client, and whoever is near nobody is a cluster of its own. A
newcomer gets the model of the cluster whose centre is nearest by the part of the
profile that needs no label; here it is handed all models, and chooses.

Deviations: those of profiles in `feroma`, but for the halves; FedAvg ends after a fixed
share of the rounds, where the authors' code watches the accuracy; a client whose
profile comes later joins the cluster that it is near then.
"""

import math

import jax.numpy as jnp

from hyperjax import mixing
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.feroma import (
    Known,
    distances,
    profiled,
    scaled,
    warmup_rounds,
)
from hyperjax.calls import Fixed
from hyperjax.registry import hands_on
from hyperjax.training import Local
from hyperjax.types import Algorithm, Array, Model


@hands_on(fedavg)
def flux(
    model: Model,
    *,
    local: Local,
    num_clients: int,
    num_rounds: int,
    warmup: Fixed = 0.5,
    max_table_gb: Fixed = mixing.MAX_TABLE_GB,
    **fedavg_options,
) -> Algorithm:
    """Returns FLUX.

    Args:
      model: the network, whose last layer is linear and is named "head".
      local: how clients train, see `fedavg`.
      num_clients: N.
      num_rounds: of the whole run.
      warmup: fraction of the rounds that are FedAvg's at first.
      max_table_gb: largest size of the server's models.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: the models would not fit, a size is out of range, or the network has
        no such head.
    """

    def together(known: Known) -> Array:
        return clusters(scaled(known.rows, known.scale()), known.there)

    def centres(known: Known) -> Array:
        same = together(known)
        count = jnp.maximum(jnp.sum(same, 1, keepdims=True), 1.0)
        return mixing.combine(same / count, known.rows)

    return profiled(
        model,
        local=local,
        num_clients=num_clients,
        warmup_rounds=warmup_rounds(num_clients, num_rounds, warmup),
        near=lambda before, now, ids: together(now).at[:, ids].get(mode="clip"),
        centres=centres,
        half=False,
        max_table_gb=max_table_gb,
        **fedavg_options,
    )


def clusters(rows: Array, there: Array) -> Array:
    """Returns who is in whose cluster, [N, N] float32; nobody is in that of the absent.

    With two samples a cluster, DBSCAN's are the components of those who have each other
    within the radius.

    Args:
      rows: [N, P].
      there: [N] float32, whose rows count.
    """
    num = len(rows)
    pair = (there[:, None] > 0) & (there[None] > 0)
    apart = jnp.where(pair, distances(rows, rows), jnp.inf)
    nearest = jnp.sort(jnp.min(jnp.where(jnp.eye(num) > 0, jnp.inf, apart), 1))
    # The elbow is where the curve is farthest below its chord.
    last = jnp.maximum(jnp.sum(there).astype(jnp.int32) - 1, 0)
    place = jnp.arange(num)
    rise = jnp.maximum(nearest[last] - nearest[0], 1e-12)
    below = place / jnp.maximum(last, 1) - (nearest - nearest[0]) / rise
    radius = nearest[jnp.argmax(jnp.where(place <= last, below, -jnp.inf))]
    linked = jnp.where(apart <= radius, 1.0, 0.0)
    linked = jnp.maximum(linked, jnp.eye(num)) * pair
    for _ in range(math.ceil(math.log2(max(num, 2)))):
        linked = jnp.where(linked @ linked > 0, 1.0, 0.0)
    return linked
