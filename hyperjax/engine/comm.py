"""What a visit sends, in numbers and bytes, from the messages themselves."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.data import clients
from hyperjax.types import (
    AdaptData,
    Algorithm,
    ClientData,
    Cohort,
    Downlink,
    Messages,
    Pool,
)


class Cost(NamedTuple):
    """Per client and round; `down` is the shared part plus the client's own."""

    down_numbers: int
    up_numbers: int
    down_bytes: int
    up_bytes: int


def describe(alg: Algorithm) -> Messages:
    """Runs one exchange with one client by abstract evaluation; computes nothing.

    The server's update is part of it, so that what a method cannot do is known before
    any work. A method is described once; that of `families.view` for each family.

    Raises:
      ValueError: a method with families.
    """
    if alg.has_families:
        raise ValueError(
            f"the method has the families {sorted(alg.client)}; describe one by one: "
            "describe(hyperjax.engine.families.view(method, name))"
        )
    return _described(alg)


_described = functools.lru_cache(maxsize=64)(Algorithm.messages)


def cost(messages: Messages) -> Cost:
    """Counts a client's messages of one round."""
    down, up = messages.sent()
    return Cost(
        tree.count(down), tree.count(up), tree.num_bytes(down), tree.num_bytes(up)
    )


def fitting(alg: Algorithm) -> Cost:
    """Counts what a participant of a round of the method's `Fit` is sent and sends.

    That is beside the trained model, which it has to be sent first, and 0 of a method
    without; the last state is sent to whoever is deployed. For methods without
    families.
    """
    fit = alg.client.fit
    if fit is None:
        return Cost(0, 0, 0, 0)
    shape, no = alg.client.model.sample_shape, jnp.zeros(1, jnp.int32)
    pool = Pool(jnp.zeros((1, *shape), jnp.uint8), no, jnp.zeros(1), jnp.ones(1))
    held = ClientData(no, jnp.int32(1), pool)

    def send(messages: Messages):
        server, key, one = alg.server, jax.random.key(0), jnp.ones(1)
        cohort = Cohort(no, one, one, jnp.int32(0), jnp.float32(1))
        given = (server.release or server.downlink)(key, messages.server, cohort)
        own = jax.tree.map(lambda x: x[0], given.own)
        down = Downlink(given.shared, own, cohort.round)
        data = AdaptData(held, clients.withhold_labels(held))
        return fit.send(key, fit.start(), down, messages.client, data, held)

    up = jax.eval_shape(send, describe(alg).alone)
    return cost(Messages((), jax.eval_shape(fit.start), (), (), up))
