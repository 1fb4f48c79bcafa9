"""FedJETs: a pool of experts and a gate, of which every client is sent a few experts.

Dun, Garcia, Zheng, Awadallah, Sim, Kyrillidis, Dimitriadis 2023, "FedJETs: Efficient
Just-In-Time Personalization with Federated Mixture of Experts" (arXiv:2306.08586), a
baseline of HyperFedZero's paper (arXiv:2508.12673). The server keeps M experts, each a
whole model, and a gate: a linear layer from the features of a frozen "common expert" to
M scores. A client averages the gate's softmax over its inputs, takes the K experts with
the largest shares, and trains them and the gate on the cross-entropy of the logits
sum_k g_k(x) expert_k(x), with g the gate's softmax over the K experts.

Each expert moves by the mean change of those who trained it, the gate by everybody's,
weighted as in FedAvg. Anchor clients train the one expert they are pinned to, and the
gate to name it. A deployed client answers every input with the expert that the gate
ranks first, so one never seen before needs no labels.

Written after summaries and reviews of the paper. What they leave open: anchors are the
clients with the lowest numbers, as a server that chose distinct distributions would
have to know them; their loss for the gate has weight 1; experts start as copies of the
common expert, the untrained network of the public seed unless a pretrained one is
given (a weak one is said to cost accuracy).

A server without data cannot rank for a client, and there is one downlink. So clients
report their shares [M] after training, by which they are sent experts the next time:
random ones before the first report, and to novel clients the best on average. With
`num_sent` = M clients are sent the pool, choose by the gate of the same round, and
novel ones reach all experts. Anchors are charged for K experts too.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax import mixing, rng, tree
from hyperjax.aggregators import mean_over_clients
from hyperjax.data import clients
from hyperjax.errors import check_at_least
from hyperjax.models.layers import Dense
from hyperjax.models.linen import check_gives, cross_entropy
from hyperjax.training import Local, check_given, no_adjustment, trainer, tuner
from hyperjax.types import (
    Algorithm,
    Array,
    ClientData,
    ClientSide,
    Downlink,
    Key,
    Model,
    PyTree,
    Serve,
    ServerSide,
    Trained,
    Visit,
    cannot_rebuild,
)

GATE_BATCH = 256  # inputs ranked at a time


class State(NamedTuple):
    """What the server knows; experts are variables with a leading axis [M]."""

    experts: PyTree
    gate: PyTree
    opt: PyTree  # of the experts, leaves [M, ...], and of the gate
    shares: Array  # [N, M] float32, the last report of every client


class Own(NamedTuple):
    """The experts that a client has, leaves [S, ...]."""

    experts: PyTree
    which: Array  # [S] int32, ascending
    pinned: Array  # [] int32, the anchor's expert; M for all other clients


class Uplink(NamedTuple):
    """Changes of K experts, leaves [K, ...], and of the gate; the client's shares."""

    experts: PyTree
    gate: PyTree
    trained: Array  # [K] int32; M where an anchor has nothing to say
    shares: Array  # [M] float32


def fedjets(
    model: Model,
    *,
    local: Local,
    num_clients: int,
    num_experts: int = 5,
    top_k: int = 2,
    num_sent: int | None = None,
    anchors_per_expert: int = 1,
    common_expert: Callable | None = None,
    server_opt: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Returns FedJETs.

    Args:
      model: a classifier with a layer named "head"; experts and common expert are such.
      local: how clients train, see `fedavg`.
      num_clients: N.
      num_experts: M.
      top_k: K, experts that a client trains and sends back.
      num_sent: S, experts that a client is sent, K to M; None: K.
      anchors_per_expert: clients 0, 1, ... are pinned to experts 0, ..., M - 1 in turn,
        so many to each; 0: no anchors (the paper's ablation).
      common_expert: `(common) -> variables` of the frozen network; each client stores
        them from its first visit, and they are never sent. Default: `model.init`.
      server_opt: descends along minus the mean changes, with a state for each expert
        that stands still with it; default: adds the mean.

    Raises:
      ValueError: the model has no layer "head", does not give its logits in training,
        or not 1 <= K <= S <= M.
    """
    check_given(model, local)
    num_sent = top_k if num_sent is None else num_sent
    check_at_least(1, num_clients=num_clients, top_k=top_k)
    check_at_least(0, anchors_per_expert=anchors_per_expert)
    check_at_least(top_k, num_sent=num_sent)
    check_at_least(num_sent, num_experts=num_experts)
    check_gives(model, "logits")
    model.check_without("fedjets", *Visit._fields, "condition")
    common_expert = common_expert or model.init
    server_opt = optax.sgd(1.0) if server_opt is None else server_opt
    pool = _Pool(model, Dense(num_experts), num_experts, common_expert)
    whole = _mixture(pool, num_sent)
    num_anchors = min(anchors_per_expert * num_experts, num_clients)
    server = _server(pool, num_clients, num_anchors, num_sent, top_k, server_opt)
    jax.eval_shape(server.init, jax.random.key(0))  # refuses models without features
    client = _client(pool, whole, local, top_k)
    return Algorithm(server, client, exact=("trained", "shares"))


class _Pool(NamedTuple):
    """The experts and the gate; a mixture's variables are some experts and the gate."""

    model: Model  # of an expert
    gate: Dense
    size: int  # M, which also stands for no expert where the number of one is asked for
    common_expert: Callable

    def mixture(self, own: Own, gate: PyTree, common: PyTree) -> PyTree:
        """Variables of S experts, of which only the experts' and the gate's train."""
        return {
            "params": {"experts": own.experts["params"], "gate": gate},
            "stats": {"experts": own.experts["stats"]},
            "memory": {"common": common, "which": own.which, "pinned": own.pinned},
        }

    def experts(self, variables: PyTree) -> PyTree:
        """Those of a mixture, leaves [S, ...]."""
        return {name: variables[name]["experts"] for name in ("params", "stats")}

    def each(self, variables: PyTree) -> Iterator[PyTree]:
        """The experts of a mixture, one after another."""
        for slot in range(variables["memory"]["which"].shape[0]):
            yield jax.tree.map(lambda x, s=slot: x[s], self.experts(variables))

    def answers(self, which: Array, pinned: Array) -> Array:
        """Which of a client's experts take part, [S]: of an anchor's the pinned one."""
        return (pinned == self.size) | (which == pinned)

    def rank(self, variables: PyTree, x: Array) -> Array:
        """The gate's scores of all experts, [B, M]."""
        features = self.model.features(variables["memory"]["common"], x)
        params = variables["params"]["gate"]
        scores: Any = self.gate.apply({"params": params}, features)
        return scores

    def shares(self, variables: PyTree, data: ClientData) -> Array:
        """The gate's mean softmax over a client's inputs, [M]; labels are not read."""

        def step(total, batch):
            return total + batch.mask @ jax.nn.softmax(self.rank(variables, batch.x))

        total = clients.fold(step, jnp.zeros(self.size), data, GATE_BATCH)
        return total / jnp.maximum(data.size, 1)

    def first(self, common: Key) -> tuple[PyTree, PyTree]:
        """The common expert, and the gate as it starts on its features."""
        expert = self.common_expert(common)
        x = jnp.zeros((1, *self.model.sample_shape), jnp.float32)
        features = self.model.features(expert, x)
        return expert, self.gate.init(rng.stream(common, "gate"), features)["params"]


def _mixture(pool: _Pool, num_sent: int) -> Model:
    """What a client trains and answers by."""

    def init(key):
        first, gate = pool.first(key)
        experts = mixing.table(first, num_sent)
        own = Own(experts, jnp.arange(num_sent), jnp.int32(pool.size))
        return pool.mixture(own, gate, first)

    def loss(key, variables, batch, context):
        scores, told = pool.rank(variables, batch.x), variables["memory"]
        which, pinned = told["which"], told["pinned"]
        share = jax.nn.softmax(scores[:, which], where=pool.answers(which, pinned))
        logits, seen = jnp.float32(0), []
        for slot, expert in enumerate(pool.each(variables)):
            _, trained = pool.model.loss(key, expert, batch, ())
            seen.append(trained.stats)
            logits += share[:, slot, None] * trained.logits
        value = cross_entropy(logits, batch)
        # Of a client that is no anchor any label will do: its term is not counted.
        expert = jnp.full_like(batch.y, jnp.minimum(pinned, pool.size - 1))
        named = cross_entropy(scores, batch._replace(y=expert, prior=()))
        total = value + jnp.where(pinned == pool.size, 0.0, named)
        seen = jax.tree.map(lambda *x: jnp.stack(x), *seen)
        # A mixture's logits are not those of the one expert that predicts.
        return total, Trained({"experts": seen}, {"loss": value})

    def apply(variables, x):
        """For each input what the expert says that the gate ranks first."""
        scores = pool.rank(variables, x)[:, variables["memory"]["which"]]
        best, every = jnp.argmax(scores, -1), jnp.arange(len(x))
        outputs = [pool.model.apply(expert, x) for expert in pool.each(variables)]
        return jax.tree.map(lambda *rows: jnp.stack(rows)[best, every], *outputs)

    return pool.model.around(
        "sample_shape",
        init=init,
        loss=loss,
        apply=apply,
        visit=Visit(),
        serve=Serve(),  # there is no single network to speak of
        with_shape=cannot_rebuild,
    )


def _server(
    pool: _Pool,
    num_clients: int,
    num_anchors: int,
    num_sent: int,
    top_k: int,
    optimizer: optax.GradientTransformation,
) -> ServerSide:
    """Chooses experts for clients and moves each by those who trained it."""

    def init(common):
        first, gate = pool.first(common)
        experts = mixing.table(first, pool.size)
        opt = jax.vmap(optimizer.init)(experts["params"]), optimizer.init(gate)
        draw = jax.random.normal(rng.stream(common, "shares"), (num_clients, pool.size))
        return State(experts, gate, opt, jax.nn.softmax(draw))

    def downlink(key, server, cohort):
        is_anchor = cohort.ids < num_anchors
        pinned = jnp.where(is_anchor, cohort.ids % pool.size, pool.size)
        liked = jax.vmap(_put_first)(mixing.rows(server.shares, cohort.ids), pinned)
        which = jnp.sort(jax.lax.top_k(liked, num_sent)[1])
        own = Own(mixing.take(server.experts, which), which, pinned)
        return Downlink(shared=server.gate, own=own)

    def move(before, mean, weight):
        """A server step from (params, opt); both stay where nobody trained."""
        params, opt = before
        updates, opt = optimizer.update(tree.scale(mean, -1.0), opt, params)
        after = optax.apply_updates(params, updates), opt
        return jax.tree.map(lambda x, y: jnp.where(weight > 0, x, y), after, before)

    def update(key, server, uplink, cohort):
        weight = cohort.weight * cohort.active
        changes = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), uplink.experts)
        # An expert's weights are those of the clients that trained it, [M, C K].
        mine = uplink.trained.reshape(-1) == jnp.arange(pool.size)[:, None]
        weights = jnp.where(mine, jnp.repeat(weight, top_k), 0.0)
        mean = jax.vmap(mean_over_clients, (None, 0))(changes, weights)
        trained = jnp.sum(weights, 1)
        before = server.experts["params"], server.opt[0]
        params, opt = jax.vmap(move)(before, mean["params"], trained)
        stats = tree.add(server.experts["stats"], mean["stats"])
        gate_mean = mean_over_clients(uplink.gate, weight)
        gate, gate_opt = move((server.gate, server.opt[1]), gate_mean, jnp.sum(weight))
        told = mixing.put(server.shares, cohort.ids, uplink.shares, cohort.active)
        info = {"experts_trained": jnp.sum((trained > 0).astype(jnp.float32))}
        experts = {"params": params, "stats": stats}
        return State(experts, gate, (opt, gate_opt), told), info

    return ServerSide(init, downlink, update)


def _client(pool: _Pool, whole: Model, local: Local, top_k: int) -> ClientSide:
    """Trains a mixture of the best of what it is sent; keeps the common expert."""
    train = trainer(whole, local)

    def update(key, down, common, data):
        sent, gate = down.own, down.shared
        shares = pool.shares(pool.mixture(sent, gate, common), data)
        liked = _put_first(shares, sent.pinned)
        slots = jnp.sort(jax.lax.top_k(liked[sent.which], top_k)[1])
        own = Own(mixing.take(sent.experts, slots), sent.which[slots], sent.pinned)
        start = pool.mixture(own, gate, common)
        after, info = train(key, start, data, down.round, no_adjustment)
        uplink = Uplink(
            tree.sub(pool.experts(after), own.experts),
            tree.sub(after["params"]["gate"], gate),
            jnp.where(pool.answers(own.which, own.pinned), own.which, pool.size),
            pool.shares(after, data),
        )
        return uplink, common, info

    def deploy(down, common):
        own = down.own._replace(pinned=jnp.int32(pool.size))
        return pool.mixture(own, down.shared, common)

    return ClientSide(
        init=lambda key, common, down: pool.common_expert(common),
        update=update,
        adapt=lambda key, down, common, data: common,
        deploy=deploy,
        tune=tuner(whole, local),
        model=whole,
    )


def _put_first(shares: Array, pinned: Array) -> Array:
    """Shares [M] with that of the pinned expert above all others, if there is one."""
    # Shares sum to one, so 2 is above them; nobody's number M is out of range.
    return shares.at[pinned].set(2.0, mode="drop")
