"""What a run is doing, on a terminal or in a log."""

import collections
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from hyperjax.engine.log import duration

PURPOSE = {  # of programs, by the name they are compiled under
    "rounds": "training",
    "exchange": "training",
    "opening": "training",
    "closing": "training",
    "evaluate": "evaluation",
    "fit": "evaluation",
    "tune": "fine-tuning",
    "deploy": "deployment",
}


class Progress:
    """Says what is done: live lines on a terminal, plain lines elsewhere.

    On a terminal the lines are redrawn a few times a second, so that time is seen to
    pass while one call trains or compiles. They are never wider than the terminal, and
    what is logged or warned of meanwhile goes above them. Elsewhere a line is written
    at most every two seconds, without control characters, and every thirty seconds of
    something that takes long.

    As a context it leaves the terminal in order, whatever happens:

        with Progress("fedavg", 100) as progress:
            progress.stage("reading mnist")
            progress.update(5, {"loss": "0.41"})
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str = "round",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Shows nothing yet.

        Args:
          name: of the run.
          total: how much there is to do, in `unit`.
          unit: one of it.
          stream: standard error by default.
          clock: seconds.
        """
        self._name, self._total, self._unit, self._clock = name, total, unit, clock
        self._stage, self._since = "", clock()
        self._program: str | None = None  # what is being compiled
        self._compiled = 0.0  # seconds, without the program at work
        # (done, seconds of work) at the newest updates, by which the pace is judged.
        self._pace: collections.deque[tuple[int, float]] = collections.deque(maxlen=6)
        self._values: dict[str, tuple[int, str]] = {}  # (done when it was so, value)
        stream = stream or sys.stderr
        live = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._view: _Live | _Lines = (_Live if live else _Lines)(self, stream, clock)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stage(self, what: str) -> None:
        """Shows what is being done from now on."""
        if what != self._stage:
            self._stage, self._since = what, self._clock()
            self._view.show("stage", f"{self._name} | {what}")

    def compiling(self, program: str | None) -> None:
        """Shows that a program is being compiled; None says that it has been."""
        now = self._clock()
        if self._program is not None:
            self._compiled += now - self._since
        self._program, self._since = program, now
        if program is not None:
            self._view.show("stage", f"{self._name} | {self._doing()}")

    def update(self, done: int, values: Mapping[str, str]) -> None:
        """Shows that so much is done, the time left, and `values` in order.

        Live lines keep earlier values of other names, and say when they were so.
        """
        if not self._pace or done > self._pace[-1][0]:
            self._pace.append((done, self._worked()))
        new = {name: (done, value) for name, value in values.items()}
        self._values = new | {k: v for k, v in self._values.items() if k not in new}
        fields = [self._name, self._count(), *self._news()]
        self._view.show("update", " | ".join([*fields, f"left {self.left() or '?'}"]))

    def say(self, text: str) -> None:
        """Writes lines that stay, as they are."""
        self._view.say(text)

    def close(self) -> None:
        """Ends the display; the last values stay on it."""
        self._view.close()

    def left(self) -> str | None:
        """Returns the time left by the pace of late; None if unknown."""
        if len(self._pace) < 2:
            return None
        (first, began), (done, now) = self._pace[0], self._pace[-1]
        whole = (now - began) / (done - first) * (self._total - done)
        return duration(max(0.0, whole - (self._worked() - now)))

    def doing(self) -> str:
        """Returns what is being done, and for how long if that is a second or more."""
        passed = self._clock() - self._since
        return self._doing() + (f", {duration(passed)}" if passed >= 1 else "")

    def going_on(self) -> str:
        """Returns a plain line that says so."""
        return f"{self._name} | {self.doing()}"

    def lines(self, width: int) -> list[Any]:
        """Returns the live lines: text, or (text, share done, text) around a bar."""
        if not self._pace:
            return [fitted([self._name, self.doing()], width)]
        left = self.left()
        rest = self._count() + (f", {left} left" if left else "")
        share = self._done() / self._total if self._total else 1.0
        bar = (self._name, share, rest)
        values = fitted(self._news() + self._olds(), width)
        return [bar, values, self.doing()[:width]]

    def ending(self, width: int) -> str | None:
        """Returns the line that stays; None if nothing was measured."""
        if not self._pace:
            return None
        return fitted([self._name, self._count(), *self._news(), *self._olds()], width)

    def _doing(self) -> str:
        if self._program is None:
            return self._stage
        return f"compiling the {PURPOSE.get(self._program, self._program)} program"

    def _done(self) -> int:
        return self._pace[-1][0] if self._pace else 0

    def _count(self) -> str:
        return f"{self._unit} {self._done()}/{self._total}"

    def _news(self) -> list[str]:
        """The values of the last update."""
        now, values = self._done(), self._values.items()
        return [f"{name} {value}" for name, (done, value) in values if done == now]

    def _olds(self) -> list[str]:
        """The values of the newest update before."""
        now, values = self._done(), self._values.items()
        then = max((done for _, (done, _) in values if done != now), default=None)
        found = [f"{name} {value}" for name, (done, value) in values if done == then]
        return [f"{self._unit} {then}: {found[0]}", *found[1:]] if found else []

    def _worked(self) -> float:
        """Seconds on the clock without those of compilation."""
        now = self._clock()
        return now - self._compiled - (now - self._since if self._program else 0.0)


def fitted(fields: Sequence[str], width: int) -> str:
    """Returns as many whole fields as fit; the first is cut if it must be.

    Example:
      >>> fitted(["run", "loss 0.41", "sent 3 MB"], 20)
      'run | loss 0.41'
    """
    line = fields[0][:width] if fields else ""
    for field in fields[1:]:
        if len(line) + 3 + len(field) > width:
            break
        line += f" | {field}"
    return line


class Silent(Progress):
    """Shows nothing."""

    def __init__(self, *args: object, **options: object):
        pass  # neither a thread nor a terminal

    def stage(self, what: str) -> None: ...

    def compiling(self, program: str | None) -> None: ...

    def update(self, done: int, values: Mapping[str, str]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """Plain lines, not too many: the newest of each kind waits until it may go."""

    EVERY, SLOW = 2.0, 30.0  # seconds

    def __init__(self, progress: Progress, stream: TextIO, clock: Callable):
        self._progress, self._stream, self._clock = progress, stream, clock
        self._written = -math.inf
        self._waiting: dict[str, str] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._ticker: threading.Thread | None = None

    def show(self, kind: str, line: str) -> None:
        with self._lock:
            self._waiting.pop(kind, None)
            self._waiting[kind] = line
            if self._clock() - self._written >= self.EVERY:
                self._write()
        if self._ticker is None:
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()

    def say(self, text: str) -> None:
        with self._lock:
            self._write()
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join()
        self._waiting.pop("stage", None)  # it is over
        self._write()

    def _tick(self) -> None:
        while not self._closed.wait(0.5):
            with self._lock:
                passed = self._clock() - self._written
                if passed >= self.SLOW and not self._waiting:
                    self._waiting["stage"] = self._progress.going_on()
                if passed >= self.EVERY:
                    self._write()

    def _write(self) -> None:
        if self._waiting:
            self._stream.write("".join(f"{x}\n" for x in self._waiting.values()))
            self._stream.flush()
            self._waiting.clear()
            self._written = self._clock()


class _Live:
    """Lines that redraw themselves in place, from the first that is shown."""

    def __init__(self, progress: Progress, stream: TextIO, clock: Callable):
        del clock
        self._progress, self._stream = progress, stream
        self._live: Any = None
        self._handlers: list[logging.StreamHandler] = []

    def show(self, kind: str, line: str) -> None:
        del kind, line
        if self._live is None:
            self._start()

    def say(self, text: str) -> None:
        if self._live is None:
            self._stream.write(text + "\n")
            self._stream.flush()
            return
        from rich.text import Text

        self._live.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        if self._live is None:
            return
        live, self._live = self._live, None
        live.stop()
        for handler in self._handlers:
            handler.setStream(self._stream)
        ending = self._progress.ending(live.console.width)
        if ending is not None:
            self._stream.write(ending + "\n")
            self._stream.flush()

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        mine = self._stream is sys.stderr
        console = Console(file=self._stream, force_terminal=True, force_jupyter=False)
        self._live = Live(
            get_renderable=lambda: self._drawn(console.width),
            console=console,
            transient=True,
            redirect_stdout=mine and sys.stdout.isatty(),
            redirect_stderr=mine,
        )
        self._live.start(refresh=True)
        # A process that is killed must not leave a terminal without its cursor.
        console.show_cursor(True)
        if mine:  # what is logged goes above the lines, not through them
            self._handlers = [h for h in _handlers() if h.stream is self._stream]
            for handler in self._handlers:
                handler.setStream(sys.stderr)

    def _drawn(self, width: int) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        drawn: list[Any] = []
        for line in self._progress.lines(width):
            room = 0
            if not isinstance(line, str):
                name, share, rest = line
                room = width - len(name) - len(rest) - 2
                line = fitted([name, rest], width)
            if room < 8:  # text, or no room for a bar
                drawn.append(Text(line, no_wrap=True, overflow="crop"))
                continue
            grid = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=1.0, completed=share, width=min(room, 40))
            grid.add_row(Text(name), bar, Text(rest))
            drawn.append(grid)
        return Group(*drawn)


def _handlers() -> list[logging.StreamHandler]:
    """Returns what logs to a stream; absl wraps its own in another."""
    inner = (getattr(h, "python_handler", h) for h in logging.root.handlers)
    return [h for h in inner if isinstance(h, logging.StreamHandler)]
