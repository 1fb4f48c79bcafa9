"""Deploys clients from the state of a run: what scoring, tuning and serving share.

A client is deployed by `client.adapt` on its labelled training samples (none for a
zero-shot client) and its unlabelled inputs, then by `client.deploy`. Its keys follow
from the root, the round and its id, so that it gets the same network whoever asks and
whoever is deployed beside it. Nothing of it is kept.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import rng, tree
from hyperjax.data import clients
from hyperjax.data.clients import Table
from hyperjax.engine import exchange, families, schedule, stores
from hyperjax.types import (
    AdaptData,
    Algorithm,
    Array,
    ClientData,
    ClientSide,
    Cohort,
    Downlink,
    Key,
    Model,
    Pool,
    PyTree,
)


class Moment(NamedTuple):
    """A run after some rounds, as one family sees it."""

    root: Key
    round: Array  # [] int32, how many rounds have been
    server: PyTree
    population: Array  # [] float32, N_f


class Clients(NamedTuple):
    """Who is to be deployed, of one family and from one call: leaves [C, ...]."""

    ids: Any  # [C] int32, numbers inside the family; those from N_f on never trained
    state: PyTree  # stored rows
    seen: Any  # [C] bool, whether they count
    train: Table  # labelled samples; size 0 for a zero-shot client
    inputs: Table


class Arrival(NamedTuple):
    """A client before its deployment; leaves [C, ...] for several."""

    key: Key
    own: PyTree  # its own part of the downlink
    state: PyTree
    train: Table
    inputs: Table


class Shared(NamedTuple):
    """What clients who are deployed together have in common."""

    down: PyTree  # the shared part of the downlink
    round: Array
    train: Pool  # of the labelled samples
    inputs: Pool  # of the inputs, every label withheld


class Adapted(NamedTuple):
    """A client that is ready to predict."""

    state: PyTree  # of `client.adapt`
    variables: PyTree
    data: AdaptData  # what it has looked at


def moment(root: Key, carry: schedule.Carry, round: int, family: str) -> Moment:
    """Returns a run with the state `carry` after `round` rounds."""
    population = jnp.float32(len(carry.seen[family]))
    return Moment(root, jnp.int32(round), carry.server, population)


def find(
    carry: schedule.Carry, family: str, ids: np.ndarray, train: Table, inputs: Table
) -> Clients:
    """Returns clients with the state that is stored of them; who never trained: none.

    Args:
      carry: the state of a run, on the device or the host.
      family: theirs.
      ids: [C] int32, numbers inside the family.
      train: labelled samples, [C] rows.
      inputs: what they are to predict, [C] rows.
    """
    rows, seen = stores.host_gather(carry.rows[family], carry.seen[family], ids)
    known = ids < len(carry.seen[family])
    return Clients(jnp.asarray(ids), rows, seen & known, train, inputs)


def arrive(
    alg: Algorithm, family: str, at: Moment, who: Clients, pools: tuple[Pool, Pool]
) -> tuple[Arrival, Shared]:
    """Returns clients of one family with what the server sends them; to be traced.

    `pools` are those of labelled samples and of inputs without their labels.
    """
    key = jax.random.fold_in(rng.stream(at.root, "evaluate"), at.round)
    ones = jnp.ones(len(who.ids))
    cohort = Cohort(who.ids, ones, ones, jnp.int32(at.round), at.population)
    send = families.mapped(alg).server.downlink
    down = send(rng.stream(key, "downlink"), at.server, {family: cohort})[family]
    down = down._replace(round=cohort.round)
    first = exchange.first_visit(alg, at.root, down, who.ids, family)
    start = tree.where_rows(who.seen, who.state, first)
    keys = rng.client_keys(rng.stream(key, "adapt"), who.ids)
    arrival = Arrival(keys, down.own, start, who.train, who.inputs)
    return arrival, Shared(down.shared, down.round, *pools)


def adapt(side: ClientSide, client: Arrival, shared: Shared) -> Adapted:
    """Returns one client of a family, adapted and deployed."""
    down = Downlink(shared.down, client.own, shared.round)
    data = AdaptData(
        ClientData(*client.train, shared.train),
        ClientData(*client.inputs, shared.inputs),
    )
    state = side.adapt(client.key, down, client.state, data)
    return Adapted(state, side.deploy(down, state), data)


# Prediction --------------------------------------------------------------------------


def in_batches(data: ClientData, batch_size: int) -> tuple[ClientData, int]:
    """Returns data padded to whole batches, and the size B of these.

    B is `batch_size`, or the client's n_max if that is less.
    """
    n_max = data.rows.shape[0]
    width = min(batch_size, n_max)
    return data._replace(rows=jnp.pad(data.rows, (0, -n_max % width))), width


def predict_all(
    model: Model, variables: PyTree, data: ClientData, num_classes: int, batch_size: int
) -> Array:
    """Returns logits [n_max, K] in stored order; n_max a multiple of the batch size.

    They are float32, in whatever precision the model computes.
    """

    def step(state, batch):
        i, logits = state
        new = model.predict(variables, batch.x).astype(logits.dtype)
        return i + 1, jax.lax.dynamic_update_slice(logits, new, (i * batch_size, 0))

    empty = jnp.zeros((data.rows.shape[0], num_classes), jnp.float32)
    return clients.fold(step, (jnp.int32(0), empty), data, batch_size)[1]
