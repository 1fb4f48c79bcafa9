"""What happens to a message on its way: fewer numbers, or other ones.

`with_uplink(alg, topk(0.3))` returns a method whose clients send what `encode` makes of
their uplink, but for the parts that the method wants to be exact; the server decodes it
row by row. The wire is what is counted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.errors import check_number
from hyperjax.types import Algorithm, ClientSide, PyTree, in_one_line


class Channel(NamedTuple):
    """A lossy way of sending a tree of fixed shapes."""

    encode: Callable  # (message) -> wire
    decode: Callable  # (wire, like: abstract message) -> message

    def __repr__(self) -> str:
        return in_one_line(self)


class Sparse(NamedTuple):
    """Some entries of an array."""

    values: jax.Array  # [k]
    places: jax.Array  # [k] int32


def topk(fraction: float) -> Channel:
    """Sends the largest entries by magnitude of every leaf, as values and indices.

    Of n numbers floor(fraction n) are sent, with a 4-byte index each; the server takes
    the others as zero (arXiv:2507.22330 sends 30 % of a client's change).

    Raises:
      ValueError: the fraction is outside (0, 1].
    """
    check_number(above=0, at_most=1, fraction=fraction)

    def encode_leaf(x):
        flat = x.reshape(-1)
        # Rounded down: never more than the fraction, of a small leaf nothing.
        _, index = jax.lax.top_k(jnp.abs(flat), math.floor(fraction * flat.size))
        return Sparse(flat[index], index.astype(jnp.int32))

    def decode_leaf(wire, like):
        flat = jnp.zeros(math.prod(like.shape), like.dtype)
        return flat.at[wire.places].set(wire.values).reshape(like.shape)

    def decode(wire, like):
        is_wire = lambda x: isinstance(x, Sparse)  # noqa: E731
        return jax.tree.map(decode_leaf, wire, like, is_leaf=is_wire)

    return Channel(lambda message: jax.tree.map(encode_leaf, message), decode)


# Name in a config -> channel.
CHANNELS: dict[str, Callable[..., Channel]] = {"topk": topk}


def with_uplink(alg: Algorithm, channel: Channel, describe: Callable) -> Algorithm:
    """Returns `alg` with its uplink sent through a channel.

    What matches `alg.exact` is sent as it is, beside the wire of all the rest.

    Args:
      alg: with or without families.
      channel: what to do to every uplink.
      describe: `(family) -> abstract uplink` of one client (ALONE without families).
    """

    def changed(client: ClientSide) -> ClientSide:
        def update(key, down, state, data):
            message, state, info = client.update(key, down, state, data)
            exact, rest = tree.splitter(message, alg.exact).split(message)
            return (exact, channel.encode(rest)), state, info

        return client._replace(update=update)

    def decoded(name: str, wire: PyTree) -> PyTree:
        like = describe(name)
        parts = tree.splitter(like, alg.exact)
        _, rest = parts.split(like)
        return jax.vmap(
            lambda exact, row: parts.merge(exact, channel.decode(row, rest))
        )(*wire)

    def server_update(key, server, wires, cohorts):
        named = alg.by_family(wires).items()
        uplinks = alg.as_given({name: decoded(name, wire) for name, wire in named})
        return alg.server.update(key, server, uplinks, cohorts)

    # What is on the wire has no mean.
    server = alg.server._replace(update=server_update, mean_only=False, sums=None)
    return alg.with_clients(changed)._replace(server=server, exact=())
