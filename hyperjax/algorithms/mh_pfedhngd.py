"""MH-pFedHNGD: MH-pFedHN whose clients also learn from a small global model.

Zhang, Li, Liu, Jiang, Wang 2025 (arXiv:2507.22330), after the authors' code. The
global model theta_g comes out of the same hypernetwork, from embeddings of its own. A
round has two exchanges, in the order of the code:

1. All clients are sent theta_g and train a copy of it (plain cross-entropy, no clip).
   The server takes one step on the changes of the copies, averaged by samples.
2. A round of MH-pFedHN on the hypernetwork as it now is, where each client trains its
   own network with

       lambda T^2 KL(softmax(z_g / T) || softmax(z / T)) + (1 - lambda) CE(z, y)

   and the teacher z_g is theta_g as it was received in 1.

A client that has never been sent theta_g, but is evaluated, fine-tunes on labels alone.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hyperjax import mixing, over_families, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg, told
from hyperjax.algorithms.mh_pfedhn import mh_pfedhn
from hyperjax.errors import check_choice, check_number
from hyperjax.models import memory
from hyperjax.models.linen import check_gives, distillation
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local, check_given
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
NAME = "teacher"  # in a client's memory
KNOWN = "known"  # 1 once the client has been sent its teacher
TEACHERS = ("stale", "fresh")


@has_traits(joins=True)
@hands_on(mh_pfedhn, without=("keep",))
def mh_pfedhngd(
    models: Mapping[str, Model],
    *,
    local: Local,
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
      local: how clients train, see `fedavg`.
      family_sizes: clients of each family.
      lam: lambda; 0 gives the networks of MH-pFedHN the gradients of MH-pFedHN.
      temperature: T.
      teacher: "stale", theta_g as the round began, or "fresh", as the hypernetwork has
        it when the client trains its own network: then it is sent once more.
      global_step_touches_idle: the global step hands the optimizer zero gradients for
        all clients' embeddings and all heads, as the authors' code does: momentum moves
        them. Otherwise what has no part in theta_g keeps its value and moments.
      clip_global: the copies' training clips its gradient as the clients' own does.
      **mh_pfedhn_options: of `mh_pfedhn`, and those of `fedavg` for the clients.

    Raises:
      ValueError: a number is out of range, an unknown choice, the smallest network has
        statistics, or `keep` is given.
    """
    check_given(models, local)
    check_choice("teacher", teacher, TEACHERS)
    check_number(at_least=0, at_most=1, lam=lam)
    check_number(above=0, temperature=temperature)
    small = over_families.smallest(models)
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

    taught = {name: _taught(m, small, lam, temperature) for name, m in models.items()}
    alone = {GLOBAL: 1}
    everybody = {**family_sizes, **alone}
    copying = local if clip_global else local._replace(clip_norm=None)
    inner = mh_pfedhn(
        {**taught, GLOBAL: small},
        local={**dict.fromkeys(taught, local), GLOBAL: copying},
        family_sizes=everybody,
        **mh_pfedhn_options,
    )
    flat = wrappers.flat(fedavg(small, local=local))
    no_key = jax.random.key(0)  # MH-pFedHN's server draws nothing

    def theta_g(state, round):
        down = inner.server.downlink(no_key, state, _cohorts(alone, round))
        return down[GLOBAL].own[0]

    def send_global(key, state, cohorts):
        theta = theta_g(state, _round(cohorts))
        return {name: Downlink(shared=theta) for name in cohorts}

    def global_step(key, state, copies, cohorts):
        share = {
            name: cohort.weight * cohort.active for name, cohort in cohorts.items()
        }
        weight = sum(jnp.sum(x) for x in share.values())
        change = sum(mixing.combine(share[name], copies[name]) for name in cohorts)
        # Of nobody 0, not 0 / 0; the state then stays as it is, below.
        mean = change / jnp.maximum(weight, 1e-12)
        moved = everybody if global_step_touches_idle else alone
        who = _cohorts(moved, _round(cohorts))
        downs = inner.server.downlink(no_key, state, who)
        uplinks = {name: jnp.zeros_like(down.own) for name, down in downs.items()}
        # MH-pFedHN divides by the number of clients that step together.
        uplinks[GLOBAL] = sum(moved.values()) * mean[None]
        after, info = inner.server.update(no_key, state, uplinks, who)
        return jax.tree.map(
            lambda x, y: jnp.where(weight > 0, x, y), after, state
        ), info

    def send_own_and_global(key, state, cohorts):
        downs = inner.server.downlink(key, state, cohorts)
        theta = theta_g(state, _round(cohorts))
        return {name: Downlink(theta, down.own) for name, down in downs.items()}

    server, clients = inner.server, {name: inner.client[name] for name in models}
    copies = inner.client[GLOBAL]
    opening = Algorithm(
        ServerSide(server.init, send_global, global_step),
        {
            name: _copying(clients[name], copies, flat, model)
            for name, model in models.items()
        },
    )
    if teacher == "fresh":
        server = server._replace(downlink=send_own_and_global)
        clients = {name: _informed(client, flat) for name, client in clients.items()}
    return Algorithm(server, clients, opening=opening)


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


def _entry(flat: wrappers.Flat, theta_g: Array) -> PyTree:
    """What a client remembers of its teacher."""
    return {NAME: {**flat.cut(theta_g), KNOWN: jnp.float32(1)}}


def _copying(
    client: ClientSide, copies: ClientSide, flat: wrappers.Flat, model: Model
) -> ClientSide:
    """MH-pFedHN's client as a round opens: it is told theta_g and trains a copy."""
    size = tree.count(jax.eval_shape(model.init, jax.random.key(0))["params"])

    def init(key, common, down):
        # What it keeps does not depend on the network that it has yet to be sent.
        not_yet = Downlink(own=jnp.zeros(size), round=down.round)
        return client.init(key, common, not_yet)

    def update(key, down, state, data):
        received = Downlink(own=down.shared, round=down.round)
        key_init, key_train = jax.random.split(key)
        start = copies.init(key_init, key_init, received)
        change, _, info = copies.update(key_train, received, start, data)
        return change, told(state, _entry(flat, down.shared)), info

    return client._replace(init=init, update=update)


def _informed(client: ClientSide, flat: wrappers.Flat) -> ClientSide:
    """MH-pFedHN's client, which is told its teacher with every network of its own."""
    return wrappers.through(
        client,
        lambda down: Downlink(own=down.own, round=down.round),
        lambda down, state: told(state, _entry(flat, down.shared)),
    )


def _taught(model: Model, small: Model, lam: float, temperature: float) -> Model:
    """A network that learns from labels and from a teacher in its memory."""
    check_gives(model, "logits")
    template = jax.eval_shape(small.init, jax.random.key(0))
    whole = tree.splitter(template, r".*").merge

    def nobody(key, _):
        return {**tree.by_path(small.init(key)), KNOWN: jnp.float32(0)}

    inner = memory.with_entry(model, NAME, nobody)

    def loss(key, variables, batch, context):
        value, trained = inner.loss(key, variables, batch, context)
        told_of = memory.get(variables, NAME)
        z_teacher = small.predict(whole(told_of, {}), batch.x)
        z_teacher = jax.lax.stop_gradient(z_teacher)
        kl = distillation(trained.logits, z_teacher, batch, temperature)
        share = lam * told_of[KNOWN]
        info = {**trained.info, "distillation": kl}
        return share * kl + (1 - share) * value, trained._replace(info=info)

    return inner._replace(loss=loss)
