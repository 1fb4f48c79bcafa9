"""Gradient corrections against client drift: terms with memory on both sides.

They combine by `chain`, and act on whatever part of a model is shared, so that one of
them on HyperFedNet corrects the hypernetwork.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.errors import check_number
from hyperjax.types import Array, PyTree, in_one_line


class Means(NamedTuple):
    """What a server learns from the cohort, averaged over it *without* weights."""

    delta: PyTree  # change of the shared parameters
    extra: PyTree  # what `Correction.finish` sent
    participation: Array  # [] float32, participants / clients in all

    def __repr__(self) -> str:
        return in_one_line(self)


class Correction(NamedTuple):
    """A term added to local gradients of the shared parameters.

    Parameters, gradients and changes are dicts from path to leaf. `adjust` gets the
    gradients of the leaves being trained; its other arguments may hold more paths.
    `send` exists because a server may keep more than clients need, and only what is
    sent counts as communication. `probe` asks the local training for
    info["displacement"], see `training.trainer`.
    """

    init_server: Callable  # (theta) -> s
    init_client: Callable  # (theta) -> c
    send: Callable  # (s) -> the part of s that clients need
    adjust: Callable  # (grads, theta, anchor, sent, c) -> grads
    finish: Callable  # (theta, anchor, sent, c, info) -> (c, extra uplink)
    absorb: Callable  # (s, theta, Means) -> (s, theta)
    probe: bool = False

    def __repr__(self) -> str:
        return in_one_line(self)


def unmoved(s: PyTree, theta: PyTree, means: Means) -> tuple[PyTree, PyTree]:
    """The `absorb` of a correction that learns nothing from the cohort."""
    return s, theta


def none() -> Correction:
    """Changes nothing, keeps nothing, sends nothing."""
    return Correction(
        init_server=lambda theta: (),
        init_client=lambda theta: (),
        send=lambda s: (),
        adjust=lambda grads, theta, anchor, sent, c: grads,
        finish=lambda theta, anchor, sent, c, info: (c, ()),
        absorb=unmoved,
    )


def prox(mu: float) -> Correction:
    """Adds mu/2 |theta - anchor|^2 to the loss, with anchor the received parameters.

    FedProx, Li et al. 2020 (arXiv:1812.06127), equation 2.

    Raises:
      ValueError: mu is negative.
    """
    check_number(at_least=0, mu=mu)

    def adjust(grads, theta, anchor, sent, c):
        # The derivative of the added term.
        return {k: g + mu * (theta[k] - anchor[k]) for k, g in grads.items()}

    return none()._replace(adjust=adjust)


def dyn(alpha: float) -> Correction:
    """Adds -<g_k, theta> + alpha/2 |theta - anchor|^2 to client k's loss.

    FedDyn, Acar et al. 2021 (arXiv:2111.04263), algorithm 1: afterwards g_k falls by
    alpha times the client's change; the server keeps h = mean of all g_k and moves the
    averaged parameters by -h/alpha. Neither g_k nor h is ever sent: with an uplink that
    loses something, h is no longer the mean of the g_k.

    Raises:
      ValueError: alpha is not positive.
    """
    check_number(above=0, alpha=alpha)

    def adjust(grads, theta, anchor, sent, c):
        return {k: g - c[k] + alpha * (theta[k] - anchor[k]) for k, g in grads.items()}

    def finish(theta, anchor, sent, c, info):
        return {k: c[k] - alpha * (theta[k] - anchor[k]) for k in c}, ()

    def absorb(h, theta, means):
        # The change of the mean of all g_k: absent clients' do not move, so the mean
        # over participants counts by their share.
        share = alpha * means.participation
        h = jax.tree.map(lambda h, d: h - share * d, h, means.delta)
        return h, jax.tree.map(lambda x, h: x - h / alpha, theta, h)

    return none()._replace(
        init_server=tree.zeros_like,
        init_client=tree.zeros_like,
        adjust=adjust,
        finish=finish,
        absorb=absorb,
    )


def scaffold() -> Correction:
    """Adds c - c_k to client k's gradient, both estimates of mean gradients.

    SCAFFOLD, Karimireddy et al. 2020 (arXiv:1910.06378), algorithm 1, option II:
    c_k falls by c + (theta - anchor) / (steps x learning rate), and c moves by the
    participating share of clients times the mean change of their c_k. With momentum or
    a schedule the denominator is the weight that the visit's change gives to its
    gradients, so that the quotient stays a weighted mean of gradients. Optimizers whose
    change is no such sum (Adam and its kin) are refused by `training.trainer`.
    """

    def adjust(grads, theta, anchor, sent, c):
        return {k: g - c[k] + sent[k] for k, g in grads.items()}

    def finish(theta, anchor, sent, c, info):
        steps = info["displacement"]
        mean = 1.0 / jnp.where(steps > 0, steps, 1.0)
        moved = steps > 0  # a client without samples learns nothing about its gradient

        def change(k):
            # c_k after minus before, so c_k itself drops out.
            new = -sent[k] + mean * (anchor[k] - theta[k])
            return jnp.where(moved, new, 0.0)

        delta = {k: change(k) for k in c}
        return tree.add(c, delta), delta

    def absorb(s, theta, means):
        # c stays the mean of all clients' c_k, of which only participants' moved.
        return tree.add(s, tree.scale(means.extra, means.participation)), theta

    return Correction(
        init_server=tree.zeros_like,
        init_client=tree.zeros_like,
        send=lambda s: s,
        adjust=adjust,
        finish=finish,
        absorb=absorb,
        probe=True,
    )


def chain(*corrections: Correction) -> Correction:
    """Applies corrections one after another; states are tuples, one entry each."""

    def zipped(name, *states):
        return zip((getattr(c, name) for c in corrections), *states, strict=True)

    def adjust(grads, theta, anchor, sent, c):
        for one, sent_one, c_one in zipped("adjust", sent, c):
            grads = one(grads, theta, anchor, sent_one, c_one)
        return grads

    def finish(theta, anchor, sent, c, info):
        done = [
            one(theta, anchor, sent_one, c_one, info)
            for one, sent_one, c_one in zipped("finish", sent, c)
        ]
        return tuple(c for c, _ in done), tuple(extra for _, extra in done)

    def absorb(s, theta, means):
        new: list[Any] = []
        # Each moves the parameters that the one before it has left.
        for one, s_one, extra in zipped("absorb", s, means.extra):
            s_new, theta = one(s_one, theta, means._replace(extra=extra))
            new.append(s_new)
        return tuple(new), theta

    return Correction(
        init_server=lambda theta: tuple(c.init_server(theta) for c in corrections),
        init_client=lambda theta: tuple(c.init_client(theta) for c in corrections),
        send=lambda s: tuple(one(x) for one, x in zipped("send", s)),
        adjust=adjust,
        finish=finish,
        absorb=unmoved if all(c.absorb is unmoved for c in corrections) else absorb,
        probe=any(c.probe for c in corrections),
    )


# Name in a config -> correction.
CORRECTIONS: dict[str, Callable[..., Correction]] = {
    "none": none,
    "prox": prox,
    "dyn": dyn,
    "scaffold": scaffold,
}
