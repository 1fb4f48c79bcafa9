"""Text tables for terminals, and the parts HTML pages are made of."""

from __future__ import annotations

import json
import numbers
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from hyperjax.engine import log
from hyperjax.protocols import common

Columns = Sequence[tuple[str, str]]
NOTHING = "–"  # in pages, where there is no value; "-" on terminals of any locale

STYLE = """
:root{--ink:#3d4450;--muted:#7b8494;--line:#e3e7ed;--accent:#2a6f97}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:19px;margin:44px 0 10px;padding-top:18px;border-top:1px solid var(--line)}
h3{font-size:14px;margin:0 0 4px}
p{margin:6px 0;max-width:78ch}
.muted,small{color:var(--muted)}
.note{background:#fdf4ec;border-left:4px solid #e07a3f;padding:10px 14px;margin:18px 0}
.cards{display:grid;gap:14px;margin:26px 0 0;
grid-template-columns:repeat(auto-fit,minmax(165px,1fr))}
.card{border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:26px;line-height:1.25;font-weight:650;
font-variant-numeric:tabular-nums}
.card small{display:block;line-height:1.45}
.grid{display:grid;gap:26px;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));
margin-top:26px}
figure{margin:0;break-inside:avoid}
svg{display:block;width:100%;height:auto;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
.map{max-width:700px}
.picture{overflow-x:auto}
.picture svg{width:auto;max-width:100%}
.picture.wide svg{max-width:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:4px 0 8px;
padding:0;font-size:13px}
.legend li{display:flex;align-items:center;gap:6px}
.legend svg{width:26px;height:10px;flex:none}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;
margin:10px 0}
th,td{text-align:left;padding:6px 16px 6px 0;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:anywhere}
.scroll th,.scroll td{white-space:nowrap;overflow-wrap:normal}
th{color:var(--muted);font-weight:600;font-size:13px;overflow-wrap:normal}
.num{text-align:right;white-space:nowrap}
code{font:13px ui-monospace,Menlo,Consolas,"Liberation Mono",monospace}
details{margin:10px 0}
summary{cursor:pointer;font-weight:600}
a{color:var(--accent)}
@media print{main{max-width:none;padding:0}.picture.wide svg{max-width:100%}
h2{break-after:avoid}.card,tr{break-inside:avoid}}
"""


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


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; cells that are `Html` go in as they are."""
    kinds = [is_numeric([row[i] for row in rows]) for i in range(len(headings))]
    marks = [' class="num"' if kind else "" for kind in kinds]
    head = "".join(
        f"<th{mark}>{escape(heading)}</th>"
        for mark, heading in zip(marks, headings, strict=True)
    )
    lines = [
        "<tr>"
        + "".join(
            f"<td{mark}>{cell(value)}</td>"
            for mark, value in zip(marks, row, strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


class Html(str):
    """Text that is HTML already."""


def cell(value: object) -> str:
    if value is None:
        return NOTHING
    return value if isinstance(value, Html) else escape(plain(value))


def folded(summary: str, value: Any) -> str:
    """A nested mapping as a folded table; nothing if it is empty."""
    if not value:
        return ""
    rows = [(Html(f"<code>{escape(k)}</code>"), v) for k, v in flatten(value)]
    inner = table(("name", "value"), rows)
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def section(heading: str, *parts: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{''.join(parts)}</section>"


def figure(heading: str, *parts: str) -> str:
    return f"<figure><h3>{escape(heading)}</h3>{''.join(parts)}</figure>"


def page(title: str, body: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )
