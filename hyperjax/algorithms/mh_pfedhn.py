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

Unseen clients are embedded in what the hypernetwork has learned: `freeze` names the
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
from hyperjax.hypernets.multi_head import multi_head
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Downlink, Model, PyTree, ServerSide
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

    def head_of(name):
        m = str(net.positions[flats[name].size])
        return m if share_heads else f"{m}_{name}"

    def init_phi(key):
        phi = net.init(key)
        if not share_heads:
            keys = {name: rng.stream(key, "head of " + name) for name in models}
            drawn = {name: net.init(k)["heads"] for name, k in keys.items()}
            phi["heads"] = {
                head_of(name): heads[head_of(name).partition("_")[0]]
                for name, heads in drawn.items()
            }
        if not share_extractor:
            phi["extractor"] = {
                name: net.init(rng.stream(key, "extractor of " + name))["extractor"]
                for name in models
            }
        return phi

    def extractors(parts):
        """Those there are, by the family that they are of."""
        return {"": parts["extractor"]} if share_extractor else parts["extractor"]

    def in_place(found):
        """As a part of the state, see `extractors`."""
        return found[""] if share_extractor else found

    tree.splitter(jax.eval_shape(init_phi, jax.random.key(0)), freeze)  # checks them

    def init(common):
        key_phi, key_tables = jax.random.split(rng.stream(common, "hypernetwork"))
        phi = init_phi(key_phi)
        tables = {
            name: net.init_embeddings(
                rng.stream(key_tables, name), num, flats[name].size
            )
            for name, num in family_sizes.items()
        }
        opt = {
            "extractor": in_place(
                {k: server_opt.init(x) for k, x in extractors(phi).items()}
            ),
            "heads": {m: server_opt.init(head) for m, head in phi["heads"].items()},
            "tables": {k: jax.vmap(server_opt.init)(v) for k, v in tables.items()},
        }
        return State(phi, tables, opt)

    def emit(parts, rows, name):
        """Flat networks [C, K] of one family."""
        head = parts["heads"][head_of(name)]
        shared = extractors(parts)["" if share_extractor else name]
        one = lambda v: net.generate(shared, head, v, flats[name].size)  # noqa: E731
        return jax.vmap(one)(rows)

    def downlink(key, server, cohorts):
        return {
            name: Downlink(
                own=emit(server.phi, mixing.rows(server.tables[name], cohort.ids), name)
            )
            for name, cohort in cohorts.items()
        }

    def update(key, server, uplinks, cohorts):
        rows = {
            name: mixing.take(server.tables[name], cohort.ids)
            for name, cohort in cohorts.items()
        }
        active = {name: cohort.active > 0 for name, cohort in cohorts.items()}
        some = jnp.maximum(sum(jnp.sum(x) for x in active.values()), 1)
        heads = sorted({head_of(name) for name in cohorts})
        parts = {
            "extractor": server.phi["extractor"],
            "heads": {m: server.phi["heads"][m] for m in heads},
        }
        emitted = {name: lambda p, r, n=name: emit(p, r[n], n) for name in cohorts}
        _, pull = jax.vjp(
            lambda p, r: {name: f(p, r) for name, f in emitted.items()}, parts, rows
        )
        of_parts, of_rows = pull(jax.tree.map(lambda d: -d / some, uplinks))
        grads = tree.hold(freeze, tree.zeros_like(of_parts), of_parts), of_rows
        norm = tree.norm(grads)
        of_parts, of_rows = tree.scale(
            grads, jnp.minimum(1.0, clip_norm / (norm + 1e-6))
        )

        def step(g, opt, x, alive):
            updates, new = server_opt.update(g, opt, x)
            after = (optax.apply_updates(x, updates), new)
            return jax.tree.map(lambda a, b: jnp.where(alive, a, b), after, (x, opt))

        phi: PyTree = {"heads": dict(server.phi["heads"])}
        opt: PyTree = {
            "heads": dict(server.opt["heads"]),
            "tables": dict(server.opt["tables"]),
        }
        anybody = {"": jnp.any(jnp.concatenate(list(active.values())))}
        anybody |= {name: jnp.any(x) for name, x in active.items()}
        own, own_opt = extractors(server.phi), extractors(server.opt)
        moved = {
            k: step(g, own_opt[k], own[k], anybody[k])
            for k, g in extractors(of_parts).items()
            if k in anybody
        }
        phi["extractor"] = in_place(own | {k: x for k, (x, _) in moved.items()})
        opt["extractor"] = in_place(own_opt | {k: o for k, (_, o) in moved.items()})
        for m in heads:
            present = [jnp.any(active[name]) for name in cohorts if head_of(name) == m]
            phi["heads"][m], opt["heads"][m] = step(
                of_parts["heads"][m],
                server.opt["heads"][m],
                server.phi["heads"][m],
                jnp.any(jnp.stack(present)),
            )
        tables = dict(server.tables)
        for name, cohort in cohorts.items():
            stored = (server.tables[name], server.opt["tables"][name])
            old, old_opt = mixing.take(stored, cohort.ids)
            new = jax.vmap(step)(of_rows[name], old_opt, old, active[name])
            tables[name], opt["tables"][name] = mixing.put(
                stored, cohort.ids, new, cohort.active
            )
        phi = tree.hold(freeze, server.phi, phi)
        return State(phi, tables, opt), {"gradient_norm": norm}

    clients = {
        name: wrappers.own_as_shared(alg.client, flats[name])
        for name, alg in inner.items()
    }
    return Algorithm(ServerSide(init, downlink, update), clients)
