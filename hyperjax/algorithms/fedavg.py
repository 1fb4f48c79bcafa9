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
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax import aggregators, corrections, tree
from hyperjax.errors import check_choice, check_made
from hyperjax.models import memory
from hyperjax.registry import has_traits
from hyperjax.training import OPTIMIZER, Local, Trainer, check_given, trainer, tuner
from hyperjax.tree import Patterns
from hyperjax.types import (
    Algorithm,
    ClientSide,
    Downlink,
    Key,
    Model,
    PyTree,
    ServerSide,
    Sums,
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
      ValueError: `keep` matches no variable, an unknown choice, a factory where what it
        makes is asked for, or an optimizer is kept of nothing or under a correction
        that assumes a new one.
    """
    check_given(model, local)
    check_choice("bn_stats", bn_stats, BN_STATS)
    server_opt = optax.sgd(1.0) if server_opt is None else server_opt
    correction = correction or corrections.none()
    aggregator = aggregator or aggregators.weighted_mean()
    for name, made, parts, example in (
        ("server_opt", server_opt, ("init", "update"), "optax.sgd(1.0)"),
        ("correction", correction, ("init_server", "adjust"), "corrections.none()"),
        ("aggregator", aggregator, ("combine",), "aggregators.weighted_mean()"),
    ):
        check_made(name, made, parts, example)
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
    whole = _divided(model, train, keep, bn_stats, persist_optimizer)
    sends = jax.tree.leaves(jax.eval_shape(partial(_extra, correction), whole.moving()))
    return Algorithm(
        _server(whole, server_opt, correction, aggregator),
        _client(whole, model, train, correction, tuner(model, local, finetune)),
        # Lossy channels are for the change: a correction would lose what it counts on.
        exact=(r"extra(/.*)?",) if sends else (),
    )


class _Divided(NamedTuple):
    """A model's variables: those that stay home, and those that are shared."""

    start: Callable  # (common) -> variables, with an optimizer that is kept
    home: tree.Splitter  # of variables into (kept, shared), both by path

    def shared(self, common: Key) -> PyTree:
        """The shared variables by path, as they start."""
        return self.home.split(self.start(common))[1]

    def moving(self) -> PyTree:
        """The parameters among them, abstract."""
        theta = jax.eval_shape(self.shared, jax.random.key(0))
        return tree.parameters(theta)[0]


def _divided(
    model: Model, train: Trainer, keep: Patterns, bn_stats: str, persist: str
) -> _Divided:
    """Divides a model's variables as `fedavg`'s options say."""

    def start(common):
        variables = model.init(common)
        if persist == "none":
            return variables
        states = train.init_optimizer(variables)
        kept = ("apart",) if persist == "kept" else tuple(states)
        states = {name: states[name] for name in kept}
        return memory.put(variables, OPTIMIZER, states)

    template = jax.eval_shape(start, jax.random.key(0))
    return _Divided(start, tree.splitter(template, _kept(template, keep, bn_stats)))


def _server(
    whole: _Divided,
    optimizer: optax.GradientTransformation,
    correction: corrections.Correction,
    aggregator: aggregators.Aggregator,
) -> ServerSide:
    """Feeds an optimizer the mean change of what is shared."""
    add: Any = aggregator.sums
    finish: Any = aggregator.of_sums

    def init(common):
        theta = whole.shared(common)
        params, _ = tree.parameters(theta)
        return State(
            theta,
            optimizer.init(params),
            correction.init_server(params),
            aggregator.init(theta),
        )

    def downlink(key, server, cohort):
        return Downlink(shared=(server.theta, correction.send(server.correction)))

    def update(key, server, uplink, cohort):
        weight = cohort.weight * cohort.active
        if isinstance(uplink, Sums):
            combined, plain = uplink.of
            (mean, _), aggregate = finish(combined), server.aggregator
            mean = jax.tree.map(lambda m, x: m.astype(x.dtype), mean, server.theta)
            means = _means(aggregators.over(plain, jnp.sum(cohort.active)), cohort)
        else:
            (mean, _), aggregate = aggregator.combine(
                key, (uplink.delta, uplink.extra), weight, server.aggregator
            )
            plain = aggregators.mean_over_clients(_plainly(uplink), cohort.active)
            means = _means(plain, cohort)
        params, stats = tree.parameters(server.theta)
        delta, stats_delta = tree.parameters(mean)
        # A server optimizer descends, and the clients have gone downhill: minus.
        updates, opt = optimizer.update(tree.scale(delta, -1.0), server.opt, params)
        params = optax.apply_updates(params, updates)
        absorbed, params = correction.absorb(server.correction, params, means)
        # An exchange in which nobody took part must not move momentum either.
        new = State(
            {**params, **tree.add(stats, stats_delta)}, opt, absorbed, aggregate
        )
        tree.check_kept("the aggregator's state", server.aggregator, aggregate)
        tree.check_kept("the correction's state", server.correction, absorbed)
        new = _where(jnp.sum(weight) > 0, new, server)
        return new, {"update_norm": tree.norm(delta)}

    def sums(uplink, cohort):
        weight = cohort.weight * cohort.active
        return (
            add((uplink.delta, uplink.extra), weight),
            # Nobody reads them unless the correction learns from them.
            aggregators.sum_over_clients(_plainly(uplink), cohort.active),
        )

    mean_only = aggregator.is_mean and correction.absorb is corrections.unmoved
    return ServerSide(
        init,
        downlink,
        update,
        mean_only=mean_only,
        sums=None if add is None else sums,
    )


def _client(
    whole: _Divided,
    model: Model,
    train: Trainer,
    correction: corrections.Correction,
    tune: Callable,
) -> ClientSide:
    """Trains shared and kept variables together, and sends the change of the shared."""
    home = whole.home

    def init(key, common, down):
        theta, _ = down.shared
        kept, _ = home.split(whole.start(common))
        kept, _ = home.split(model.visit.arrive(key, home.merge(kept, theta)))
        return Client(kept, correction.init_client(tree.parameters(theta)[0]))

    def update(key, down, client, data):
        anchor, sent = down.shared
        anchor_params, _ = tree.parameters(anchor)

        def adjust(grads, params):
            # What stays home has no anchor, and so is not corrected.
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
        condition = model.serve.condition(variables, data.inputs)
        return client._replace(condition=condition)

    def deploy(down, client):
        variables = home.merge(client.kept, down.shared[0])
        if jax.tree.leaves(client.condition):
            variables = memory.put(variables, "condition", client.condition)
        return variables

    return ClientSide(init, update, adapt, deploy, tune, model)


def _extra(correction: corrections.Correction, params: PyTree) -> PyTree:
    """What a correction sends, of a client that did not move."""
    sent = correction.send(correction.init_server(params))
    report: Any = collections.defaultdict(lambda: jnp.float32(0))  # what it reads
    own = correction.init_client(params)
    return correction.finish(params, params, sent, own, report)[1]


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


def _plainly(uplink: Uplink) -> PyTree:
    """What is averaged over the participants without their weights."""
    return tree.parameters(uplink.delta)[0], uplink.extra


def _means(plain: PyTree, cohort) -> corrections.Means:
    """Means over the participants that ignore their weights."""
    delta, extra = plain
    participation = jnp.sum(cohort.active) / cohort.population
    return corrections.Means(delta, extra, participation)


def _where(condition, a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
