"""Numbers of many clients, of each as many as it has, in one array.

A list of a million small arrays takes some 200 bytes for each of them, and a rectangle
as wide as the largest client mostly holds padding.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np

AT_ONCE = 4096  # clients of whom something is worked out together


class Ragged(Sequence[np.ndarray]):
    """One array of integers per client, [n_i] int64; behaves as a list of them.

    Attributes:
      flat: [n_1 + n_2 + ...], those of one client after another, of any such type.
      ends: [N + 1] int, where clients begin in it, and where the last one ends.
    """

    def __init__(self, flat: np.ndarray, ends: np.ndarray):
        self.flat, self.ends = flat, ends

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> "Ragged":
        """Returns the arrays of a sequence, which may be one already."""
        if isinstance(parts, Ragged):
            return parts
        flat = np.concatenate(parts) if len(parts) else np.zeros(0, np.int64)
        return cls.sized(flat, np.fromiter(map(len, parts), np.int64, len(parts)))

    @classmethod
    def sized(cls, flat: np.ndarray, size: np.ndarray) -> "Ragged":
        """Returns those of clients who have `size` [N] numbers each."""
        return cls(flat, np.append(0, np.cumsum(size, dtype=np.int64)))

    @property
    def size(self) -> np.ndarray:
        """How many numbers each client has, [N] int64."""
        return np.diff(self.ends).astype(np.int64, copy=False)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, which: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, which: slice) -> "Ragged": ...

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            if step != 1:
                raise ValueError("clients are taken in a row")
            ends = self.ends[start : max(start, stop) + 1]
            return Ragged(self.flat[ends[0] : ends[-1]], ends - ends[0])
        place = range(len(self))[which]
        found = self.flat[self.ends[place] : self.ends[place + 1]]
        return found.astype(np.int64, copy=False)

    def pieces(self) -> Iterator["Ragged"]:
        """Yields some clients after others."""
        for start in range(0, len(self), AT_ONCE):
            yield self[start : start + AT_ONCE]

    def map(self, fn: Callable[[np.ndarray], np.ndarray], dtype: Any) -> "Ragged":
        """Returns what a function makes of the numbers, each by itself."""
        found, done = np.empty(len(self.flat), dtype), 0
        for piece in self.pieces():
            found[done : done + len(piece.flat)] = fn(piece.flat)
            done += len(piece.flat)
        return Ragged(found, self.ends)

    def where(self, chosen: np.ndarray) -> "Ragged":
        """Returns the numbers that are chosen, [n_1 + n_2 + ...] bool."""
        size = np.zeros(len(self), np.int64)
        some = self.size > 0  # of others `reduceat` would show the next one's
        if some.any():
            starts = self.ends[:-1][some]
            size[some] = np.add.reduceat(chosen, starts, dtype=np.int64)
        return Ragged.sized(self.flat[chosen], size)

    def owners(self) -> np.ndarray:
        """Whose each number is, [n_1 + n_2 + ...] int64."""
        return np.repeat(np.arange(len(self)), self.size)


class Rows:
    """A `Ragged` that shows the rectangle [N, n_max] it would be, padded with 0.

    What is taken out of it by clients is a NumPy array of int32.

    Attributes:
      parts: numbers that are not negative.
      shape: [N, n_max].
    """

    dtype, ndim = np.dtype(np.int32), 2

    def __init__(self, parts: Ragged, width: int):
        self.parts, self.shape = parts, (len(parts), width)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def nbytes(self) -> int:
        """Of what is kept, not of the rectangle."""
        return self.parts.flat.nbytes + self.parts.ends.nbytes

    def __getitem__(self, which: Any) -> np.ndarray:
        clients, *more = which if isinstance(which, tuple) else (which,)
        if isinstance(clients, slice):
            clients = np.arange(len(self))[clients]
        clients = np.asarray(clients)
        if clients.dtype == bool:
            clients = np.flatnonzero(clients)
        # Negative ones count from the end, as in any array; others are refused.
        clients = np.where(clients < 0, clients + len(self), clients)
        ends, column = self.parts.ends, np.arange(self.shape[1])
        place = ends[clients][..., None] + column
        there = place < ends[clients + 1][..., None]
        found = np.zeros(place.shape, self.dtype)
        found[there] = self.parts.flat[place[there]]
        return found[(slice(None),) * clients.ndim + tuple(more)] if more else found

    def __iter__(self) -> Iterator[np.ndarray]:
        for piece in self.pieces():
            yield from piece

    def pieces(self) -> Iterator[np.ndarray]:
        """Yields the rectangle, some clients after others."""
        column = np.arange(self.shape[1])
        for piece in self.parts.pieces():
            found = np.zeros((len(piece), self.shape[1]), self.dtype)
            found[column < piece.size[:, None]] = piece.flat
            yield found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the rectangle is made when it is asked for")
        whole, done = np.empty(self.shape, dtype or self.dtype), 0
        for piece in self.pieces():
            whole[done : done + len(piece)] = piece
            done += len(piece)
        return whole

    def widened(self, width: int) -> "Rows":
        """Returns the same with at least so many columns."""
        return Rows(self.parts, max(width, self.shape[1]))
