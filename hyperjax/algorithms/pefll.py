"""PeFLL: a client's network follows from an embedding of its samples, labels included.

Scott, Zakerinia, Lampert 2024, "PeFLL: Personalized Federated Learning by Learning to
Learn", ICLR (arXiv:2306.05515), after the authors' code. An embedding network E is
sent to the clients, a hypernetwork H stays on the server:

1. clients are sent E, and send e_i, the mean over a batch of E(x, y), y as constant
   channels of the image;
2. they are sent w_i = H(e_i), train it, and send its change; the server pulls that back
   through H, to a step on H and to a gradient of e_i;
3. they are sent that gradient, and send what it is of E; the server steps on E.

So a round has three exchanges. E is sent in the first and, counted again, in the third:
a client that keeps it meanwhile saves as much. H sees e standardised by two numbers,
mean and deviation over entries of the first embeddings, which stay as they are.

**It needs labels.** A client is embedded by its labelled samples, and an unseen one
too; who has none gets the network of e = 0. So its accuracy without labels ("zacc")
is that of one network for all, and what is published is accuracy on samples set aside
of clients with labels, "zacc_ft0". `odpfl_hn` does without. A newcomer sends e and is
sent its network; here it is handed E and H, and does the same alone.

Deviations: the mean is over samples (the code divides by the length of a pair, which
the two numbers take out again), they are of all clients of the first round; E's layers
are not published.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax import mixing, rng, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.hyperfedshift import EXTRACTORS, Extractor
from hyperjax.algorithms.pfedhn import published_size
from hyperjax.data import clients
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.hypernets import heads
from hyperjax.hypernets.embedding import mean_embedding
from hyperjax.models import memory
from hyperjax.models.linen import check_gives, cross_entropy, num_classes
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local, check_given
from hyperjax.types import (
    Algorithm,
    Array,
    ClientData,
    ClientSide,
    Downlink,
    HyperNet,
    Model,
    PyTree,
    ServerSide,
    Trained,
    Visit,
    cannot_rebuild,
)

MASKS = ("none", "zero", "out")
PRESENT = "present"  # in memory: [K] float32, 1 for classes that the client has
_AT_ONCE = 256  # samples embedded at a time
_FLOOR = 1e-6  # of a deviation


@has_traits(weights="uniform")
@hands_on(fedavg)
def pefll(
    model: Model,
    *,
    local: Local,
    num_clients: int,
    embed_labels: bool = True,
    mask_absent: str = "zero",
    embedding_size: int = 0,
    embed_batch: int = 32,
    extractor: str = "conv",
    extractor_size: int = 64,
    hidden_size: int = 100,
    num_hidden: int = 3,
    server_opt: optax.GradientTransformation | None = None,
    clip_norm: float = 50.0,
    bn_stats: str = "local",
    **fedavg_options,
) -> Algorithm:
    """Returns PeFLL.

    Args:
      model: the target network.
      local: how clients train, see `fedavg`.
      num_clients: N.
      embed_labels: E sees labels too; otherwise inputs alone, those to be predicted.
      mask_absent: logits of classes that none of a client's labelled samples has are
        left as they are ("none"), 0 as in the authors' code ("zero"), where such a
        class still wins over negative logits, or minus infinity ("out").
      embedding_size: of e; 0 for 1 + N // 4.
      embed_batch: samples that e is the mean of in training, drawn anew with
        replacement; 0: all. Deployed clients look at all.
      extractor: E: strided convolutions ("conv"), or one hidden layer ("mlp").
      extractor_size: of the hidden layer of "mlp".
      hidden_size: of H.
      num_hidden: its hidden layers.
      server_opt: of E and H; default: Adam at 2e-4.
      clip_norm: bound on the norm of either's gradient.
      bn_stats: "local"; what a hypernetwork emits has no running statistics.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: an unknown choice, a size out of range, statistics that are not kept
        at home, or a model with a condition or hooks already.
    """
    check_given(model, local)
    check_choice("mask_absent", mask_absent, MASKS)
    check_choice("extractor", extractor, EXTRACTORS)
    check_at_least(1, num_clients=num_clients, extractor_size=extractor_size)
    check_at_least(0, embedding_size=embedding_size, embed_batch=embed_batch)
    check_number(above=0, clip_norm=clip_norm)
    model.check_without("pefll", *Visit._fields, "condition")
    size = embedding_size or published_size(num_clients)
    embed = _embedder(model, size, extractor, extractor_size, embed_labels)
    masked = _masked(model, mask_absent)
    inner = fedavg(masked, local=local, bn_stats=bn_stats, **fedavg_options)
    theta = wrappers.shared(inner)
    heads.check_emitted(theta)
    net = heads.per_tensor(
        theta, condition_size=size, hidden_size=hidden_size, num_hidden=num_hidden
    )
    optimizer = server_opt or optax.adam(2e-4)
    middle, first, last = _servers(embed, net, num_clients, optimizer, clip_norm)
    side, opening, closing = _clients(
        inner.client, embed, net, embed_batch, mask_absent != "none"
    )
    return Algorithm(
        middle,
        side,
        opening=Algorithm(first, opening),
        closing=Algorithm(last, closing),
    )


# Embedding ---------------------------------------------------------------------------


class Embedder(NamedTuple):
    """E as pure functions of its parameters psi."""

    size: int
    init: Callable  # (key) -> psi
    features: Callable  # (psi, batch) -> [B, size]
    labelled: bool

    def mean(self, psi: PyTree, data: ClientData) -> Array:
        """Returns the mean over all of a client's samples, [size]; 0 of none."""

        def step(total, batch):
            e = mean_embedding(self.features(psi, batch), batch.mask)
            return total + jnp.sum(batch.mask) * e

        total = clients.fold(step, jnp.zeros(self.size), data, _AT_ONCE)
        return total / jnp.maximum(data.size, 1)

    def pulled(self, psi: PyTree, data: ClientData, slope: Array) -> PyTree:
        """Returns the gradient of psi from that of `mean`, [size]."""

        def step(total, batch):
            def part(psi):
                e = mean_embedding(self.features(psi, batch), batch.mask)
                return jnp.sum(batch.mask) * jnp.vdot(e, slope)

            return tree.add(total, jax.grad(part)(psi))

        total = clients.fold(step, tree.zeros_like(psi), data, _AT_ONCE)
        return tree.scale(total, 1 / jnp.maximum(data.size, 1))


def _embedder(
    model: Model, size: int, kind: str, hidden: int, labelled: bool
) -> Embedder:
    module = Extractor(kind, hidden, size)
    *place, channels = model.sample_shape
    classes = num_classes(model) if labelled else 0
    blank = jnp.zeros((1, *place, channels + classes))

    def features(psi, batch):
        x = batch.x
        if labelled:
            one_hot = jax.nn.one_hot(batch.y, classes)
            one_hot = one_hot.reshape(len(x), *[1] * len(place), classes)
            spread = jnp.broadcast_to(one_hot, (len(x), *place, classes))
            x = jnp.concatenate([x, spread], -1)
        return module.apply({"params": psi}, x)

    return Embedder(
        size, lambda key: module.init(key, blank)["params"], features, labelled
    )


def _masked(model: Model, mask: str) -> Model:
    """`model` whose logits leave out classes that a client has none of."""
    if mask == "none":
        return model
    check_gives(model, "logits")
    instead = 0.0 if mask == "zero" else -1e9
    classes = num_classes(model)

    def loss(key, variables, batch, shares):
        _, trained = model.loss(key, variables, batch, ())
        logits = jnp.where(shares > 0, trained.logits, instead)
        value = cross_entropy(logits, batch)
        info = {**trained.info, "loss": value}
        return value, Trained(trained.stats, info, logits, trained.features)

    def apply(variables, x):
        present = memory.get(variables, PRESENT)
        outputs = model.apply(memory.without(variables, PRESENT), x)
        if isinstance(present, tuple):
            return outputs
        logits = jnp.where(present > 0, outputs.logits, instead)
        return outputs._replace(logits=logits)

    return model.around(
        "sample_shape",
        "init",
        "serve",
        loss=loss,
        apply=apply,
        visit=Visit(context=lambda v, data: clients.class_shares(data, classes)),
        with_shape=cannot_rebuild,
    )


# The server --------------------------------------------------------------------------


class State(NamedTuple):
    """Both networks and their optimizers; of each client what a round needs."""

    psi: PyTree  # E's
    phi: PyTree  # H's
    opt_psi: PyTree
    opt_phi: PyTree
    embeddings: Array  # [N, E], as they were sent last
    slopes: Array  # [N, E], gradients of them
    scale: Array  # [2], mean and deviation of the first round's entries; 0 before


class Given(NamedTuple):
    """What a deployed client is handed."""

    psi: PyTree
    phi: PyTree
    scale: Array


def _standardised(e: Array, scale: Array) -> Array:
    return (e - scale[0]) / jnp.where(scale[1] > 0, scale[1], 1.0)


def _servers(
    embed: Embedder,
    net: HyperNet,
    num_clients: int,
    optimizer: optax.GradientTransformation,
    clip_norm: float,
) -> tuple[ServerSide, ServerSide, ServerSide]:
    """The server in the exchange of networks, in that before it, in that after it."""

    def init(common):
        key_psi, key_phi = jax.random.split(rng.stream(common, "pefll"))
        psi, phi = embed.init(key_psi), net.init(key_phi)
        table = jnp.zeros((num_clients, embed.size))
        states = optimizer.init(psi), optimizer.init(phi)
        return State(psi, phi, *states, table, table, jnp.zeros(2))

    def descend(grads, opt, params, cohort):
        grads, norm = tree.clip(grads, clip_norm)
        updates, after = optimizer.update(grads, opt, params)
        new = optax.apply_updates(params, updates), after
        # Without anybody decay and momentum would move them all the same.
        alive = jnp.sum(cohort.active) > 0
        kept = jax.tree.map(lambda x, y: jnp.where(alive, x, y), new, (params, opt))
        return *kept, norm

    def send_psi(key, state, cohort):
        return Downlink(shared=state.psi)

    def take_embeddings(key, state, e, cohort):
        table = mixing.put(state.embeddings, cohort.ids, e, cohort.active)
        share = cohort.active / jnp.maximum(jnp.sum(cohort.active), 1.0)
        mean = jnp.mean(share @ e)
        first = jnp.stack([mean, jnp.sqrt(jnp.mean(share @ (e - mean) ** 2)) + _FLOOR])
        begins = (state.scale[1] == 0) & (jnp.sum(cohort.active) > 0)
        scale = jnp.where(begins, first, state.scale)
        return state._replace(embeddings=table, scale=scale), {}

    def emit(phi, e, scale):
        return jax.vmap(lambda e: net.generate(phi, _standardised(e, scale)))(e)

    def send_networks(key, state, cohort):
        e = mixing.take(state.embeddings, cohort.ids)
        return Downlink(own=emit(state.phi, e, state.scale))

    def take_changes(key, state, uplink, cohort):
        e = mixing.take(state.embeddings, cohort.ids)
        _, pull = jax.vjp(lambda phi, e: emit(phi, e, state.scale), state.phi, e)
        some = jnp.maximum(jnp.sum(cohort.active), 1.0)
        # Old minus new is what a minimiser wants.
        of_phi, of_e = pull(tree.scale(uplink.delta, -1.0 / some))
        phi, opt, norm = descend(of_phi, state.opt_phi, state.phi, cohort)
        slopes = mixing.put(state.slopes, cohort.ids, of_e, cohort.active)
        state = state._replace(phi=phi, opt_phi=opt, slopes=slopes)
        return state, {"gradient_norm": norm}

    def send_slopes(key, state, cohort):
        return Downlink(state.psi, mixing.take(state.slopes, cohort.ids))

    def take_gradients(key, state, of_psi, cohort):
        total = jax.tree.map(lambda x: jnp.sum(x, 0), of_psi)
        psi, opt, norm = descend(total, state.opt_psi, state.psi, cohort)
        return state._replace(psi=psi, opt_psi=opt), {"gradient_norm": norm}

    def release(key, state, cohort):
        return Downlink(shared=Given(state.psi, state.phi, state.scale))

    return (
        ServerSide(init, send_networks, take_changes, release),
        ServerSide(init, send_psi, take_embeddings),
        ServerSide(init, send_slopes, take_gradients),
    )


# The client --------------------------------------------------------------------------


class Client(NamedTuple):
    """What a client keeps: FedAvg's state, and what its embedding was the mean of."""

    inner: PyTree
    # [embed_batch] int32, places among its samples; () if it is of all of them.
    batch: Array | tuple[()]


class Ready(NamedTuple):
    """A client that is deployed: its network, and the classes it has."""

    inner: PyTree
    theta: PyTree
    present: Array | tuple[()]  # [K]; () where it does not count


def _clients(
    side: ClientSide, embed: Embedder, net: HyperNet, embed_batch: int, masks: bool
) -> tuple[ClientSide, ClientSide, ClientSide]:
    """The client in the exchange of networks, in that before it, in that after it."""
    whole = wrappers.own_as_shared(side)
    classes = num_classes(side.model)

    def init(key, common, down):
        # What it keeps does not depend on the network that it has yet to be sent.
        theta = net.generate(net.init(common), jnp.zeros(embed.size))
        not_yet = Downlink(own=theta, round=down.round)
        places = jnp.zeros(embed_batch, jnp.int32) if embed_batch else ()
        return Client(whole.init(key, common, not_yet), places)

    def seen(data, places):
        """What a training embedding is the mean of."""
        if not embed_batch:
            return data
        size = jnp.where(data.size > 0, embed_batch, 0)
        return data._replace(rows=data.rows[places], size=size)

    def send_embedding(key, down, state, data):
        if embed_batch:
            most = jnp.maximum(data.size, 1)
            places = jax.random.randint(key, (embed_batch,), 0, most)
            state = state._replace(batch=places)
        return embed.mean(down.shared, seen(data, state.batch)), state, {}

    def update(key, down, state, data):
        uplink, after, info = whole.update(key, down, state.inner, data)
        return uplink, state._replace(inner=after), info

    def send_gradient(key, down, state, data):
        of_psi = embed.pulled(down.shared, seen(data, state.batch), down.own)
        return of_psi, state, {}

    def adapt(key, down, state, data):
        psi, phi, scale = down.shared
        by = data.train if embed.labelled else data.inputs
        e = _standardised(embed.mean(psi, by), scale)
        theta = net.generate(phi, jnp.where(by.size > 0, e, 0.0))
        own = Downlink(own=theta, round=down.round)
        adapted = whole.adapt(key, own, state.inner, data)
        if not masks:
            return Ready(adapted, theta, ())
        present = clients.class_shares(data.train, classes)
        present = jnp.where(data.train.size > 0, present, 1.0)
        return Ready(adapted, theta, present)

    def deploy(down, ready):
        own = Downlink(own=ready.theta, round=down.round)
        variables = whole.deploy(own, ready.inner)
        return memory.put(variables, PRESENT, ready.present) if masks else variables

    client = whole._replace(init=init, update=update, adapt=adapt, deploy=deploy)
    return (
        client,
        client._replace(update=send_embedding),
        client._replace(update=send_gradient),
    )
