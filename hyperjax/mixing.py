"""What methods share that keep a model of every client on the server.

Memory is N x P by their nature: `check_table` refuses what would not fit. They act on
the shared part of a model, as paths -> leaves: on HyperFedNet they mix generators.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import aggregators, tree
from hyperjax.types import Algorithm, Array, ClientSide, Downlink, PyTree, ServerSide

MAX_TABLE_GB = 8.0


def check_table(theta: PyTree, num_clients: int, max_gb: float) -> None:
    """Refuses a table of N models that would not fit.

    Args:
      theta: what is kept of each client; abstract, nothing is allocated.
      num_clients: N.
      max_gb: largest size of the table, in 10^9 bytes.

    Raises:
      ValueError: it would take more than `max_gb` (the message names the sizes).
    """
    each = tree.num_bytes(theta)
    if num_clients * each > max_gb * 1e9:
        raise ValueError(
            f"this method keeps models of clients on the server: {num_clients} "
            f"clients x {tree.count(theta):,} numbers ({each / 1e6:.1f} MB) = "
            f"{num_clients * each / 1e9:.1f} GB, more than max_table_gb={max_gb:g}"
        )


def table(theta: PyTree, num_clients: int) -> PyTree:
    """Returns N copies of shared variables, leaves [N, ...]."""
    return jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)).copy(), theta
    )


def check_emitted(theta: PyTree) -> None:
    """Refuses running statistics among what a hypernetwork is to emit.

    Raises:
      ValueError: there are some.
    """
    if any(path.startswith("stats/") for path in theta):
        raise ValueError(
            "bn_stats='average' would have the hypernetwork emit running variances, "
            "negative ones too; use 'local'"
        )


def rows(stored: PyTree, ids: Array) -> PyTree:
    """Returns the models of clients [C, ...]; those without one get the mean of all."""
    num_clients = jax.tree.leaves(stored)[0].shape[0]
    known = ids < num_clients
    mean = aggregators.mean_over_clients(stored, jnp.ones(num_clients))
    everyone = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (ids.shape[0], *x.shape)), mean
    )
    return tree.where_rows(known, take(stored, ids), everyone)


def take(stored: PyTree, ids: Array) -> PyTree:
    """Returns rows of a table; ids beyond its end show the last one."""
    return jax.tree.map(lambda x: x.at[ids].get(mode="clip"), stored)


def put(stored: PyTree, ids: Array, new: PyTree, active: Array) -> PyTree:
    """Writes rows [C, ...] of the active clients; ids beyond the end are dropped."""
    num_clients = jax.tree.leaves(stored)[0].shape[0]
    ids = jnp.where(active > 0, ids, num_clients)
    return jax.tree.map(lambda x, y: x.at[ids].set(y, mode="drop"), stored, new)


def combine(share: Array, stored: Array) -> Array:
    """Returns weighted sums of models: [..., N] and [N, ...] to [..., ...]."""
    # Full precision: accelerators would otherwise round parameters to TF32.
    return jnp.tensordot(share, stored, axes=1, precision=jax.lax.Precision.HIGHEST)


class Flat(NamedTuple):
    """Shared variables of one method as a vector: `size`, `join`, and its inverse."""

    size: int
    join: Callable  # (theta) -> [size]
    cut: Callable  # ([size]) -> theta


def flat(alg: Algorithm) -> Flat:
    """Returns the vector form of what a `fedavg` shares."""
    theta = jax.eval_shape(alg.server.init, jax.random.key(0)).theta
    sizes = {path: math.prod(leaf.shape) for path, leaf in theta.items()}

    def join(theta):
        return jnp.concatenate([theta[path].reshape(-1) for path in sizes])

    def cut(vector):
        found, first = {}, 0
        for path, size in sizes.items():
            part = jax.lax.slice_in_dim(vector, first, first + size)
            found[path] = part.reshape(theta[path].shape)
            first += size
        return found

    return Flat(sum(sizes.values()), join, cut)


def own_as_shared(client: ClientSide, vector: Flat | None = None) -> ClientSide:
    """Returns FedAvg's client for a server that sends each client its own model.

    With `vector` messages are flat: the model [K] down, its change [K] up.
    """

    def shared(down: Downlink) -> Downlink:
        theta = down.own if vector is None else vector.cut(down.own)
        return Downlink(shared=(theta, ()), round=down.round)

    def update(key, down, *rest):
        uplink, state, info = client.update(key, shared(down), *rest)
        sent = uplink if vector is None else vector.join(uplink.delta)
        return sent, state, info

    return client._replace(
        init=lambda key, common, down: client.init(key, common, shared(down)),
        update=update,
        adapt=lambda key, down, *rest: client.adapt(key, shared(down), *rest),
        deploy=lambda down, adapted: client.deploy(shared(down), adapted),
    )


def layers(theta: PyTree) -> list[list[str]]:
    """Returns the paths of each layer: those that differ in their last part only."""
    found: dict[str, list[str]] = {}
    for path in theta:
        found.setdefault(path.rpartition("/")[0], []).append(path)
    return list(found.values())


def over_families(algorithms: Mapping[str, Algorithm]) -> Algorithm:
    """Returns one method of FedAvgs whose models differ in what stays home only.

    Their shared variables have equal paths and shapes, and are averaged over the
    clients of all families together.

    Raises:
      ValueError: shared variables differ (the message names the families).
    """
    sides = dict(algorithms)
    first, *others = sides
    shared = {
        name: jax.eval_shape(alg.server.init, jax.random.key(0)).theta
        for name, alg in sides.items()
    }
    shapes = {k: {p: x.shape for p, x in v.items()} for k, v in shared.items()}
    for name in others:
        if shapes[name] != shapes[first]:
            raise ValueError(
                f"families {first!r} and {name!r} do not share the same variables: "
                f"{shapes[first]} and {shapes[name]}"
            )
    server = sides[first].server

    def downlink(key, state, cohorts):
        return {name: server.downlink(key, state, c) for name, c in cohorts.items()}

    def update(key, state, uplinks, cohorts):
        sent = [uplinks[name] for name in cohorts]
        uplink = jax.tree.map(lambda *x: jnp.concatenate(x), *sent)
        parts = list(cohorts.values())
        # FedAvg's server asks for nobody's number, so these may repeat.
        everybody = parts[0]._replace(
            **{
                field: jnp.concatenate([getattr(part, field) for part in parts])
                for field in ("ids", "active", "weight")
            }
        )
        return server.update(key, state, uplink, everybody)

    return Algorithm(
        ServerSide(server.init, downlink, update),
        {name: alg.client for name, alg in sides.items()},
    )
