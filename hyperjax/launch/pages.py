"""Text tables for terminals, and the parts HTML pages are made of."""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import importlib.metadata
import json
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from hyperjax.engine import log
from hyperjax.engine.checkpoint import write_atomically
from hyperjax.protocols import common

Columns = Sequence[tuple[str, str]]
NOTHING = "–"  # in pages, where there is no value; "-" on terminals of any locale

_TEMPLATE = Path(__file__).with_name("page.html")
# From this many rows on a table can be filtered.
_MANY = 8


def text_table(rows: Sequence[Mapping[str, object]], columns: Columns) -> str:
    """Lays rows out in aligned columns for a terminal.

    Args:
      rows: values by key; missing ones and None show as "-".
      columns: (key, heading) in order.

    Returns:
      Lines without a final newline: headings, a rule, one line per row. Numbers stand
      on the right, floats with two decimals, integers with thousands separators.

    Example:
      >>> print(text_table([{"n": 1234}], [("n", "samples")]))
      samples
      -------
        1,234
    """
    numeric = [is_numeric([row.get(key) for row in rows]) for key, _ in columns]
    cells = [[heading for _, heading in columns]]
    cells += [[plain(row.get(key)) for key, _ in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for line in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        return f"{float(value):.2f}"
    return str(value)


def is_numeric(values: Sequence[object]) -> bool:
    """Whether all values that are there are numbers, and there is one."""
    there = [value for value in values if value is not None]
    return bool(there) and all(
        isinstance(value, numbers.Real) and not isinstance(value, bool)
        for value in there
    )


def accuracy(value: float | None) -> str:
    """An accuracy for a terminal, "-" if there is none."""
    return plain(None if value is None else float(value))


def percent(value: Any) -> str:
    return NOTHING if value is None else f"{value:.2f} %"


def num_bytes(value: Any) -> str:
    """Bytes in decimal units, such as 1.23 MB."""
    return NOTHING if value is None else log.size(value)


def flatten(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (a.b.c, value) for nested mappings; lists stay whole."""
    for name, inner in common.flat(value).items():
        yield name, inner if isinstance(inner, str) else json.dumps(inner)


class Html(str):
    """Text that is HTML already."""


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; cells that are `Html` go in as they are."""
    return _table(headings, rows, lambda heading: escape(heading))


def _table(headings: Sequence[str], rows, headed: Callable[[str], str]) -> str:
    kinds = [is_numeric([row[i] for row in rows]) for i in range(len(headings))]
    marks = [' class="num"' if kind else "" for kind in kinds]
    head = "".join(
        f"<th{mark}>{headed(heading)}</th>"
        for mark, heading in zip(marks, headings, strict=True)
    )
    lines = "".join(f"<tr>{''.join(map(_cell, marks, row))}</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table>"


def _cell(mark: str, value: object) -> str:
    exact = f' data-v="{value!r}"' if isinstance(value, float) else ""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        exact = f' data-v="{value}"'  # without the separators
    return f"<td{mark}{exact}>{cell(value)}</td>"


def cell(value: object) -> str:
    if value is None:
        return NOTHING
    return value if isinstance(value, Html) else escape(plain(value))


def tabular(
    name: str, headings: Sequence[str], rows: Sequence[Sequence[object]]
) -> Html:
    """A table that scrolls, sorts, filters if it is long, and can be kept as CSV.

    Args:
      name: of the file.
      headings: of its columns.
      rows: cells, see `table`.
    """
    sorts = _table(
        headings, rows, lambda h: f'<button type="button">{escape(h)}</button>'
    )
    words = '<input type="search" placeholder="filter" aria-label="filter rows">'
    return Html(
        f'<div class="tabular" data-name="{escape(name)}">'
        f'<div class="scroll">{sorts}</div><div class="tools">'
        f"{words if len(rows) >= _MANY else ''}"
        '<button type="button" class="csv">CSV</button>'
        '<span class="hint">scroll sideways for more columns →</span></div></div>'
    )


def header(title: str, words: str, *more: str) -> Html:
    """The top of a page."""
    return Html(
        f'<header><h1>{escape(title)}</h1><p class="muted">{escape(words)}</p>'
        f"{''.join(more)}</header>"
    )


def card(name: str, value: str, *lines: str) -> str:
    """One main number, with lines of small print."""
    small = "".join(f"<small>{escape(line)}</small>" for line in lines if line)
    return f'<div class="card">{escape(name)}<b>{escape(value)}</b>{small}</div>'


def command(text: str) -> Html:
    return Html(f"<pre><code>{escape(text)}</code></pre>")


def facts(rows: Sequence[tuple[str, object]]) -> Html:
    """Names and values, without headings."""
    lines = "".join(f"<tr><th>{escape(k)}</th><td>{cell(v)}</td></tr>" for k, v in rows)
    return Html(f'<table class="words"><tbody>{lines}</tbody></table>')


def code(text: object) -> Html:
    return Html(f"<code>{escape(str(text))}</code>")


def link(target: str, text: str) -> Html:
    return Html(f'<a href="{quote(target)}">{escape(text)}</a>')


def text(words: str, note: bool = False) -> Html:
    """A paragraph; a note stands out."""
    return Html(f"<p{' class=note' if note else ''}>{escape(words)}</p>")


def folded(summary: str, inner: str) -> Html:
    """What is shown once it is asked for; nothing if it is empty."""
    if not inner:
        return Html("")
    return Html(f"<details><summary>{escape(summary)}</summary>{inner}</details>")


def nested(value: Any) -> str:
    """A nested mapping as a table; nothing if it is empty."""
    return facts([(k, v) for k, v in flatten(value)]) if value else ""


def section(heading: str, *parts: str) -> Html:
    """A part of a page; none if there is nothing in it."""
    if not any(parts):
        return Html("")
    return Html(f"<section><h2>{escape(heading)}</h2>{''.join(parts)}</section>")


def chart(heading: str, spec: str, note: str = "") -> Html:
    """A chart of `charts` with its name, and what it needs to be understood."""
    name = re.sub(r"\W+", "_", heading).strip("_").lower()
    return Html(
        f"<figure><h3>{escape(heading)}</h3>{text(note) if note else ''}"
        f'<div class="chart" data-name="{name}" role="img" '
        f'aria-label="{escape(heading)}"></div>'
        f'<script type="text/plain" class="spec">{_packed(spec)}</script></figure>'
    )


def picture(said: str, svg: str, *, packed: bool = False) -> Html:
    """A drawing and what it shows; packed, of a tenth the size, beside a chart."""
    if packed:
        svg = f'<script type="text/plain" class="svg">{_packed(svg)}</script>'
    return Html(
        f'<div class="picture" role="img" aria-label="{escape(said)}">{svg}</div>'
    )


def grid(*parts: str) -> Html:
    """Parts side by side where there is room."""
    there = [part for part in parts if part]
    return Html(f'<div class="grid">{"".join(there)}</div>' if there else "")


def against(axes: Mapping[str, str]) -> Html:
    """Lets the reader choose the horizontal axis of a section's charts."""
    options = "".join(
        f'<option value="{name}" data-axis="{escape(title)}">{name}</option>'
        for name, title in axes.items()
    )
    return Html(
        f'<div class="tools"><label>against <select class="against">{options}</select>'
        "</label><span>click a legend's entry to hide it, drag to move, shift and "
        "wheel to zoom, double click to reset; ⋯ keeps a chart as SVG or PNG</span>"
        "</div>"
    )


def page(title: str, body: Sequence[str]) -> str:
    """Returns a page that stands alone: style, scripts and charts are in it."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    parts = [Markup(part) for part in body]
    has_charts = any('class="chart"' in part for part in parts)
    script = drawing() if has_charts else ""
    return template.render(title=title, body=parts, drawing=script) + "\n"


@functools.cache
def drawing() -> str:
    """The scripts that draw charts, packed: a third of their size.

    To make them takes seconds, so they are kept where compiled programs are.
    """
    found = f"vega-{importlib.metadata.version('vl-convert-python')}.txt"
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        kept = Path(base).expanduser() / "hyperjax" / found
        if kept.exists():
            return kept.read_text(encoding="ascii")
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, _bundle())
    return _bundle()


@functools.cache
def _bundle() -> str:
    import vl_convert

    bundle: Any = vl_convert.javascript_bundle  # its type asks for what has a default
    return _packed(bundle())


def _packed(text: str) -> str:
    """Text that `unpacked` of the page reads."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
