"""What a visit sends, in numbers and bytes, from the messages themselves."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import rng, tree
from hyperjax.types import Algorithm, ClientData, Cohort, Pool, PyTree


class Messages(NamedTuple):
    """Abstract server state, downlink, state and uplink of one client."""

    server: PyTree
    shared: PyTree
    own: PyTree
    client: PyTree
    uplink: PyTree
    opening: "Messages | None" = None  # of the exchange that opens a round


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
    return _describe(alg)


@functools.lru_cache(maxsize=64)
def _describe(alg: Algorithm) -> Messages:
    opening = alg.opening and describe(alg.opening)
    shape = alg.client.model.sample_shape
    channels = shape[-1]

    def once(root):
        pool = Pool(
            jnp.zeros((1, *shape), jnp.uint8),
            jnp.zeros(1, jnp.int32),
            jnp.zeros(channels),
            jnp.ones(channels),
        )
        data = ClientData(jnp.zeros(1, jnp.int32), jnp.int32(1), pool)
        common = rng.stream(root, "common_init")
        server = alg.server.init(common)
        one = jnp.ones(1, jnp.float32)
        cohort = Cohort(jnp.zeros(1, jnp.int32), one, one, jnp.int32(0), jnp.float32(1))
        down = alg.server.downlink(root, server, cohort)
        shared, own = down.shared, jax.tree.map(lambda x: x[0], down.own)
        down = down._replace(own=own, round=cohort.round)
        client = alg.client.init(root, common, down)
        uplink, _, _ = alg.client.update(root, down, client, data)
        alg.server.update(root, server, jax.tree.map(lambda x: x[None], uplink), cohort)
        return Messages(server, shared, own, client, uplink)

    return jax.eval_shape(once, jax.random.key(0))._replace(opening=opening)


def cost(messages: Messages) -> Cost:
    """Counts a client's messages of one round."""
    every = [messages, messages.opening] if messages.opening else [messages]
    down = [(one.shared, one.own) for one in every]
    up = [one.uplink for one in every]
    return Cost(
        tree.count(down), tree.count(up), tree.num_bytes(down), tree.num_bytes(up)
    )
