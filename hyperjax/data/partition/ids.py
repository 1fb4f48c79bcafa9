"""Clients that made their samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hyperjax.data.partition.dealing import (
    check,
    gather,
)
from hyperjax.errors import check_at_least


def by_client_id(
    rng: np.random.Generator,
    y: np.ndarray,
    num_clients: int,
    *,
    client_ids: np.ndarray,
    min_size: int = 1,
) -> Sequence[np.ndarray]:
    """Groups samples by who made them.

    Args:
      rng: the only source of randomness.
      y: [n] integer labels.
      num_clients: number of clients, N.
      client_ids: [n] integers or names; samples with equal ids belong together. N of
        the distinct ids are drawn if there are more; the samples of the others are
        nobody's.
      min_size: ids with fewer samples are not drawn.

    Returns:
      N arrays of indices into `y`, int64, by increasing id.

    Raises:
      ValueError: `y` is no label array, an option is out of range, `client_ids` does
        not fit, or fewer than N distinct ids have so many samples.
    """
    y = check(y, num_clients)
    client_ids = check_ids(client_ids, len(y))
    check_at_least(1, min_size=min_size)
    distinct, owner, sizes = np.unique(
        client_ids, return_inverse=True, return_counts=True
    )
    able = np.flatnonzero(sizes >= min_size)
    if len(able) < num_clients:
        few = f", of which {len(able)} have {min_size} samples or more"
        raise ValueError(
            f"num_clients={num_clients}, unseen ones included, but client_ids has only "
            f"{len(distinct)} distinct ids{few if len(able) < len(distinct) else ''}: "
            "lower num_clients or num_novel"
        )
    chosen = np.sort(rng.choice(able, num_clients, replace=False))
    kept = np.flatnonzero(np.isin(owner, chosen))
    return gather(rng, kept, np.searchsorted(chosen, owner[kept]), num_clients)


def check_ids(client_ids: Any, num: int) -> np.ndarray:
    """Returns the ids of who made each of `num` samples, integers or names [n].

    Raises:
      ValueError: another type, shape or number of ids.
    """
    if isinstance(client_ids, np.ma.MaskedArray):
        raise ValueError("client_ids is a masked array: give every sample an id")
    ids = np.asarray(client_ids)
    if ids.ndim != 1:
        raise ValueError(f"client_ids has the shape {ids.shape}, not [{num}]")
    if len(ids) != num:
        raise ValueError(
            f"client_ids: {len(ids)} client ids given for the {num} samples"
        )
    if ids.dtype.kind == "O" and all(isinstance(i, str) for i in ids):  # pandas'
        ids = ids.astype(str)
    if ids.dtype.kind not in "iuUS":
        hint = {"f": "ids.astype(int)", "O": "ids.astype(str)"}.get(ids.dtype.kind, "")
        raise ValueError(
            f"client_ids is {ids.dtype}; ids must be integers or names"
            + (f": {hint}" if hint else "")
        )
    return ids
