"""Clients with a few classes alone."""

from collections.abc import Sequence

import numpy as np

from hyperjax.data.partition.dealing import (
    check,
    check_classes,
    classes_of,
    deal,
    hold,
)
from hyperjax.errors import check_at_least, check_number


def pathological(
    rng: np.random.Generator,
    y: np.ndarray,
    num_clients: int,
    *,
    classes_per_client: int,
) -> Sequence[np.ndarray]:
    """Gives every client samples of a fixed number of classes.

    Each class gets `N * classes_per_client // K` holders, and classes drawn at random
    get one more until all places are taken; with fewer places than classes, the classes
    without a place stay unused. A class is split over its holders in shares that differ
    by one at most.

    Args:
      rng: the only source of randomness.
      y: [n] integer labels of K distinct values.
      num_clients: number of clients, N.
      classes_per_client: classes of each client, 1 to K.

    Returns:
      N arrays of indices into `y`, int64; together all samples of the held classes.

    Raises:
      ValueError: `y` is no label array, `classes_per_client` is out of range, there are
        more clients than samples, or a class has fewer samples than holders.
    """
    y, classes, sizes = classes_of(y, num_clients, classes_per_client)
    places, rest = divmod(num_clients * classes_per_client, len(classes))
    left = np.full(len(classes), places)
    left[rng.permutation(len(classes))[:rest]] += 1
    held = hold(rng, num_clients, left, classes_per_client)
    holders = held.sum(axis=0)
    if (holders > sizes).any():
        k = np.argmax(holders - sizes)
        raise ValueError(
            f"class {classes[k]} has {sizes[k]} samples for {holders[k]} clients; "
            f"lower num_clients={num_clients} or classes_per_client="
            f"{classes_per_client}"
        )
    counts = np.zeros((num_clients, len(classes)), np.int64)
    for k in np.flatnonzero(holders):
        whole, rest = divmod(sizes[k], holders[k])
        share = whole + (np.arange(holders[k]) < rest)
        counts[rng.permutation(np.flatnonzero(held[:, k])), k] = share
    return deal(rng, y, counts)


def class_shares(
    rng: np.random.Generator,
    y: np.ndarray,
    num_clients: int,
    *,
    classes_per_client: int,
    low: float = 0.4,
    high: float = 0.6,
) -> Sequence[np.ndarray]:
    """Gives every client an uneven share of each of a fixed number of classes.

    Each class is cut into `N * classes_per_client // K + 1` shares in proportion to
    weights uniform in [low, high); one client after the other takes a share of each of
    the classes with most shares left, ties at random. The shares left at the end, one
    to K of them, belong to nobody: for 10 classes, 50 clients and 2 classes each, an
    eleventh of the samples. So do the crumbs of shares, which are rounded down.

    A held-out part with the same shares needs `federate(..., stratified=True)`.

    Args:
      rng: the only source of randomness.
      y: [n] integer labels of K distinct values.
      num_clients: number of clients, N.
      classes_per_client: classes of each client, 1 to K.
      low: smallest weight of a share, before they are scaled to sum to one.
      high: largest weight.

    Returns:
      N arrays of indices into `y`, int64.

    Raises:
      ValueError: `y` is no label array, an option is out of range, there are more
        clients than samples, or a client's share of a class is less than one sample.
    """
    y, classes, sizes = classes_of(y, num_clients, classes_per_client)
    _check_weights(low, high)
    num_shares = num_clients * classes_per_client // len(classes) + 1
    left = np.full(len(classes), num_shares)
    held = hold(rng, num_clients, left, classes_per_client)
    counts = np.zeros((num_clients, len(classes)), np.int64)
    for k, size in enumerate(sizes):
        weights = rng.uniform(low, high, num_shares)
        holders = np.flatnonzero(held[:, k])
        shares = weights[: len(holders)] / weights.sum()
        counts[holders, k] = np.floor(size * shares)
    _check_shares(classes, sizes, held, counts)
    return deal(rng, y, counts)


def class_draws(
    rng: np.random.Generator,
    y: np.ndarray,
    num_clients: int,
    *,
    classes_per_client: int,
    low: float = 0.4,
    high: float = 0.6,
) -> Sequence[np.ndarray]:
    """Lets every client draw a fixed number of classes, whatever the others draw.

    Each client draws its classes uniformly, without replacement. A class is divided
    completely among those who drew it, in proportion to weights uniform in [low, high);
    shares are rounded down, and the crumbs go to the first holder. A class that nobody
    drew is nobody's: (1 - classes_per_client / K)**N of the classes on average.

    Args:
      rng: the only source of randomness.
      y: [n] integer labels of K distinct values.
      num_clients: number of clients, N.
      classes_per_client: classes of each client, 1 to K.
      low: smallest weight of a share, before they are scaled to sum to one.
      high: largest weight.

    Returns:
      N arrays of indices into `y`, int64; together all samples of the drawn classes.

    Raises:
      ValueError: `y` is no label array, an option is out of range, there are more
        clients than samples, or a client's share of a class is less than one sample.
    """
    y, classes, sizes = classes_of(y, num_clients, classes_per_client)
    _check_weights(low, high)
    ranked = rng.random((num_clients, len(classes))).argsort(axis=1)
    held = np.zeros((num_clients, len(classes)), bool)
    np.put_along_axis(held, ranked[:, :classes_per_client], True, axis=1)
    weights = np.where(held, rng.uniform(low, high, held.shape), 0.0)
    shares = weights / np.maximum(weights.sum(axis=0), low)  # low: nobody drew it
    counts = np.floor(sizes * shares).astype(np.int64)
    drawn = np.flatnonzero(held.any(axis=0))
    counts[held.argmax(axis=0)[drawn], drawn] += (sizes - counts.sum(axis=0))[drawn]
    _check_shares(classes, sizes, held, counts)
    return deal(rng, y, counts)


def groups(
    rng: np.random.Generator,
    y: np.ndarray,
    num_clients: int,
    *,
    num_groups: int,
    classes_per_client: int,
) -> Sequence[np.ndarray]:
    """Gives clients in equal groups the same classes, which other groups have none of.

    The first N / G clients share the first classes_per_client classes, the next ones
    the next, and so on; a class is split over its clients in shares that differ by one
    at most. Classes beyond those of the last group are nobody's.

    Args:
      rng: the only source of randomness.
      y: [n] integer labels of K distinct values.
      num_clients: number of clients, N, a multiple of the number of groups.
      num_groups: G.
      classes_per_client: classes of each group and so of each client; G times as many
        are K at most.

    Returns:
      N arrays of indices into `y`, int64; together all samples of the first classes.

    Raises:
      ValueError: `y` is no label array, an option is out of range, there are more
        clients than samples, or a class has fewer samples than its group has clients.
    """
    y = check(y, num_clients)
    classes, sizes = np.unique(y, return_counts=True)
    check_at_least(1, num_groups=num_groups)
    check_classes(classes_per_client, len(classes))
    if num_clients % num_groups or num_groups * classes_per_client > len(classes):
        raise ValueError(
            f"num_groups={num_groups} with classes_per_client={classes_per_client} "
            f"takes a multiple of {num_groups} clients and "
            f"{num_groups * classes_per_client} classes; there are num_clients="
            f"{num_clients} and {len(classes)} classes"
        )
    members = num_clients // num_groups
    counts = np.zeros((num_clients, len(classes)), np.int64)
    for k in range(num_groups * classes_per_client):
        first = k // classes_per_client * members
        whole, rest = divmod(sizes[k], members)
        counts[first : first + members, k] = whole + (np.arange(members) < rest)
    held = np.arange(len(classes)) // classes_per_client
    _check_shares(
        classes, sizes, held == np.arange(num_clients)[:, None] // members, counts
    )
    return deal(rng, y, counts)


def _check_weights(low: float, high: float) -> None:
    check_number(above=0, low=low, high=high)
    if low > high:
        raise ValueError(f"low={low} must not exceed high={high}")


def _check_shares(
    classes: np.ndarray, sizes: np.ndarray, held: np.ndarray, counts: np.ndarray
) -> None:
    """Refuses holders [N, K] of a class who get nothing of it."""
    empty = (held & (counts == 0)).any(axis=0)
    if empty.any():
        k = np.argmax(empty)
        raise ValueError(
            f"class {classes[k]} has {sizes[k]} samples for the {held[:, k].sum()} of "
            f"{len(held)} clients who hold it, one of them without a sample; lower "
            "num_clients or classes_per_client"
        )
