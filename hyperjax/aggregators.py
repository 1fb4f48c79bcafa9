"""How a server combines the uplinks of a cohort into one tree."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.types import Array, PyTree, in_one_line


class Aggregator(NamedTuple):
    """Combines stacked uplinks; `state` is whatever it keeps between exchanges."""

    init: Callable  # (spec) -> state
    combine: Callable  # (key, stacked [C, ...], weight [C], state) -> (tree, state)
    is_mean: bool = False  # combines to the weighted mean, and keeps nothing
    # Where the state is () and sums over clients are all it takes: what to add up, and
    # what follows from the sums.
    sums: Callable | None = None  # (stacked [B, ...], weight [B]) -> tree of sums
    of_sums: Callable | None = None  # (sums) -> tree

    def __repr__(self) -> str:
        return in_one_line(self)


@jax.jit
def mean_over_clients(stacked: PyTree, weight: Array) -> PyTree:
    """Averages a tree over its leading client axis.

    Args:
      stacked: leaves [C, ...], float; rows of inactive clients must be zero.
      weight: [C] float32, non-negative; need not sum to one.

    Returns:
      Leaves [...], same dtypes. All zeros if `weight` sums to zero.

    Raises:
      ValueError: a leaf's leading axis is not C (the message names its path).

    Example:
      >>> mean_over_clients({"w": jnp.array([1.0, 3.0])}, jnp.array([1.0, 1.0]))
      {'w': Array(2., dtype=float32)}

    Reference: McMahan et al. 2017, algorithm 1 (arXiv:1602.05629).
    """
    total = jnp.sum(weight)
    share = weight / jnp.where(total > 0, total, 1.0)

    def average(path, x):
        if x.ndim == 0 or x.shape[0] != weight.shape[0]:
            raise ValueError(
                f"leaf {jax.tree_util.keystr(path)} has shape {x.shape}; its leading "
                f"axis must be the {weight.shape[0]} clients of the cohort"
            )
        # Full precision: accelerators would otherwise round parameters to TF32.
        mean = jnp.tensordot(
            share, x.astype(jnp.float32), axes=1, precision=jax.lax.Precision.HIGHEST
        )
        return mean.astype(x.dtype)

    return jax.tree_util.tree_map_with_path(average, stacked)


def sum_over_clients(stacked: PyTree, weight: Array) -> PyTree:
    """Returns sums over the leading axis, weighted by [C] float32: leaves [...]."""
    exact = jax.lax.Precision.HIGHEST  # as for means
    return jax.tree.map(
        lambda x: jnp.tensordot(weight, x.astype(jnp.float32), 1, precision=exact),
        stacked,
    )


def over(sums: PyTree, total: Array) -> PyTree:
    """Returns sums divided by a total, zeros if that is zero."""
    return tree.scale(sums, 1.0 / jnp.where(total > 0, total, 1.0))


def weighted_mean() -> Aggregator:
    """The weighted average of FedAvg; keeps no state."""
    return Aggregator(
        init=lambda spec: (),
        combine=lambda key, stacked, weight, state: (
            mean_over_clients(stacked, weight),
            state,
        ),
        is_mean=True,
        sums=lambda stacked, weight: (
            sum_over_clients(stacked, weight),
            jnp.sum(weight),
        ),
        of_sums=lambda sums: over(*sums),
    )
