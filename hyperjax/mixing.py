"""What methods share that keep a model of every client on the server.

Memory is N x P by their nature: `check_table` refuses what would not fit. They act on
the shared part of a model, as paths -> leaves: on HyperFedNet they mix generators.
"""

import re

import jax
import jax.numpy as jnp

from hyperjax import aggregators, tree
from hyperjax.errors import check_number
from hyperjax.types import (
    Array,
    PyTree,
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


def layers(theta: PyTree) -> list[list[str]]:
    """Returns the paths of each layer: weight, bias and running statistics together."""
    found: dict[str, list[str]] = {}
    for path in theta:
        place = re.sub(r"params/|stats/[^/]*/", "", path, count=1)
        found.setdefault(place.rpartition("/")[0], []).append(path)
    return list(found.values())
