"""The page of a sweep that is running: what each point is at, and its accuracies."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperjax.engine import log
from hyperjax.engine.checkpoint import write_atomically
from hyperjax.launch import pages, workdir
from hyperjax.runs.results import SHOWN
from hyperjax.sweeps.live import Shown
from hyperjax.sweeps.record import ENDED, Record

PAGE = "report.html"
_RELOADED = "<script>setTimeout(()=>location.reload(),15000)</script>"


class Page:
    """Writes `report.html` again and again, as often as costs little."""

    SHARE = 0.05  # of the time, at most

    def __init__(self, record: Record, show: Shown):
        self._record, self._show = record, show
        self._next = 0.0
        self.write()

    def write(self, last: bool = False) -> None:
        """Writes it if it is time, or for the last time."""
        began = time.monotonic()
        if last or began >= self._next:
            with self._record.change() as found:  # one process at a time
                draw(self._record.folder, found, self._show.left())
            now = time.monotonic()
            self._next = now + (now - began) / self.SHARE


def draw(folder: Path, found: Mapping[str, Any], left: str | None) -> None:
    """Writes the page, which loads itself anew as long as the sweep runs.

    Args:
      folder: of the sweep.
      found: what `sweep.json` holds.
      left: the time left; None if it is not known yet.
    """
    entries = [*found.get("trials", ()), *found["points"]]
    statuses = [entry["status"] for entry in entries]
    counts = ", ".join(
        f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)
    )
    rest = "" if set(statuses) <= set(ENDED) else f"; about {left or '?'} left"
    rows = [_row(folder, entry) for entry in entries]
    headings = ("run", "status", *(f"{name} %" for name in SHOWN.values()))
    body = [
        pages.header(folder.name, f"{len(entries)} runs: {counts}{rest}"),
        pages.tabular("runs", headings, rows),
        *(
            pages.text(f"{entry['name']}: {entry['message']}", note=True)
            for entry in entries
            if entry["message"]
        ),
        pages.command(found["command"]),
        "" if set(statuses) <= set(ENDED) else _RELOADED,
    ]
    write_atomically(folder / PAGE, pages.page(folder.name, body))


def _row(folder: Path, entry: Mapping[str, Any]) -> list[object]:
    name: object = entry["name"]
    if (folder / entry["name"] / workdir.REPORT).exists():
        name = pages.link(f"{entry['name']}/{workdir.REPORT}", entry["name"])
    scores = _scores(folder / entry["name"])
    return [name, entry["status"], *(scores.get(k) for k in SHOWN)]


def _scores(folder: Path) -> Mapping[str, Any]:
    """The accuracies of a run so far."""
    try:
        return json.loads((folder / workdir.SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (log.read_lines(folder / log.METRICS) or [{}])[-1]
