"""Gradient corrections against client drift: terms with memory on both sides."""

from collections.abc import Callable
from typing import NamedTuple


class Correction(NamedTuple):
    """A term added to local gradients of the shared parameters.

    Parameters, gradients and changes are dicts from path to leaf. `adjust` gets the
    gradients of the leaves being trained; its other arguments may hold more paths.
    `send` exists because a server may keep more than clients need, and only what is
    sent counts as communication.
    """

    init_server: Callable  # (theta) -> s
    init_client: Callable  # (theta) -> c
    send: Callable  # (s) -> the part of s that clients need
    adjust: Callable  # (grads, theta, anchor, sent, c) -> grads
    finish: Callable  # (theta, anchor, sent, c, info) -> (c, extra uplink)
    absorb: Callable  # (s, theta, mean_delta, mean_extra, participation) -> (s, theta)


def none() -> Correction:
    """Changes nothing, keeps nothing, sends nothing."""
    return Correction(
        init_server=lambda theta: (),
        init_client=lambda theta: (),
        send=lambda s: (),
        adjust=lambda grads, theta, anchor, sent, c: grads,
        finish=lambda theta, anchor, sent, c, info: (c, ()),
        absorb=lambda s, theta, mean_delta, mean_extra, participation: (s, theta),
    )
