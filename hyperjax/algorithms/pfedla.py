"""pFedLA: a hypernetwork per client decides whose layers it is sent.

Ma, Zhang, Guo, Xu 2022, "Layer-Wised Model Aggregation for Personalized Federated
Learning", CVPR (arXiv:2205.03993). For client k a small generator emits, layer by layer
(weight, bias and running statistics together), non-negative weights over all clients
that sum to one, and the client receives theta_k^l = sum_j a_{k,j}^l theta_j^l of the
stored models. From d_k, what its training changes in the parameters, the server learns
the generator by one step along

    psi_k <- psi_k + lr (d theta_k / d psi_k)^T d_k.

The sign is the one that descends the client's loss; public reproductions have the other
(`sign=-1`). Deviations: the clients of a cohort mix the models that were stored before
the round; with the sequential protocol of the engine, one after another, each mixes
what earlier ones have just stored, as the reproductions do. Heur-pFedLA, which keeps
some layers at home, is not here.
"""

import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import mixing, rng, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.calls import Fixed
from hyperjax.errors import check_at_least, check_number
from hyperjax.models.layers import torch_uniform
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local
from hyperjax.types import Algorithm, Array, Model, PyTree

SIGNS = (1, -1)
DEPTH = 3  # hidden layers of the generator


class State(NamedTuple):
    """Models by path and generators, leaves [N, ...]."""

    models: PyTree
    psi: PyTree


@has_traits(base=True)
@hands_on(fedavg)
def pfedla(
    model: Model,
    *,
    local: Local,
    num_clients: int,
    embedding_size: int = 100,
    hidden_size: int = 100,
    generator_learning_rate: float = 5e-3,
    sign: int = 1,
    max_table_gb: Fixed = mixing.MAX_TABLE_GB,
    **fedavg_options,
) -> Algorithm:
    """Returns pFedLA.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`.
      num_clients: N.
      embedding_size: of a client's generator.
      hidden_size: of its three layers.
      generator_learning_rate: of the generators' plain gradient steps.
      sign: 1 descends the clients' losses; -1 is the public reproductions' sign.
      max_table_gb: largest size of the server's models and generators.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: the models would not fit, or a number is out of range.
    """
    check_at_least(
        1,
        num_clients=num_clients,
        embedding_size=embedding_size,
        hidden_size=hidden_size,
    )
    if sign not in SIGNS:
        raise ValueError(f"sign={sign} must be 1 or -1")
    check_number(at_least=0, generator_learning_rate=generator_learning_rate)
    inner = fedavg(model, local=local, **fedavg_options)
    layers = layers_of(wrappers.shared(inner))

    def init_generator(key):
        sizes = [embedding_size, *[hidden_size] * DEPTH]
        keys = jax.random.split(key, DEPTH + 2)

        def linear(key, d, width):
            key_w, key_b = jax.random.split(key)
            draw = torch_uniform(d)
            return {"w": draw(key_w, (d, width)), "b": draw(key_b, (width,))}

        return {
            "embedding": jax.random.normal(keys[0], (embedding_size,)),
            "trunk": [
                linear(k, *pair)
                for k, pair in zip(keys[1:-1], itertools.pairwise(sizes), strict=True)
            ],
            # Positive, so that every client starts with a say.
            "heads": jax.random.uniform(
                keys[-1], (hidden_size, len(layers), num_clients)
            ),
            "bias": jnp.zeros((len(layers), num_clients)),
        }

    # A generator has as many heads as there are clients.
    psi = jax.eval_shape(init_generator, jax.random.key(0))

    def begin(common, models):
        keys = jax.random.split(rng.stream(common, "generators"), num_clients)
        return State(models, jax.vmap(init_generator)(keys))

    def mixed(psi, client, models):
        """A client's model, by path."""
        share = layer_weights(psi, client)
        return {
            path: mixing.combine(share[i], models[path])
            for i, paths in enumerate(layers)
            for path in paths
        }

    def send(state, cohort):
        psi = mixing.take(state.psi, cohort.ids)
        own = jax.vmap(mixed, (0, 0, None))(psi, cohort.ids, state.models)
        return mixing.or_mean(own, state.models, cohort.ids)

    def learn(state, after, trained, uplink, cohort):
        psi = mixing.take(state.psi, cohort.ids)

        def gradient(psi, client, delta):
            _, pull = jax.vjp(lambda p: mixed(p, client, state.models), psi)
            return pull(delta)[0]

        # Running statistics are not trained: their change leads nowhere downhill.
        params, stats = tree.parameters(uplink.delta)
        change = {**params, **tree.zeros_like(stats)}
        grads = jax.vmap(gradient)(psi, cohort.ids, change)
        rate = sign * generator_learning_rate
        new = jax.tree.map(lambda p, g: p + rate * g, psi, grads)
        return after._replace(psi=mixing.put(state.psi, cohort.ids, new, cohort.active))

    server = mixing.server(
        inner,
        num_clients,
        send,
        begin=begin,
        learn=learn,
        beside=psi,
        max_table_gb=max_table_gb,
    )
    return Algorithm(server, wrappers.own_as_shared(inner.client))


def layers_of(theta: PyTree) -> list[list[str]]:
    """Returns the paths of each layer: weight, bias and running statistics together."""
    found: dict[str, list[str]] = {}
    for path in theta:
        place = re.sub(r"params/|stats/[^/]*/", "", path, count=1)
        found.setdefault(place.rpartition("/")[0], []).append(path)
    return list(found.values())


def layer_weights(psi: PyTree, client: Array) -> Array:
    """Returns a generator's weights over clients, [layers, N]; each row sums to one."""
    x = psi["embedding"]
    for layer in psi["trunk"]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    raw = jax.nn.relu(jnp.einsum("h,hln->ln", x, psi["heads"]) + psi["bias"])
    total = jnp.sum(raw, -1, keepdims=True)
    own = jax.nn.one_hot(client, raw.shape[-1])
    return jnp.where(total > 0, raw / jnp.where(total > 0, total, 1.0), own)
