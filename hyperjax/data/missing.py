"""Labels and ids that are not there, as NumPy, pandas and people write that."""

from typing import Any

import numpy as np

_FIRST = 3  # positions that a message names


def check_present(given: Any, name: str, among: Any = None) -> None:
    """Raises ValueError if a label or an id is missing.

    None, NaN, NaT and pandas' NA are missing, and among names the empty one.

    Args:
      given: [n, ...], an array or what NumPy makes one of; others are for who reads it.
      name: what gave it, for the message.
      among: bool [n], which of them must be there; None: all.
    """
    values = given
    if not hasattr(given, "dtype"):
        try:  # as they are: of ["a", nan] NumPy makes two names
            values = np.array(given, dtype=object)
        except (TypeError, ValueError):
            return
    values = np.asarray(values)
    if values.dtype.kind == "f":
        missing = np.isnan(values)
    elif values.dtype.kind in "mM":
        missing = np.isnat(values)
    elif values.dtype.kind in "US":
        missing = values == values.dtype.type()
    elif values.dtype.kind == "O":
        flat = [_is_missing(value) for value in values.ravel()]
        missing = np.array(flat, bool).reshape(values.shape)
    else:
        return
    if missing.ndim == 0:
        return
    missing = missing.any(axis=tuple(range(1, missing.ndim)))
    if among is not None and np.shape(among) == missing.shape:
        missing &= np.asarray(among, bool)
    rows = np.flatnonzero(missing)
    if len(rows):
        first = ", ".join(map(str, rows[:_FIRST])) + ", ..." * (len(rows) > _FIRST)
        raise ValueError(
            f"{name}: {len(rows):,} of {len(missing):,} values are missing, at "
            f"{first} (counted from 0); fill them in or leave these samples out"
        )


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, str | bytes):
        return not value
    return isinstance(value, float | np.floating) and bool(np.isnan(value))
