"""FedAvg and the FedOpt family: a weighted mean of local changes, fed to an optimizer.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS (arXiv:1602.05629), algorithm 1. Server optimizers: Hsu et
al. 2019 (FedAvgM, arXiv:1909.06335); Reddi et al. 2021 (FedAdagrad, FedAdam, FedYogi,
arXiv:2003.00295, algorithm 2).

Deviations: the mean is over participants with weights registered once (number of
samples, or ones), and an optimizer other than the mean acts on parameters only, while
statistics such as those of batch-norm are averaged.
"""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax import aggregators, corrections, tree
from hyperjax.errors import check_choice
from hyperjax.models import memory
from hyperjax.registry import has_traits
from hyperjax.training import OPTIMIZER, Local, trainer, tuner
from hyperjax.tree import Patterns
from hyperjax.types import (
    Algorithm,
    ClientSide,
    Downlink,
    Model,
    PyTree,
    ServerSide,
)

PERSIST = ("none", "kept", "all")
BN_STATS = ("average", "local")


class State(NamedTuple):
    """Server state: shared variables by path, optimizer, correction, aggregator."""

    theta: PyTree
    opt: PyTree
    correction: PyTree
    aggregator: PyTree


class Client(NamedTuple):
    """Client state: variables that stay home, what the correction keeps, and (only in
    an adapted copy) the condition the client is deployed with."""

    kept: PyTree
    correction: PyTree
    condition: PyTree = ()


class Uplink(NamedTuple):
    """What a client sends: its change (after minus before), the correction's part."""

    delta: PyTree
    extra: PyTree


@has_traits(base=True)
def fedavg(
    model: Model,
    *,
    local: Local,
    keep: Patterns = (),
    bn_stats: str = "average",
    persist_optimizer: str = "none",
    clip_kept: bool = True,
    server_opt: optax.GradientTransformation | None = None,
    correction: corrections.Correction | None = None,
    aggregator: aggregators.Aggregator | None = None,
    finetune: Patterns = (),
) -> Algorithm:
    """Returns federated averaging of `model`.

    Args:
      model: what is trained.
      local: how clients train: optimizer, batch size, epochs and so on.
      keep: patterns on paths of variables that stay on the client; (): none.
      bn_stats: "average" running statistics like parameters, or keep them "local".
      persist_optimizer: what of its optimizer's state a client keeps between visits:
        "none", that of the "kept" parameters, which then have an optimizer of their
        own, or "all".
      clip_kept: whether the local training's clip bounds the kept parameters' gradient
        too, together with that of the shared ones.
      server_opt: descends along minus the mean change; default: adds the mean.
      correction: gradient term against client drift; default none.
      aggregator: default the weighted mean.
      finetune: patterns of the parameters that fine-tuning moves; (): all.

    Raises:
      ValueError: `keep` matches no variable, an unknown choice, or an optimizer is kept
        of nothing or under a correction that assumes a new one.
    """
    check_choice("bn_stats", bn_stats, BN_STATS)
    server_opt = optax.sgd(1.0) if server_opt is None else server_opt
    correction = correction or corrections.none()
    aggregator = aggregator or aggregators.weighted_mean()
    check_choice("persist_optimizer", persist_optimizer, PERSIST)
    if persist_optimizer == "kept" and not tree.as_patterns(keep):
        raise ValueError(
            "persist_optimizer='kept' keeps the optimizer of what stays at home, and "
            f"keep={keep!r} keeps nothing; accepted: none, all, or patterns in keep"
        )
    if correction.probe and persist_optimizer != "none":
        raise ValueError(
            f"persist_optimizer={persist_optimizer!r} does not go with SCAFFOLD or "
            "FedNova: they assume a local optimizer that starts anew at every visit"
        )
    own_optimizer = persist_optimizer == "kept" or not clip_kept
    train = trainer(
        model,
        local,
        apart=tree.as_patterns(keep) if own_optimizer else None,
        clip_apart=clip_kept,
        probe=correction.probe,
    )

    def start(common):
        variables = model.init(common)
        if persist_optimizer != "none":
            states = train.init_optimizer(variables)
            kept = ("apart",) if persist_optimizer == "kept" else tuple(states)
            states = {name: states[name] for name in kept}
            variables = memory.put(variables, OPTIMIZER, states)
        return variables

    template = jax.eval_shape(start, jax.random.key(0))
    home = tree.splitter(template, _kept(template, keep, bn_stats))

    def shared_part(variables):
        return home.split(variables)[1]

    def init(common):
        theta = shared_part(start(common))
        params, _ = tree.parameters(theta)
        return State(
            theta,
            server_opt.init(params),
            correction.init_server(params),
            aggregator.init(theta),
        )

    def extra(params):
        """What a correction sends, of a client that did not move."""
        sent = correction.send(correction.init_server(params))
        report: Any = collections.defaultdict(lambda: jnp.float32(0))  # what it reads
        own = correction.init_client(params)
        return correction.finish(params, params, sent, own, report)[1]

    # Lossy channels are for the change: a correction would lose what it counts on.
    moving, _ = tree.parameters(shared_part(template))
    sends = jax.tree.leaves(jax.eval_shape(extra, moving))

    def downlink(key, server, cohort):
        return Downlink(shared=(server.theta, correction.send(server.correction)))

    def server_update(key, server, uplink, cohort):
        weight = cohort.weight * cohort.active
        (mean, _), aggregate = aggregator.combine(
            key, (uplink.delta, uplink.extra), weight, server.aggregator
        )
        params, stats = tree.parameters(server.theta)
        delta, stats_delta = tree.parameters(mean)
        # A server optimizer descends, and the clients have gone downhill: minus.
        updates, opt = server_opt.update(tree.scale(delta, -1.0), server.opt, params)
        params = optax.apply_updates(params, updates)
        absorbed, params = correction.absorb(
            server.correction, params, _plain_means(uplink, cohort)
        )
        # An exchange in which nobody took part must not move momentum either.
        new = State(
            {**params, **tree.add(stats, stats_delta)}, opt, absorbed, aggregate
        )
        new = _where(jnp.sum(weight) > 0, new, server)
        return new, {"update_norm": tree.norm(delta)}

    def client_init(key, common, down):
        theta, _ = down.shared
        kept, _ = home.split(start(common))
        kept, _ = home.split(model.visit.arrive(key, home.merge(kept, theta)))
        return Client(kept, correction.init_client(tree.parameters(theta)[0]))

    def client_update(key, down, client, data):
        anchor, sent = down.shared
        anchor_params, _ = tree.parameters(anchor)

        def adjust(grads, params):
            shared = {k: g for k, g in grads.items() if k in anchor}
            adjusted = correction.adjust(
                shared, params, anchor_params, sent, client.correction
            )
            return {**grads, **adjusted}

        before = model.visit.enter(home.merge(client.kept, anchor))
        after, info = train(key, before, data, down.round, adjust)
        kept, theta = home.split(model.visit.leave(after))
        params, _ = tree.parameters(theta)
        own, extra = correction.finish(
            params, anchor_params, sent, client.correction, info
        )
        return Uplink(tree.sub(theta, anchor), extra), Client(kept, own), info

    def adapt(key, down, client, data):
        variables = home.merge(client.kept, down.shared[0])
        return client._replace(condition=model.serve.condition(variables, data.inputs))

    def deploy(down, client):
        variables = home.merge(client.kept, down.shared[0])
        if jax.tree.leaves(client.condition):
            variables = memory.put(variables, "condition", client.condition)
        return variables

    return Algorithm(
        ServerSide(init, downlink, server_update),
        ClientSide(
            client_init,
            client_update,
            adapt,
            deploy,
            tuner(model, local, finetune),
            model,
        ),
        exact=(r"extra(/.*)?",) if sends else (),
    )


def told(client: Client, entries: PyTree) -> Client:
    """Returns the client after it was told entries of its memory, {name: tree}."""
    return client._replace(kept={**client.kept, **tree.by_path({"memory": entries})})


def _kept(template: PyTree, keep, bn_stats: str) -> tuple[str, ...]:
    """Patterns of everything that stays home."""
    patterns = tree.as_patterns(keep)
    if bn_stats == "local" and jax.tree.leaves(template["stats"]):
        patterns += (r"stats/.*",)
    remembers = jax.tree.leaves(template.get("memory", ()))
    return patterns + ((r"memory/.*",) if remembers else ())


def _plain_means(uplink: Uplink, cohort) -> corrections.Means:
    """Means over the participants that ignore their weights."""
    delta, _ = tree.parameters(uplink.delta)
    delta, extra = aggregators.mean_over_clients((delta, uplink.extra), cohort.active)
    participation = jnp.sum(cohort.active) / cohort.population
    return corrections.Means(delta, extra, participation)


def _where(condition, a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
