"""Inputs of somebody whom a run has not met: a file of arrays or a folder of images."""

from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from hyperjax.data import own, sources
from hyperjax.engine import checkpoint
from hyperjax.launch import build

_NAMES = ("image", "x")


def read(
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    data: ml_collections.ConfigDict | None = None,
) -> dict[str, np.ndarray]:
    """Reads inputs, and what is known of them.

    Args:
      path: an .npz file with `image` or `x`, and perhaps `label`; or a folder with
        images in it, which are read in the order of their names.
      shape: of an input of the run.
      dtype: likewise.
      data: the run's `config.data`: images of another size go through its `shrink` and
        `resize`, as the run's own did.

    Returns:
      `x` [n, *shape] of that type, and `label` [n] or `name` [n], of an image's file,
      if there are any.

    Raises:
      ValueError, FileNotFoundError: not such a file, or not what the run takes.
    """
    kind = sources.kind_of(shape, dtype)
    if Path(path).is_dir():
        if kind:
            raise ValueError(f"data={path!r} is a folder; this run takes {kind}, .npz")
        size = data.resize if data and data.shrink == 1 else 0
        x, names = own.pictures(path, size, shape[-1])
        found, key = {"name": names}, "image"
    else:
        found, key = _arrays(path, f"{'x' if kind else 'image'}={dtype} array")
        x = found.pop(key)
    given_as = sources.kind_like(x, shape, dtype)
    if given_as:
        x = sources.check_samples(sources.as_samples(x, key, given_as), key)
    elif x.ndim == len(shape) and shape[-1] == 1:
        x = x[..., None]
    if x.dtype.kind == dtype.kind == "f":
        x = x.astype(dtype)
    if data and not kind and x.ndim == 4 and len(x) and x.shape[1:] != shape:
        nobody = np.zeros(len(x), np.int32)
        x = build.scaled(sources.Source(path, x, nobody, 1, ("",)), data).x
    if x.dtype != dtype or x.shape[1:] != shape or not len(x):
        raise ValueError(
            f"data={path!r}: `{key}` is {x.dtype}{x.shape}; this run takes "
            f"{dtype}(n, {', '.join(map(str, shape))}) with n of at least 1"
        )
    return {**found, "x": x}


def _arrays(path: str, written: str) -> tuple[dict[str, Any], str]:
    """Arrays of a file, and the name of its inputs among them."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"data={path!r}: there is no such file")
    what = f"save a client's inputs as numpy.savez(file, {written}) does"
    content = checkpoint.read_npz(path, what)
    key = next((name for name in _NAMES if name in content), None)
    if key is None:
        raise ValueError(f"data={path!r} has no array 'image' or 'x'; {what}")
    ignored = sorted({*content} - {key, "label"})
    if ignored:
        logging.warning(
            "%s has arrays that are not looked at: %s (%s and label are).",
            *(path, ", ".join(ignored), key),
        )
    return {name: content[name] for name in (key, "label") if name in content}, key
