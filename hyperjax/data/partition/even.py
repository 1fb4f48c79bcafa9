"""Clients that are alike."""

from collections.abc import Sequence

import numpy as np

from hyperjax.data.partition.dealing import check, check_share, gather, labels_of
from hyperjax.data.ragged import AT_ONCE, Ragged
from hyperjax.errors import check_at_least, check_number


def iid(
    rng: np.random.Generator,
    y: np.ndarray,
    num_clients: int,
    *,
    samples_per_client: int = 0,
) -> Sequence[np.ndarray]:
    """Deals samples out at random, in shares that differ by one at most.

    Args:
      rng: the only source of randomness.
      y: [n] integer labels.
      num_clients: number of clients, N.
      samples_per_client: as many for each, and the rest for nobody; 0: all samples.

    Returns:
      N arrays of indices into `y`, int64; together all of them, unless they are capped.

    Raises:
      ValueError: `y` is no label array, or there are more clients than samples, or
        fewer samples than are asked for.
    """
    y = check(y, num_clients)
    size = check_share(samples_per_client, num_clients, len(y))
    parts = gather(rng, np.arange(len(y)), np.arange(len(y)) % num_clients, num_clients)
    return [part[:size] for part in parts] if samples_per_client else parts


def bootstrap(
    rng: np.random.Generator,
    y: np.ndarray,
    num_clients: int,
    *,
    alpha: float,
    samples_per_client: int,
    apart: np.ndarray | None = None,
) -> Sequence[np.ndarray]:
    """Draws every client's samples with replacement, whatever the others have drawn.

    So there may be more clients than samples, a million of them over a small data set.
    Each client draws its shares of the classes from a symmetric Dirichlet distribution,
    as by `mixtures`, then the class of each of its samples by those shares, then a
    sample of that class. A client may have a sample several times.

    Args:
      rng: the only source of randomness.
      y: [n] integer labels of K distinct values.
      num_clients: number of clients, N.
      alpha: concentration; small values give clients of few classes.
      samples_per_client: m, how many each client draws.
      apart: [n] bool, samples that are not trained on; of its m each client draws the
        same share of these, m times their share of all, but one and m - 1 at least and
        at most. `federate` says which, so that nobody trains on what others hold out.

    Returns:
      N arrays of m indices into `y`, int64, those apart at the end.

    Raises:
      ValueError: `y` is no label array, an option is out of range, or all samples of a
        class are apart, or none.
    """
    y = labels_of(y)
    check_at_least(1, num_clients=num_clients)
    check_number(above=0, alpha=alpha)
    check_at_least(1 if apart is None else 2, samples_per_client=samples_per_client)
    classes, position = np.unique(y, return_inverse=True)
    groups, nums = [np.ones(len(y), bool)], [samples_per_client]
    if apart is not None:
        share = round(apart.mean() * samples_per_client)
        num = min(max(1, share), samples_per_client - 1)
        groups, nums = [~apart, apart], [samples_per_client - num, num]
    pieces = [slice(i, i + AT_ONCE) for i in range(0, num_clients, AT_ONCE)]
    # Where in [0, 1) the shares of the classes end.
    ends = np.empty((num_clients, len(classes)))
    for some in pieces:
        ends[some] = rng.dirichlet(np.full(len(classes), alpha), len(ends[some]))
        ends[some].cumsum(axis=1, out=ends[some])
    kind = np.int32 if len(y) < 2**31 else np.int64
    drawn, done = np.empty((num_clients, samples_per_client), kind), 0
    for group, num in zip(groups, nums, strict=True):
        places = np.flatnonzero(group)
        places = places[np.argsort(position[places], kind="stable")]
        sizes = np.bincount(position[places], minlength=len(classes))
        if not sizes.all():
            k = np.argmin(sizes)
            raise ValueError(
                f"class {classes[k]} has {np.sum(position == k)} sample(s); clients "
                "need one to train on and another to hold out"
            )
        which = np.zeros((num_clients, num), np.min_scalar_type(len(classes)))
        for some in pieces:
            at = rng.random(which[some].shape)
            # The last class ends at 1, whatever its shares sum to in floating point.
            for end in ends[some, :-1].T:
                which[some] += at >= end[:, None]
        first = sizes.cumsum() - sizes
        for some in pieces:
            mine = which[some]
            among = rng.random(mine.shape) * sizes[mine]
            found = places[first[mine] + among.astype(np.int64)]
            drawn[some, done : done + num] = found
        done += num
    return Ragged.sized(drawn.ravel(), np.full(num_clients, samples_per_client))
