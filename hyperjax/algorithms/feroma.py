"""FEROMA: each client's model is a mean over clients whose inputs look like its own.

Li, Fenoglio, Gjoreski, Langheinrich 2026, ICLR (arXiv:2602.07671), after the authors'
code. FedAvg for a share of the rounds; from then on clients send, beside their model, a
profile d_i: of their features f(x) under FedAvg's model as it was then, turned by a
fixed matrix to L numbers, mean and deviation, over all samples and over those of each
class, 2 L + 2 L K numbers. The server's model of client i becomes

    w_i = sum_j n_j a_ij w_j / sum_j n_j a_ij,      a_ij = 1 / (|d_i - d_j| + 1e-8)

over the clients j of the round, d_i as it is now and d_j as it was before; profiles are
of a random half of the samples each time, so that a client is near itself and not at
it. A newcomer gets the model of the client that is nearest by the part of the profile
that needs no label; here it is handed all models, and chooses.

Deviations: the matrix is a random rotation (the code's is of random points and so
another one); profiles are of training samples and of one half, not three; they come
with the model and not before it; deployed is the neighbour's model after aggregation.
The model that profiles are of is sent every round: a client that keeps it saves that.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import mixing, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.calls import Fixed
from hyperjax.errors import check_at_least, check_number
from hyperjax.models.linen import sizes
from hyperjax.priors import outputs_of
from hyperjax.registry import hands_on
from hyperjax.training import Local, round_at
from hyperjax.types import (
    Algorithm,
    Array,
    ClientData,
    ClientSide,
    Cohort,
    Downlink,
    Key,
    Model,
    PyTree,
)

_SEED = 1  # of the matrix that turns features
_NEAR = 1e-8
_FEW = 2  # samples of a class, below which it has no moments
_NONE = -1.0  # in the place of those


@hands_on(fedavg)
def feroma(
    model: Model,
    *,
    local: Local,
    num_clients: int,
    num_rounds: int,
    warmup: Fixed = 0.5,
    max_table_gb: Fixed = mixing.MAX_TABLE_GB,
    **fedavg_options,
) -> Algorithm:
    """Returns FEROMA.

    Args:
      model: the network, whose last layer is linear and is named "head".
      local: how clients train, see `fedavg`.
      num_clients: N.
      num_rounds: of the whole run.
      warmup: fraction of the rounds that are FedAvg's at first; half as published.
      max_table_gb: largest size of the server's models.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: the models would not fit, a size is out of range, or the network has
        no such head.
    """

    def near(before: Known, now: Known, ids: Array) -> Array:
        theirs = mixing.take(before, ids)
        scale = now.scale()
        gap = distances(scaled(now.rows, scale), scaled(theirs.rows, scale))
        return 1 / (gap + _NEAR) * now.there[:, None] * theirs.there[None]

    return profiled(
        model,
        local=local,
        num_clients=num_clients,
        warmup_rounds=warmup_rounds(num_clients, num_rounds, warmup),
        near=near,
        centres=lambda known: known.rows,
        half=True,
        max_table_gb=max_table_gb,
        **fedavg_options,
    )


def warmup_rounds(num_clients: int, num_rounds: int, warmup: float) -> int:
    """Returns how many rounds are FedAvg's; refuses sizes that are none."""
    check_at_least(1, num_clients=num_clients)
    check_at_least(0, num_rounds=num_rounds)
    check_number(at_least=0, at_most=1, warmup=warmup)
    return round_at(warmup, num_rounds)


# Profiles ----------------------------------------------------------------------------


class Profiler(NamedTuple):
    """What a client's samples look like through a network's features."""

    model: Model
    turn: np.ndarray  # [features, L]
    classes: int

    @property
    def free(self) -> int:
        """How many numbers need no label; they come first."""
        return 2 * self.turn.shape[1]

    @property
    def size(self) -> int:
        """Of a profile, P."""
        return self.free * (1 + self.classes)

    def __call__(self, key: Key | None, variables: PyTree, data: ClientData) -> Array:
        """Returns the profile of labelled samples, [P]; of a half, drawn by a key."""
        mask, seen = outputs_of(self.model, variables, data)
        if key is not None:
            # A half at random, and all of one sample.
            draw = jax.random.uniform(key, mask.shape)
            rank = jnp.argsort(jnp.argsort(jnp.where(mask > 0, draw, 2.0)))
            mask = mask * (rank < (data.size + 1) // 2)
        x = seen.features @ self.turn
        labels = jax.nn.one_hot(data.pool.y[data.rows], self.classes)
        groups = jnp.concatenate([mask[:, None], labels * mask[:, None]], 1).T
        count = jnp.sum(groups, 1, keepdims=True)
        mean = groups @ x / jnp.maximum(count, 1.0)
        square = groups @ x**2 / jnp.maximum(count, 1.0)
        deviation = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
        some = jnp.where(jnp.arange(len(groups)) == 0, 1, _FEW)[:, None]
        mean, deviation = (
            jnp.where(count >= some, part, _NONE) for part in (mean, deviation)
        )
        parts = mean[0], deviation[0], mean[1:].ravel(), deviation[1:].ravel()
        return jnp.concatenate(parts)


def profiler(model: Model) -> Profiler:
    """Returns the profiles of a network's features."""
    classes, features = sizes(model)
    draw = np.random.default_rng(_SEED).normal(size=(features, min(classes, features)))
    turn = np.linalg.qr(draw)[0].astype(np.float32)
    return Profiler(model, turn, classes)


class Known(NamedTuple):
    """Profiles of clients, and whose there are."""

    rows: Array  # [N, P]
    there: Array  # [N] float32
    groups: Array  # [P] int32: means, deviations, those by class

    def scale(self) -> tuple[Array, Array]:
        """Returns the least and the largest number of each kind, [P] each."""
        there = self.there[:, None] > 0

        def of(fill, reduce, over):
            value = reduce(jnp.where(there, self.rows, fill), 0)
            kinds = over(value, self.groups, num_segments=4)
            return jnp.where(jnp.isfinite(kinds), kinds, 0.0)[self.groups]

        return (
            of(jnp.inf, jnp.min, jax.ops.segment_min),
            of(-jnp.inf, jnp.max, jax.ops.segment_max),
        )


def scaled(rows: Array, scale: tuple[Array, Array]) -> Array:
    """Returns profiles [..., p], of which p may be the first ones, within [0, 1]."""
    low, high = (part[: rows.shape[-1]] for part in scale)
    return (rows - low) / jnp.maximum(high - low, _NEAR)


def distances(a: Array, b: Array) -> Array:
    """Returns Euclidean distances [n, m] of rows [n, p] and [m, p]."""
    return jnp.linalg.norm(a[:, None] - b[None], axis=-1)


# The method --------------------------------------------------------------------------


class State(NamedTuple):
    """Server state: models and profiles of clients, and what profiles are of."""

    models: PyTree  # leaves [N, ...] by path
    known: Known
    reference: PyTree  # FedAvg's model when it ended


class Uplink(NamedTuple):
    """What a client sends: FedAvg's message and its profile."""

    inner: PyTree
    profile: Array  # [P]


class Given(NamedTuple):
    """What a deployed client is handed to choose from."""

    models: PyTree
    centres: Array  # [N, P]
    there: Array  # [N]
    scale: tuple[Array, Array]
    reference: PyTree


def profiled(
    model: Model,
    *,
    local: Local,
    num_clients: int,
    warmup_rounds: int,
    near: Callable[[Known, Known, Array], Array],
    centres: Callable[[Known], Array],
    half: bool,
    max_table_gb: float,
    **fedavg_options,
) -> Algorithm:
    """Returns a method whose clients' models are means by what profiles say.

    Args:
      model: the network.
      local: how clients train.
      num_clients: N.
      warmup_rounds: that are FedAvg's.
      near: `(before, now, ids) -> [N, C]`, how much the model of everybody is to have
        of those just trained, from profiles before and after the exchange; 0 of nobody
        who is known.
      centres: `(known) -> [N, P]`, which a newcomer compares itself with.
      half: profiles are of a random half of a client's samples.
      max_table_gb: largest size of the server's models.
      **fedavg_options: of `fedavg`.
    """
    inner = fedavg(model, local=local, **fedavg_options)
    look = profiler(model)
    length = look.turn.shape[1]
    kinds = np.repeat(np.arange(4), [length] * 2 + [length * look.classes] * 2)

    def begin(common, models):
        nobody = jnp.zeros((num_clients, look.size)), jnp.zeros(num_clients)
        first = jax.tree.map(lambda x: x[0], models)
        return State(models, Known(*nobody, jnp.asarray(kinds)), first)

    def send(state, cohort):
        return mixing.rows(state.models, cohort.ids)

    def learn(state: State, after, trained, uplink, cohort: Cohort):
        warm = cohort.round < warmup_rounds
        weight = cohort.weight * cohort.active
        there = mixing.put(state.known.there, cohort.ids, cohort.active, cohort.active)
        rows = mixing.put(state.known.rows, cohort.ids, uplink.profile, cohort.active)
        known = state.known._replace(
            rows=jnp.where(warm, state.known.rows, rows),
            there=jnp.where(warm, state.known.there, there),
        )
        share = near(state.known, known, cohort.ids) * weight
        alone = jnp.sum(share, 1, keepdims=True) <= 0
        share = jnp.where(warm | alone, weight, share)
        total = jnp.sum(share, 1, keepdims=True)
        share = share / jnp.maximum(total, 1e-30)
        models = jax.tree.map(lambda x: mixing.combine(share, x), trained)
        models = tree.where_rows(total[:, 0] > 0, models, state.models)
        first = jax.tree.map(lambda x: x[0], models)
        reference = jax.tree.map(
            lambda x, y: jnp.where(warm, x, y), first, state.reference
        )
        return State(models, known, reference)

    server = mixing.server(
        inner,
        num_clients,
        send,
        begin=begin,
        received=lambda sent, uplink: tree.add(sent, uplink.inner.delta),
        learn=learn,
        max_table_gb=max_table_gb,
    )

    def downlink(key, state, cohort):
        return Downlink(state.reference, send(state, cohort))

    def release(key, state, cohort):
        known = state.known
        shared = Given(
            state.models, centres(known), known.there, known.scale(), state.reference
        )
        return Downlink(shared, (send(state, cohort), cohort.ids < num_clients))

    side = _client(inner.client, look, half)
    server = server._replace(downlink=downlink, release=release)
    return Algorithm(server, side, exact=("profile",))


def _client(inner: ClientSide, look: Profiler, half: bool) -> ClientSide:
    side = wrappers.own_as_shared(inner)

    def init(key, common, down):
        # It keeps nothing that depends on what it is sent.
        theta = down.shared.reference if isinstance(down.shared, Given) else down.own
        return side.init(key, common, Downlink(own=theta, round=down.round))

    def update(key, down, state, data):
        key_train, key_half = jax.random.split(key)
        theirs = side.deploy(Downlink(own=down.shared, round=down.round), state)
        profile = look(key_half if half else None, theirs, data)
        message, state, info = side.update(key_train, down, state, data)
        return Uplink(message, profile), state, info

    def adapt(key, down, state, data):
        given, (own, participates) = down.shared, down.own
        theirs = side.deploy(Downlink(own=given.reference, round=down.round), state)
        mine = look(None, theirs, data.inputs)[: look.free]
        centres = scaled(given.centres[:, : look.free], given.scale)
        gap = distances(scaled(mine, given.scale)[None], centres)[0]
        nearest = jnp.argmin(jnp.where(given.there > 0, gap, jnp.inf))
        theta = jax.tree.map(
            lambda x, y: jnp.where(participates, x, y[nearest]), own, given.models
        )
        received = Downlink(own=theta, round=down.round)
        return side.adapt(key, received, state, data), theta

    def deploy(down, adapted):
        state, theta = adapted
        return side.deploy(Downlink(own=theta, round=down.round), state)

    return side._replace(init=init, update=update, adapt=adapt, deploy=deploy)
