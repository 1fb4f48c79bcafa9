"""Samples and labels as arrays, and what is asked of them.

Samples are images [n, H, W, C], uint8 or float32; features [n, d], float32 columns of a
table; or tokens [n, L], int32 numbers of words or characters.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hyperjax.data import partition
from hyperjax.data.missing import check_present
from hyperjax.errors import check_at_least, check_choice, first_line, some

_MOST = 10_000  # classes; labels that are larger are names, ids perhaps
KINDS = ("features", "tokens", "images")  # what samples [n, d] may be


class Keys(NamedTuple):
    """Names of arrays, or paths of features, in a set; "" stands for the usual ones."""

    image: str = ""
    label: str = ""
    client: str = ""  # of whose a sample is; "" for nobody's
    kind: str = ""  # what samples [n, d] are, see `from_arrays`


class Source(NamedTuple):
    """A labelled set in memory.

    A set of your own is `Source("mine", x, y, 10, tuple("0123456789"))`; `federate`
    checks it, see `checked`. Some sets have a test part of their own, or say whose
    each sample is, which the partition "by_client_id" goes by.
    """

    name: str
    # Images [n, H, W, C], uint8 from 0 to 255 or float32 on any scale; features [n, d]
    # float32; or tokens [n, L] int32.
    x: np.ndarray
    y: np.ndarray  # int32 [n], in [0, num_classes)
    num_classes: int
    label_names: tuple[str, ...]  # num_classes of them
    test: np.ndarray | None = None  # bool [n], what is of the test part
    client_ids: np.ndarray | None = None  # [n] integers or names

    def __repr__(self) -> str:
        try:
            what = f"{described(self.x)}, {self.num_classes} classes"
        except (AttributeError, TypeError):  # not checked yet
            what = f"of {type(self.x).__name__}"
        return f"Source({self.name!r}, {what})"


def described(x: Any) -> str:
    """Returns what samples are for people: "1,797 images of 8x8x1"."""
    number, *shape = x.shape
    if len(shape) != 1:
        return f"{number:,} images of {shown_shape(tuple(shape))}"
    rows, parts = ("texts", "tokens") if is_tokens(x) else ("rows", "features")
    return f"{number:,} {rows} of {shape[0]} {parts}"


def shown_shape(shape: tuple[int, ...]) -> str:
    """Returns the shape of an image for people, "28x28x1"."""
    return "x".join(map(str, shape))


def is_tokens(x: Any) -> bool:
    """Whether checked samples are tokens."""
    return x.ndim == 2 and x.dtype.kind == "i"


def kind_of(shape: tuple[int, ...], dtype: Any) -> str:
    """Returns the kind of checked samples of a shape and type, "" of images."""
    if len(shape) == 3:
        return ""
    return "tokens" if np.dtype(dtype).kind == "i" else "features"


def kind_like(x: np.ndarray, shape: tuple[int, ...], dtype: Any) -> str:
    """Returns the kind of samples given as those of a shape and type once were."""
    flat = len(shape) == 3 and np.ndim(x) == 2
    return "images" if flat else kind_of(shape, dtype)


def vocabulary(x: Any) -> int:
    """Returns how many different tokens there may be, the largest and 1; else 0."""
    return int(x.max()) + 1 if is_tokens(x) else 0


def checked(source: Source) -> Source:
    """Returns a set whose arrays are what `Source` says, labels in int32.

    Nothing is guessed: images that may mean two things are refused, with what to write.

    Args:
      source: arrays, or what NumPy makes arrays of; labels of any integer type.

    Raises:
      ValueError: naming the array, what it is and what is accepted.
    """
    if not isinstance(source, Source):
        raise ValueError(
            f"source is {type(source).__name__}; accepted: samples with their labels, "
            "federate(x, y, ...); {client: (x, y)}; or a set, hyperjax.load(name) or "
            "hyperjax.Source(name, x, y, num_classes, label_names)"
        )
    check_at_least(1, num_classes=source.num_classes)
    check_present(source.y, "y")
    check_known(source.client_ids, source.test)
    x = check_samples(source.x, "x")
    y = check_labels(source.y, "y", len(x), source.num_classes)
    names = source.label_names
    if isinstance(names, str) or not hasattr(names, "__len__"):
        raise ValueError(f"label_names={names!r} must be a tuple of names")
    if len(names) != source.num_classes:
        raise ValueError(
            f"label_names has {len(names)} name(s) for num_classes="
            f"{source.num_classes}; accepted: one for each class"
        )
    test, ids = source.test, source.client_ids
    if test is not None:
        test = _array(test, "test")
        if test.dtype != bool or test.shape != y.shape or test.all():
            raise ValueError(
                f"test is {test.dtype} of shape {test.shape}; it must be bool "
                f"{y.shape}, and not True everywhere"
            )
    if ids is not None:
        ids = partition.check_ids(ids, len(y))
    classes = int(source.num_classes)
    return Source(str(source.name), x, y, classes, tuple(map(str, names)), test, ids)


def from_arrays(
    x: Any,
    y: Any,
    *,
    label_names: Sequence[str] | None = None,
    name: str = "arrays",
    test: Any = None,
    client_ids: Any = None,
    kind: str = "",
) -> Source:
    """Returns a set of one's own, checked.

    Args:
      x: [n, H, W] or [n, H, W, C] images, uint8 or float; [n, d] features, floats, or
        a DataFrame of numbers;
        [n, L] tokens, integers with `kind`; [n, H * H] grey images, row by row, with
        `kind`; or [n] texts, whose tokens are their bytes in UTF-8, with zeros behind
        shorter ones.
      y: [n] or [n, 1] labels. Integers from 0 on are classes as they are; other
        integers, and names, are numbered in sorted order.
      label_names: of the classes; by default the labels themselves.
      name: of the set.
      test: bool [n], what is of its test part; None: it has none.
      client_ids: [n] integers or names, whose each sample is; None: nobody's.
      kind: of samples [n, d]: "features", "tokens" or "images"; "": floats are
        features, and integers, which may be any of them, are refused.

    Raises:
      ValueError: arrays that are no labelled samples, naming what is wrong.

    Example:
      >>> x, y = np.zeros((3, 8, 8), np.uint8), ["cat", "dog", "cat"]
      >>> from_arrays(x, y).label_names
      ('cat', 'dog')
    """
    check_present(y, "y")
    check_known(client_ids, test)
    samples, labels = as_samples(x, "x", kind), _array(y, "y")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.dtype.kind not in "iuUSO":
        raise ValueError(
            f"y is {labels.dtype}; labels must be integers or names: y.astype(int)"
        )
    whole = labels.dtype.kind in "iu"
    classes = whole and labels.size and labels.min() == 0 and labels.max() < _MOST
    if labels.ndim == 1 and not classes:
        known, labels = np.unique(
            labels if whole else labels.astype(str), return_inverse=True
        )
        label_names = tuple(map(str, known)) if label_names is None else label_names
    if label_names is None:
        last = int(labels.max()) if labels.dtype.kind in "iu" and labels.size else 0
        label_names = tuple(map(str, range(last + 1)))
    names = tuple(label_names)
    return checked(Source(name, samples, labels, len(names), names, test, client_ids))


def as_samples(given: Any, name: str, kind: str = "") -> np.ndarray:
    """Returns an array that `check_samples` then looks at; see `from_arrays`.

    Raises:
      ValueError: an unknown kind, or one of other samples.
    """
    check_choice("kind", kind, ("", *KINDS))
    if hasattr(given, "columns") and hasattr(given, "dtypes"):  # pandas'
        given, kind = _columns(given, name), kind or "features"
    x = _array(given, name)
    if x.ndim == 1 and x.dtype.kind in "UO" and all(isinstance(t, str) for t in x):
        texts = [text.encode() for text in x]
        width = max(map(len, texts), default=0)
        padded = b"".join(text.ljust(width, b"\0") for text in texts)
        x, kind = np.frombuffer(padded, np.uint8).reshape(len(texts), width), "tokens"
    if kind and x.ndim != 2:
        raise ValueError(
            f"kind={kind!r}: {name} has the shape {x.shape}; {kind} are [n, number]"
        )
    if kind == "features" and x.dtype.kind in "biuf":
        return x.astype(np.float32)
    if kind == "images":
        side = math.isqrt(x.shape[1])
        if side**2 != x.shape[1]:
            raise ValueError(
                f"kind='images': {name} has the shape {x.shape}; flat images are grey "
                f"and square, and {x.shape[1]} is no square number"
            )
        x = x.reshape(-1, side, side, 1)
        return x.astype(np.uint8) if _are_bytes(x) else x  # JSON has no bytes
    if kind == "tokens" and x.dtype.kind == "f":
        raise ValueError(f"{name} is {x.dtype}: floats are no tokens")
    if kind == "tokens" and x.dtype.kind in "iu" and x.size and x.max() < 2**31:
        return x.astype(np.int32)
    if x.ndim == 2 and x.dtype.kind in "biu":
        raise ValueError(
            f"{name} is {x.dtype} of shape {x.shape}, which may be tokens, features or "
            "images: say kind='tokens', 'features' or 'images', in a config data.kind; "
            "images that are not grey and square are x.reshape(n, H, W, channels)"
        )
    if isinstance(given, list) and x.ndim > 2 and _are_bytes(x):
        x = x.astype(np.uint8)  # nor have lists
    return x[..., None] if x.ndim == 3 else x


def _columns(table: Any, name: str) -> np.ndarray:
    """Returns a DataFrame of numbers as an array; with NaN where one is missing."""
    text = [
        str(column)
        for column, kind in zip(table.columns, table.dtypes, strict=True)
        if getattr(kind, "kind", "O") not in "biuf"
    ]
    if text:
        raise ValueError(
            f"{name} is a DataFrame whose columns {some(map(repr, text))} are no "
            "numbers; leave them out, or make them numbers (pandas.get_dummies)"
        )
    if table.isna().to_numpy().any():
        return table.to_numpy(np.float32, na_value=np.nan)
    whole = all(kind.kind in "biu" for kind in table.dtypes)
    return table.to_numpy(np.int64 if whole else np.float32)


def check_known(client_ids: Any, test: Any) -> None:
    """Refuses missing ids; of a test part nobody need know whose it is."""
    if client_ids is not None:
        check_present(
            client_ids, "client_ids", None if test is None else ~np.asarray(test, bool)
        )


def _are_bytes(x: np.ndarray) -> bool:
    """Whether whole numbers are from 0 to 255."""
    return bool(x.dtype.kind in "iu" and x.size and x.min() >= 0 and x.max() <= 255)


def check_samples(samples: Any, name: str) -> np.ndarray:
    """Returns images, features [n, d] float32 or tokens [n, L] int32, n at least 1.

    Raises:
      ValueError: another type or number of axes; see `check_images` and `from_arrays`.
    """
    x = _array(samples, name)
    if x.ndim != 2:
        return check_images(x, name)
    if 0 in x.shape:
        raise ValueError(f"{name} has the shape {x.shape}: there is nothing in it")
    if x.dtype.kind == "f":
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ValueError(f"{name} holds features that are not finite")
        return x
    if x.dtype != np.int32:
        raise ValueError(
            f"{name} is {x.dtype} of shape {x.shape}; images must be [n, height, "
            "width, channels], features float, x.astype(np.float32), and tokens int32, "
            "x.astype(np.int32)"
        )
    if x.min() < 0:
        raise ValueError(f"{name} holds the token {x.min()}; tokens are 0 or above")
    return x


def check_images(images: Any, name: str) -> np.ndarray:
    """Returns images as an array [n, H, W, C] with n of at least 1, uint8 or float32.

    Raises:
      ValueError: another type, number of axes or order of them; see `checked`.
    """
    x = _array(images, name)
    if x.dtype.kind == "f":
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ValueError(f"{name} holds pixels that are not finite")
    elif x.dtype != np.uint8:
        hint = "scale them to 0 to 255, then x.astype(np.uint8)"
        if x.dtype.kind == "b":
            hint = "images of False and True are np.uint8(255) * x"
        raise ValueError(
            f"{name} is {x.dtype} of shape {x.shape}; images must be uint8, 0 to 255, "
            f"or float: {hint}"
        )
    if x.ndim != 4:
        hint = "write x[..., None] for grey images" if x.ndim == 3 else "x.reshape"
        raise ValueError(
            f"{name} has the shape {x.shape}; images must be [n, height, width, "
            f"channels]: {hint}"
        )
    if 0 in x.shape:
        raise ValueError(f"{name} has the shape {x.shape}: there are no pixels in it")
    height, width, channels = x.shape[1:]
    # [n, 1, 28, 28], [n, 3, 4, 4]: all but surely pictures whose channels come first.
    first = height <= 4 < channels and height != width
    square = height in (1, 3) and height != width == channels
    if first or square:
        raise ValueError(
            f"{name} has the shape {x.shape}, which reads as {channels} channels of "
            f"{height}x{width} pixels. Images must be [n, height, width, channels]: "
            "write np.moveaxis(x, 1, -1) if channels come first here, or "
            "x.swapaxes(1, 2) if pictures are really that flat"
        )
    return x


def check_labels(labels: Any, name: str, num: int, num_classes: int) -> np.ndarray:
    """Returns the labels of `num` samples as int32 [n], in [0, num_classes).

    Raises:
      ValueError: another type, shape or number of labels, or one out of range.
    """
    y = _array(labels, name)
    if y.ndim != 1:
        hint = ""
        if y.ndim == 2:
            hint = ": write y[:, 0]" if y.shape[1] == 1 else ": one-hot is y.argmax(1)"
        raise ValueError(
            f"{name} has the shape {y.shape}; labels must be [n], one for each of the "
            f"{num} samples{hint}"
        )
    if len(y) != num:
        raise ValueError(f"there are {num} samples and {len(y)} labels {name}")
    if y.dtype.kind not in "iu":
        hint = "y.astype(int)"
        if y.dtype.kind in "OUS":
            hint = "names, y = np.unique(y, return_inverse=True)"
        raise ValueError(
            f"{name} is {y.dtype}; labels must be integers from 0 to "
            f"{num_classes - 1}: {hint}"
        )
    if y.min() < 0 or y.max() >= num_classes:
        raise ValueError(
            f"{name} has labels from {y.min()} to {y.max()}; num_classes="
            f"{num_classes} takes 0 to {num_classes - 1}"
        )
    return y.astype(np.int32)


def _array(given: Any, name: str) -> np.ndarray:
    """Returns an array, unless NumPy would leave something out or make objects."""
    if isinstance(given, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array: leave the masked ones out first")
    try:
        array = np.asarray(given)
    except ValueError as error:  # rows of different lengths
        raise ValueError(
            f"{name} is no array, its parts differ in shape: {first_line(error)}"
        ) from error
    if array.ndim == 0:
        raise ValueError(f"{name}={given!r} is no array")
    return array


_PACKAGES = {
    "array_record": "array_record",
    "datasets": "datasets",
    "mlxtend": "mlxtend",
    "pandas": "pandas",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "tensorflow": "tensorflow",
    "tensorflow_datasets": "tensorflow-datasets",
}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def require(*modules: str, needed_for: str) -> None:
    """Raises ImportError naming what to install if any of the modules is missing."""
    missing = [_PACKAGES[module] for module in modules if not installed(module)]
    if missing:
        raise ImportError(
            f"{needed_for} needs packages that are not installed; "
            f"pip install {' '.join(missing)}"
        )
