"""Around algorithms and clients: what they look at, are sent or do before they predict.

`adapt` may return another structure than the state that is stored, and only `deploy`
sees it; the wrappers of whole algorithms rest on that.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hyperjax.data import clients
from hyperjax.errors import check_at_least, check_choice
from hyperjax.types import (
    AdaptData,
    Algorithm,
    ClientData,
    ClientSide,
    Downlink,
    Fit,
    PyTree,
)

CONDITION_SOURCES = ("eval_inputs", "local_train_inputs")
REFRESH_BATCH = 64  # samples at a time


def with_condition_of(
    alg: Algorithm, *, condition_source: str = "eval_inputs"
) -> Algorithm:
    """Returns a method whose clients are conditioned on inputs of a choice.

    Args:
      alg: of a model that has a condition.
      condition_source: inputs that a deployed model's condition is computed from:
        "eval_inputs" (those it predicts on, without labels) or "local_train_inputs"
        (its training inputs; those it predicts on if it has none).

    Raises:
      ValueError: an unknown choice.
    """
    check_choice("condition_source", condition_source, CONDITION_SOURCES)
    if condition_source == "eval_inputs":
        return alg
    side: ClientSide = alg.client

    def adapt(key, down, client, data):
        return side.adapt(key, down, client, data._replace(inputs=_trained_on(data)))

    return alg._replace(client=side._replace(adapt=adapt))


def with_few_inputs(alg: Algorithm, num: int) -> Algorithm:
    """Returns a method whose clients are deployed by few of their inputs.

    These are drawn, anew for every round and client; all of them are predicted.

    Args:
      alg: with or without families.
      num: of inputs; a client with fewer is deployed by all.

    Raises:
      ValueError: it is below 1.
    """
    check_at_least(1, context=num)

    def changed(side: ClientSide) -> ClientSide:
        def adapt(key, down, client, data):
            key, key_draw = jax.random.split(key)
            inputs = data.inputs
            some = inputs.rows[clients.shuffled(key_draw, inputs)]
            few = inputs._replace(rows=some, size=jnp.minimum(inputs.size, num))
            return side.adapt(key, down, client, data._replace(inputs=few))

        return side._replace(adapt=adapt)

    return alg.with_clients(changed)


def _trained_on(data: AdaptData) -> ClientData:
    """Inputs that a client trained on, or will predict on if there are none."""

    def widened(rows):
        return jnp.pad(rows, (0, width - rows.shape[0]))

    train, inputs = data.train, data.inputs
    use = train.size > 0
    # The pool is the one without labels; rows and size alone choose the data.
    width = max(train.rows.shape[0], inputs.rows.shape[0])
    rows = jnp.where(use, widened(train.rows), widened(inputs.rows))
    return inputs._replace(rows=rows, size=jnp.where(use, train.size, inputs.size))


def with_refreshed_statistics(alg: Algorithm) -> Algorithm:
    """Returns a method whose clients' running statistics see what is deployed.

    They do in a pass over the client's training samples before it predicts: as trained
    they are of parameters which the server may since have changed.
    """
    side: ClientSide = alg.client

    def adapt(key, down, client, data):
        adapted = side.adapt(key, down, client, data)
        variables = side.deploy(down, adapted)
        context = side.model.visit.context(variables, data.train)

        def step(variables, batch):
            _, trained = side.model.loss(key, variables, batch, context)
            return {**variables, "stats": trained.stats}

        seen = clients.fold(step, variables, data.train, REFRESH_BATCH)
        return adapted, seen["stats"]

    def deploy(down, refreshed):
        adapted, stats = refreshed
        return {**side.deploy(down, adapted), "stats": stats}

    return alg._replace(client=side._replace(adapt=adapt, deploy=deploy))


def adapting(side: ClientSide, change: Callable, fit: Fit | None = None) -> ClientSide:
    """Returns a client whose deployed variables are changed by its inputs.

    What was adapted is the client's state, so that a neighbour's may be borrowed.

    Args:
      side: the client.
      change: `(key, variables, inputs) -> variables`, with a last argument `fitted` if
        something is.
      fit: what participants find out first, with a `send(key, fitted, variables, held)`
        of what they are deployed with.
    """

    def adapt(key, down, client, data):
        adapted = side.adapt(key, down, client, data)
        told = () if fit is None else (data.fitted,)
        return change(key, side.deploy(down, adapted), data.inputs, *told)

    changed = side._replace(adapt=adapt, deploy=lambda down, variables: variables)
    if fit is None:
        return changed
    of_deployed = fit.send

    def send(key, fitted, down, client, data, held):
        adapted = side.adapt(key, down, client, data)
        return of_deployed(key, fitted, side.deploy(down, adapted), held)

    return changed._replace(fit=fit._replace(send=send))


# Messages ---------------------------------------------------------------------------


def shared(alg: Algorithm) -> PyTree:
    """Returns what a `fedavg` shares, by path; abstract."""
    return jax.eval_shape(alg.server.init, jax.random.key(0)).theta


def through(
    client: ClientSide,
    received: Callable,
    told: Callable = lambda down, state: state,
) -> ClientSide:
    """Returns a client that is sent something else than `client` is.

    Args:
      client: what it is underneath.
      received: `(down) -> Downlink` that `client` takes.
      told: `(down, state) -> state` with what `client` must know of the rest, before it
        trains or adapts.
    """
    return client._replace(
        init=lambda key, common, down: client.init(key, common, received(down)),
        update=lambda key, down, state, data: client.update(
            key, received(down), told(down, state), data
        ),
        adapt=lambda key, down, state, data: client.adapt(
            key, received(down), told(down, state), data
        ),
        deploy=lambda down, adapted: client.deploy(received(down), adapted),
    )


class Flat(NamedTuple):
    """Shared variables of one method as a vector, in the order of their paths."""

    size: int
    join: Callable  # (theta) -> [size]
    cut: Callable  # ([size]) -> theta


def flat(alg: Algorithm) -> Flat:
    """Returns the vector form of what a `fedavg` shares."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shared(alg))
    vector, cut = ravel_pytree(zeros)
    return Flat(vector.size, lambda theta: ravel_pytree(theta)[0], cut)


def own_as_shared(client: ClientSide, vector: Flat | None = None) -> ClientSide:
    """Returns FedAvg's client for a server that sends each client its own model.

    With `vector` messages are flat: the model [K] down, its change [K] up.
    """

    def received(down: Downlink) -> Downlink:
        theta = down.own if vector is None else vector.cut(down.own)
        return Downlink(shared=(theta, ()), round=down.round)

    side = through(client, received)
    if vector is None:
        return side

    def update(*args):
        uplink, state, info = side.update(*args)
        return vector.join(uplink.delta), state, info

    return side._replace(update=update)
