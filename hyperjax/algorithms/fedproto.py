"""FedProto: clients exchange the mean feature of each class, and no parameters.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang 2022, "FedProto: Federated Prototype Learning
across Heterogeneous Clients", AAAI (arXiv:2105.00243), algorithm 1. Clients train on

    CE(f(x), y) + lambda mean |z(x) - prototype_y|^2 / L

with z the L inputs of the layer named "head" and prototypes averaged over all clients
by their samples of the class; a class that nobody has shown yet pulls nothing. Networks
may differ between families as long as L is the same.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.data import clients
from hyperjax.models.linen import masked_mean
from hyperjax.types import (
    Algorithm,
    Array,
    Batch,
    ClientSide,
    Downlink,
    Model,
    PyTree,
    ServerSide,
)

FEATURE_BATCH = 64
# Accelerators would otherwise round features to TF32.
FULL_PRECISION = jax.lax.Precision.HIGHEST


class Prototypes(NamedTuple):
    """Mean features [K, L], and 1 for the classes that have any, [K]."""

    mean: Array
    known: Array


class Uplink(NamedTuple):
    """A client's mean features [K, L] and samples [K] of each class."""

    mean: Array
    samples: Array


def fedproto(
    models: Mapping[str, Model],
    *,
    local,
    family_sizes: Mapping[str, int],
    lam: float = 1.0,
    **fedavg_options,
) -> Algorithm:
    """Returns FedProto.

    Args:
      models: the network of each family of clients.
      local: builds a training loop, see `fedavg`.
      family_sizes: clients of each family.
      lam: lambda.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: lam is negative, or features of two families differ in number.
    """
    if not lam >= 0:
        raise ValueError(f"lam={lam} must not be negative")
    shapes = {name: _shape(model) for name, model in models.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"families differ in classes and features (K, L): {shapes}")
    num_classes, num_features = next(iter(shapes.values()))

    def empty():
        zeros = jnp.zeros((num_classes, num_features))
        return Prototypes(zeros, jnp.zeros(num_classes))

    def init(common):
        return empty()

    def downlink(key, server, cohorts):
        return {name: Downlink(shared=server) for name in cohorts}

    def update(key, server, uplinks, cohorts):
        means = jnp.concatenate([up.mean for up in uplinks.values()])
        counts = jnp.concatenate([up.samples for up in uplinks.values()])
        total = jnp.sum(counts, 0)
        share = counts / jnp.maximum(total, 1.0)
        mean = jnp.einsum("ck,ckl->kl", share, means, precision=FULL_PRECISION)
        shown = total > 0  # a class nobody shows today keeps its prototype
        after = Prototypes(
            jnp.where(shown[:, None], mean, server.mean),
            jnp.where(shown, 1.0, server.known),
        )
        return after, {}

    sides = {
        name: _client(model, local, lam, empty, fedavg_options)
        for name, model in models.items()
    }
    return Algorithm(ServerSide(init, downlink, update), sides)


def _client(model: Model, local, lam: float, empty, options) -> ClientSide:
    pulled = _pulled(model, lam, empty)
    inner = fedavg(pulled, local=local, keep=r".*", **options).client

    def plain(down):
        return Downlink(shared=({}, ()), round=down.round)

    def told(down, client):
        prototypes = {
            "stats/prototypes/mean": down.shared.mean,
            "stats/prototypes/known": down.shared.known,
        }
        return client._replace(kept={**client.kept, **prototypes})

    def update(key, down, client, data):
        _, after, info = inner.update(key, plain(down), told(down, client), data)
        variables = inner.deploy(plain(down), after)
        return features_by_class(pulled, variables, data, empty()), after, info

    return inner._replace(
        init=lambda key, common, down: inner.init(key, common, plain(down)),
        update=update,
        # Fine-tuning goes on with the prototypes of today.
        adapt=lambda key, down, client, data: inner.adapt(
            key, plain(down), told(down, client), data
        ),
        deploy=lambda down, adapted: inner.deploy(plain(down), adapted),
    )


def _pulled(model: Model, lam: float, empty) -> Model:
    """The model, its features pulled to the prototypes among its statistics."""

    def split(variables):
        stats = dict(variables["stats"])
        prototypes = stats.pop("prototypes")
        return {**variables, "stats": stats}, prototypes

    def init(key):
        variables = model.init(key)
        stats = {**variables["stats"], "prototypes": empty()._asdict()}
        return {**variables, "stats": stats}

    def loss(key, variables, batch: Batch, context):
        ours, prototypes = split(variables)
        value, (stats, info) = model.loss(key, ours, batch, context)
        z = model.features(ours, batch, True)
        label = jnp.maximum(batch.y, 0)
        apart = jnp.mean(jnp.square(z - prototypes["mean"][label]), -1)
        pull = masked_mean(prototypes["known"][label] * apart, batch.mask)
        info = {**info, "pull": pull}
        return value + lam * pull, ({**stats, "prototypes": prototypes}, info)

    def beside(hook):
        return lambda variables, *rest: hook(split(variables)[0], *rest)

    return model._replace(
        init=init,
        loss=loss,
        predict=beside(model.predict),
        export=beside(model.export),
        features=beside(model.features),
    )


def features_by_class(
    model: Model, variables: PyTree, data, like: Prototypes
) -> Uplink:
    """Returns a client's mean features and samples of each class."""

    def step(sums, batch):
        z = model.features(variables, batch, False)
        member = jax.nn.one_hot(batch.y, like.mean.shape[0]) * batch.mask[:, None]
        z = jnp.where(batch.mask[:, None] > 0, z, 0.0)
        of_class = jnp.matmul(member.T, z, precision=FULL_PRECISION)
        return sums[0] + of_class, sums[1] + jnp.sum(member, 0)

    start = (jnp.zeros_like(like.mean), jnp.zeros_like(like.known))
    total, count = clients.fold(step, start, data, FEATURE_BATCH)
    return Uplink(total / jnp.maximum(count, 1.0)[:, None], count)


def _shape(model: Model) -> tuple[int, int]:
    """Classes K and features L of a model."""

    def both(key):
        variables = model.init(key)
        x = jnp.zeros((1, *model.sample_shape))
        batch = Batch(x, jnp.zeros(1, jnp.int32), jnp.ones(1))
        return model.predict(variables, x), model.features(variables, batch, False)

    logits, z = jax.eval_shape(both, jax.random.key(0))
    return logits.shape[-1], z.shape[-1]
