"""pFedSim: bodies are mixed by how similar the heads are.

Tan, Zhou, Liu, Wang, Yu 2023, "pFedSim: Similarity-Aware Model Aggregation Towards
Personalized Federated Learning" (arXiv:2305.15706). After a `warmup` of FedAvg
every client has a model of its own on the server. Client i receives its own head and

    body_i = sum_j w_ij body_j,   w_ij proportional to -ln(1 - Phi_ij),

where Phi_ij is the mean over classes of the cosine between the two heads' weights for
that class, no less than 0, renewed whenever i and j take part together. Deviations:
every Phi is cut off at 0.9999, not Phi_ii alone, and a client is deployed with the
mixture that it would receive next. Clients could keep the head that the server sends
back to them after the warm-up, which would save its numbers on the way down.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import aggregators, mixing, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.calls import Fixed
from hyperjax.errors import check_at_least, check_number
from hyperjax.models import HEAD
from hyperjax.registry import hands_on
from hyperjax.training import Local, round_at
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Array, Model, PyTree

# Of similarities: -ln(1 - 1) is infinite, and everybody's head is just like itself.
LARGEST = 0.9999


class State(NamedTuple):
    """Models [N, ...] by path, and the heads' similarities [N, N]."""

    models: PyTree
    phi: Array


@hands_on(fedavg)
def pfedsim(
    model: Model,
    *,
    local: Local,
    num_clients: int,
    num_rounds: int,
    warmup: Fixed = 0.5,
    head: Patterns = HEAD,
    max_table_gb: Fixed = mixing.MAX_TABLE_GB,
    **fedavg_options,
) -> Algorithm:
    """Returns pFedSim.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`.
      num_clients: N.
      num_rounds: of the whole run.
      warmup: fraction of the rounds that are FedAvg's at first; half as published.
      head: patterns of the head; its "kernel" is [L, K].
      max_table_gb: largest size of the server's models.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: the models would not fit, or a size is out of range.
    """
    check_at_least(1, num_clients=num_clients)
    check_at_least(0, num_rounds=num_rounds)
    check_number(at_least=0, at_most=1, warmup=warmup)
    warmup_rounds = round_at(warmup, num_rounds)
    inner = fedavg(model, local=local, **fedavg_options)
    theta = wrappers.shared(inner)
    tops, _ = tree.splitter(theta, head).split(theta)
    kernel = next((path for path in tops if path.endswith("/kernel")), None)
    if kernel is None:
        raise ValueError(f"pfedsim needs a head with a kernel; {head!r} has {[*tops]}")

    def begin(common, models):
        return State(models, jnp.zeros((num_clients, num_clients)))

    def weights(phi, ids):
        """Mixing weights of clients, [C, N]; they sum to one."""
        known = jnp.minimum(ids, num_clients - 1)
        own = jax.nn.one_hot(known, num_clients)
        similar = jnp.minimum(jnp.maximum(phi[known], own), LARGEST)
        raw = -jnp.log1p(-similar)
        return raw / jnp.sum(raw, 1, keepdims=True)

    def send(state, cohort):
        stored = mixing.rows(state.models, cohort.ids)
        share = weights(state.phi, cohort.ids)
        mix = (cohort.round >= warmup_rounds) & (cohort.ids < num_clients)

        def body(path, own):
            mixed = mixing.combine(share, state.models[path])
            return tree.where_rows(mix, mixed, own)

        return {k: x if k in tops else body(k, x) for k, x in stored.items()}

    def learn(state, after, trained, uplink, cohort):
        weight = cohort.weight * cohort.active
        mean = aggregators.mean_over_clients(trained, weight)
        same = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)), mean
        )
        warm, anybody = cohort.round < warmup_rounds, jnp.sum(weight) > 0
        models = jax.tree.map(
            lambda x, y, z: jnp.where(warm, jnp.where(anybody, x, z), y),
            *(same, after.models, state.models),
        )
        renewed = _renewed(state.phi, trained[kernel], cohort)
        return State(models, jnp.where(warm, state.phi, renewed))

    server = mixing.server(
        inner, num_clients, send, begin=begin, learn=learn, max_table_gb=max_table_gb
    )
    return Algorithm(server, wrappers.own_as_shared(inner.client))


def _renewed(phi: Array, kernels: Array, cohort) -> Array:
    """Similarities after a cohort with heads [C, L, K] took part together."""
    norms = jnp.linalg.norm(kernels, axis=1, keepdims=True)
    unit = kernels / jnp.maximum(norms, 1e-12)  # zeros stay, like nobody's weights
    # Full precision: weights of heads that are nearly alike differ in 1 - cosine.
    cosines = jnp.einsum(
        "alk,blk->abk", unit, unit, precision=jax.lax.Precision.HIGHEST
    )
    new = jnp.maximum(jnp.mean(cosines, -1), 0.0)
    num_clients = phi.shape[0]
    ids = jnp.where(cohort.active > 0, cohort.ids, num_clients)
    return phi.at[ids[:, None], ids[None, :]].set(new, mode="drop")
