"""FedProto: clients exchange the mean feature of each class, and no parameters.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang 2022, "FedProto: Federated Prototype Learning
across Heterogeneous Clients", AAAI (arXiv:2105.00243), algorithm 1. Clients train on

    CE(f(x), y) + lambda mean |z(x) - prototype_y|^2 / L

with z the L inputs of the layer named "head" (dropout on, as in f) and prototypes, of
features in evaluation mode, averaged over all clients by their samples of the class; a
class that nobody has shown yet pulls nothing. Networks may differ between families as
long as L is the same.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import wrappers
from hyperjax.algorithms.fedavg import fedavg, told
from hyperjax.data import clients
from hyperjax.errors import check_number
from hyperjax.models import memory
from hyperjax.models.linen import masked_mean, sizes
from hyperjax.registry import hands_on
from hyperjax.training import Local, check_given
from hyperjax.types import (
    Algorithm,
    Array,
    ClientSide,
    Downlink,
    Model,
    PyTree,
    ServerSide,
)

NAME = "prototypes"  # in a client's memory
FEATURE_BATCH = 64  # samples at a time where nothing is trained
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


@hands_on(fedavg, without=("keep",))
def fedproto(
    models: Mapping[str, Model],
    *,
    local: Local,
    family_sizes: Mapping[str, int],
    lam: float = 1.0,
    **fedavg_options,
) -> Algorithm:
    """Returns FedProto.

    Args:
      models: the network of each family of clients.
      local: how clients train, see `fedavg`.
      family_sizes: clients of each family.
      lam: lambda.
      **fedavg_options: of `fedavg`, for the clients.

    Raises:
      ValueError: lam is negative, or features of two families differ in number.
    """
    check_given(models, local)
    check_number(at_least=0, lam=lam)
    shapes = {name: sizes(model) for name, model in models.items()}
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
    return Algorithm(ServerSide(init, downlink, update), sides, exact=("samples",))


def _client(model: Model, local, lam: float, empty, options) -> ClientSide:
    pulled = _pulled(model, lam, empty)
    inner = fedavg(pulled, local=local, keep=r".*", **options).client

    def received(down):
        return Downlink(shared=({}, ()), round=down.round)

    # Fine-tuning goes on with the prototypes of today.
    side = wrappers.through(
        inner,
        received,
        lambda down, client: told(client, {NAME: down.shared._asdict()}),
    )

    def update(key, down, client, data):
        _, after, info = side.update(key, down, client, data)
        variables = side.deploy(down, after)
        return features_by_class(pulled, variables, data, empty()), after, info

    return side._replace(update=update)


def _pulled(model: Model, lam: float, empty) -> Model:
    """The model, its features pulled to the prototypes in its memory."""

    inner = memory.with_entry(model, NAME, lambda key, variables: empty()._asdict())

    def loss(key, variables, batch, context):
        value, trained = inner.loss(key, variables, batch, context)
        z, prototypes = trained.features, memory.get(variables, NAME)
        label = jnp.maximum(batch.y, 0)  # -1, withheld, would be the last class
        apart = jnp.mean(jnp.square(z - prototypes["mean"][label]), -1)
        pull = masked_mean(prototypes["known"][label] * apart, batch.mask)
        info = {**trained.info, "pull": pull}
        return value + lam * pull, trained._replace(info=info)

    return inner._replace(loss=loss)


def features_by_class(
    model: Model, variables: PyTree, data, like: Prototypes
) -> Uplink:
    """Returns a client's mean features and samples of each class."""

    def step(sums, batch):
        z = model.features(variables, batch.x)
        member = jax.nn.one_hot(batch.y, like.mean.shape[0]) * batch.mask[:, None]
        z = jnp.where(batch.mask[:, None] > 0, z, 0.0)
        of_class = jnp.matmul(member.T, z, precision=FULL_PRECISION)
        return sums[0] + of_class, sums[1] + jnp.sum(member, 0)

    start = (jnp.zeros_like(like.mean), jnp.zeros_like(like.known))
    total, count = clients.fold(step, start, data, FEATURE_BATCH)
    return Uplink(total / jnp.maximum(count, 1.0)[:, None], count)
