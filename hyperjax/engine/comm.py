"""What a visit sends, in numbers and bytes, from the messages themselves."""

import functools
from typing import NamedTuple

from hyperjax import tree
from hyperjax.types import Algorithm, Messages


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
