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
random ones before the first report, and to unseen clients the best on average. With
`num_sent` = M clients are sent the pool, choose by the gate of the same round, and
unseen ones reach all experts. Anchors are charged for K experts too.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax import mixing, rng, tree
from hyperjax.aggregators import mean_over_clients
from hyperjax.data import clients
from hyperjax.errors import check_at_least
from hyperjax.models.layers import Dense
from hyperjax.models.linen import check_gives, cross_entropy
from hyperjax.training import Local, no_adjustment, trainer, tuner
from hyperjax.types import (
    Algorithm,
    Array,
    ClientSide,
    Downlink,
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
    num_sent = top_k if num_sent is None else num_sent
    check_at_least(1, num_clients=num_clients, top_k=top_k)
    check_at_least(0, anchors_per_expert=anchors_per_expert)
    check_at_least(top_k, num_sent=num_sent)
    check_at_least(num_sent, num_experts=num_experts)
    check_gives(model, "logits")
    model.check_without("fedjets", *Visit._fields, "condition")
    common_expert = common_expert or model.init
    server_opt = optax.sgd(1.0) if server_opt is None else server_opt
    nobody = num_experts  # where the number of an expert is asked for
    num_anchors = min(anchors_per_expert * num_experts, num_clients)
    network = Dense(num_experts)

    # The mixture, a model --------------------------------------------------------

    def mixture(own, gate, common):
        """Variables of S experts, of which only the experts' and the gate's train."""
        rest = {"common": common, "which": own.which, "pinned": own.pinned}
        return {
            "params": {"experts": own.experts["params"], "gate": gate},
            "stats": {"experts": own.experts["stats"]},
            "memory": rest,
        }

    def experts_of(variables):
        return {name: variables[name]["experts"] for name in ("params", "stats")}

    def each(variables):
        """The experts of a mixture, one after another."""
        for slot in range(variables["memory"]["which"].shape[0]):
            yield jax.tree.map(lambda x, s=slot: x[s], experts_of(variables))

    def rank(variables, x):
        """The gate's scores of all experts, [B, M]."""
        features = model.features(variables["memory"]["common"], x)
        return network.apply({"params": variables["params"]["gate"]}, features)

    def answers(which, pinned):
        """Which of a client's experts take part, [S]: of an anchor's the pinned one."""
        return (pinned == nobody) | (which == pinned)

    def loss(key, variables, batch, context):
        scores, told = rank(variables, batch.x), variables["memory"]
        which, pinned = told["which"], told["pinned"]
        share = jax.nn.softmax(scores[:, which], where=answers(which, pinned))
        logits, seen = jnp.float32(0), []
        for slot, expert in enumerate(each(variables)):
            _, trained = model.loss(key, expert, batch, ())
            seen.append(trained.stats)
            logits += share[:, slot, None] * trained.logits
        value = cross_entropy(logits, batch)
        expert = jnp.full_like(batch.y, jnp.minimum(pinned, num_experts - 1))
        named = cross_entropy(scores, batch._replace(y=expert))
        total = value + jnp.where(pinned == nobody, 0.0, named)
        seen = jax.tree.map(lambda *x: jnp.stack(x), *seen)
        # A mixture's logits are not those of the one expert that predicts.
        return total, Trained({"experts": seen}, {"loss": value})

    def apply(variables, x):
        """For each input what the expert says that the gate ranks first."""
        scores = rank(variables, x)[:, variables["memory"]["which"]]
        best, every = jnp.argmax(scores, -1), jnp.arange(len(x))
        outputs = [model.apply(expert, x) for expert in each(variables)]
        return jax.tree.map(lambda *rows: jnp.stack(rows)[best, every], *outputs)

    def shares(variables, data):
        """The gate's mean softmax over a client's inputs, [M]; labels are not read."""

        def step(total, batch):
            return total + batch.mask @ jax.nn.softmax(rank(variables, batch.x))

        total = clients.fold(step, jnp.zeros(num_experts), data, GATE_BATCH)
        return total / jnp.maximum(data.size, 1)

    def first_gate(common, first):
        x = jnp.zeros((1, *model.sample_shape), jnp.float32)
        features = model.features(first, x)
        return network.init(rng.stream(common, "gate"), features)["params"]

    def first_mixture(key):
        first = common_expert(key)
        which = jnp.arange(num_sent)
        own = Own(mixing.table(first, num_sent), which, jnp.int32(nobody))
        return mixture(own, first_gate(key, first), first)

    whole = model.around(
        "sample_shape",
        init=first_mixture,
        loss=loss,
        apply=apply,
        visit=Visit(),
        serve=Serve(),  # there is no single network to speak of
        with_shape=cannot_rebuild,
    )
    train = trainer(whole, local)

    # Server ----------------------------------------------------------------------

    def init(common):
        first = common_expert(common)
        experts, start = mixing.table(first, num_experts), first_gate(common, first)
        opt = jax.vmap(server_opt.init)(experts["params"]), server_opt.init(start)
        draw = jax.random.normal(rng.stream(common, "shares"), (num_clients, nobody))
        return State(experts, start, opt, jax.nn.softmax(draw))

    jax.eval_shape(init, jax.random.key(0))  # refuses models without features

    def downlink(key, server, cohort):
        pinned = jnp.where(cohort.ids < num_anchors, cohort.ids % num_experts, nobody)
        liked = jax.vmap(_put_first)(mixing.rows(server.shares, cohort.ids), pinned)
        which = jnp.sort(jax.lax.top_k(liked, num_sent)[1])
        own = Own(mixing.take(server.experts, which), which, pinned)
        return Downlink(shared=server.gate, own=own)

    def move(before, mean, weight):
        """A server step from (params, opt); both stay where nobody trained."""
        params, opt = before
        updates, opt = server_opt.update(tree.scale(mean, -1.0), opt, params)
        after = optax.apply_updates(params, updates), opt
        return jax.tree.map(lambda x, y: jnp.where(weight > 0, x, y), after, before)

    def update(key, server, uplink, cohort):
        weight = cohort.weight * cohort.active
        changes = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), uplink.experts)
        # An expert's weights are those of the clients that trained it, [M, C K].
        mine = uplink.trained.reshape(-1) == jnp.arange(num_experts)[:, None]
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

    # Client; its state is the common expert --------------------------------------

    def client_update(key, down, common, data):
        sent, gate = down.own, down.shared
        liked = _put_first(shares(mixture(sent, gate, common), data), sent.pinned)
        slots = jnp.sort(jax.lax.top_k(liked[sent.which], top_k)[1])
        own = Own(mixing.take(sent.experts, slots), sent.which[slots], sent.pinned)
        start = mixture(own, gate, common)
        after, info = train(key, start, data, down.round, no_adjustment)
        uplink = Uplink(
            tree.sub(experts_of(after), own.experts),
            tree.sub(after["params"]["gate"], gate),
            jnp.where(answers(own.which, own.pinned), own.which, nobody),
            shares(after, data),
        )
        return uplink, common, info

    def deploy(down, common):
        own = down.own._replace(pinned=jnp.int32(nobody))
        return mixture(own, down.shared, common)

    side = ClientSide(
        init=lambda key, common, down: common_expert(common),
        update=client_update,
        adapt=lambda key, down, common, data: common,
        deploy=deploy,
        tune=tuner(whole, local),
        model=whole,
    )
    exact = ("trained", "shares")
    return Algorithm(ServerSide(init, downlink, update), side, exact)


def _put_first(shares: Array, pinned: Array) -> Array:
    """Shares [M] with that of the pinned expert above all others, if there is one."""
    return shares.at[pinned].set(2.0, mode="drop")
