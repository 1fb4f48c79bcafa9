"""Feature shift: what lies between a client's images and how everybody sees them.

A client is described by a row of numbers (`PARAMETERS`): the angle that its images are
turned by, their contrast and so on. The row is drawn from the seed of the data, and
every sample is its client's alone, so pixels are shifted once, by one compiled program,
as the federation is dealt out, and are stored once. Nothing behind it knows of shifts.

    x -> blocks permuted -> turned -> blurred -> 0.5 + contrast (x - 0.5)
      -> times tint of the channel -> plus brightness -> plus noise,
                                          for x in [0, 1], and clipped to it

So much for P(x). Where images of some classes alone are shifted, another few for each
client, P(x | y) differs ("class_rotation"); where classes have each other's label,
P(y | x) does ("label_swap"), which no input tells; how many they are is drawn for each
client, or `classes`. P(y) is the partition's. Some benchmarks have these names the
other way round. `strength` is how far all of it goes.

Whoever never trained has a shift of the same law ("inside"), one in the outer tenth of
the range ("edge"), or one beyond it by half its width at most ("outside"): then no
participant has anything like it. With "corruptions" a client has one kind of several,
and outside are kinds that no participant has.

References: rotations and block permutations, Goodfellow et al. 2013 (arXiv:1312.6211);
blur, noise, contrast and brightness, Hendrycks, Dietterich 2019 (arXiv:1903.12261).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.errors import check_choice, check_number
from hyperjax.types import Array, Key, in_one_line

# Parameter of a client -> its value where nothing is done.
PARAMETERS: dict[str, float] = {
    "angle": 0.0,  # degrees, against the clock
    "contrast": 1.0,  # -1 inverts
    "blur": 0.0,  # pixels, deviation of a Gaussian
    "noise": 0.0,  # deviation, of pixels in [0, 1]
    "blocks": 0.0,  # which permutation of `GRID` x `GRID` blocks; 0: none
    "tint_0": 1.0,  # factor on a channel
    "tint_1": 1.0,
    "tint_2": 1.0,
    "brightness": 0.0,  # added, to pixels in [0, 1]
    "classes": 1.0,  # share of the classes whose images are shifted
    "swapped": 0.0,  # share of the classes that have each other's label
    "order": 0.0,  # which order of classes these two are the first of
}
IDENTITY = np.array(list(PARAMETERS.values()), np.float32)
# Of which class a sample is counts for these; how many classes, for the first two.
BY_CLASS = ("classes", "swapped", "order")
_HOW_MANY = BY_CLASS[:2]
GRID = 4
NOVEL = ("inside", "edge", "outside")
_EDGE, _BEYOND = 0.1, 0.5  # shares of a range
_AT_ONCE = 2048  # images shifted at a time
_STREAM = 0x5417F7  # apart from the draws of the partition, which thus stays as it is
_WHICH, _ORDERS = 97, 98  # of its draws; those of PARAMETERS have their places there


class Range(NamedTuple):
    """A uniform law on [low, high]; of both signs, or of multiples of a step."""

    low: float
    high: float
    mirrored: bool = False  # times -1 or 1
    step: float = 0.0  # rounded down to multiples of it, so high is excluded
    always: bool = False  # whatever the strength, and wherever unseen clients are

    def moved(self, where: str) -> "Range":
        """The range of clients at its edge or outside of it."""
        width = self.high - self.low
        if self.always:
            return self
        if where == "edge":
            return self._replace(low=self.high - _EDGE * width)
        if where == "outside":
            return self._replace(low=self.high, high=self.high + _BEYOND * width)
        return self

    def draw(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Returns [num] values."""
        value = rng.uniform(self.low, self.high, num)
        sign = np.where(rng.random(num) < 0.5, -1.0, 1.0)
        value = value * sign if self.mirrored else value
        return self.stepped(value)

    def drawn(self, key: Key, num: int) -> Array:
        """Returns [num] values, in a program."""
        key, key_sign = jax.random.split(key)
        value = jax.random.uniform(key, (num,), jnp.float32, self.low, self.high)
        sign = jax.random.rademacher(key_sign, (num,), jnp.float32)
        return self.stepped(value * sign if self.mirrored else value, jnp)

    def stepped(self, value: Any, numpy: Any = np) -> Any:
        """Rounds values down to steps, if there are any."""
        return numpy.floor(value / self.step) * self.step if self.step else value


TURNS = (2, 3, 4, 5)  # numbers of groups of clients, whose angles are alike
_ANY_ORDER = Range(0.0, 2.0**20, step=1.0, always=True)
_HALF_TURN, _OFF_ZERO = Range(0.0, 180.0), Range(0.3, 1.0, mirrored=True)
KINDS: dict[str, dict[str, Range]] = {
    "none": {},
    "rotation": {"angle": _HALF_TURN},
    "rotation360": {"angle": Range(0.0, 360.0)},
    **{f"turns{k}": {"angle": Range(0.0, 360.0, step=360 / k)} for k in TURNS},
    "contrast": {"contrast": Range(-1.0, 1.0)},
    "contrast_off_zero": {"contrast": _OFF_ZERO},
    "inversion": {"contrast": Range(1.0, 1.0, mirrored=True)},
    "blur": {"blur": Range(0.0, 3.0)},
    "noise": {"noise": Range(0.0, 0.6)},
    "colour": {f"tint_{i}": Range(0.2, 1.0) for i in range(3)},
    "permutation": {"blocks": Range(0.0, 8.0, step=1.0)},
    "everything": {
        "angle": _HALF_TURN,
        "contrast": _OFF_ZERO,
        "blur": Range(0.0, 1.5),
    },
    "corruptions": {
        "noise": Range(0.1, 0.6),
        "blur": Range(0.5, 3.0),
        "contrast": Range(0.1, 0.6),
        "brightness": Range(0.1, 0.6),
        "angle": Range(10.0, 60.0),
        **{f"tint_{i}": Range(0.1, 0.6) for i in range(3)},
    },
    "class_rotation": {
        "angle": _HALF_TURN,
        "classes": Range(0.1, 0.8, always=True),
        "order": _ANY_ORDER,
    },
    "label_swap": {"swapped": Range(0.2, 0.8), "order": _ANY_ORDER},
}
# Kind -> what differs between clients.
WORDS: dict[str, str] = {
    "none": "nothing",
    "rotation": "images are turned by 0 to 180 degrees",
    "rotation360": "images are turned by any angle",
    **{f"turns{k}": f"images are turned by one of {k} angles" for k in TURNS},
    "contrast": "anything from the negative, by grey, to the image as it is",
    "contrast_off_zero": "the same without what is almost grey",
    "inversion": "half of all clients have negatives",
    "blur": "images are more or less out of focus",
    "noise": "pixels have more or less noise",
    "colour": "channels are darkened, each for itself",
    "permutation": "blocks of images change places",
    "everything": "images are turned, blurred, and of other contrast",
    "corruptions": "a client has noise, blur, low contrast or brightness; outside: "
    "turned or tinted images",
    "class_rotation": "images of some classes, a client's own, are turned",
    "label_swap": "some classes, a client's own, have each other's label",
}
# Kinds of which a client has one: those of everybody, and those of whoever is outside.
_ONE_OF: dict[str, tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]]] = {
    "corruptions": (
        (("noise",), ("blur",), ("contrast",), ("brightness",)),
        (("angle",), ("tint_0", "tint_1", "tint_2")),
    )
}
# Beyond their ranges is what is inside, or nothing.
_TURNS = tuple(f"turns{k}" for k in TURNS)
_WITHOUT_OUTSIDE = ("none", "rotation360", *_TURNS, "inversion", "label_swap")


def _draws(seed: int, number: int) -> list[np.random.Generator]:
    """Those of participants and of unseen clients."""
    return [np.random.default_rng([seed, _STREAM, number, side]) for side in (0, 1)]


class Shift(NamedTuple):
    """How clients' images differ; checked by `shift`."""

    kind: str = "none"
    strength: float = 1.0
    novel: str = "inside"
    classes: float = 0.0

    def __repr__(self) -> str:
        return in_one_line(self)

    def draw(self, seed: int, num_clients: int, num_novel: int) -> np.ndarray:
        """Returns the parameters of clients 0 to N + M - 1, [N + M, S] float32.

        The same seed gives the same participants whatever the unseen clients are.
        """
        columns, sizes = [], (num_clients, num_novel)
        has = self._has(seed, *sizes)
        # Other kinds are far enough outside.
        where = "inside" if has and self.novel == "outside" else self.novel
        for number, (name, identity) in enumerate(PARAMETERS.items()):
            law = KINDS[self.kind].get(name)
            if law is not None and self.classes and name in _HOW_MANY:
                law = Range(self.classes, self.classes, always=True)
            if law is None:
                columns.append(np.full(sum(sizes), identity))
                continue
            ours, theirs = _draws(seed, number)
            values = [
                law.draw(ours, num_clients),
                law.moved(where).draw(theirs, num_novel),
            ]
            strength = 1.0 if law.always else self.strength
            found = identity + strength * (np.concatenate(values) - identity)
            found = law.stepped(found)
            columns.append(np.where(has[name], found, identity) if has else found)
        return np.stack(columns, 1).astype(np.float32)

    def _has(self, seed: int, *sizes: int) -> dict[str, np.ndarray]:
        """Who has which parameter, of a kind of which a client has one; or {}."""
        if self.kind not in _ONE_OF:
            return {}
        everybody, others = _ONE_OF[self.kind]
        outside = self.novel == "outside"
        which = [
            rng.integers(len(of), size=num) + start
            for rng, num, of, start in zip(
                _draws(seed, _WHICH),
                sizes,
                (everybody, others if outside else everybody),
                (0, len(everybody) if outside else 0),
                strict=True,
            )
        ]
        chosen, groups = np.concatenate(which), [*everybody, *others]
        return {n: chosen == i for i, group in enumerate(groups) for n in group}


def shift(
    kind: str = "none",
    *,
    strength: float = 1.0,
    novel: str = "inside",
    classes: float = 0.0,
) -> Shift:
    """Returns a shift of one kind.

    Args:
      kind: a key of `KINDS`.
      strength: how far clients go from the identity, as a share of the kind's range;
        0 changes nothing.
      novel: where in the range unseen clients are: "inside", "edge" or "outside".
      classes: share of the classes that are shifted, of the kinds where some are; 0:
        each client's is drawn.

    Raises:
      ValueError: an unknown choice, a number out of range, a kind without an outside,
        or `classes` of a kind that shifts all of them.
    """
    check_choice("shift", kind, KINDS)
    check_choice("shift_novel", novel, NOVEL)
    check_number(at_least=0, shift_strength=strength)
    if novel != "inside" and kind in _WITHOUT_OUTSIDE:
        able = ", ".join(k for k in KINDS if k not in _WITHOUT_OUTSIDE)
        raise ValueError(
            f"shift_novel={novel!r} has no meaning for shift={kind!r}, which has no "
            f"edge; accepted: inside, or one of the kinds {able}"
        )
    check_number(at_least=0, at_most=1, shift_classes=classes)
    by_class = [k for k, laws in KINDS.items() if set(laws) & set(_HOW_MANY)]
    if classes and kind not in by_class:
        raise ValueError(
            f"shift_classes={classes} has no meaning for shift={kind!r}, which is of "
            f"all classes; accepted: 0, or one of the kinds {', '.join(by_class)}"
        )
    return Shift(kind, float(strength), novel, float(classes))


def varying(parameters: np.ndarray) -> dict[str, np.ndarray]:
    """Returns {parameter: [N]} of those that are not the identity's for everybody.

    "order" says nothing by itself, and is left out. Runs from before there were all
    parameters have the first of them.
    """
    return {
        name: column
        for (name, identity), column in zip(
            PARAMETERS.items(), parameters.T, strict=False
        )
        if name != "order" and np.any(column != np.float32(identity))
    }


def drawn(key: Key, kind: str, num: int, strength: float = 1.0) -> Array:
    """Returns parameters of a kind's law, drawn in a program, [num, S]."""
    columns = []
    for number, (name, identity) in enumerate(PARAMETERS.items()):
        law = KINDS[kind].get(name)
        value = jnp.full(num, identity)
        if law is not None:
            found = law.drawn(jax.random.fold_in(key, number), num)
            strength_of = 1.0 if law.always else strength
            value = law.stepped(identity + strength_of * (found - identity), jnp)
        columns.append(value)
    return jnp.stack(columns, 1)


# Classes ------------------------------------------------------------------------------


def relabelled(
    y: np.ndarray,
    parts: Sequence[np.ndarray],
    parameters: np.ndarray,
    seed: int,
    num_classes: int,
) -> np.ndarray:
    """Returns labels as their clients call them, [n].

    Of a client's order of classes the first have each other's label, in a circle.

    Args:
      y: [n] integers.
      parts: N arrays of indices into `y`, those of each client.
      parameters: [N, S].
      seed: of the orders.
      num_classes: K.
    """
    found = y.copy()
    for part, row in zip(parts, parameters, strict=True):
        num = int(np.rint(row[_place("swapped")] * num_classes))
        names = np.arange(num_classes)
        first = _order(seed, row, num_classes)[:num]
        names[first] = np.roll(first, 1)
        found[part] = names[y[part]]
    return found


def _touched(
    y: np.ndarray,
    parts: Sequence[np.ndarray],
    parameters: np.ndarray,
    seed: int,
    num_classes: int,
) -> np.ndarray:
    """Whether the images of the samples of all parts are shifted, one after another."""
    found = []
    for part, row in zip(parts, parameters, strict=True):
        num = max(1, int(np.rint(row[_place("classes")] * num_classes)))
        found.append(np.isin(y[part], _order(seed, row, num_classes)[:num]))
    return np.concatenate(found)


def _order(seed: int, row: np.ndarray, num_classes: int) -> np.ndarray:
    draw = np.random.default_rng([seed, _STREAM, _ORDERS, int(row[_place("order")])])
    return draw.permutation(num_classes)


# Pixels -------------------------------------------------------------------------------


def apply(
    x: np.ndarray,
    parts: Sequence[np.ndarray],
    parameters: np.ndarray,
    seed: int,
    y: np.ndarray | None = None,
    num_classes: int = 0,
) -> np.ndarray:
    """Returns images as their clients see them.

    Args:
      x: [n, H, W, c] uint8, or float32 on a scale of its own, whose least and greatest
        value then stand for 0 and 1.
      parts: N arrays of indices into `x`, those of each client.
      parameters: [N, S].
      seed: of the noise, which is a sample's own for good.
      y: [n] integer labels, for shifts of some classes.
      num_classes: K, with `y`.

    Returns:
      [n, H, W, c] of the same type. Samples of nobody, and of clients whose parameters
      are the identity's, keep their bits.

    Raises:
      ValueError: images that are not square are turned or permuted, which needs it.
    """
    changed = varying(parameters)
    if not set(changed) - set(BY_CLASS):
        return x
    height, width = x.shape[1:3]
    if "blocks" in changed and (height % GRID or width % GRID):
        raise ValueError(
            f"shift='permutation' moves {GRID} x {GRID} blocks, which images of "
            f"{height}x{width} pixels do not divide into"
        )
    found, floats = x.copy(), x.dtype.kind == "f"
    low, high = (float(x.min()), float(x.max())) if floats else (0.0, 255.0)
    scale = max(high - low, 1e-12)
    tables = _permutations(seed, int(parameters[:, _place("blocks")].max()) + 1)
    key = jax.random.key(seed % 2**32)
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    rows = np.concatenate([np.asarray(part) for part in parts])
    moving = np.any(parameters != IDENTITY, axis=1)[owner]
    if "classes" in changed and y is not None:
        moving &= _touched(y, parts, parameters, seed, num_classes)
    owner, rows = owner[moving], rows[moving]
    names = tuple(sorted(set(changed) - set(BY_CLASS)))
    for start in range(0, len(rows), _AT_ONCE):
        block = rows[start : start + _AT_ONCE]
        given = np.resize(block, _AT_ONCE)  # one shape, one program
        own = parameters[np.resize(owner[start : start + _AT_ONCE], _AT_ONCE)]
        images = (x[given].astype(np.float32) - low) / scale
        shifted = np.asarray(transformed(names, key, images, own, given, tables))
        shifted = shifted[: len(block)] * scale + low
        found[block] = shifted if floats else np.rint(shifted).astype(np.uint8)
    return found


def _place(name: str) -> int:
    return list(PARAMETERS).index(name)


def _permutations(seed: int, num: int) -> np.ndarray:
    """Returns permutations of blocks [num, GRID^2] by number; number 0 is none."""
    draws = [np.random.default_rng([seed, _STREAM, 99, i]) for i in range(num)]
    found = [draw.permutation(GRID**2) for draw in draws]
    found[0] = np.arange(GRID**2)
    return np.stack(found).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def transformed(
    names: tuple[str, ...],
    key: Key,
    x: Array,
    parameters: Array,
    rows: Array,
    tables: Array,
) -> Array:
    """Returns images [B, H, W, c] in [0, 1] as seen under parameters.

    Args:
      names: of the parameters that vary; the others are the identity's.
      key: of the noise.
      x: [B, H, W, c] in [0, 1].
      parameters: [B, S].
      rows: [B] numbers of the samples, each with noise of its own.
      tables: [k, GRID^2] permutations, by number.
    """

    def one(image: Array, values: Array, row: Array) -> Array:
        own: Mapping[str, Array] = {name: values[_place(name)] for name in PARAMETERS}
        if "blocks" in names:
            image = _permuted(image, tables[own["blocks"].astype(jnp.int32)])
        if "angle" in names:
            image = turned(image, own["angle"])
        if "blur" in names:
            image = blurred(image, own["blur"])
        if "contrast" in names:
            image = 0.5 + own["contrast"] * (image - 0.5)
        if any(name.startswith("tint") for name in names):
            tint = jnp.stack([own[f"tint_{i % 3}"] for i in range(image.shape[-1])])
            image = image * tint
        if "brightness" in names:
            image = image + own["brightness"]
        if "noise" in names:
            draw = jax.random.normal(jax.random.fold_in(key, row), image.shape)
            image = image + own["noise"] * draw
        return jnp.clip(image, 0.0, 1.0)

    return jax.vmap(one)(x, parameters, rows)


def turned(
    image: Array, degrees: Array, moved: Array | None = None, outside: str = "constant"
) -> Array:
    """Returns an image [H, W, c] turned about its centre against the clock.

    Bilinear.

    Args:
      image: [H, W, c].
      degrees: [].
      moved: [2] pixels down and to the right, before it is turned; None: not at all.
      outside: a mode of `map_coordinates` for what comes in; "constant": 0.
    """
    height, width, _ = image.shape
    angle = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    centre = (height - 1) / 2, (width - 1) / 2
    down, across = jnp.meshgrid(
        jnp.arange(height) - centre[0], jnp.arange(width) - centre[1], indexing="ij"
    )
    # Where each pixel comes from; rows count downwards.
    coordinates = [cos * down + sin * across + centre[0]]
    coordinates += [cos * across - sin * down + centre[1]]
    if moved is not None:
        coordinates = [x - by for x, by in zip(coordinates, moved, strict=True)]

    def channel(plane):
        return jax.scipy.ndimage.map_coordinates(plane, coordinates, 1, mode=outside)

    return jax.vmap(channel, -1, -1)(image)


def blurred(image: Array, deviation: Array) -> Array:
    """Returns an image [H, W, c] blurred by a Gaussian, scaled up at the edges."""

    def weights(length: int) -> Array:
        distance = jnp.arange(length)[:, None] - jnp.arange(length)
        # At a thousandth of a pixel all but the pixel itself vanish in float32.
        wide = jnp.maximum(deviation, 1e-3)
        kernel = jnp.exp(-0.5 * (distance / wide) ** 2)
        return kernel / jnp.sum(kernel, axis=1, keepdims=True)

    height, width, _ = image.shape
    return jnp.einsum("ih,hwc,jw->ijc", weights(height), image, weights(width))


def _permuted(image: Array, order: Array) -> Array:
    """An image [H, W, c] whose GRID x GRID blocks change places."""
    height, width, channels = image.shape
    size = height // GRID, width // GRID
    blocks = image.reshape(GRID, size[0], GRID, size[1], channels).swapaxes(1, 2)
    blocks = blocks.reshape(GRID**2, *size, channels)[order]
    blocks = blocks.reshape(GRID, GRID, *size, channels).swapaxes(1, 2)
    return blocks.reshape(image.shape)
