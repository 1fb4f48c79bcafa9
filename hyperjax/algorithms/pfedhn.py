"""pFedHN: a hypernetwork on the server emits every client's network.

Shamsian, Navon, Fetaya, Chechik 2021, "Personalized Federated Learning using
Hypernetworks", ICML (arXiv:2103.04628), algorithm 1. The server holds the hypernetwork
h and an embedding per client. Client i receives theta_i = h(v_i; phi), trains it, and
sends back its change; the server pulls it through the generator,

    g = (d theta_i / d(phi, v_i))^T (theta_i - theta_i'),

clips g and takes an optimizer step on phi and v_i. As published a round is one client
(`cohort_size=1`); with more, g is the mean over them: the synchronous variant, another
algorithm, which wants a larger learning rate.

pFedHN-PC, whose clients keep their classifier and the state of its optimizer, is
`keep=r"params/head/.*"` with `persist_optimizer="kept"` (section 3.3).

Clients may have different networks (a mapping of models): the hypernetwork emits the
parameters of all of them, and each client is sent the slice of its own, which alone
passes a gradient back; decay and momentum move the others' too.

Novel clients are embedded in a hypernetwork that stays as it is, `freeze=".*"`.

Deviations, which `faithful=True` undoes: momentum and decay do not move embeddings of
clients that are absent (the authors' code has one dense table), and the local gradient
clip bounds what a client keeps too (the authors' code clips the body alone). The code's
local steps draw fresh batches: the trainer's `batches="fresh"`. A client without an
embedding is sent the network of the mean embedding.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax import mixing, over_families, rng, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.errors import check_at_least, check_number
from hyperjax.hypernets import generators, heads
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local
from hyperjax.tree import Patterns
from hyperjax.types import (
    Algorithm,
    Array,
    Cohort,
    Downlink,
    HyperNet,
    Key,
    Model,
    PyTree,
    ServerSide,
)


class State(NamedTuple):
    """Hypernetwork, embeddings [N, d], and the states of their optimizers.

    The second optimizer state has a leading axis [N], or is that of the whole table if
    the method is `faithful`.
    """

    phi: PyTree
    table: jax.Array
    opt_phi: PyTree
    opt_table: PyTree


def published_size(num_clients: int) -> int:
    """Returns the size of an embedding, d, as published."""
    return 1 + num_clients // 4


@has_traits(joins=True)
@hands_on(fedavg)
def pfedhn(
    model: Model | Mapping[str, Model],
    *,
    local: Local,
    num_clients: int,
    family_sizes: Mapping[str, int] | None = None,
    embedding_size: int = 0,
    hidden_size: int = 100,
    num_hidden: int = 3,
    hypernet: str | Callable = "",
    server_opt: optax.GradientTransformation | None = None,
    weight_decay: float = 1e-3,
    clip_norm: float = 50.0,
    faithful: bool = False,
    freeze: Patterns = (),
    bn_stats: str = "local",
    **fedavg_options,
) -> Algorithm:
    """Returns pFedHN.

    Args:
      model: the target network, or one for each family of clients.
      local: how clients train, see `fedavg`.
      num_clients: N, of all families together.
      family_sizes: clients of each family, if there are any.
      embedding_size: d; 0 for `published_size`, 1 + N // 4.
      hidden_size: of the hypernetwork.
      num_hidden: its hidden layers.
      hypernet: another one, for which these two count for nothing:
        "chunked_mlp(hidden=(32,))" or one of yours, see `hypernets.generators`.
      server_opt: default SGD at 0.01 with momentum 0.9.
      weight_decay: added to the server's gradient.
      clip_norm: bound on its norm, over all that received gradient.
      faithful: momentum and decay move all embeddings at every step, and what a client
        keeps is not clipped.
      freeze: patterns of paths in phi that do not move.
      bn_stats: "local"; what a hypernetwork emits has no running statistics.
      **fedavg_options: of `fedavg`, for the clients: `keep`, `persist_optimizer`, ...

    Raises:
      ValueError: a size is out of range, statistics are not kept at home, a pattern
        matches nothing, or `family_sizes` does not go with the models.
    """
    check_at_least(1, num_clients=num_clients)
    check_at_least(0, embedding_size=embedding_size)
    check_number(at_least=0, weight_decay=weight_decay)
    size = embedding_size or published_size(num_clients)
    server_opt = server_opt or optax.sgd(0.01, momentum=0.9)

    def emitter(template):
        if hypernet:
            return Emitter(generators.generator(hypernet, template, size), size)
        return Emitter(
            heads.per_tensor(
                template,
                condition_size=size,
                hidden_size=hidden_size,
                num_hidden=num_hidden,
            ),
            size,
        )

    return emitting(
        model,
        emitter,
        local=local,
        num_clients=num_clients,
        family_sizes=family_sizes,
        optimizer=optax.chain(optax.add_decayed_weights(weight_decay), server_opt),
        clip_norm=clip_norm,
        faithful=faithful,
        freeze=freeze,
        **{"bn_stats": bn_stats, "clip_kept": not faithful, **fedavg_options},
    )


class Emitter(NamedTuple):
    """A hypernetwork and the embeddings [d] that it emits networks for.

    Attributes:
      net: emits a target's parameters for an embedding.
      size: d.
      spread: standard deviation of embeddings at the start.
    """

    net: HyperNet
    size: int
    spread: float = 1.0  # as PyTorch's nn.Embedding


def emitting(
    model: Model | Mapping[str, Model],
    emitter: Callable[[PyTree], Emitter],
    *,
    local: Local,
    num_clients: int,
    family_sizes: Mapping[str, int] | None,
    optimizer: optax.GradientTransformation,
    clip_norm: float,
    faithful: bool = False,
    freeze: Patterns = (),
    **fedavg_options,
) -> Algorithm:
    """Returns a server that emits clients' networks, around FedAvg's clients.

    Args:
      model, local, num_clients, family_sizes, clip_norm, faithful, freeze: of `pfedhn`.
      emitter: from the leaves that are to be emitted, by path, to what emits them.
      optimizer: of the hypernetwork and of the embeddings.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: statistics are not kept at home, a pattern matches nothing, or
        `family_sizes` does not go with the models.
    """
    check_number(above=0, clip_norm=clip_norm)
    models = model if isinstance(model, Mapping) else {"": model}
    if isinstance(model, Mapping):
        over_families.check(models, family_sizes, num_clients)
    inner = {n: fedavg(m, local=local, **fedavg_options) for n, m in models.items()}
    shared = {name: wrappers.shared(alg) for name, alg in inner.items()}
    for theta in shared.values():
        heads.check_emitted(theta)
    template = {
        f"{name}/{path}" if name else path: leaf
        for name, theta in shared.items()
        for path, leaf in theta.items()
    }
    net, size, spread = emitter(template)
    tree.splitter(jax.eval_shape(net.init, jax.random.key(0)), freeze)  # checks them
    embeddings = _Embeddings(num_clients, size, spread, optimizer, faithful)
    whole = _server(net, embeddings, clip_norm, freeze)
    sides = {name: wrappers.own_as_shared(alg.client) for name, alg in inner.items()}
    if isinstance(model, Mapping):
        return Algorithm(_sliced(whole, shared, dict(family_sizes or {})), sides)

    def update(key, server, uplink, cohort):
        return whole.update(key, server, uplink.delta, cohort)

    return Algorithm(whole._replace(update=update), sides[""])


class _Embeddings(NamedTuple):
    """The table of clients' embeddings [N, d], and how it is trained."""

    num_clients: int
    size: int
    spread: float
    optimizer: optax.GradientTransformation
    faithful: bool

    def init(self, key: Key) -> tuple[Array, PyTree]:
        """A table and its optimizer's state."""
        # One optimizer state for the whole table, or one for each row, which ages with
        # its client alone.
        table = self.spread * jax.random.normal(key, (self.num_clients, self.size))
        init = self.optimizer.init
        return table, init(table) if self.faithful else jax.vmap(init)(table)

    def update(self, stored: tuple[Array, PyTree], grads: Array, cohort: Cohort):
        """Both after a step along the gradients [C, d] of a cohort's rows."""
        if self.faithful:
            table, opt = stored
            dense = jnp.zeros_like(table)
            dense = dense.at[cohort.ids].add(grads, mode="drop")
            return _step(self.optimizer, dense, opt, table)
        rows, opt_rows = mixing.take(stored, cohort.ids)
        new = jax.vmap(lambda g, o, p: _step(self.optimizer, g, o, p))(
            grads, opt_rows, rows
        )
        return mixing.put(stored, cohort.ids, new, cohort.active)


def _server(
    net: HyperNet, embeddings: _Embeddings, clip_norm: float, freeze: Patterns
) -> ServerSide:
    """Emits networks and pulls changes of them, leaves [C, ...], back through `net`."""
    optimizer = embeddings.optimizer

    def init(common):
        key_phi, key_table = jax.random.split(rng.stream(common, "hypernetwork"))
        phi = net.init(key_phi)
        table, opt_table = embeddings.init(key_table)
        return State(phi, table, optimizer.init(phi), opt_table)

    def emit(phi, v):
        return jax.vmap(net.generate, (None, 0))(phi, v)

    def downlink(key, server, cohort):
        v = mixing.rows(server.table, cohort.ids)
        return Downlink(own=emit(server.phi, v))

    def update(key, server, delta, cohort):
        v = mixing.take(server.table, cohort.ids)
        _, pull = jax.vjp(emit, server.phi, v)
        some = jnp.maximum(jnp.sum(cohort.active), 1.0)
        # Old minus new is what a minimiser wants.
        of_phi, of_v = pull(tree.scale(delta, -1.0 / some))
        of_phi = tree.hold(freeze, tree.zeros_like(of_phi), of_phi)
        (of_phi, of_v), norm = tree.clip((of_phi, of_v), clip_norm)
        phi, opt_phi = _step(optimizer, of_phi, server.opt_phi, server.phi)
        # Held once more: an optimizer's decay moves what has no gradient.
        phi = tree.hold(freeze, server.phi, phi)
        stored = (server.table, server.opt_table)
        table, opt_table = embeddings.update(stored, of_v, cohort)
        after = State(phi, table, opt_phi, opt_table)
        alive = jnp.sum(cohort.active) > 0
        after = jax.tree.map(lambda x, y: jnp.where(alive, x, y), after, server)
        return after, {"gradient_norm": norm}

    return ServerSide(init, downlink, update)


def _sliced(
    server: ServerSide, shared: Mapping[str, PyTree], sizes: Mapping[str, int]
) -> ServerSide:
    """A server for families, from one that emits all networks for every client.

    `server` takes changes [C, ...] of all networks; ids of families follow one another.
    """
    first, num_clients = {}, 0
    for name, size in sizes.items():
        first[name] = num_clients
        num_clients += size

    def everywhere(name, cohort):
        known = cohort.ids < sizes[name]
        return cohort._replace(
            ids=jnp.where(known, first[name] + cohort.ids, num_clients)
        )

    def downlink(key, state, cohorts):
        found = {}
        for name, cohort in cohorts.items():
            whole = server.downlink(key, state, everywhere(name, cohort)).own
            own = {path: whole[f"{name}/{path}"] for path in shared[name]}
            found[name] = Downlink(own=own)
        return found

    def update(key, state, uplinks, cohorts):
        everybody = over_families.together(
            everywhere(name, cohort) for name, cohort in cohorts.items()
        )

        def change(name, path):
            """Of one tensor: zero for clients of other families."""
            parts = []
            for other, cohort in cohorts.items():
                zero = jnp.zeros((*cohort.ids.shape, *shared[name][path].shape))
                parts.append(uplinks[name].delta[path] if other == name else zero)
            return jnp.concatenate(parts)

        delta = {
            f"{name}/{path}": change(name, path)
            for name in shared
            for path in shared[name]
        }
        return server.update(key, state, delta, everybody)

    return ServerSide(server.init, downlink, update)


def _step(optimizer, grads, state, params):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state
