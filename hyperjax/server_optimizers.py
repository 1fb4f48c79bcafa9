"""The FedOpt family in its papers' form, as optax transformations.

Reddi et al. 2021, "Adaptive Federated Optimization" (arXiv:2003.00295), algorithm 2:
unlike optax's Adam and Yogi there is no bias correction, v starts at tau squared (or at
a given `v0`), and tau is added outside the root. FedAvgM: Hsu et al. 2019
(arXiv:1909.06335).

All descend along what they are given, so a server feeds minus the mean change. A number
that is not finite or out of range is a ValueError.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax.errors import check_number
from hyperjax.types import PyTree


class FedOptState(NamedTuple):
    """First and second moments, trees like the parameters."""

    m: PyTree
    v: PyTree


def fedavgm(
    learning_rate: float = 1.0, beta: float = 0.9, nesterov: bool = False
) -> optax.GradientTransformation:
    """FedAvgM: m = beta m + D, theta += learning_rate m."""
    check_number(at_least=0, learning_rate=learning_rate)
    check_number(at_least=0, below=1, beta=beta)
    return optax.sgd(learning_rate, momentum=beta, nesterov=nesterov)


def fedadagrad(
    learning_rate: float = 0.1,
    b1: float = 0.0,
    tau: float = 1e-3,
    v0: float | None = None,
) -> optax.GradientTransformation:
    """FedAdagrad: v += D^2."""
    return _fedopt(learning_rate, b1, tau, v0, lambda v, d2: v + d2)


def fedadam(
    learning_rate: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    v0: float | None = None,
) -> optax.GradientTransformation:
    """FedAdam: v = b2 v + (1 - b2) D^2."""
    check_number(at_least=0, at_most=1, b2=b2)
    return _fedopt(learning_rate, b1, tau, v0, lambda v, d2: b2 * v + (1 - b2) * d2)


def fedyogi(
    learning_rate: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    v0: float | None = None,
) -> optax.GradientTransformation:
    """FedYogi: v -= (1 - b2) D^2 sign(v - D^2)."""
    check_number(at_least=0, at_most=1, b2=b2)
    return _fedopt(
        learning_rate, b1, tau, v0, lambda v, d2: v - (1 - b2) * d2 * jnp.sign(v - d2)
    )


def _fedopt(
    learning_rate: float, b1: float, tau: float, v0: float | None, second: Callable
) -> optax.GradientTransformation:
    """m = b1 m + (1 - b1) D; theta += learning_rate m / (sqrt(v) + tau)."""
    check_number(at_least=0, learning_rate=learning_rate, v0=v0 or 0)
    check_number(at_least=0, below=1, b1=b1)
    check_number(above=0, tau=tau)

    def init(params):
        start = tau**2 if v0 is None else v0
        v = jax.tree.map(lambda x: jnp.full_like(x, start), params)
        return FedOptState(jax.tree.map(jnp.zeros_like, params), v)

    def update(gradient, state, params=None):
        del params
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, gradient)
        v = jax.tree.map(lambda v, g: second(v, jnp.square(g)), state.v, gradient)
        step = jax.tree.map(lambda m, v: -learning_rate * m / (jnp.sqrt(v) + tau), m, v)
        return step, FedOptState(m, v)

    return optax.GradientTransformation(init, update)


FEDOPT: dict[str, Callable[..., optax.GradientTransformation]] = {
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
}
