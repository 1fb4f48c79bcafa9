"""Arrays in files, as people name them."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from hyperjax.data.arrays import require
from hyperjax.data.ragged import Rows
from hyperjax.errors import check_choice, first_line


def read_array(given: str, field: str) -> np.ndarray:
    """Reads an array from "ids.npy" or "file.npz:key".

    Args:
      given: a path, absolute, relative or from "~"; an .npz file with a key.
      field: what gave it, for messages.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, or has no such array.
    """
    path, separator, key = given.partition(".npz:")
    path = path + ".npz" if separator else path
    arrays = _load(path, given, field, only=key)
    names = list(arrays)
    alone = names == [""]
    if alone and key:
        raise ValueError(f"{field}={given!r} is one array and has no keys")
    if not alone and not key:
        accepted = ", ".join(f"{path}:{name}" for name in names)
        raise ValueError(
            f"{field}={given!r} does not say which array; accepted: {accepted}"
        )
    if key not in names:
        check_choice(f"key of {field}", key, names)
    return np.asarray(arrays[key])


def read_npz(path: str, field: str) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file, by name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, or holds objects.
    """
    found = _load(path, path, field)
    if list(found) == [""]:
        raise ValueError(
            f"{field}={path!r} is one array; write images and labels with "
            "numpy.savez(file, image=x, label=y)"
        )
    return found


def read_table(path: str, field: str) -> dict[str, np.ndarray]:
    """Reads the columns of a CSV file, by their names in its first line.

    Returns:
      Columns [n] of integers, floats, or text as objects.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, a column has no name, or a value is missing.
    """
    require("pandas", needed_for=f"reading {path!r}")
    import pandas

    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{field}={path!r}: there is no file {path!r}")
    try:
        table = pandas.read_csv(file)
    except Exception as error:  # parsers and decoders raise what they like
        raise ValueError(
            f"{field}={path!r} cannot be read as CSV ({first_line(error)})"
        ) from error
    columns = {str(name): table[name].to_numpy() for name in table}
    for number, name in enumerate(columns, 1):
        if name.startswith("Unnamed: "):
            raise ValueError(
                f"{field}={path!r}: column {number} has no name; an index is left out "
                "by table.to_csv(file, index=False)"
            )
        missing = np.flatnonzero(table[name].isna().to_numpy())
        if len(missing):
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ValueError(
                f"{field}={path!r}: column {name!r} has no value in row "
                f"{missing[0] + 1}{others}"
            )
    return columns


def write_npz(path: str | os.PathLike, **arrays: Any) -> None:
    """Writes arrays to a compressed .npz file; of `ragged.Rows` a piece at a time.

    The file is never half written. Compression is the fastest: most of such rows is
    padding.
    """
    part = Path(path).with_name(f".part-{Path(path).name}")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        entry = archive.open  # of bytes, whose mode is "w" here
        for name, array in arrays.items():
            with entry(f"{name}.npy", "w", force_zip64=True) as file:
                if not isinstance(array, Rows):
                    np.lib.format.write_array(file, np.asarray(array))
                    continue
                kind = np.lib.format.dtype_to_descr(array.dtype)
                header = dict(descr=kind, fortran_order=False, shape=array.shape)
                np.lib.format.write_array_header_1_0(file, header)
                for piece in array.pieces():
                    file.write(piece.data)
    os.replace(part, path)


def _load(path: str, given: str, field: str, only: str | None = None) -> dict[str, Any]:
    """Arrays by name, "" for one that has none; of others than `only`, None."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{field}={given!r}: there is no file {path!r}")
    try:
        with open(file, "rb") as opened:
            content: Any = np.load(opened, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return {"": content}
            return {
                name: content[name] if only in (None, name) else None
                for name in content
            }
    except Exception as error:  # NumPy, zip and zlib raise what they like
        raise ValueError(
            f"{field}={given!r} cannot be read as .npy or .npz ({first_line(error)}); "
            "write it anew with np.save or np.savez, without objects"
        ) from error
