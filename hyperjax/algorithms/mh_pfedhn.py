"""MH-pFedHN: pFedHN for clients with different networks, of which it knows the sizes.

Zhang, Li, Liu, Jiang, Wang 2025, "Hypernetworks for Model-Heterogeneous Personalized
Federated Learning" (arXiv:2507.22330), after the authors' code. Every client is sent a
flat vector of as many numbers as its network has, in an order that is its own business,
trains, and sends its change back. The server pulls the change through the generator
(`hypernets.multi_head`), clips, and takes an optimizer step on the extractor, the head
of the client's size and the client's embeddings. What received no gradient keeps its
value, its moments and its step count.

As published clients come one after another (the engine's sequential rounds). With
several at once g is the sum over them divided by their number: the averaged variant,
which wants a larger learning rate. Running statistics stay home.

Novel clients are embedded in what the hypernetwork has learned: `freeze` names the
extractor and the heads that were taken over; heads of new sizes are trained with the
embeddings.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax import mixing, over_families, rng, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.errors import check_number
from hyperjax.hypernets.heads import check_emitted
from hyperjax.hypernets.multi_head import MultiHead, multi_head
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Array, Downlink, Key, Model, PyTree, ServerSide
from hyperjax.wrappers import with_refreshed_statistics


class State(NamedTuple):
    """Hypernetwork, embeddings {family: [N_f, m, d]}, an optimizer state for each part.

    `opt` is {"extractor", "heads": {m}, "tables": {family: leaves [N_f, ...]}}; if
    families share no extractor, there is one for each under its name.
    """

    phi: PyTree
    tables: dict[str, jax.Array]
    opt: PyTree


@has_traits(joins=True)
@hands_on(fedavg)
def mh_pfedhn(
    models: Mapping[str, Model],
    *,
    local: Local | Mapping[str, Local],
    family_sizes: Mapping[str, int],
    output_size: int = 3072,
    embedding_size: int = 64,
    hidden_size: int = 128,
    num_layers: int = 3,
    embedding_deviation: float = 0.002,
    server_opt: optax.GradientTransformation | None = None,
    clip_norm: float = 50.0,
    share_heads: bool = True,
    share_extractor: bool = True,
    freeze: Patterns = (),
    bn_stats: str = "local",
    refresh_stats: bool = False,
    **fedavg_options,
) -> Algorithm:
    """Returns MH-pFedHN.

    Args:
      models: the network of each family of clients.
      local: how clients train, the same for all families or by family.
      family_sizes: clients of each family.
      output_size: O.
      embedding_size: d.
      hidden_size: of the extractor.
      num_layers: of the extractor.
      embedding_deviation: of embeddings at first.
      server_opt: default Adam at 2e-4.
      clip_norm: bound on the norm of the gradient, over all that received some.
      share_heads: False gives every family a head of its own (ablation).
      share_extractor: False gives every family an extractor of its own (ablation).
      freeze: patterns of paths in phi that do not move.
      bn_stats: "local"; what a hypernetwork emits has no running statistics.
      refresh_stats: running statistics see the network that a client is sent once
        more before it predicts, see `wrappers.with_refreshed_statistics`.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: a size is out of range, a pattern matches nothing, or `family_sizes`
        is of other families.
    """
    over_families.check(models, family_sizes)
    check_number(above=0, clip_norm=clip_norm)
    server_opt = server_opt or optax.adam(2e-4)
    options = {"bn_stats": bn_stats, **fedavg_options}
    by_family = local if isinstance(local, Mapping) else dict.fromkeys(models, local)
    inner = {
        name: fedavg(model, local=by_family[name], **options)
        for name, model in models.items()
    }
    if refresh_stats:
        inner = {name: with_refreshed_statistics(alg) for name, alg in inner.items()}
    for alg in inner.values():
        check_emitted(wrappers.shared(alg))
    flats = {name: wrappers.flat(alg) for name, alg in inner.items()}
    net = multi_head(
        [flat.size for flat in flats.values()],
        output_size=output_size,
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        embedding_deviation=embedding_deviation,
    )
    sizes = {name: flat.size for name, flat in flats.items()}
    generator = _Generator(net, sizes, share_heads, share_extractor)
    clients = {
        name: wrappers.own_as_shared(alg.client, flats[name])
        for name, alg in inner.items()
    }
    return Algorithm(
        _server(generator, family_sizes, server_opt, clip_norm, freeze), clients
    )


class _Generator(NamedTuple):
    """The hypernetwork, and which of its heads and extractors is whose."""

    net: MultiHead
    sizes: Mapping[str, int]  # numbers in the network of each family
    share_heads: bool
    share_extractor: bool

    def head_of(self, name: str) -> str:
        """The head of a family."""
        m = str(self.net.positions[self.sizes[name]])
        return m if self.share_heads else f"{m}_{name}"

    def init(self, key: Key) -> PyTree:
        """Draws the hypernetwork's parameters, phi."""
        phi = self.net.init(key)
        if not self.share_heads:
            # From a key of its own each: families of one size start apart.
            keys = {name: rng.stream(key, "head of " + name) for name in self.sizes}
            drawn = {name: self.net.init(k)["heads"] for name, k in keys.items()}
            phi["heads"] = {
                self.head_of(name): heads[self.head_of(name).partition("_")[0]]
                for name, heads in drawn.items()
            }
        if not self.share_extractor:
            keys = {n: rng.stream(key, "extractor of " + n) for n in self.sizes}
            phi["extractor"] = {
                name: self.net.init(k)["extractor"] for name, k in keys.items()
            }
        return phi

    def extractors(self, parts: PyTree) -> dict[str, PyTree]:
        """The extractors of a part of the state, by whose they are; "" is all's."""
        return {"": parts["extractor"]} if self.share_extractor else parts["extractor"]

    def in_place(self, found: Mapping[str, PyTree]) -> PyTree:
        """Undoes `extractors`."""
        return found[""] if self.share_extractor else dict(found)

    def emit(self, phi: PyTree, rows: Mapping[str, Array]) -> dict[str, Array]:
        """Flat networks {family: [C, K]} from embeddings {family: [C, m, d]}."""

        def of(name):
            head, size = phi["heads"][self.head_of(name)], self.sizes[name]
            extractor = self.extractors(phi)["" if self.share_extractor else name]
            return jax.vmap(lambda v: self.net.generate(extractor, head, v, size))(
                rows[name]
            )

        return {name: of(name) for name in rows}


def _server(
    generator: _Generator,
    family_sizes: Mapping[str, int],
    optimizer: optax.GradientTransformation,
    clip_norm: float,
    freeze: Patterns,
) -> ServerSide:
    """Emits networks and pulls their changes back through the generator."""
    # The splitter checks the patterns.
    tree.splitter(jax.eval_shape(generator.init, jax.random.key(0)), freeze)

    def init(common):
        key_phi, key_tables = jax.random.split(rng.stream(common, "hypernetwork"))
        phi = generator.init(key_phi)
        tables = {
            name: generator.net.init_embeddings(
                rng.stream(key_tables, name), num, generator.sizes[name]
            )
            for name, num in family_sizes.items()
        }
        # A state for each part: what has no gradient must not even count a step.
        opt = {
            "extractor": generator.in_place(
                {k: optimizer.init(x) for k, x in generator.extractors(phi).items()}
            ),
            "heads": {m: optimizer.init(head) for m, head in phi["heads"].items()},
            "tables": {k: jax.vmap(optimizer.init)(v) for k, v in tables.items()},
        }
        return State(phi, tables, opt)

    def downlink(key, server, cohorts):
        rows = {
            name: mixing.rows(server.tables[name], cohort.ids)
            for name, cohort in cohorts.items()
        }
        own = generator.emit(server.phi, rows)
        return {name: Downlink(own=networks) for name, networks in own.items()}

    def gradient(server, uplinks, cohorts):
        """Of the present heads, extractor and rows, clipped; its norm before that."""
        present = {generator.head_of(name) for name in cohorts}
        heads = {m: server.phi["heads"][m] for m in sorted(present)}
        phi = {"extractor": server.phi["extractor"], "heads": heads}
        rows = {
            name: mixing.take(server.tables[name], cohort.ids)
            for name, cohort in cohorts.items()
        }
        active = sum(jnp.sum(cohort.active > 0) for cohort in cohorts.values())
        some = jnp.maximum(active, 1)
        _, pull = jax.vjp(generator.emit, phi, rows)
        # Old minus new is what a minimiser wants.
        of_phi, of_rows = pull(jax.tree.map(lambda d: -d / some, uplinks))
        of_phi = tree.hold(freeze, tree.zeros_like(of_phi), of_phi)
        return tree.clip((of_phi, of_rows), clip_norm)

    def step(grads, opt, params, alive):
        """(params, opt) after a step, if anybody gave a gradient."""
        updates, new = optimizer.update(grads, opt, params)
        after = (optax.apply_updates(params, updates), new)
        return jax.tree.map(lambda a, b: jnp.where(alive, a, b), after, (params, opt))

    def update(key, server, uplinks, cohorts):
        (of_phi, of_rows), norm = gradient(server, uplinks, cohorts)
        active = {name: cohort.active > 0 for name, cohort in cohorts.items()}
        # Who has a part in each extractor: "" is all families'.
        anybody = {"": jnp.any(jnp.concatenate(list(active.values())))}
        anybody |= {name: jnp.any(x) for name, x in active.items()}
        old, old_opt = server.phi, server.opt
        extractors = dict(generator.extractors(old))
        opt_extractors = dict(generator.extractors(old_opt))
        for k, of_one in generator.extractors(of_phi).items():
            if k in anybody:
                extractors[k], opt_extractors[k] = step(
                    of_one, opt_extractors[k], extractors[k], anybody[k]
                )
        heads, opt_heads = dict(old["heads"]), dict(old_opt["heads"])
        for m, of_head in of_phi["heads"].items():
            families = [name for name in cohorts if generator.head_of(name) == m]
            alive = jnp.any(jnp.stack([jnp.any(active[name]) for name in families]))
            heads[m], opt_heads[m] = step(of_head, opt_heads[m], heads[m], alive)
        tables, opt_tables = dict(server.tables), dict(old_opt["tables"])
        for name, cohort in cohorts.items():
            stored = (tables[name], opt_tables[name])
            rows, opt_rows = mixing.take(stored, cohort.ids)
            new = jax.vmap(step)(of_rows[name], opt_rows, rows, active[name])
            tables[name], opt_tables[name] = mixing.put(
                stored, cohort.ids, new, cohort.active
            )
        # Held once more: an optimizer's decay moves what has no gradient.
        phi = {"extractor": generator.in_place(extractors), "heads": heads}
        phi = tree.hold(freeze, old, phi)
        opt_extractor = generator.in_place(opt_extractors)
        opt = {"extractor": opt_extractor, "heads": opt_heads, "tables": opt_tables}
        return State(phi, tables, opt), {"gradient_norm": norm}

    return ServerSide(init, downlink, update)
