"""Clients with other shares of all classes."""

from collections.abc import Sequence

import numpy as np

from hyperjax.data.partition.dealing import (
    check,
    check_share,
    classes_of,
    deal,
    fill,
    hold,
)
from hyperjax.errors import check_at_least, check_number


def mixtures(
    rng: np.random.Generator,
    y: np.ndarray,
    num_clients: int,
    *,
    alpha: float,
    samples_per_client: int = 0,
) -> Sequence[np.ndarray]:
    """Gives every client the same number of samples, in a mixture of its own.

    Each client draws its shares of the classes from a symmetric Dirichlet distribution,
    and then its samples, without replacement, class by class by those shares. Where a
    class is used up, the shares of the others are scaled up.

    Args:
      rng: the only source of randomness.
      y: [n] integer labels.
      num_clients: number of clients, N.
      alpha: concentration; small values give clients of few classes.
      samples_per_client: of each client; 0: n / N, which leaves late clients little
        choice.

    Returns:
      N arrays of indices into `y`, int64.

    Raises:
      ValueError: `y` is no label array, an option is out of range, or there are fewer
        samples than are asked for.
    """
    y = check(y, num_clients)
    check_number(above=0, alpha=alpha)
    size = check_share(samples_per_client, num_clients, len(y))
    left = np.unique(y, return_counts=True)[1]
    counts = np.zeros((num_clients, len(left)), np.int64)
    for own in counts:
        fill(rng, own, rng.dirichlet(np.full(len(left), alpha)), size, left)
    return deal(rng, y, counts)


def dirichlet(
    rng: np.random.Generator,
    y: np.ndarray,
    num_clients: int,
    *,
    alpha: float,
    min_size: int = 1,
    max_redraws: int = 1000,
    capped: bool = False,
) -> Sequence[np.ndarray]:
    """Cuts every class in shares drawn from a symmetric Dirichlet distribution.

    The shares of all classes are drawn anew until every client holds `min_size`
    samples. A draw touches counts only and takes milliseconds for 500 clients and 100
    classes; samples are dealt out once, after the last draw.

    The cap evens sizes out: classes are cut in the order of their labels, and a client
    that already holds n / N samples or more has no share in the next ones, while the
    shares of the others are scaled up to sum to one. The others' shares are drawn alone
    instead, which has the same law and cannot end with nothing but zeros; there always
    are others, since all clients together hold fewer than n samples before the last
    class is cut.

    Args:
      rng: the only source of randomness.
      y: [n] integer labels.
      num_clients: number of clients, N.
      alpha: concentration; small values give clients of few classes.
      min_size: fewest samples that a client may hold, 1 or more.
      max_redraws: draws after the first before giving up.
      capped: whether clients that hold their n / N samples get no further class.

    Returns:
      N arrays of indices into `y`, int64; together all of them.

    Raises:
      ValueError: `y` is no label array, an option is out of range, there are too few
        samples, or no draw gave every client `min_size` samples.
    """
    y = check(y, num_clients)
    check_number(above=0, alpha=alpha)
    check_at_least(1, min_size=min_size)
    check_at_least(0, max_redraws=max_redraws)
    if min_size * num_clients > len(y):
        raise ValueError(
            f"min_size={min_size} for each of {num_clients} clients takes "
            f"{min_size * num_clients} samples; there are {len(y)}: lower num_clients, "
            "num_novel or min_size"
        )
    sizes = np.unique(y, return_counts=True)[1]
    best = 0
    for _ in range(max_redraws + 1):
        counts = _cut(rng, sizes, num_clients, alpha, capped)
        smallest = int(counts.sum(axis=1).min())
        if smallest >= min_size:
            return deal(rng, y, counts)
        best = max(best, smallest)
    raise ValueError(
        f"{max_redraws + 1} draws with alpha={alpha} for {num_clients} clients and "
        f"{len(sizes)} classes never gave every client min_size={min_size} samples; "
        f"the smallest client had {best} in the best draw. Raise alpha or max_redraws, "
        "or lower num_clients or min_size"
    )


def majors(
    rng: np.random.Generator,
    y: np.ndarray,
    num_clients: int,
    *,
    classes_per_client: int,
    ratio: float = 16.0,
    samples_per_client: int = 0,
) -> Sequence[np.ndarray]:
    """Gives every client all classes, a few of its own much more often than the others.

    Every class is among the frequent ones of as many clients as any other, but for one.
    Clients have equally many samples; with 200, 2 classes of 10 and a ratio of 16 that
    is 80 of two classes and 5 of each other. Where a class is used up, more of the
    others are drawn.

    Args:
      rng: the only source of randomness.
      y: [n] integer labels of K distinct values.
      num_clients: number of clients, N.
      classes_per_client: frequent classes of each client, 1 to K.
      ratio: how many samples of these there are for one of any other.
      samples_per_client: of each client; 0: n / N.

    Returns:
      N arrays of indices into `y`, int64.

    Raises:
      ValueError: `y` is no label array, an option is out of range, or there are fewer
        samples than are asked for.
    """
    y, classes, sizes = classes_of(y, num_clients, classes_per_client)
    check_number(at_least=1, ratio=ratio)
    size = check_share(samples_per_client, num_clients, len(y))
    each, more = divmod(num_clients * classes_per_client, len(classes))
    places = each + (rng.permutation(len(classes)) < more)
    held = hold(rng, num_clients, places, classes_per_client)
    counts, left = np.zeros(held.shape, np.int64), sizes.copy()
    for own, often in zip(counts, held, strict=True):
        shares = np.where(often, ratio, 1.0)
        shares /= shares.sum()
        own += np.minimum((size * shares + 1e-9).astype(np.int64), left)
        left -= own
        fill(rng, own, shares, size, left)
    return deal(rng, y, counts)


def _cut(
    rng: np.random.Generator,
    sizes: np.ndarray,
    num_clients: int,
    alpha: float,
    capped: bool,
) -> np.ndarray:
    """Draws how many samples of each class each client gets, [N, K] int64."""
    counts = np.zeros((num_clients, len(sizes)), np.int64)
    takers = np.arange(num_clients)
    for k, size in enumerate(sizes):
        if capped:
            takers = np.flatnonzero(counts.sum(axis=1) * num_clients < sizes.sum())
        shares = rng.dirichlet(np.full(len(takers), alpha))
        # Cuts rounded down would leave the crumbs of every class to the last client.
        cuts = np.rint(shares.cumsum() * size).astype(np.int64)
        cuts[-1] = size  # whatever the shares sum to in floating point
        counts[takers, k] = np.diff(cuts, prepend=0)
    return counts
