"""What is shown while a sweep runs: points done, the one at work, time left."""

import collections
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from hyperjax.engine.log import duration
from hyperjax.engine.progress import Progress


class Shown:
    """A line for every point that has ended, above live lines of the one at work."""

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Shows nothing yet.

        Args:
          total: points in all.
          stream: of the lines of points; standard output by default.
          clock: seconds.
        """
        self.total, self.done = total, 0
        self._stream, self._clock = stream, clock
        self._since, self._at_once = clock(), 1
        self._spent: collections.deque[float] = collections.deque(maxlen=8)

    def begin(self, at_once: int = 1) -> None:
        """A point begins, or several side by side."""
        self._since, self._at_once = self._clock(), at_once

    def point(self, name: str, rounds: int) -> Progress:
        """Returns the progress lines of a point, for `train`."""
        return _Point(self, name, rounds)

    def ended(self, name: str, outcome: str, ran: bool = True) -> None:
        """Writes the line of a point; `ran`: it took time, and others will."""
        self.done += 1
        line = f"{self.count()} {name}: {outcome}"
        if ran:
            seconds = self._clock() - self._since
            self._spent.append(seconds / self._at_once)
            line += f" ({duration(seconds)})"
        print(line, file=self._stream or sys.stdout, flush=True)

    def count(self) -> str:
        """Returns "3/18", as wide for every point."""
        return f"{self.done:>{len(str(self.total))}}/{self.total}"

    def left(self) -> str | None:
        """Returns the time left by the points of late; None if unknown."""
        if not self._spent:
            return None
        each = sum(self._spent) / len(self._spent)
        passed = self._clock() - self._since
        waiting = self.total - self.done - 1
        return duration(max(0, waiting) * each + max(0.0, each - passed))

    def line(self) -> tuple[str, float, str]:
        """Returns text, the share that is done, and text."""
        left = self.left()
        rest = f"{self.done}/{self.total}" + (f", {left} left" if left else "")
        return "points", self.done / self.total, rest


class _Point(Progress):
    """Progress lines of a point, under that of the sweep."""

    def __init__(self, sweep: Shown, name: str, rounds: int):
        self._sweep = sweep
        super().__init__(name, rounds)

    def lines(self, width: int) -> list[Any]:
        return [self._sweep.line(), *super().lines(width)]

    def ending(self, width: int) -> str | None:
        return None  # the sweep writes a line about it
