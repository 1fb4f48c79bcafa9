"""The page of a sweep that is running: what each point is at, and its accuracies."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hyperjax.engine import log
from hyperjax.engine.checkpoint import write_atomically
from hyperjax.launch import pages, workdir
from hyperjax.launch.train import SHOWN

PAGE = "report.html"
_RELOADED = "<script>setTimeout(()=>location.reload(),15000)</script>"


def write(folder: Path, found: Mapping[str, Any], left: str | None) -> None:
    """Writes `report.html`, which loads itself anew as long as the sweep runs.

    Args:
      folder: of the sweep.
      found: what `sweep.json` holds.
      left: the time left; None if unknown.
    """
    entries = [*found.get("trials", ()), *found["points"]]
    statuses = [entry["status"] for entry in entries]
    counts = ", ".join(
        f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)
    )
    rest = f"; about {left} left" if left else ""
    fields = list(dict.fromkeys(field for e in entries for field in e["fields"]))
    rows = [_row(folder, entry, fields) for entry in entries]
    table = pages.table(("run", *fields, "status", *SHOWN.values()), rows)
    body = [
        f"<header><h1>{escape(folder.name)}</h1>",
        f'<p class="muted">{len(entries)} runs: {counts}{rest}</p></header>',
        f'<div class="scroll">{table}</div>',
        f"<p><code>{escape(found['command'])}</code></p>",
        _RELOADED,
    ]
    write_atomically(folder / PAGE, pages.page(folder.name, body))


def _row(folder: Path, entry: Mapping[str, Any], fields: list[str]) -> list[object]:
    name = escape(entry["name"])
    if (folder / entry["name"] / workdir.REPORT).exists():
        link = quote(f"{entry['name']}/{workdir.REPORT}")
        name = f'<a href="{link}">{name}</a>'
    values = [entry["fields"].get(field) for field in fields]
    # As text: a seed is no number to add up or to round.
    texts = [None if value is None else str(value) for value in values]
    status = f"{entry['status']}: {entry['message']}".removesuffix(": ")
    scores = _scores(folder / entry["name"])
    return [pages.Html(name), *texts, status, *(scores.get(name) for name in SHOWN)]


def _scores(folder: Path) -> Mapping[str, Any]:
    """The accuracies of a run so far."""
    try:
        return json.loads((folder / workdir.SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (log.read_lines(folder / log.METRICS) or [{}])[-1]
