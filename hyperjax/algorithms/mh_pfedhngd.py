"""MH-pFedHNGD: MH-pFedHN whose clients also learn from a small global model.

Zhang, Li, Liu, Jiang, Wang 2025 (arXiv:2507.22330), after the authors' code. The
global model theta_g comes out of the same hypernetwork, from embeddings of its own.
Every round each client is sent theta_g, trains a copy (plain cross-entropy, no clip),
and trains its own network with

    lambda T^2 KL(softmax(z_g / T) || softmax(z / T)) + (1 - lambda) CE(z, y)

where the teacher z_g is theta_g as received. The server takes one step on the changes
of the copies, averaged by samples. Deviation: it does so when the round is over (that
is, when the next one begins), where the code does so before the clients' own steps of
the same round.

A teacher that has learned from the copies of the same round (`teacher="fresh"`) would
have to wait for the last of them, and clients are visited once a round. So it learns
from those that are there: a client is sent, beside theta_g, what a global step on the
changes received so far would make of it. That is another teacher for every client of a
sequential round, nearly the round's own for the last, and costs K_g more numbers down;
clients that train at the same time all get theta_g, as with "stale".
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import mixing, tree
from hyperjax.algorithms.fedavg import fedavg, told
from hyperjax.algorithms.mh_pfedhn import mh_pfedhn
from hyperjax.errors import check_choice
from hyperjax.models.beside import beside
from hyperjax.models.linen import check_gives, distillation
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

GLOBAL = "~global"  # the global model as a family of one; sorts last
NAME = "teacher"  # among a client's statistics
TEACHERS = ("stale", "fresh")


class State(NamedTuple):
    """MH-pFedHN's state, and what the round under way has for the global model."""

    inner: PyTree
    teacher: Array  # [K_g], theta_g of this round
    change: Array  # [K_g], sum of weight times change
    weight: Array  # []
    round: Array  # [] int32


class Uplink(NamedTuple):
    """Changes of the client's own network [K] and of its copy of theta_g [K_g]."""

    own: Array
    copy: Array


def mh_pfedhngd(
    models: Mapping[str, Model],
    *,
    local,
    family_sizes: Mapping[str, int],
    lam: float = 0.2,
    temperature: float = 15.0,
    teacher: str = "stale",
    global_step_touches_idle: bool = False,
    clip_global: bool = False,
    **mh_pfedhn_options,
) -> Algorithm:
    """Returns MH-pFedHNGD; the global model is the smallest of the networks.

    Args:
      models: the network of each family of clients.
      local: builds a training loop, see `fedavg`.
      family_sizes: clients of each family.
      lam: lambda; 0 gives the networks of MH-pFedHN the gradients of MH-pFedHN.
      temperature: T.
      teacher: "stale", theta_g as the round began, or "fresh", see above.
      global_step_touches_idle: the global step hands the optimizer zero gradients for
        all clients' embeddings and all heads, as the authors' code does: momentum moves
        them. Otherwise what has no part in theta_g keeps its value and moments.
      clip_global: the copies' training clips its gradient as the clients' own does.
      **mh_pfedhn_options: of `mh_pfedhn`, and those of `fedavg` for the clients.

    Raises:
      ValueError: a number is out of range, an unknown choice, the smallest network has
        statistics, or `keep` is given.
    """
    check_choice("teacher", teacher, TEACHERS)
    if not 0 <= lam <= 1 or not temperature > 0:
        raise ValueError(
            f"lam={lam} must lie in [0, 1], temperature={temperature} be positive"
        )
    fresh = teacher == "fresh"
    small = mixing.smallest(models)
    if jax.tree.leaves(jax.eval_shape(small.init, jax.random.key(0))["stats"]):
        raise ValueError(
            "the smallest network is the global model, and must do without running "
            "statistics: nobody would have them for a teacher that is generated anew"
        )
    if mh_pfedhn_options.get("keep"):
        raise ValueError(
            f"keep={mh_pfedhn_options['keep']!r} must be None: nobody would have those "
            "parts of the global model, which is generated whole"
        )

    def loop(model, **options):
        if model is small and not clip_global:
            options["clip_norm"] = None
        return local(model, **options)

    taught = {name: _taught(m, small, lam, temperature) for name, m in models.items()}
    alone = {GLOBAL: 1}
    everybody = {**family_sizes, **alone}
    inner = mh_pfedhn(
        {**taught, GLOBAL: small},
        local=loop,
        family_sizes=everybody,
        **mh_pfedhn_options,
    )
    flat = mixing.flat(fedavg(small, local=local))
    no_key = jax.random.key(0)  # MH-pFedHN's server draws nothing

    def theta_g(state, round):
        down = inner.server.downlink(no_key, state, _cohorts(alone, round))
        return down[GLOBAL].own[0]

    def init(common):
        state = inner.server.init(common)
        teacher = theta_g(state, jnp.int32(0))
        zero = jnp.zeros(flat.size)
        return State(state, teacher, zero, jnp.float32(0), jnp.int32(0))

    def stepped(server):
        """MH-pFedHN's state after the global step on the changes received so far."""
        moved = everybody if global_step_touches_idle else alone
        who = _cohorts(moved, server.round)
        mean = server.change / jnp.maximum(server.weight, 1e-12)
        downs = inner.server.downlink(no_key, server.inner, who)
        uplinks = {name: jnp.zeros_like(down.own) for name, down in downs.items()}
        # MH-pFedHN divides by the number of clients that step together.
        uplinks[GLOBAL] = sum(moved.values()) * mean[None]
        after, _ = inner.server.update(no_key, server.inner, uplinks, who)
        some = server.weight > 0
        return jax.tree.map(lambda x, y: jnp.where(some, x, y), after, server.inner)

    def settled(server, round):
        """The state after the global step, if a new round begins."""

        def begin(server):
            state = stepped(server)
            zero = jnp.zeros_like(server.change)
            return State(state, theta_g(state, round), zero, jnp.float32(0), round)

        return jax.lax.cond(server.round == round, lambda s: s, begin, server)

    def downlink(key, server, cohorts):
        server = settled(server, _round(cohorts))
        downs = inner.server.downlink(key, server.inner, cohorts)
        sent = server.teacher
        if fresh:
            sent = jnp.stack([sent, theta_g(stepped(server), server.round)])
        return {name: Downlink(sent, down.own) for name, down in downs.items()}

    def update(key, server, uplinks, cohorts):
        server = settled(server, _round(cohorts))
        own = {name: uplink.own for name, uplink in uplinks.items()}
        state, info = inner.server.update(key, server.inner, own, cohorts)
        change, weight = server.change, server.weight
        for name, cohort in cohorts.items():
            share = cohort.weight * cohort.active
            change = change + mixing.combine(share, uplinks[name].copy)
            weight = weight + jnp.sum(share)
        return State(state, server.teacher, change, weight, server.round), info

    sides = {
        name: _with_copy(inner.client[name], inner.client[GLOBAL], flat, fresh)
        for name in models
    }
    # A sparse uplink is of the clients' own networks (arXiv:2507.22330).
    return Algorithm(ServerSide(init, downlink, update), sides, exact=(r"copy",))


def _round(cohorts) -> Array:
    return next(iter(cohorts.values())).round


def _cohorts(sizes: Mapping[str, int], round: Array) -> dict[str, Cohort]:
    """All clients of some families."""
    return {
        name: Cohort(
            jnp.arange(num), jnp.ones(num), jnp.ones(num), round, jnp.float32(num)
        )
        for name, num in sizes.items()
    }


def _with_copy(
    client: ClientSide, copies: ClientSide, flat: mixing.Flat, fresh: bool
) -> ClientSide:
    """MH-pFedHN's client, which is told its teacher and trains a copy of theta_g."""

    def taught(down, state):
        teacher = down.shared[1] if fresh else down.shared
        return told(state, {NAME: flat.cut(teacher)})

    # Fine-tuning learns from the teacher of today, on a first visit too.
    side = mixing.through(
        client, lambda down: Downlink(own=down.own, round=down.round), taught
    )

    def update(key, down, state, data):
        sent, state, info = side.update(key, down, state, data)
        theta_g = down.shared[0] if fresh else down.shared
        received = Downlink(own=theta_g, round=down.round)
        key_init, key_train = jax.random.split(jax.random.fold_in(key, 1))
        start = copies.init(key_init, key_init, received)
        change, _, _ = copies.update(key_train, received, start, data)
        return Uplink(sent, change), state, info

    return side._replace(update=update)


def _taught(model: Model, small: Model, lam: float, temperature: float) -> Model:
    """A network that learns from labels and from a teacher among its statistics."""
    check_gives(model, "logits")
    template = jax.eval_shape(small.init, jax.random.key(0))
    whole = tree.splitter(template, r".*").merge
    inner = beside(model, NAME, lambda key, _: tree.by_path(small.init(key)))

    def loss(key, variables, batch, context):
        value, trained = inner.loss(key, variables, batch, context)
        z_teacher = small.predict(whole(trained.stats[NAME], {}), batch.x)
        z_teacher = jax.lax.stop_gradient(z_teacher)
        kl = distillation(trained.logits, z_teacher, batch, temperature)
        info = {**trained.info, "distillation": kl}
        return lam * kl + (1 - lam) * value, trained._replace(info=info)

    return inner._replace(loss=loss)
