"""FedFomo: every client is sent others' models and takes from each what helps it.

Zhang, Sapra, Fidler, Yeung, Alvarez 2021, "Personalized Federated Learning with First
Order Model Optimization", ICLR (arXiv:2012.08565), equations 6 and 7. Client i keeps a
fifth of its samples for validation, scores each of M received models by

    w_n = (L_i(theta_i) - L_i(theta_n)) / |theta_n - theta_i|,

moves to theta_i + sum_n w+_n (theta_n - theta_i) with w+ the positive scores divided by
their sum, then trains and sends its model and the scores. The server adds the scores to
row i of its preferences, and picks the M best of row i, or with probability epsilon M
at random, among clients whose model has been trained.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import mixing, rng, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.calls import Fixed
from hyperjax.errors import check_at_least, check_number
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local, mean_loss
from hyperjax.types import (
    Algorithm,
    Array,
    ClientData,
    ClientSide,
    Cohort,
    Downlink,
    Model,
    PyTree,
)


class State(NamedTuple):
    """What the server knows.

    `seed` is constant: `send` and `learn` draw the same choice from it.
    """

    models: PyTree  # leaves [N, ...] by path
    preference: Array  # [N, N] float32
    trained: Array  # [N] bool
    seed: Array  # [] uint32


class Own(NamedTuple):
    """What a client is sent: its model, and M others, leaves [M, ...]."""

    model: PyTree
    others: PyTree


class Uplink(NamedTuple):
    """What a client sends: its model and the scores [M] of those it received."""

    model: PyTree
    scores: Array


@has_traits(base=True)
@hands_on(fedavg)
def fedfomo(
    model: Model,
    *,
    local: Local,
    num_clients: int,
    num_models: int = 5,
    epsilon: float = 0.3,
    epsilon_decay: float = 0.05,
    validation_fraction: Fixed = 0.2,
    max_table_gb: Fixed = mixing.MAX_TABLE_GB,
    **fedavg_options,
) -> Algorithm:
    """Returns FedFomo.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`.
      num_clients: N.
      num_models: M, models of others that a client receives; 0 never mixes.
      epsilon: probability of a random choice in the first round.
      epsilon_decay: what it falls by each round.
      validation_fraction: share of a client's samples kept from training.
      max_table_gb: largest size of the server's models.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: the models would not fit, or a number is out of range.
    """
    check_at_least(1, num_clients=num_clients)
    check_at_least(0, num_models=num_models)
    if num_models >= max(num_clients, 2):
        raise ValueError(
            f"num_models={num_models} must be less than the {num_clients} clients"
        )
    check_number(at_least=0, at_most=1, epsilon=epsilon)
    check_number(at_least=0, epsilon_decay=epsilon_decay)
    check_number(above=0, below=1, validation_fraction=validation_fraction)
    inner = fedavg(model, local=local, **fedavg_options)
    choice = _Choice(num_clients, num_models, epsilon, epsilon_decay)

    def begin(common, models):
        nobody = jnp.zeros(num_clients, bool)
        seed = jax.random.bits(rng.stream(common, "choice"), (), jnp.uint32)
        return State(models, jnp.eye(num_clients), nobody, seed)

    def send(state, cohort):
        own = mixing.rows(state.models, cohort.ids)
        return Own(own, mixing.take(state.models, choice(state, cohort)))

    def learn(state, after, models, uplink, cohort):
        alive = jnp.where(cohort.active > 0, cohort.ids, num_clients)
        preference = state.preference.at[alive[:, None], choice(state, cohort)].add(
            uplink.scores, mode="drop"
        )
        trained = state.trained.at[alive].set(True, mode="drop")
        return after._replace(preference=preference, trained=trained)

    server = mixing.server(
        inner,
        num_clients,
        send,
        begin=begin,
        received=lambda sent, uplink: uplink.model,  # clients mix, so nobody else knows
        learn=learn,
        max_table_gb=max_table_gb,
    )
    client = _client(inner.client, model, validation_fraction)
    return Algorithm(server, client, exact=("scores",))


class _Choice(NamedTuple):
    """Whose models clients are sent."""

    num_clients: int
    num_models: int
    epsilon: float
    epsilon_decay: float

    def __call__(self, state: State, cohort: Cohort) -> Array:
        """Clients [C, M]; who is sent a model, where nobody else is left."""
        key = jax.random.fold_in(jax.random.key(state.seed), cohort.round)
        chance = jnp.clip(self.epsilon - self.epsilon_decay * cohort.round, 0.0, 1.0)

        def one(key, client):
            key_greedy, key_draw = jax.random.split(key)
            random = jax.random.uniform(key_draw, (self.num_clients,))
            wander = jax.random.uniform(key_greedy) < chance
            known = jnp.minimum(client, self.num_clients - 1)
            score = jnp.where(wander, random, state.preference[known])
            # A model that nobody has trained says nothing: never among the best.
            open_ = state.trained & (jnp.arange(self.num_clients) != client)
            score = jnp.where(open_, score, -jnp.inf)
            best, who = jax.lax.top_k(score, self.num_models)
            return jnp.where(jnp.isfinite(best), who, known)

        return jax.vmap(one)(rng.client_keys(key, cohort.ids), cohort.ids)


def _client(inner: ClientSide, model: Model, validation_fraction: float) -> ClientSide:
    """FedAvg's client, which first mixes the models that it is sent."""

    def start_from(down, theta):
        return Downlink(shared=(theta, ()), round=down.round)

    def gap(other, mine):
        """Differences of parameters; running statistics have no part in a distance."""
        return {k: other[k] - x for k, x in tree.parameters(mine)[0].items()}

    def update(key, down, client, data):
        train, validation = parted(data, validation_fraction)
        mine, others = down.own

        def loss(theta):
            variables = inner.deploy(start_from(down, theta), client)
            return mean_loss(model, variables, validation)

        distance = jax.vmap(lambda other: tree.norm(gap(other, mine)))(others)
        gain = loss(mine) - jax.lax.map(loss, others)
        # A model equal to one's own helps nothing; so does any without validation.
        useful = (distance > 0) & (validation.size > 0)
        scores = jnp.where(useful, gain / jnp.where(useful, distance, 1.0), 0.0)
        share = jnp.maximum(scores, 0.0)
        share = share / jnp.where(jnp.sum(share) > 0, jnp.sum(share), 1.0)
        mixed = jax.tree.map(
            lambda x, y: x + mixing.combine(share, y - x), mine, others
        )
        sent, client, info = inner.update(key, start_from(down, mixed), client, train)
        return Uplink(tree.add(mixed, sent.delta), scores), client, info

    side = wrappers.through(inner, lambda down: start_from(down, down.own.model))
    return side._replace(update=update)


def parted(data: ClientData, fraction: float) -> tuple[ClientData, ClientData]:
    """Cuts a client's samples in those to train on and the first few, to validate."""
    held = jnp.where(data.size > 1, jnp.maximum(1, data.size * fraction), 0)
    held = held.astype(jnp.int32)
    # Rolled, not cut: rows keep their width, and the first `size` of them count.
    train = data._replace(rows=jnp.roll(data.rows, -held), size=data.size - held)
    return train, data._replace(size=held)
