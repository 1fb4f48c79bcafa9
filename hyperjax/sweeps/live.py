"""What is shown while a sweep runs: points done, the one at work, time left."""

import collections
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from statistics import mean
from typing import Any, TextIO

from hyperjax.engine.log import duration
from hyperjax.engine.progress import Progress


class Shown:
    """A line for every point that has ended, above live lines of the one at work."""

    def __init__(
        self,
        programs: Mapping[str, Hashable],
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Shows nothing yet.

        Args:
          programs: {name of a point: what it shares with others of its program}, of all
            points.
          stream: of the lines of points; standard output by default.
          clock: seconds.
        """
        self.total, self.done = len(programs), 0
        self._stream, self._clock = stream, clock
        self._since, self._at_work = clock(), list[str]()
        self._told: set[str] = set()  # of points, what others need not tell again
        self._waiting = dict(programs)  # or at work
        # Seconds of points by program, in their order: the first has it compiled.
        self._spent: dict[Hashable, list[float]] = {}

    def begin(self, *names: str) -> None:
        """A point begins, or several side by side."""
        self._since, self._at_work = self._clock(), list(names)

    def point(self, name: str, rounds: int) -> Progress:
        """Returns the progress lines of a point, for `train`."""
        return _Point(self, name, rounds)

    def ended(self, name: str, outcome: str, ran: bool = True) -> None:
        """Writes the line of a point; `ran`: it took time, and others will."""
        self.done += 1
        program = self._waiting.pop(name, None)
        line = f"{self.count()} {name}: {outcome}"
        if ran:
            seconds = self._clock() - self._since
            each = seconds / max(1, len(self._at_work))
            self._spent.setdefault(program, []).append(each)
            line += f" ({duration(seconds)})"
        self.say(line)

    def say(self, line: str) -> None:
        """Writes a line that stays."""
        print(line, file=self._stream or sys.stdout, flush=True)

    def is_news(self, text: str) -> bool:
        """Whether no point has told this before."""
        news = text not in self._told
        self._told.add(text)
        return news

    def count(self) -> str:
        """Returns "3/18", as wide for every point."""
        return f"{self.done:>{len(str(self.total))}}/{self.total}"

    def left(self) -> str | None:
        """Returns the time left; None before any point has taken some.

        Points cost what others of their program did, and where there are none yet, what
        those of the other programs did on average.
        """
        if not self._spent:
            return None
        at_work = self._expected(n for n in self._at_work if n in self._waiting)
        passed = min(self._clock() - self._since, at_work)
        return duration(self._expected(self._waiting) - passed)

    def _expected(self, names: Iterable[str]) -> float:
        """Seconds that points will take."""
        firsts = [own[0] for own in self._spent.values()]
        others = [each for own in self._spent.values() for each in own[1:]] or firsts
        found = 0.0
        for program, num in collections.Counter(map(self._waiting.get, names)).items():
            if own := self._spent.get(program):
                found += num * mean(own[1:] or own)
            else:
                found += mean(firsts) + (num - 1) * mean(others)
        return found

    def line(self) -> tuple[str, float, str]:
        """Returns text, the share that is done, and text."""
        rest = f"{self.done}/{self.total}, {self.left() or '?'} left"
        return "points", self.done / self.total, rest


class _Point(Progress):
    """Progress lines of a point, under that of the sweep."""

    def __init__(self, sweep: Shown, name: str, rounds: int):
        self._sweep = sweep
        super().__init__(name, rounds)

    def lines(self, width: int) -> list[Any]:
        return [self._sweep.line(), *super().lines(width)]

    def say(self, text: str) -> None:
        if self._sweep.is_news(text):
            super().say(text)

    def ending(self, width: int) -> str | None:
        return None  # the sweep writes a line about it
