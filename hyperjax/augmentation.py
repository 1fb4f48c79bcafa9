"""Augmentation: a client's images are shifted once more, another way at every visit.

`with_augmentation(alg, "rotation360")` returns a method whose participants train as
clients of other shifts would: at each visit all images of a client are turned by one
more angle, drawn anew. What conditions a network sees the same images as the network,
so that a condition is trained on more than the participants' own range, and unseen
clients beyond that may be within this. With `each="image"` every image has its own
angle, as networks without a condition are usually trained; a condition then stands for
no shift. What is deployed, adapted, scored and sent is as without, and so are exchanges
before and after that of training.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import calls, rng
from hyperjax.data import clients, shift
from hyperjax.errors import check_choice, check_number
from hyperjax.types import Algorithm, Array, ClientData, ClientSide, Key, Pool

FIELD = "local.augment"
# How a parameter adds to that of the client's own shift.
_TOGETHER: dict[str, Callable] = {
    "angle": jnp.add,
    "blur": jnp.hypot,
    "noise": jnp.hypot,
}
KINDS = tuple(
    k for k, laws in shift.KINDS.items() if laws and laws.keys() <= _TOGETHER.keys()
)
EACH = ("visit", "image")


def with_augmentation(alg: Algorithm, text: str, field: str = FIELD) -> Algorithm:
    """Returns a method whose participants' images are shifted once more.

    Args:
      alg: with or without families.
      text: one of `KINDS` with options of `augment`: "rotation360(each='image')".
      field: for what, for messages.

    Raises:
      ValueError: an unknown name or option.
    """
    return alg.with_clients(factory(text, field))


def factory(text: str, field: str = FIELD) -> Callable[[ClientSide], ClientSide]:
    """Returns what changes a client, of a text; see `with_augmentation`."""
    kind, options = calls.parse(field, text)
    check_choice(field, kind, KINDS)
    return calls.call(field, augment, kind, **options)


def augment(
    kind: str, *, each: str = "visit", strength: float = 1.0
) -> Callable[[ClientSide], ClientSide]:
    """Shifts a client's training images by one of the laws of `data.shift`.

    Args:
      kind: of the law; those that change what moments of inputs undo are left out.
      each: whether a "visit" or an "image" has a shift of its own.
      strength: how far from the identity, as a share of the law's range; above 0.

    Raises:
      ValueError: an unknown choice, or a strength out of range.
    """
    check_choice("each", each, EACH)
    check_number(above=0, strength=strength)

    def change(side: ClientSide) -> ClientSide:
        def update(key, down, client, data):
            key_draw, key_noise = jax.random.split(rng.stream(key, "augment"))
            num = len(data.rows) if each == "image" else 1
            more = shift.drawn(key_draw, kind, num, strength)
            return side.update(key, down, client, _shifted(key_noise, data, kind, more))

        return side._replace(update=update)

    return change


def check_images(x: np.ndarray | Array, field: str = FIELD) -> None:
    """Raises ValueError unless samples [n, ...] are square images of bytes."""
    if x.ndim == 4 and x.dtype == np.uint8 and x.shape[1] == x.shape[2]:
        return
    raise ValueError(
        f"{field} shifts images; accepted: samples [n, H, H, c] of uint8; these are of "
        f"{x.dtype}, {'x'.join(map(str, x.shape[1:]))}"
    )


def _shifted(key: Key, data: ClientData, kind: str, more: Array) -> ClientData:
    """A client's samples under parameters [1 or n_max, S], in a pool of its own."""
    pool, rows = data.pool, data.rows
    places = jnp.arange(len(rows))
    names = tuple(sorted(shift.KINDS[kind]))
    x = pool.x[rows].astype(jnp.float32) / 255.0
    each = jnp.broadcast_to(more, (len(rows), more.shape[1]))
    x = shift.transformed(names, key, x, each, places, jnp.zeros((1, 1), jnp.int32))
    mean, std = pool.mean, pool.std
    if mean.ndim == 2:  # a client's inputs are scaled by moments of their own
        mean, std = _own_moments(x, places < data.size, pool.std[pool.owner[rows[0]]])
    own = jnp.asarray(shift.IDENTITY)
    if not isinstance(pool.shift, tuple):
        own = pool.shift[pool.owner[rows[0]]]
    owner = jnp.zeros_like(places) if len(more) == 1 else places
    mine = Pool(x, pool.y[rows], mean, std, owner, _together(own, more))
    return data._replace(rows=places, pool=mine)


def _together(own: Array, more: Array) -> Array:
    """Parameters of a client's shift [S] and one after it [k, S], [k, S]."""
    own = jnp.broadcast_to(own, more.shape)
    columns = [
        _TOGETHER[name](first, second) if name in _TOGETHER else first
        for name, first, second in zip(shift.PARAMETERS, own.T, more.T, strict=True)
    ]
    return jnp.stack(columns, 1)


def _own_moments(x: Array, real: Array, std: Array) -> tuple[Array, Array]:
    """Mean and divisor [ch] of real images [n, H, W, ch]; its sign is that of `std`."""
    weight = real / (jnp.maximum(jnp.sum(real), 1) * x.shape[1] * x.shape[2])
    mean = jnp.einsum("n,nhwc->c", weight, x)
    square = jnp.einsum("n,nhwc->c", weight, (x - mean) ** 2)
    return mean, jnp.sign(std) * jnp.maximum(jnp.sqrt(square), clients.LEAST)
