"""Data sets of one's own: files, folders, and functions of a package.

What `load` reads, by the form of the name:

- `mine.npz`: arrays `image` [n, H, W] or [n, H, W, C], uint8 or float, and `label` [n],
  integers or names; or `x` [n, d] of floats, which are features, or [n, L] of integers,
  which are tokens or features as `data.kind` says. Other usual names are found (x, y;
  x_train, y_train, ...), any by `Keys`. `image_test` and `label_test` (or x_test, ...)
  are the set's own test part.
- `table.csv`: a column `label` (or another usual name, or `Keys`), and beside it, and
  the column of clients, columns of numbers, which are features, or as `data.kind` says
  the grey values of an image or tokens; or one column of text.
- `folder/` with a folder of images for each class, or with `train/` and `test/` that
  have these.
- `folder/` with an .npz file for each client, named by the client.
- `folder/` or `file.json` in the format of LEAF (arXiv:1812.01097): `users` and
  `user_data`; of a folder with `train/` and `test/` each user has parts of both.
- `package.module:function`, which returns a `Source`, a pair (x, y), two of these
  (train, test), or a dict with the names of an .npz file.

Where a set says whose each sample is, `Source.client_ids` has it, and the partition
"by_client_id" keeps it, with clients' own test parts.
"""

import importlib.util
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperjax import registry
from hyperjax.data import files
from hyperjax.data.arrays import Keys, Source, checked, from_arrays, require
from hyperjax.data.missing import check_present
from hyperjax.errors import check_choice, first_line, some

ACCEPTED = (
    "of your own: file.npz, table.csv, folder/ (a folder of images for each class), "
    "package.module:function"
)
# What people call images and labels, in the order in which they are looked for.
IMAGES = ("image", "images", "x", "X", "x_train", "X_train", "train_images", "data")
LABELS = ("label", "labels", "y", "y_train", "train_labels", "target")
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff")

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUBS = ("huggingface:", "kaggle:")  # TFDS's own


def is_own(name: str) -> bool:
    """Whether a name is that of a set of one's own, and not TFDS's."""
    return is_path(name) or bool(
        _FUNCTION.fullmatch(name) and not name.startswith(_HUBS)
    )


def is_path(name: str) -> bool:
    """Whether a name is that of a file or folder."""
    ends = (".npz", ".npy", ".csv", ".json", "/", os.sep)
    return name.endswith(ends) or name.startswith(("/", "./", "../", "~"))


def hint(name: str) -> str:
    """Returns a word on a folder of such a name, if there is one."""
    there = Path(name).expanduser().is_dir()
    return f"; of the folder here write {name + '/'!r}" if there else ""


def load(name: str, split: str, test_split: str, keys: Keys, size: int) -> Source:
    """Reads a set of one's own.

    Args:
      name: see above.
      split: "train", or "train+test" for both parts as one.
      test_split: "" or "test": the test part is known in any case.
      keys: names of arrays.
      size: images in a folder are scaled to size x size pixels, averaged where they
        get smaller; 0: they must be of one size.

    Raises:
      ValueError, FileNotFoundError: it is not there, or not such a set.
    """
    if name.startswith("hf:") and importlib.util.find_spec("hf") is None:
        hub = f"huggingface:{name.removeprefix('hf:')}"
        raise ValueError(
            f"data.name={name!r}: a set of the Hugging Face hub is written {hub!r}"
        )
    check_choice("data.split", split, ("train", "train+test"))
    check_choice("data.test_split", test_split, ("", "test"))
    if not is_path(name):
        found = _from_function(name, keys)
    elif name.endswith(".npz"):
        found = _from_arrays(name, files.read_npz(name, "data.name"), keys)
    elif name.endswith(".csv"):
        found = _from_table(name, keys)
    elif name.endswith(".npy"):
        raise ValueError(
            f"data.name={name!r} is one array; write images and labels with "
            "numpy.savez('mine.npz', image=x, label=y)"
        )
    elif name.endswith(".json"):
        if not Path(name).expanduser().is_file():
            raise FileNotFoundError(f"data.name={name!r}: there is no such file")
        found = _from_leaf(name, [Path(name).expanduser()], [], keys)
    else:
        found = _from_folder(name, keys, size)
    found = checked(found._replace(name=name))
    if split == "train+test" and found.client_ids is None:
        return found._replace(test=None)
    return found


# Arrays ------------------------------------------------------------------------------


def _from_arrays(name: str, arrays: Mapping[str, Any], keys: Keys) -> Source:
    """A set of arrays by name."""
    image = _find(name, arrays, keys.image, IMAGES, "data.image_key", "images")
    label = _find(name, arrays, keys.label, LABELS, "data.label_key", "labels")
    x, y = arrays[image], arrays[label]
    tests = _test_name(image, arrays), _test_name(label, arrays)
    for key in (label, tests[1], *filter(arrays.__contains__, [keys.client])):
        if key:  # before parts are joined, and named as they are there
            check_present(arrays[key], f"data.name={name!r}, {key!r}")
    if (tests[0] is None) != (tests[1] is None):
        only = tests[0] or tests[1]
        raise ValueError(
            f"data.name={name!r} has {only!r} without its counterpart: a test part "
            "has images and labels"
        )
    test: Any = None
    if tests[0] and tests[1]:
        theirs = arrays[tests[0]], arrays[tests[1]]
        _check_lengths(name, {tests[0]: theirs[0], tests[1]: theirs[1]})
        _check_lengths(name, {image: x, label: y})
        test = np.arange(len(y) + len(theirs[1])) >= len(y)
        x, y = _append(name, x, theirs[0]), _append(name, y, theirs[1])
    ids: Any = None
    if keys.client:
        check_choice(f"data.client_key of {name!r}", keys.client, list(arrays))
        ids = np.asarray(arrays[keys.client])
        more = _test_name(keys.client, arrays)
        if more is not None:
            ids = _append(name, ids, arrays[more])
        elif test is not None and len(ids) == len(y) - test.sum():
            # Of the test part nobody knows whose it is, so that it is the federation's.
            ids = np.concatenate([ids.astype(str), np.full(int(test.sum()), "")])
    try:
        return from_arrays(x, y, name=name, test=test, client_ids=ids, kind=keys.kind)
    except ValueError as error:
        named = f"data.name={name!r}, x={image!r}, y={label!r}"
        raise ValueError(f"{named}: {error}") from error


def _from_table(name: str, keys: Keys) -> Source:
    """A table: a column of labels, perhaps one of clients, and all others."""
    columns = files.read_table(name, "data.name")
    label = _find(name, columns, keys.label, LABELS, "data.label_key", "labels")
    for field, key in (("image", keys.image), ("client", keys.client)):
        if key:
            check_choice(f"data.{field}_key of {name!r}", key, list(columns))
    given = [keys.image] if keys.image else [*columns]
    given = [key for key in given if key not in (label, keys.client)]
    if not given:
        raise ValueError(f"data.name={name!r} has no column beside {label!r}")
    text = [key for key in given if columns[key].dtype.kind not in "biuf"]
    if text and len(given) > 1:
        raise ValueError(
            f"data.name={name!r}: the column {text[0]!r} is text among "
            f"{len(given) - 1} others; make it numbers (pandas.get_dummies), or name "
            "it by data.client_key if it says whose a row is, by data.image_key if it "
            "alone is to be looked at"
        )
    found: Any = [columns[key] for key in given]
    x = found[0] if text else np.stack(found, axis=1)
    ids = columns[keys.client] if keys.client else None
    kind = keys.kind if text else keys.kind or "features"
    try:
        return from_arrays(x, columns[label], name=name, client_ids=ids, kind=kind)
    except ValueError as error:
        raise ValueError(f"data.name={name!r}, y={label!r}: {error}") from error


def _find(
    name: str,
    arrays: Mapping[str, Any],
    asked: str,
    usual: Sequence[str],
    field: str,
    what: str,
) -> str:
    if asked:
        check_choice(f"{field} of {name!r}", asked, list(arrays))
        return asked
    found = next((key for key in usual if key in arrays), None)
    if found is None:
        raise ValueError(
            f"data.name={name!r} has no array of {what} by a usual name "
            f"({', '.join(usual)}); name one of its arrays by {field}: "
            f"{some(arrays) or 'there are none'}"
        )
    return found


def _test_name(key: str, arrays: Mapping[str, Any]) -> str | None:
    """The name of the test part of an array, if there is one."""
    names = [key.replace("train", "test")] if "train" in key else []
    names += [f"{key}_test", f"test_{key}"]
    return next((name for name in names if name in arrays), None)


def _check_lengths(name: str, arrays: Mapping[str, Any]) -> None:
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key!r} has {n}" for key, n in lengths.items())
        raise ValueError(f"data.name={name!r}: lengths differ: {listed}")


def _append(name: str, first: Any, second: Any) -> np.ndarray:
    a, b = np.asarray(first), np.asarray(second)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"data.name={name!r}: the test part has the shape {b.shape}, the training "
            f"part {a.shape}"
        )
    kinds = {a.dtype.kind, b.dtype.kind}
    if a.dtype != b.dtype and not kinds <= set("iu") and len(kinds) > 1:
        raise ValueError(
            f"data.name={name!r}: the test part is {b.dtype}, the training part "
            f"{a.dtype}"
        )
    return np.concatenate([a, b])


def _from_function(name: str, keys: Keys) -> Source:
    """What a function of a package returns."""
    function = registry.find_object(name, "data.name", "function")
    if not callable(function):
        raise ValueError(
            f"data.name={name!r} is {type(function).__name__}: no function"
        )
    found = function()
    if isinstance(found, Source):
        return found
    if isinstance(found, Mapping):
        return _from_arrays(name, found, keys)
    if isinstance(found, tuple | list) and len(found) == 2:
        parts = [found[0], found[1]]
        if all(isinstance(part, tuple | list) and len(part) == 2 for part in parts):
            (x, y), (x_test, y_test) = parts
            arrays = dict(x=x, y=y, x_test=x_test, y_test=y_test)
            return _from_arrays(name, arrays, keys)
        return _from_arrays(name, dict(x=found[0], y=found[1]), keys)
    raise ValueError(
        f"data.name={name!r} returns {type(found).__name__}; accepted: a pair (x, y), "
        "((x, y), (x_test, y_test)), a dict of arrays, or a hyperjax.Source"
    )


# Clients -----------------------------------------------------------------------------


def from_clients(
    clients: Mapping[Any, Any], name: str = "clients", kind: str = ""
) -> Source:
    """Returns a set that is already divided.

    Args:
      clients: of every client a pair (x, y), two of these (train, test), or a dict of
        arrays with the names of an .npz file.
      name: of the set.
      kind: of samples [n, d], see `from_arrays`.

    Raises:
      ValueError: naming the client whose arrays are none.
    """
    if not clients:
        raise ValueError("there are no clients")
    columns: list[list[Any]] = [[], [], [], []]
    for client, given in clients.items():
        x, y, test = _parts(f"client {client!r}", given)
        for column, value in zip(
            columns, (x, y, test, np.full(len(y), str(client))), strict=True
        ):
            column.append(value)
    shapes = {
        c: (x.shape[1:], "text" if x.dtype.kind == "U" else x.dtype)
        for c, x in zip(clients, columns[0], strict=True)
    }
    first, *others = shapes.items()
    for client, what in others:
        if what != first[1]:
            raise ValueError(
                f"samples of client {client!r} are {what[1]} of shape {what[0]}, those "
                f"of {first[0]!r} {first[1][1]} of shape {first[1][0]}"
            )
    x, y, test, ids = map(np.concatenate, columns)
    marks = test if test.any() else None
    return from_arrays(x, y, name=name, test=marks, client_ids=ids, kind=kind)


def _parts(who: str, given: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples and labels of a client, and which of them are of its test part."""
    if isinstance(given, Mapping):
        image = _find(who, given, "", IMAGES, "x", "samples")
        label = _find(who, given, "", LABELS, "y", "labels")
        parts = [(given[image], given[label])]
        tests = _test_name(image, given), _test_name(label, given)
        if tests[0] and tests[1]:
            parts.append((given[tests[0]], given[tests[1]]))
    elif isinstance(given, tuple | list) and len(given) == 2:
        two = all(isinstance(part, tuple | list) and len(part) == 2 for part in given)
        parts = list(given) if two and not np.isscalar(given[1][0]) else [tuple(given)]
    else:
        raise ValueError(
            f"{who} is {type(given).__name__}; accepted: (x, y), ((x, y), (x_test, "
            "y_test)), or a dict of arrays"
        )
    for part, (_, y) in zip(("labels", "labels of the test part"), parts, strict=False):
        check_present(y, f"{who}, {part}")
    arrays = [(np.asarray(x), np.asarray(y)) for x, y in parts]
    for x, y in arrays:
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            raise ValueError(
                f"{who} has samples of shape {x.shape} and labels of shape {y.shape}"
            )
    sizes = [len(y) for _, y in arrays]
    test = np.repeat([False, True][: len(sizes)], sizes)
    x, y = (_append(who, *c) if len(c) > 1 else c[0] for c in zip(*arrays, strict=True))
    return x, y, test


def _from_leaf(
    name: str, train: Sequence[Path], test: Sequence[Path], keys: Keys
) -> Source:
    """LEAF's JSON: users, num_samples and user_data {user: {x, y}}."""
    parts: list[dict[str, tuple[Any, Any]]] = [{}, {}]
    for part, paths in zip(parts, (train, test), strict=True):
        for path in paths:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                data = content["user_data"]
                part |= {user: (data[user]["x"], data[user]["y"]) for user in data}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"data.name={name!r}: {str(path)!r} is not LEAF's JSON, with "
                    f"user_data of users with x and y ({first_line(error)})"
                ) from error
    clients: dict[str, Any] = {}
    there = {user for user, (_, y) in parts[0].items() if len(y)}
    _warn_of_left_out(name, {*parts[0], *parts[1]} - there)
    for user, (x, y) in parts[0].items():
        if user not in there:
            continue
        pair = _floats(x), np.asarray(y)
        other = parts[1].get(user)
        if other is not None and len(other[1]):
            clients[user] = pair, (_floats(other[0]), np.asarray(other[1]))
        else:
            clients[user] = pair
    return from_clients(clients, name, keys.kind)


def _warn_of_left_out(name: str, clients: Iterable[str]) -> None:
    """Says which clients of a set nobody will see, as there is nothing to train on."""
    if left := sorted(clients):
        from absl import logging

        logging.warning(
            "%r: clients without training samples are left out, %d: %s",
            *(name, len(left), ", ".join(left[:5]) + ", ..." * (len(left) > 5)),
        )


def _floats(x: Any) -> np.ndarray:
    """Numbers of JSON: float32, or as they are."""
    found = np.asarray(x)
    return found.astype(np.float32) if found.dtype.kind == "f" else found


# Folders -----------------------------------------------------------------------------


def _from_folder(name: str, keys: Keys, size: int) -> Source:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data.name={name!r}: there is no such folder")
    if (folder / "checkpoints").is_dir():
        raise ValueError(
            f"data.name={name!r} is the folder of a run, which hyperjax.load_run reads"
        )
    for ending, what in ((".npz", _from_npz_files), (".json", _from_leaf)):
        here = sorted(folder.glob(f"*{ending}"))
        train, test = (sorted((folder / p).glob(f"*{ending}")) for p in PARTS)
        if here:
            return what(name, here, [], keys)
        if train:
            return what(name, train, test, keys)
    return _from_pictures(name, folder, size)


PARTS = ("train", "test")


def _from_npz_files(
    name: str, train: Sequence[Path], test: Sequence[Path], keys: Keys
) -> Source:
    """A file for each client; or one for each of two parts."""
    tests = {path.stem: path for path in test}
    _warn_of_left_out(name, tests.keys() - {path.stem for path in train})
    clients: dict[str, Any] = {}
    for path in train:
        arrays = files.read_npz(str(path), "data.name")
        if path.stem in tests:
            clients[path.stem] = tuple(
                _parts(f"client {path.stem!r}", given)[:2]
                for given in (
                    arrays,
                    files.read_npz(str(tests[path.stem]), "data.name"),
                )
            )
        else:
            clients[path.stem] = arrays
    return from_clients(clients, name, keys.kind)


def _from_pictures(name: str, folder: Path, size: int) -> Source:
    """A folder of images for each class."""
    require("PIL", needed_for=f"reading the images of {name!r}")
    parts = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    if "train" not in parts or not _classes(folder / "train"):
        parts = {"train": folder}
    found: list[tuple[Path, str, bool]] = []
    for part, place in parts.items():
        for cls, paths in _classes(place).items():
            found += [(path, cls, part == "test") for path in paths]
    if not found:
        raise ValueError(
            f"data.name={name!r} has neither folders of images, one for each class "
            f"({', '.join(PICTURES)}), nor .npz or .json files, one for each client"
        )
    x = _stacked(name, [path for path, _, _ in found], size)
    y = np.array([cls for _, cls, _ in found])
    test = np.array([is_test for _, _, is_test in found])
    return from_arrays(x, y, name=name, test=test if test.any() else None)


def pictures(
    name: str, size: int = 0, colours: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images in a folder, in the order of their names.

    Args:
      name: of the folder.
      size: they are scaled to size x size pixels; 0: they must be of one size.
      colours: least number of channels.

    Returns:
      Images [n, H, W, C] uint8, and the names of their files [n].

    Raises:
      ValueError: there are none, they cannot be read, or they differ in size.
    """
    require("PIL", needed_for=f"reading the images of {name!r}")
    folder = Path(name).expanduser()
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"{name!r} has no images in it ({', '.join(PICTURES)})")
    return _stacked(name, paths, size, colours), np.array([p.name for p in paths])


def _stacked(
    name: str, paths: Sequence[Path], size: int, colours: int = 1
) -> np.ndarray:
    """Images of files as one array [n, H, W, C] uint8."""
    images = [_picture(path) for path in paths]
    colours = max(colours, *(image.shape[2] for image in images))
    shapes = {image.shape[:2] for image in images}
    if not size and len(shapes) > 1:
        (a, b), (c, d) = sorted(shapes)[0], sorted(shapes)[-1]
        raise ValueError(
            f"{name!r} has images of {len(shapes)} sizes, from {a}x{b} to "
            f"{c}x{d}: data.resize=32 (with data.shrink=1) makes them 32x32"
        )
    first = (size, size) if size else shapes.pop()
    x = np.empty((len(images), *first, colours), np.uint8)
    for i, image in enumerate(images):
        # Grey images among coloured ones have three equal channels.
        x[i] = scaled(image, size) if size else image
    return x


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Images by the folder that they are in, both in order of names."""
    found = {}
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        paths = sorted(p for p in place.rglob("*") if p.suffix.lower() in PICTURES)
        if paths:
            found[place.name] = paths
    return found


def _picture(path: Path) -> np.ndarray:
    """An image file as [H, W, 1] or [H, W, 3] uint8."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are not bytes (mode {opened.mode})")
            grey = opened.mode in ("1", "L", "LA", "La")
            image = np.asarray(opened.convert("L" if grey else "RGB"))
    except Exception as error:  # decoders raise what they like
        raise ValueError(
            f"{str(path)!r} cannot be read: {first_line(error)}"
        ) from error
    return image[..., None] if grey else image


def scaled(image: np.ndarray, size: int) -> np.ndarray:
    """Returns an image [H, W, c] uint8 at size x size, averaged where it shrinks."""
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image

    def one(channel: np.ndarray) -> np.ndarray:
        made = Image.fromarray(np.ascontiguousarray(channel))
        return np.asarray(made.resize((size, size), Image.Resampling.BILINEAR))

    return np.stack([one(image[..., k]) for k in range(image.shape[2])], axis=-1)


def expand(name: str) -> list[str]:
    """Returns the names that one with braces stands for.

    Example:
      >>> expand("corrupted/{fog,snow}_{1,3}")
      ['corrupted/fog_1', 'corrupted/fog_3', 'corrupted/snow_1', 'corrupted/snow_3']

    Raises:
      ValueError: braces that do not match, or say nothing.
    """
    parts = re.split(r"\{([^{}]*)\}", name)
    choices = [part.split(",") for part in parts[1::2]]
    rest = parts[0::2]
    if any(re.search("[{}]", part) for part in rest) or not all(map(all, choices)):
        raise ValueError(
            f"data.name={name!r}: braces have names with commas between, as in "
            "'cifar10_corrupted/{fog,snow}_3'"
        )
    texts = itertools.product(*choices)
    return [
        "".join(a + b for a, b in zip(rest, (*text, ""), strict=True)) for text in texts
    ]


def absolute(name: str) -> str:
    """Returns a name whose files are found from any folder; others as they are."""
    if not any(map(is_path, expand(name))):
        return name
    path = os.path.abspath(os.path.expanduser(name))
    return path + "/" * name.endswith(("/", os.sep))
