"""Arrays in files, as people name them."""

from pathlib import Path

import numpy as np

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
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{field}={given!r}: there is no file {path!r}")
    try:
        with open(file, "rb") as opened:
            content = np.load(opened, allow_pickle=False)
            alone = isinstance(content, np.ndarray)
            arrays = {"": content} if alone else content
            names = list(arrays)
            array = arrays[key] if key in names else None
    except Exception as error:  # NumPy, zip and zlib raise what they like
        raise ValueError(
            f"{field}={given!r} cannot be read as .npy or .npz ({first_line(error)}); "
            "write it anew with np.save or np.savez, without objects"
        ) from error
    if alone and key:
        raise ValueError(f"{field}={given!r} is one array and has no keys")
    if not alone and not key:
        accepted = ", ".join(f"{path}:{name}" for name in names)
        raise ValueError(
            f"{field}={given!r} does not say which array; accepted: {accepted}"
        )
    if array is None:
        check_choice(f"key of {field}", key, names)
    return np.asarray(array)
