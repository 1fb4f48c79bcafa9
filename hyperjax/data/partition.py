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

from hyperjax.data.ragged import AT_ONCE, Ragged
from hyperjax.errors import check_at_least, check_choice, check_number


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
    y = _check(y, num_clients)
    size = _check_share(samples_per_client, num_clients, len(y))
    parts = _gather(
        rng, np.arange(len(y)), np.arange(len(y)) % num_clients, num_clients
    )
    return [part[:size] for part in parts] if samples_per_client else parts


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
    y = _check(y, num_clients)
    check_number(above=0, alpha=alpha)
    size = _check_share(samples_per_client, num_clients, len(y))
    left = np.unique(y, return_counts=True)[1]
    counts = np.zeros((num_clients, len(left)), np.int64)
    for own in counts:
        _fill(rng, own, rng.dirichlet(np.full(len(left), alpha)), size, left)
    return _deal(rng, y, counts)


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
    y = _check(y, num_clients)
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
            return _deal(rng, y, counts)
        best = max(best, smallest)
    raise ValueError(
        f"{max_redraws + 1} draws with alpha={alpha} for {num_clients} clients and "
        f"{len(sizes)} classes never gave every client min_size={min_size} samples; "
        f"the smallest client had {best} in the best draw. Raise alpha or max_redraws, "
        "or lower num_clients or min_size"
    )


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
    y, classes, sizes = _classes(y, num_clients, classes_per_client)
    places, rest = divmod(num_clients * classes_per_client, len(classes))
    left = np.full(len(classes), places)
    left[rng.permutation(len(classes))[:rest]] += 1
    held = _hold(rng, num_clients, left, classes_per_client)
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
    return _deal(rng, y, counts)


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
    y, classes, sizes = _classes(y, num_clients, classes_per_client)
    _check_weights(low, high)
    num_shares = num_clients * classes_per_client // len(classes) + 1
    left = np.full(len(classes), num_shares)
    held = _hold(rng, num_clients, left, classes_per_client)
    counts = np.zeros((num_clients, len(classes)), np.int64)
    for k, size in enumerate(sizes):
        weights = rng.uniform(low, high, num_shares)
        holders = np.flatnonzero(held[:, k])
        shares = weights[: len(holders)] / weights.sum()
        counts[holders, k] = np.floor(size * shares)
    _check_shares(classes, sizes, held, counts)
    return _deal(rng, y, counts)


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
    y, classes, sizes = _classes(y, num_clients, classes_per_client)
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
    return _deal(rng, y, counts)


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
    y, classes, sizes = _classes(y, num_clients, classes_per_client)
    check_number(at_least=1, ratio=ratio)
    size = _check_share(samples_per_client, num_clients, len(y))
    each, more = divmod(num_clients * classes_per_client, len(classes))
    places = each + (rng.permutation(len(classes)) < more)
    held = _hold(rng, num_clients, places, classes_per_client)
    counts, left = np.zeros(held.shape, np.int64), sizes.copy()
    for own, often in zip(counts, held, strict=True):
        shares = np.where(often, ratio, 1.0)
        shares /= shares.sum()
        own += np.minimum((size * shares + 1e-9).astype(np.int64), left)
        left -= own
        _fill(rng, own, shares, size, left)
    return _deal(rng, y, counts)


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
    y = _check(y, num_clients)
    classes, sizes = np.unique(y, return_counts=True)
    check_at_least(1, num_groups=num_groups)
    _check_classes(classes_per_client, len(classes))
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
    return _deal(rng, y, counts)


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
    y = _check(y, num_clients)
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
    return _gather(rng, kept, np.searchsorted(chosen, owner[kept]), num_clients)


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
    y = _labels(y)
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


def _labels(y: np.ndarray) -> np.ndarray:
    """Returns `y` as an array of labels."""
    y = np.asarray(y)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"y must be integer labels [n], got {y.dtype} {y.shape}")
    return y


def _check(y: np.ndarray, num_clients: int) -> np.ndarray:
    """Returns `y` as an array of labels that are enough for one each."""
    y = _labels(y)
    check_number(whole=True, num_clients=num_clients)
    if not 1 <= num_clients <= len(y):
        raise ValueError(
            f"num_clients={num_clients} must lie between 1 and the {len(y)} samples"
        )
    return y


def _check_share(samples_per_client: int, num_clients: int, num: int) -> int:
    """Returns how many of `num` samples each client gets."""
    check_at_least(0, samples_per_client=samples_per_client)
    if samples_per_client * num_clients > num:
        raise ValueError(
            f"samples_per_client={samples_per_client} for each of {num_clients} clients"
            f" takes {samples_per_client * num_clients} samples; there are {num}"
        )
    return samples_per_client or num // num_clients


def _check_classes(classes_per_client: int, num_classes: int) -> None:
    check_number(whole=True, classes_per_client=classes_per_client)
    if not 1 <= classes_per_client <= num_classes:
        raise ValueError(
            f"classes_per_client={classes_per_client} must lie between 1 and the "
            f"{num_classes} classes of the labels"
        )


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


def _classes(
    y: np.ndarray, num_clients: int, classes_per_client: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns checked labels, their distinct values and how often each occurs."""
    y = _check(y, num_clients)
    classes, sizes = np.unique(y, return_counts=True)
    _check_classes(classes_per_client, len(classes))
    return y, classes, sizes


def _fill(
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


def _hold(
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


def _deal(rng: np.random.Generator, y: np.ndarray, counts: np.ndarray) -> Ragged:
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
    return _gather(rng, by_class, owner, num_clients + 1)[:-1]


def _gather(
    rng: np.random.Generator, indices: np.ndarray, owner: np.ndarray, num_clients: int
) -> Ragged:
    """Collects each client's indices in random order; `owner` is [len(indices)]."""
    order = rng.permutation(len(indices))
    order = order[np.argsort(owner[order], kind="stable")]
    size = np.bincount(owner, minlength=num_clients)
    return Ragged.sized(indices[order].astype(np.int64), size)
