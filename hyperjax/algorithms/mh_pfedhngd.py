"""MH-pFedHNGD: MH-pFedHN whose clients also learn from a small global model.

Zhang, Li, Liu, Jiang, Wang 2025 (arXiv:2507.22330), after the authors' code. The
global model theta_g comes out of the same hypernetwork, from embeddings of its own.
Every round each client is sent theta_g, trains a copy (plain cross-entropy, no clip),
and trains its own network with

    lambda T^2 KL(softmax(z_g / T) || softmax(z / T)) + (1 - lambda) CE(z, y)

where the teacher z_g is theta_g as received. The server takes one step on the changes
of the copies, averaged by samples. Deviation: it does so when the round is over, where
the code does so before the clients' own steps of the same round.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import mixing, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.mh_pfedhn import mh_pfedhn
from hyperjax.models.linen import distillation
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
    output_size: int = 3072,
    embedding_size: int = 64,
    hidden_size: int = 128,
    num_layers: int = 3,
    embedding_deviation: float = 0.002,
    server_opt=None,
    clip_norm: float = 50.0,
    **fedavg_options,
) -> Algorithm:
    """Returns MH-pFedHNGD; the global model is the smallest of the networks.

    Args:
      models: the network of each family of clients.
      local: builds a training loop, see `fedavg`.
      family_sizes: clients of each family.
      lam: lambda; 0 gives the networks of MH-pFedHN the gradients of MH-pFedHN.
      temperature: T.
      output_size: see `mh_pfedhn`, as for all below.
      embedding_size: d.
      hidden_size: of the extractor.
      num_layers: of the extractor.
      embedding_deviation: of embeddings at first.
      server_opt: default Adam at 2e-4.
      clip_norm: bound on the server's gradient.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: a number is out of range, the smallest network has statistics, or
        `keep` is given.
    """
    if not 0 <= lam <= 1 or not temperature > 0:
        raise ValueError(
            f"lam={lam} must lie in [0, 1], temperature={temperature} be positive"
        )
    small = min(models.values(), key=_count)
    if jax.tree.leaves(jax.eval_shape(small.init, jax.random.key(0))["stats"]):
        raise ValueError(
            "the smallest network is the global model, and must do without running "
            "statistics: nobody would have them for a teacher that is generated anew"
        )
    options: dict[str, Any] = {"bn_stats": "local", **fedavg_options}
    if options.get("keep"):
        raise ValueError(
            f"keep={options['keep']!r} must be None: nobody would have those parts of "
            "the global model, which is generated whole"
        )
    copies = fedavg(small, local=functools.partial(local, clip_norm=None), **options)
    flat = mixing.flat(copies)
    taught = {name: _taught(m, small, lam, temperature) for name, m in models.items()}
    inner = mh_pfedhn(
        {**taught, GLOBAL: small},
        local=local,
        family_sizes={**family_sizes, GLOBAL: 1},
        output_size=output_size,
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        embedding_deviation=embedding_deviation,
        server_opt=server_opt,
        clip_norm=clip_norm,
        **options,
    )

    def only(round):
        """The cohort of the global model."""
        one = jnp.ones(1)
        return {
            GLOBAL: Cohort(jnp.zeros(1, jnp.int32), one, one, round, jnp.float32(1))
        }

    def theta_g(state, round):
        down = inner.server.downlink(jax.random.key(0), state, only(round))
        return down[GLOBAL].own[0]

    def init(common):
        state = inner.server.init(common)
        teacher = theta_g(state, jnp.int32(0))
        zero = jnp.zeros(flat.size)
        return State(state, teacher, zero, jnp.float32(0), jnp.int32(0))

    def settled(server, round):
        """The state after the global step, if a new round begins."""

        def step(server):
            mean = server.change / jnp.maximum(server.weight, 1e-12)
            uplink, who = {GLOBAL: mean[None]}, only(round)
            stepped, _ = inner.server.update(
                jax.random.key(0), server.inner, uplink, who
            )
            some = server.weight > 0
            state = jax.tree.map(
                lambda x, y: jnp.where(some, x, y), stepped, server.inner
            )
            zero = jnp.zeros_like(server.change)
            return State(state, theta_g(state, round), zero, jnp.float32(0), round)

        return jax.lax.cond(server.round == round, lambda s: s, step, server)

    def downlink(key, server, cohorts):
        server = settled(server, _round(cohorts))
        downs = inner.server.downlink(key, server.inner, cohorts)
        return {k: Downlink(server.teacher, down.own) for k, down in downs.items()}

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
        name: _with_copy(inner.client[name], copies.client, flat) for name in models
    }
    return Algorithm(ServerSide(init, downlink, update), sides)


def _round(cohorts) -> Array:
    return next(iter(cohorts.values())).round


def _count(model: Model) -> int:
    return tree.count(jax.eval_shape(model.init, jax.random.key(0))["params"])


def _with_copy(client: ClientSide, copies: ClientSide, flat: mixing.Flat) -> ClientSide:
    """MH-pFedHN's client, which is told its teacher and trains a copy of it."""

    def own(down):
        return Downlink(own=down.own, round=down.round)

    def told(down, state):
        theta = flat.cut(down.shared)
        teacher = {f"stats/teacher/{path}": x for path, x in theta.items()}
        return state._replace(kept={**state.kept, **teacher})

    def update(key, down, state, data):
        sent, state, info = client.update(key, own(down), told(down, state), data)
        received = Downlink(shared=(flat.cut(down.shared), ()), round=down.round)
        key_init, key_train = jax.random.split(jax.random.fold_in(key, 1))
        start = copies.init(key_init, key_init, received)
        copied, _, _ = copies.update(key_train, received, start, data)
        return Uplink(sent, flat.join(copied.delta)), state, info

    return client._replace(
        init=lambda key, common, down: client.init(key, common, own(down)),
        update=update,
        # Fine-tuning learns from the teacher of today, on a first visit too.
        adapt=lambda key, down, state, data: client.adapt(
            key, own(down), told(down, state), data
        ),
        deploy=lambda down, adapted: client.deploy(own(down), adapted),
    )


def _taught(model: Model, small: Model, lam: float, temperature: float) -> Model:
    """A network that learns from labels and from a teacher among its statistics."""

    def split(variables):
        stats = dict(variables["stats"])
        teacher = stats.pop("teacher")
        return {**variables, "stats": stats}, teacher

    def init(key):
        variables = model.init(key)
        theirs = {"params": small.init(key)["params"]}
        flat = dict(zip(tree.paths(theirs), jax.tree.leaves(theirs), strict=True))
        stats = {**variables["stats"], "teacher": flat}
        return {**variables, "stats": stats}

    template = jax.eval_shape(small.init, jax.random.key(0))
    structure = jax.tree.structure({"params": template["params"]})
    names = tree.paths({"params": template["params"]})

    def loss(key, variables, batch, context):
        ours, teacher = split(variables)
        value, (stats, info) = model.loss(key, ours, batch, context)
        fixed = jax.tree.unflatten(structure, [teacher[name] for name in names])
        z_teacher = small.predict({**fixed, "stats": {}}, batch.x)
        z = model.logits(key, ours, batch)
        kl = distillation(z, jax.lax.stop_gradient(z_teacher), batch, temperature)
        total = lam * kl + (1 - lam) * value
        return total, ({**stats, "teacher": teacher}, {**info, "distillation": kl})

    def beside(hook):
        return lambda variables, *rest: hook(split(variables)[0], *rest)

    return model._replace(
        init=init,
        loss=loss,
        predict=beside(model.predict),
        export=beside(model.export),
        features=beside(model.features),
    )
