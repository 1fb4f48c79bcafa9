"""What methods share that keep a model of every client on the server.

Memory is N x P by their nature: `check_table` refuses what would not fit. They act on
the shared part of a model, as paths -> leaves: on HyperFedNet they mix generators.
`server` is the server of all of them, the functions before it are for tables of any
kind, such as a hypernetwork's embeddings of clients.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import aggregators, tree, wrappers
from hyperjax.calls import Fixed
from hyperjax.errors import check_at_least, check_number
from hyperjax.types import Algorithm, Array, Downlink, PyTree, ServerSide

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


def rows(stored: PyTree, ids: Array) -> PyTree:
    """Returns the models of clients [C, ...]; those without one get the mean of all."""
    num_clients = jax.tree.leaves(stored)[0].shape[0]
    known = ids < num_clients
    mean = aggregators.mean_over_clients(stored, jnp.ones(num_clients))
    everyone = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (ids.shape[0], *x.shape)), mean
    )
    return tree.where_rows(known, take(stored, ids), everyone)


def or_mean(mixed: PyTree, stored: PyTree, ids: Array) -> PyTree:
    """Returns `mixed` [C, ...], but the mean of all for clients without a row."""
    num_clients = jax.tree.leaves(stored)[0].shape[0]
    return tree.where_rows(ids < num_clients, mixed, rows(stored, ids))


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


# The server -------------------------------------------------------------------------


class State(NamedTuple):
    """What a server that mixes knows, if it learns nothing else."""

    models: PyTree  # leaves [N, ...] by path


def server(
    alg: Algorithm,
    num_clients: int,
    send: Callable,
    *,
    begin: Callable = lambda common, models: State(models),
    received: Callable = lambda sent, uplink: tree.add(sent, uplink.delta),
    learn: Callable = lambda state, after, trained, uplink, cohort: after,
    beside: PyTree = (),
    max_table_gb: Fixed = MAX_TABLE_GB,
) -> ServerSide:
    """Returns a server that keeps a model of every client and sends mixtures of them.

    Args:
      alg: the `fedavg` whose shared variables are mixed.
      num_clients: N.
      send: `(state, cohort) -> own`, what each client is sent, leaves [C, ...].
      begin: `(common, models) -> state`, a named tuple with these `models`, leaves
        [N, ...], and what else the server goes by.
      received: `(sent, uplink) -> models` [C, ...] as the clients have trained them;
        those of active clients are stored.
      learn: `(state, after, trained, uplink, cohort) -> state`, from the state before
        the exchange and the one `after` storing; `trained` is what `received` found.
      beside: what else is kept of each client; abstract, for the size of the table.
      max_table_gb: largest size of the table.

    Raises:
      ValueError: the table would not fit, or there are no clients.
    """
    check_at_least(1, num_clients=num_clients)
    theta = wrappers.shared(alg)
    check_table((theta, beside), num_clients, max_table_gb)

    def init(common):
        return begin(common, table(alg.server.init(common).theta, num_clients))

    def downlink(key, state, cohort):
        return Downlink(own=send(state, cohort))

    def update(key, state, uplink, cohort):
        # What was sent is not kept: it follows from the same state and cohort.
        trained = received(send(state, cohort), uplink)
        models = put(state.models, cohort.ids, trained, cohort.active)
        after = state._replace(models=models)
        return learn(state, after, trained, uplink, cohort), {}

    return ServerSide(init, downlink, update)
