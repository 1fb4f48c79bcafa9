"""Splits of a labelled set over clients.

Every partitioner takes `(rng, y, num_clients, **options)` and returns one index array
per client: int64, disjoint but for those of `SHARED`, never empty, in an order drawn
from `rng`. Equal generators give equal partitions. "iid" (unless it is capped) and
"dirichlet" deal out every sample; the others may leave some to nobody, which whoever
asks for a partition should say (`federate` does).

References: Dirichlet label skew, Hsu et al. 2019 (arXiv:1909.06335), in the per-class
form of Yurochkin et al. 2019 (arXiv:1905.12022), with the cap of Li et al. 2022
(arXiv:2102.02079); a few classes per client, McMahan et al. 2017 (arXiv:1602.05629);
uneven shares of a few classes, the code of Shamsian et al. 2021 (arXiv:2103.04628);
a few classes drawn by each client, the code of Zhang et al. 2025 (arXiv:2507.22330);
a few classes that are more frequent, Bao et al. 2023 (arXiv:2310.18816).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hyperjax.data.partition.even import bootstrap, iid
from hyperjax.data.partition.few_classes import (
    class_draws,
    class_shares,
    groups,
    pathological,
)
from hyperjax.data.partition.ids import by_client_id, check_ids
from hyperjax.data.partition.skewed import dirichlet, majors, mixtures
from hyperjax.data.ragged import Ragged
from hyperjax.errors import check_choice

__all__ = (
    "PARTITIONERS",
    "SHARED",
    "bootstrap",
    "by_client_id",
    "check_ids",
    "class_counts",
    "class_draws",
    "class_shares",
    "dirichlet",
    "groups",
    "iid",
    "majors",
    "mixtures",
    "partition",
    "pathological",
)

PARTITIONERS: dict[str, Callable[..., Sequence[np.ndarray]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "mixtures": mixtures,
    "pathological": pathological,
    "class_shares": class_shares,
    "class_draws": class_draws,
    "majors": majors,
    "groups": groups,
    "by_client_id": by_client_id,
    "bootstrap": bootstrap,
}
SHARED = ("bootstrap",)  # clients may have samples in common


def partition(
    name: str, rng: np.random.Generator, y: np.ndarray, num_clients: int, **kwargs: Any
) -> Sequence[np.ndarray]:
    """Splits the samples with labels `y` by the partitioner called `name`.

    Args:
      name: a key of `PARTITIONERS`.
      rng: the only source of randomness.
      y: [n] integer labels.
      num_clients: number of clients, N.
      **kwargs: options of the partitioner.

    Returns:
      N arrays of indices into `y`, int64.

    Raises:
      ValueError: unknown name, unknown or missing options, or what the partitioner
        raises.

    Example:
      >>> parts = partition("iid", np.random.default_rng(0), np.zeros(5, int), 2)
      >>> [len(part) for part in parts]
      [3, 2]
    """
    check_choice("partition", name, PARTITIONERS)
    partitioner = PARTITIONERS[name]
    options = dict(list(inspect.signature(partitioner).parameters.items())[3:])
    for given in kwargs:
        check_choice(f"option of {name}", given, options)
    for needed, option in options.items():
        if option.default is option.empty and kwargs.get(needed) is None:
            raise ValueError(f"partition={name!r} needs {needed}")
    return partitioner(rng, y, num_clients, **kwargs)


def class_counts(
    y: np.ndarray, parts: Sequence[np.ndarray], num_classes: int
) -> np.ndarray:
    """Counts the samples of each class that each client holds.

    Args:
      y: [n] integer labels in [0, num_classes).
      parts: N arrays of indices into `y`.
      num_classes: number of classes, K.

    Returns:
      [N, K] int64, or int16 where that does and there are more than a million counts.

    Raises:
      ValueError: a label is not in [0, num_classes).
    """
    y = np.asarray(y)
    if len(y) and (y.min() < 0 or y.max() >= num_classes):
        raise ValueError(
            f"labels run from {y.min()} to {y.max()}; num_classes={num_classes}"
        )
    each = Ragged.of(parts)
    few = len(each) * num_classes > 10**6 and each.size.max(initial=0) < 2**15
    counts = np.empty((len(each), num_classes), np.int16 if few else np.int64)
    done = 0
    for piece in each.pieces():
        place = piece.owners() * num_classes + y[piece.flat]
        found = np.bincount(place, minlength=len(piece) * num_classes)
        counts[done : done + len(piece)] = found.reshape(-1, num_classes)
        done += len(piece)
    return counts
