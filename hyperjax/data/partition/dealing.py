"""What partitioners have in common: checks, and samples dealt out by counts."""

import numpy as np

from hyperjax.data.ragged import Ragged
from hyperjax.errors import check_at_least, check_number


def labels_of(y: np.ndarray) -> np.ndarray:
    """Returns `y` as an array of labels."""
    y = np.asarray(y)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"y must be integer labels [n], got {y.dtype} {y.shape}")
    return y


def check(y: np.ndarray, num_clients: int) -> np.ndarray:
    """Returns `y` as an array of labels that are enough for one each."""
    y = labels_of(y)
    check_number(whole=True, num_clients=num_clients)
    if not 1 <= num_clients <= len(y):
        raise ValueError(
            f"num_clients={num_clients} must lie between 1 and the {len(y)} samples"
        )
    return y


def check_share(samples_per_client: int, num_clients: int, num: int) -> int:
    """Returns how many of `num` samples each client gets."""
    check_at_least(0, samples_per_client=samples_per_client)
    if samples_per_client * num_clients > num:
        raise ValueError(
            f"samples_per_client={samples_per_client} for each of {num_clients} clients"
            f" takes {samples_per_client * num_clients} samples; there are {num}"
        )
    return samples_per_client or num // num_clients


def check_classes(classes_per_client: int, num_classes: int) -> None:
    check_number(whole=True, classes_per_client=classes_per_client)
    if not 1 <= classes_per_client <= num_classes:
        raise ValueError(
            f"classes_per_client={classes_per_client} must lie between 1 and the "
            f"{num_classes} classes of the labels"
        )


def classes_of(
    y: np.ndarray, num_clients: int, classes_per_client: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns checked labels, their distinct values and how often each occurs."""
    y = check(y, num_clients)
    classes, sizes = np.unique(y, return_counts=True)
    check_classes(classes_per_client, len(classes))
    return y, classes, sizes


def fill(
    rng: np.random.Generator,
    own: np.ndarray,
    shares: np.ndarray,
    size: int,
    left: np.ndarray,
) -> None:
    """Draws by `shares` [K] what `own` [K] lack of `size`, out of `left` [K]."""
    while missing := size - own.sum():
        # Of classes that are used up nothing; 1e-12 if the others have no share.
        open_ = np.where(left > 0, np.maximum(shares, 1e-12), 0.0)
        more = np.minimum(rng.multinomial(missing, open_ / open_.sum()), left)
        own += more
        left -= more


def hold(
    rng: np.random.Generator, num_clients: int, left: np.ndarray, classes_each: int
) -> np.ndarray:
    """Draws which client holds which class, bool [N, K].

    `left` [K], the places of each class, differ by one at most and are enough.
    """
    left = left.copy()
    held = np.zeros((num_clients, len(left)), bool)
    for client in rng.permutation(num_clients):
        # Most places left first, ties at random: never strands a place (Gale-Ryser).
        ranked = np.lexsort((rng.random(len(left)), -left))
        held[client, ranked[:classes_each]] = True
        left -= held[client]
    return held


def deal(rng: np.random.Generator, y: np.ndarray, counts: np.ndarray) -> Ragged:
    """Deals counts[i, k] random samples of the k-th class to client i.

    A column of `counts` sums to the size of its class at most; the rest is left out.
    """
    num_clients = len(counts)
    position, sizes = np.unique(y, return_inverse=True, return_counts=True)[1:]
    indices = rng.permutation(len(y))
    used = counts.sum(axis=0) > 0
    indices = indices[used[position[indices]]]
    by_class = indices[np.argsort(position[indices], kind="stable")]
    # What is left of a class goes to one more client, who is dropped.
    rest = np.where(used, sizes - counts.sum(axis=0), 0)
    owner = np.repeat(
        np.tile(np.arange(num_clients + 1), counts.shape[1]),
        np.vstack([counts, rest]).T.ravel(),
    )
    return gather(rng, by_class, owner, num_clients + 1)[:-1]


def gather(
    rng: np.random.Generator, indices: np.ndarray, owner: np.ndarray, num_clients: int
) -> Ragged:
    """Collects each client's indices in random order; `owner` is [len(indices)]."""
    order = rng.permutation(len(indices))
    order = order[np.argsort(owner[order], kind="stable")]
    size = np.bincount(owner, minlength=num_clients)
    return Ragged.sized(indices[order].astype(np.int64), size)
