"""Index tables of clients, and the batches gathered from them inside compiled code."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.data.arrays import is_tokens
from hyperjax.data.ragged import Ragged, Rows
from hyperjax.data.shift import IDENTITY
from hyperjax.errors import check_choice
from hyperjax.types import Array, Batch, ClientData, Key, Pool, PyTree, in_one_line


class Table(NamedTuple):
    """Which pool rows belong to which client, padded to a rectangle.

    NumPy arrays, or `ragged.Rows`, but for the copy that the engine's device store
    makes.
    """

    rows: Any  # [N, n_max] int32; padding repeats row 0 of the pool
    size: Any  # [N] int32

    def __repr__(self) -> str:
        return in_one_line(self)


_LEVELS = np.arange(256) / 255.0
LEAST = 1e-3  # deviation of images by which one divides, a quarter of a byte's level
LARGE = 2**22  # numbers; a larger rectangle is not made


def table(parts: Sequence[np.ndarray], multiple: int = 1) -> Table:
    """Packs per-client index arrays into a `Table`, n_max rounded up to a multiple.

    Its rows are `ragged.Rows` where the rectangle would be `LARGE`.
    """
    each = Ragged.of(parts)
    size = each.size.astype(np.int32)
    width = -(-max(1, int(size.max(initial=0))) // multiple) * multiple
    kind = np.min_scalar_type(int(each.flat.max(initial=0)))
    # Signed: differences are taken of them. One more than the last has room too.
    short = each.ends.astype(np.min_scalar_type(-len(each.flat) - 1))
    rows = Rows(Ragged(each.flat.astype(kind), short), width)
    return Table(rows if len(size) * width > LARGE else np.asarray(rows), size)


# How inputs are scaled: by the moments of all participants' training pixels, by each
# client's own, by these so that a negative is like its positive, or not at all.
STANDARDISE = ("pool", "client", "signed", "none")
POOLS = ("device", "host")  # where samples are kept


def make_pool(
    x: np.ndarray,
    y: np.ndarray,
    train_rows: np.ndarray,
    *,
    standardise: str = "pool",
    owners: Sequence[np.ndarray] = (),
    shift: np.ndarray | None = None,
    on: str = "device",
) -> Pool:
    """Puts samples where they are kept, with channel moments of the training rows only.

    Columns of a table are channels, and one that is constant is not divided. Tokens
    have no moments: they stay what they are.

    Args:
      x: [n, H, W, ch] uint8, or float32 on a scale of its own; [n, d] float32 features;
        or [n, L] int32 tokens.
      y: [n] int32.
      train_rows: [m] int, rows whose pixels define mean and standard deviation.
      standardise: "pool", "client" (the moments of all of a client's own pixels, of
        which it need tell nobody), "signed" (the same, and what most pixels are is
        below the mean, whether images are negatives or not) or "none" (0 and 1).
      owners: rows of every client, for its own moments and with `shift`.
      shift: [len(owners), S] what each client's images have been through.
      on: "device", or "host": x stays the array it is, also one in a file that is
        mapped to memory, and `some` takes what clients need of it.
    """
    check_choice("pool on", on, POOLS)
    put: Any = jnp.asarray if on == "device" else np.asarray
    if standardise == "none" or is_tokens(x):
        channels = x.shape[-1]
        mean, std = np.zeros(channels), np.ones(channels)
    elif standardise in ("client", "signed"):
        theirs = np.concatenate(owners)
        nobodys = np.setdiff1d(np.arange(len(x)), theirs)
        # Of nobody's samples, if there are any, those together; else everybody's.
        rest = nobodys if len(nobodys) else theirs
        signed = standardise == "signed"
        pairs = [_own_moments(x, rows, signed) for rows in (*owners, rest)]
        mean, std = (np.stack(column) for column in zip(*pairs, strict=True))
    else:
        mean, std = moments(x, train_rows)
        std = _divisor(x, mean, std)
    owner: Any = ()
    told: Any = ()
    if np.ndim(mean) == 2 or shift is not None:
        owner = np.full(len(x), len(owners), np.int32)
        for client, rows in enumerate(owners):
            owner[rows] = client
        owner = put(owner)
    if shift is not None:
        told = jnp.asarray(np.concatenate([shift, IDENTITY[None]]), jnp.float32)
    return Pool(
        put(x),
        put(y, np.int32),
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(std, jnp.float32),
        owner,
        told,
    )


def is_on_host(pool: Pool) -> bool:
    """Returns whether a pool's samples are on the host, see `make_pool`."""
    return isinstance(pool.x, np.ndarray)


def room_for(num: int) -> int:
    """Returns how many samples a pool has that is made for so many: a power of two."""
    return 1 << max(0, num - 1).bit_length()


def some(pool: Pool, *tables: Table, room: int = 0) -> tuple[Pool, list[Table]]:
    """Returns the samples of some clients out of a pool on the host.

    Args:
      pool: of n samples.
      *tables: rows [C, .] of the pool.
      room: how many samples the new pool has, at least as many as the tables name; 0:
        as `room_for`. What is left over repeats the last of them.

    Returns:
      A pool on the host, and the tables with rows of it.
    """
    every = np.concatenate([np.asarray(table.rows).ravel() for table in tables])
    rows, places = np.unique(every, return_inverse=True)
    width = room or room_for(len(rows))
    rows = np.pad(rows, (0, width - len(rows)), mode="edge")
    take: Callable[[Any], Any] = lambda x: np.take(x, rows, axis=0)  # noqa: E731
    owner = pool.owner if isinstance(pool.owner, tuple) else take(pool.owner)
    found, start = [], 0
    for table in tables:
        shape, size = np.shape(table.rows), np.size(table.rows)
        mine = places[start : start + size].reshape(shape).astype(np.int32)
        found.append(Table(mine, table.size))
        start += size
    part = pool._replace(x=take(pool.x), y=take(pool.y), owner=owner)
    return part, found


def _divisor(x: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    """Deviations by which one can divide."""
    if x.ndim > 2:
        return np.maximum(std, LEAST)
    # Features have any scale; less than this is rounding of a constant.
    return np.where(np.asarray(std) > 1e-6 * np.abs(mean), std, 1.0)


def _own_moments(x: np.ndarray, rows: np.ndarray, signed: bool) -> tuple[Any, Any]:
    """Mean and divisor [ch] of somebody's own; the divisor's sign is that of all."""
    mean, std = moments(x, rows)
    divisor = _divisor(x, mean, std)
    return mean, divisor * (_side(x, rows, mean) if signed else 1)


def pool_of_one(
    x: np.ndarray, mean: Any, std: Any, shift: Any = (), *, signed: bool = False
) -> Pool:
    """Returns the pool of somebody's unlabelled samples, scaled as a run's are.

    Args:
      x: [n, ...], see `make_pool`.
      mean, std: those of the run's pool; of clients' own moments, these samples' own
        take the place.
      shift: likewise; what these have been through is not known.
      signed: whether the run's pool was made with the moments "signed".
    """
    mean, std = jnp.asarray(mean), jnp.asarray(std)
    owner: Any = ()
    num = len(x)
    if mean.ndim == 2 or not isinstance(shift, tuple):
        owner = jnp.zeros(num, jnp.int32)
    if mean.ndim == 2:
        own, divisor = _own_moments(np.asarray(x), np.arange(num), signed)
        mean = jnp.asarray([own], jnp.float32)
        std = jnp.asarray([divisor], jnp.float32)
    if not isinstance(shift, tuple):
        shift = jnp.asarray(IDENTITY[None])
    labels = jnp.full(num, -1, jnp.int32)
    return Pool(jnp.asarray(x), labels, mean, std, owner, shift)


def moments(x: np.ndarray, rows: np.ndarray) -> tuple[Any, Any]:
    """Returns mean and deviation [ch] of rows of x, bytes in units of [0, 1]."""
    return (_float_moments if x.dtype.kind == "f" else _moments)(x, rows)


def _moments(x: np.ndarray, rows: np.ndarray) -> tuple[Any, Any]:
    """Mean and deviation [ch] of uint8 pixels in units of [0, 1]."""
    mean, std = [], []
    for share in _shares(x, rows):
        mean.append(share @ _LEVELS)
        std.append(np.sqrt(share @ _LEVELS**2 - mean[-1] ** 2))
    return mean, std


def _shares(x: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Shares [256] of the levels of uint8 pixels, channel by channel.

    Moments by these are exact, and take no float copy of x. Some 4,096 images at a
    time, since indexing by rows copies them.
    """
    often = None
    if len(rows) > len(x):  # some are there several times, and are looked at once
        often = np.bincount(rows, minlength=len(x))
        rows = np.flatnonzero(often)
    pixels = math.prod(x.shape[1:-1])
    for channel in range(x.shape[-1]):
        counts = np.zeros(256)
        for block in np.array_split(rows, max(1, len(rows) // 4096)):
            weight = None if often is None else np.repeat(often[block], pixels)
            counts += np.bincount(x[block, ..., channel].ravel(), weight, 256)
        yield counts / counts.sum()


def _side(x: np.ndarray, rows: np.ndarray, mean: Any) -> float:
    """-1 where the third moment about the mean of all channels is negative, else 1."""
    if x.dtype.kind == "f":
        blocks = np.array_split(rows, max(1, len(rows) // 4096))
        third = sum(float(np.sum((x[b] - np.asarray(mean)) ** 3)) for b in blocks)
    else:
        pairs = zip(_shares(x, rows), mean, strict=True)
        third = sum(share @ (_LEVELS - middle) ** 3 for share, middle in pairs)
    return -1.0 if third < 0 else 1.0


def _float_moments(x: np.ndarray, rows: np.ndarray) -> tuple[Any, Any]:
    """Mean and deviation [ch] of floats [..., ch], added up in float64."""
    blocks = np.array_split(rows, max(1, len(rows) // 4096))
    axes, num = tuple(range(x.ndim - 1)), len(rows) * math.prod(x.shape[1:-1])
    mean = sum(x[block].sum(axes, dtype=np.float64) for block in blocks) / num
    square = sum(np.square(x[block] - mean).sum(axes) for block in blocks) / num
    return mean, np.sqrt(square)


def withhold_labels(data: ClientData) -> ClientData:
    """Returns the same data with every label -1."""
    return data._replace(pool=data.pool._replace(y=jnp.full_like(data.pool.y, -1)))


def gather(pool: Pool, rows: Array, mask: Array) -> Batch:
    """Gathers a normalised float32 batch: rows [B] int32, mask [B] float32."""
    x = pool.x[rows].astype(jnp.float32)
    x = x / 255.0 if pool.x.dtype == jnp.uint8 else x
    mean, std = pool.mean, pool.std
    if mean.ndim == 2:  # everybody's own
        whose = pool.owner[rows]
        axes = range(1, x.ndim - 1)
        mean, std = (jnp.expand_dims(each[whose], axes) for each in (mean, std))
    return Batch((x - mean) / std, pool.y[rows], mask)


def class_shares(data: ClientData, num_classes: int) -> Array:
    """Returns the shares of classes among a client's samples, [K]; all 0 of none."""
    mask = jnp.arange(data.rows.shape[0]) < data.size
    labels = jnp.where(mask, data.pool.y[data.rows], num_classes)
    counts = jnp.zeros(num_classes).at[labels].add(1.0, mode="drop")
    return counts / jnp.maximum(data.size, 1)


def num_batches(size: Array | int, batch_size: Array | int) -> Array | int:
    """Returns ceil(size / batch_size), [] int32."""
    return (size + batch_size - 1) // batch_size


def take(data: ClientData, order: Array, step: Array | int, batch_size: int) -> Batch:
    """Returns batch number `step` of an epoch that visits rows in `order` [n_max].

    It has no more rows than there are: min(batch_size, n_max).
    """
    width = min(batch_size, order.shape[0])
    position = step * batch_size + jnp.arange(width)
    inside = position < data.size
    # Clipped: positions past the end are masked, whatever row they show.
    place = order.at[position].get(mode="clip")
    return gather(data.pool, data.rows[place], inside.astype(jnp.float32))


def shuffled(key: Key, data: ClientData) -> Array:
    """Returns a random order of the client's samples, [n_max] int32, padding last.

    Each position draws its own number, so padding the table with more rows leaves the
    order of the real samples as it was.
    """
    n_max = data.rows.shape[0]
    # One bit less than the padding's number: no draw comes after it, or beside it.
    draw = jax.random.bits(key, (n_max,), jnp.uint32) >> 1
    draw = jnp.where(jnp.arange(n_max) < data.size, draw, jnp.uint32(0xFFFFFFFF))
    return jnp.argsort(draw)


def fold(
    step: Callable[[PyTree, Batch], PyTree],
    carry: PyTree,
    data: ClientData,
    batch_size: int,
) -> PyTree:
    """Folds `step` over the client's samples in stored order, exactly once each."""
    order = jnp.arange(data.rows.shape[0])
    return jax.lax.fori_loop(
        0,
        num_batches(data.size, batch_size),
        lambda i, c: step(c, take(data, order, i, batch_size)),
        carry,
    )
