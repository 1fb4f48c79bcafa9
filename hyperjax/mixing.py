"""What methods share that keep a model of every client on the server.

Memory is N x P by their nature: `check_table` refuses what would not fit. They act on
the shared part of a model, as paths -> leaves: on HyperFedNet they mix generators.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hyperjax import aggregators, tree
from hyperjax.errors import check_at_least, check_number
from hyperjax.types import (
    Algorithm,
    Array,
    ClientSide,
    Cohort,
    Downlink,
    Model,
    PyTree,
    ServerSide,
)

MAX_TABLE_GB = 8.0


def check_table(theta: PyTree, num_clients: int, max_gb: float) -> None:
    """Refuses a table of N models that would not fit.

    Args:
      theta: what is kept of each client; abstract, nothing is allocated.
      num_clients: N.
      max_gb: largest size of the table, in 10^9 bytes.

    Raises:
      ValueError: it would take more than `max_gb` (the message names the sizes), or
        that is no positive number.
    """
    check_number(above=0, max_table_gb=max_gb)
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
    if tree.parameters(theta)[1]:
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


def shared(alg: Algorithm) -> PyTree:
    """Returns what a `fedavg` shares, by path; abstract."""
    return jax.eval_shape(alg.server.init, jax.random.key(0)).theta


def smallest(models: Mapping[str, Model]) -> Model:
    """Returns the network with the fewest parameters."""

    def count(model):
        return tree.count(jax.eval_shape(model.init, jax.random.key(0))["params"])

    return min(models.values(), key=count)


class Flat(NamedTuple):
    """Shared variables of one method as a vector, in the order of their paths."""

    size: int
    join: Callable  # (theta) -> [size]
    cut: Callable  # ([size]) -> theta


def flat(alg: Algorithm) -> Flat:
    """Returns the vector form of what a `fedavg` shares."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shared(alg))
    vector, cut = ravel_pytree(zeros)
    return Flat(vector.size, lambda theta: ravel_pytree(theta)[0], cut)


def through(
    client: ClientSide,
    plain: Callable,
    told: Callable = lambda down, state: state,
) -> ClientSide:
    """Returns a client that is sent something else than `client` is.

    Args:
      client: what it is underneath.
      plain: `(down) -> Downlink` that `client` takes.
      told: `(down, state) -> state` with what `client` must know of the rest, before it
        trains or adapts.
    """
    return client._replace(
        init=lambda key, common, down: client.init(key, common, plain(down)),
        update=lambda key, down, state, data: client.update(
            key, plain(down), told(down, state), data
        ),
        adapt=lambda key, down, state, data: client.adapt(
            key, plain(down), told(down, state), data
        ),
        deploy=lambda down, adapted: client.deploy(plain(down), adapted),
    )


def own_as_shared(client: ClientSide, vector: Flat | None = None) -> ClientSide:
    """Returns FedAvg's client for a server that sends each client its own model.

    With `vector` messages are flat: the model [K] down, its change [K] up.
    """

    def plain(down: Downlink) -> Downlink:
        theta = down.own if vector is None else vector.cut(down.own)
        return Downlink(shared=(theta, ()), round=down.round)

    side = through(client, plain)
    if vector is None:
        return side

    def update(*args):
        uplink, state, info = side.update(*args)
        return vector.join(uplink.delta), state, info

    return side._replace(update=update)


def together(cohorts: Iterable[Cohort]) -> Cohort:
    """Returns several cohorts of a round as one."""
    first, *others = cohorts
    joined = {
        field: jnp.concatenate([getattr(c, field) for c in (first, *others)])
        for field in ("ids", "active", "weight")
    }
    return first._replace(**joined)


def check_families(
    models: Mapping[str, Model],
    sizes: Mapping[str, int] | None,
    num_clients: int | None = None,
) -> None:
    """Refuses sizes that are not those of the models' families.

    Raises:
      ValueError: other families, a size below 1, or not `num_clients` in all.
    """
    sizes = sizes or {}
    if set(sizes) != set(models):
        raise ValueError(
            f"family_sizes is of {sorted(sizes)}, models of {sorted(models)}"
        )
    check_at_least(1, **sizes)
    if num_clients not in (None, sum(sizes.values())):
        raise ValueError(
            f"family_sizes={dict(sizes)} are {sum(sizes.values())} clients, "
            f"num_clients={num_clients}"
        )


def layers(theta: PyTree) -> list[list[str]]:
    """Returns the paths of each layer: weight, bias and running statistics together."""
    found: dict[str, list[str]] = {}
    for path in theta:
        place = re.sub(r"params/|stats/[^/]*/", "", path, count=1)
        found.setdefault(place.rpartition("/")[0], []).append(path)
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
    shapes = {
        name: {path: x.shape for path, x in shared(alg).items()}
        for name, alg in sides.items()
    }
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
        # FedAvg's server asks for nobody's number, so these may repeat.
        return server.update(key, state, uplink, together(cohorts.values()))

    return Algorithm(
        ServerSide(server.init, downlink, update),
        {name: alg.client for name, alg in sides.items()},
    )
