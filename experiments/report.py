"""Self-contained HTML pages about finished and running experiments, and text tables.

A page holds its own style and pictures, so it opens anywhere and can be sent as it is.
The same files give the same page.
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from experiments import plots
from hyperjax.data import picture

Row = Mapping[str, Any]
Columns = Sequence[tuple[str, str]]

_METRICS = {"gacc": "gACC", "pacc": "pACC", "zacc": "zACC"}
_COLORS = {"gacc": plots.INK, "pacc": plots.PARTICIPATING, "zacc": plots.NOVEL}
_CONTROLS = {"_em": ("EM control", "dashed"), "_oracle": ("oracle", "dotted")}
_MEANINGS = {
    "gacc": "global test set",
    "pacc": "clients that take part",
    "zacc": "clients never trained on",
}
# Embeddings that differ by less are one embedding in float32.
_SAME = 1e-6
# Below this share of its most, embedding use is called small.
_LITTLE_USE = 0.01
# More clients than this scroll sideways rather than shrink out of sight.
_WIDE_CLIENTS = 150
_SUMMARY_COLUMNS: Columns = (
    ("method", "method"),
    ("dataset", "data set"),
    ("seed", "seed"),
    ("rounds", "rounds"),
    ("gacc", "gACC %"),
    ("pacc", "pACC %"),
    ("zacc", "zACC %"),
    ("zacc_em", "zACC EM %"),
    ("zacc_oracle", "zACC oracle %"),
    ("zacc_p10", "zACC p10 %"),
    ("up_bytes", "up, bytes"),
    ("down_bytes", "down, bytes"),
    ("seconds", "seconds"),
    ("finished", "finished"),
)
_STYLE = """
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


class _Run(NamedTuple):
    """What a run folder holds; parts not written yet are empty or None."""

    folder: str
    about: Row  # config.json
    metrics: list[Row]
    summary: Row
    clients: list[Row]
    partition: tuple[np.ndarray, np.ndarray, list[str]] | None


def run_report(workdir: str) -> str:
    """Writes `report.html` about one run, finished or not.

    Args:
      workdir: the run's folder; files other than `config.json` may be missing.

    Returns:
      The path of the page. It is replaced as a whole, never seen half written.

    Raises:
      FileNotFoundError: the folder holds no `config.json`.
    """
    run = _read_run(workdir)
    latest = _latest(run)
    heading = (
        f"{latest.get('method', 'run')} on {latest.get('dataset', 'unknown data')}"
    )
    body = [_headline(run, latest, heading), _cards(latest), _curves(run)]
    body += [_partition(run), _clients(run), _embeddings(run, latest)]
    body += [_communication(latest), _configuration(run, latest)]
    path = os.path.join(workdir, "report.html")
    _write(path, _page(heading, body))
    return path


def comparison_report(
    workdirs: Sequence[str],
    path: str,
    title: str,
    labels: Sequence[str] | None = None,
    rows: Sequence[Row] | None = None,
) -> str:
    """Writes a page that lays several runs side by side.

    Args:
      workdirs: run folders.
      path: where the page goes; links to the runs' own pages are relative to it.
      title: heading of the page.
      labels: a name per run; the folders' names if None.
      rows: a mapping per run with further columns of the table, heading to value, such
        as the swept settings.

    Returns:
      `path`.

    Raises:
      ValueError: no runs, or `labels` or `rows` do not match them.
      FileNotFoundError: a folder holds no `config.json`.
    """
    runs = [_read_run(workdir) for workdir in workdirs]
    if labels is None:
        labels = [os.path.basename(os.path.abspath(run.folder)) for run in runs]
    rows = [{} for _ in runs] if rows is None else rows
    if not runs or not len(runs) == len(labels) == len(rows):
        raise ValueError(
            f"{len(runs)} runs with {len(labels)} labels and {len(rows)} rows"
        )
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="muted">{len(runs)} runs</p></header>',
        _section("Summary", _comparison_table(runs, path, labels, rows)),
        _section("Accuracy against round", _overlaid(runs, labels)),
        _shared_partition(runs),
    ]
    _write(path, _page(title, body))
    return path


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
    numeric = [_is_numeric([row.get(key) for row in rows]) for key, _ in columns]
    cells = [[heading for _, heading in columns]]
    cells += [[_plain(row.get(key)) for key, _ in columns] for row in rows]
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


# --- reading and writing --------------------------------------------------------------


def _read_run(folder: str) -> _Run:
    about = _read_json(folder, "config.json")
    if about is None:
        raise FileNotFoundError(f"no config.json in {folder!r}: not a run folder")
    metrics = _read_lines(folder, "metrics.jsonl")
    seconds = {
        row["round"]: row["seconds"] for row in _read_lines(folder, "timing.jsonl")
    }
    metrics = [{"seconds": seconds.get(row["round"]), **row} for row in metrics]
    try:
        with np.load(os.path.join(folder, "partition.npz"), allow_pickle=False) as file:
            names = [str(name) for name in file["label_names"]]
            partition = (file["counts"], file["participating"].astype(bool), names)
    except FileNotFoundError:
        partition = None
    summary = _read_json(folder, "summary.json") or {}
    clients = _read_json(folder, "clients.json") or []
    return _Run(folder, about, metrics, summary, clients, partition)


def _read_json(folder: str, name: str) -> Any:
    """The content of a file, or None if there is none."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def _read_lines(folder: str, name: str) -> list[Row]:
    """One object per line; a last line that is still being written is left out."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return rows


def _write(path: str, text: str) -> None:
    """Replaces a file as a whole; readers see the old one or the new one."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def _latest(run: _Run) -> dict[str, Any]:
    """The newest value of everything: configuration, last evaluation, then summary."""
    config = run.about.get("config", {})
    data, method = config.get("data", {}), config.get("method", {})
    known = {
        "method": method.get("name"),
        "dataset": data.get("name") or data.get("dataset"),
        "seed": config.get("seed"),
        "rounds": config.get("rounds"),
        "plan": run.about.get("plan"),
    }
    latest = {**known, **(run.metrics[-1] if run.metrics else {}), **run.summary}
    return {key: value for key, value in latest.items() if value is not None}


# --- text and tables ------------------------------------------------------------------


def _plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        return f"{float(value):.2f}"
    return str(value)


def _is_numeric(values: Sequence[object]) -> bool:
    """Whether all values that are there are numbers, and there is one."""
    there = [value for value in values if value is not None]
    return bool(there) and all(
        isinstance(value, numbers.Real) and not isinstance(value, bool)
        for value in there
    )


def _percent(value: Any) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _bytes(value: Any) -> str:
    """Bytes in decimal units, such as 1.23 MB."""
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:,.0f} B"
    power = min(int(math.log10(value) // 3), 4)
    return f"{value / 1000**power:.3g} {'kMGT'[power - 1]}B"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (a.b.c, value) for nested mappings; lists stay whole."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; cells that are `_Html` go in as they are."""
    kinds = [_is_numeric([row[i] for row in rows]) for i in range(len(headings))]
    marks = [' class="num"' if kind else "" for kind in kinds]
    head = "".join(
        f"<th{mark}>{escape(heading)}</th>"
        for mark, heading in zip(marks, headings, strict=True)
    )
    lines = [
        "<tr>"
        + "".join(
            f"<td{mark}>{_cell(value)}</td>"
            for mark, value in zip(marks, row, strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


class _Html(str):
    """Text that is HTML already."""


def _cell(value: object) -> str:
    return value if isinstance(value, _Html) else escape(_plain(value))


def _pairs(summary: str, value: Any) -> str:
    """A nested mapping as a folded table; nothing if it is empty."""
    if not value:
        return ""
    rows = [(_Html(f"<code>{escape(k)}</code>"), v) for k, v in _flatten(value)]
    table = _table(("name", "value"), rows)
    return f"<details><summary>{escape(summary)}</summary>{table}</details>"


def _section(heading: str, *parts: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{''.join(parts)}</section>"


def _figure(heading: str, *parts: str) -> str:
    return f"<figure><h3>{escape(heading)}</h3>{''.join(parts)}</figure>"


def _page(title: str, body: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


# --- sections of a run's page ---------------------------------------------------------


def _headline(run: _Run, latest: Row, heading: str) -> str:
    rounds = latest.get("rounds", "?")
    finished = latest.get("finished") is True
    state = "finished" if finished else "not finished"
    note = ""
    if not finished:
        done = run.metrics[-1]["round"] if run.metrics else 0
        note = (
            '<p class="note">This run is not finished: evaluated up to round '
            f"{done} of {escape(str(rounds))}. Numbers are of that evaluation.</p>"
        )
    facts = f"seed {latest.get('seed', '?')} · {rounds} rounds · {state}"
    return (
        f'<header><h1>{escape(heading)}</h1><p class="muted">{escape(facts)}</p>'
        f"{note}</header>"
    )


def _cards(latest: Row) -> str:
    cards = []
    for key, name in _METRICS.items():
        lines = [_MEANINGS[key]]
        controls = [
            f"{label} {latest[key + suffix]:.2f}"
            for suffix, (label, _) in _CONTROLS.items()
            if key + suffix in latest
        ]
        lines += [" · ".join(controls)] if controls else []
        # The global test set is one client, so there is no spread.
        if key != "gacc" and f"{key}_mean" in latest:
            spread = f"mean {latest[f'{key}_mean']:.2f}"
            if f"{key}_std" in latest:
                spread += f" ± {latest[f'{key}_std']:.2f}"
            if f"{key}_p10" in latest:
                spread += f", tenth percentile {latest[f'{key}_p10']:.2f}"
            lines.append(f"over clients: {spread}")
        cards.append(_card(name, _percent(latest.get(key)), *lines))
    if "up_bytes" in latest and "down_bytes" in latest:
        up, down = latest["up_bytes"], latest["down_bytes"]
        line = f"up {_bytes(up)} · down {_bytes(down)}"
        cards.append(_card("Per client and round", _bytes(up + down), line))
    if "seconds" in latest:
        compile_seconds = latest.get("compile_seconds")
        line = (
            ""
            if compile_seconds is None
            else f"of it compiling {compile_seconds:.1f} s"
        )
        cards.append(_card("Wall time", f"{latest['seconds']:,.1f} s", line))
    if "samples_per_second" in latest:
        cards.append(
            _card("Samples per second", f"{latest['samples_per_second']:,.0f}")
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(name: str, value: str, *lines: str) -> str:
    small = "".join(f"<small>{escape(line)}</small>" for line in lines if line)
    return f'<div class="card">{escape(name)}<b>{escape(value)}</b>{small}</div>'


def _points(run: _Run, key: str) -> list[plots.Point]:
    return [(row["round"], row[key]) for row in run.metrics if row.get(key) is not None]


def _curves(run: _Run) -> str:
    if not run.metrics:
        return _section("Curves", "<p>No evaluation yet.</p>")
    lines, entries = [], []
    for key, name in _METRICS.items():
        lines.append(plots.Line(name, _points(run, key), _COLORS[key]))
        entries.append((name, _COLORS[key], "solid"))
    for suffix, (label, style) in _CONTROLS.items():
        extra = [
            plots.Line(
                f"{name} {label}", _points(run, key + suffix), _COLORS[key], style
            )
            for key, name in _METRICS.items()
        ]
        extra = [line for line in extra if line.points]
        lines += extra
        if extra:
            entries.append((label, plots.MUTED, style))
    loss = plots.Line("loss", _points(run, "loss"), plots.INK)
    note = (
        "<p>EM control: the same outputs, reweighted by class shares estimated from "
        "them (label-shift EM), without training. Oracle: reweighted by the true "
        "class shares, which no client knows.</p>"
        if len(entries) > len(_METRICS)
        else ""
    )
    accuracy = plots.line_chart(
        "Accuracy in percent against round", lines, y_ceiling=100
    )
    return _section(
        "Curves",
        note,
        '<div class="grid">',
        _figure("Accuracy, %", plots.legend(entries), accuracy),
        _figure(
            "Local training loss",
            plots.legend([("mean over the last round", plots.INK, "solid")]),
            plots.line_chart("Local training loss against round", [loss]),
        ),
        "</div>",
        _further_quantities(run),
    )


def _further_quantities(run: _Run) -> str:
    """Small charts of the training quantities that have no place of their own."""
    placed = (*_METRICS, "collapse_", "up_bytes", "down_bytes")
    keys = dict.fromkeys(key for row in run.metrics for key in row)
    figures = []
    for key in keys:
        points = [p for p in _points(run, key) if isinstance(p[1], numbers.Real)]
        if key in ("round", "loss", "seconds") or key.startswith(placed) or not points:
            continue
        line = plots.Line(key, points, plots.PARTICIPATING)
        chart = plots.line_chart(f"{key} against round", [line], size=(380, 200))
        figures.append(_figure(key.replace("_", " "), chart))
    return f'<div class="grid small">{"".join(figures)}</div>' if figures else ""


def _partition(run: _Run) -> str:
    if run.partition is None:
        return ""
    counts, participating, names = run.partition
    # A dollar sign would start a formula in the picture.
    names = [name.replace("$", r"\$") for name in names]
    figure = picture.partition_picture(counts, participating, names, None)
    name = (
        f"Samples of {counts.shape[1]} classes over {counts.shape[0]} clients, "
        f"{int(participating.sum())} of them participating"
    )
    wide = " wide" if len(counts) > _WIDE_CLIENTS else ""
    return _section(
        "Partition",
        f"<p>{name}; {int(counts.sum()):,} samples in all.</p>",
        f'<div class="picture{wide}" role="img" aria-label="{name}">',
        picture.figure_svg(figure),
        "</div>",
    )


def _clients(run: _Run) -> str:
    marks, tested = [], [c for c in run.clients if c.get("accuracy") is not None]
    for client in tested:
        control = client.get("accuracy_em")
        name = f"client {client['client']}: {client['accuracy']:.2f} %"
        name += "" if control is None else f", EM control {control:.2f} %"
        name += f", {client['train_samples']:,} training samples"
        where = (0.0, client["accuracy"], bool(client["participating"]), control)
        marks.append(plots.Mark(name, *where))
    if not marks:
        return ""
    entries = [
        ("participating", plots.PARTICIPATING, "dot"),
        ("not participating", plots.NOVEL, "diamond"),
        ("mean of a group", plots.MUTED, "dashed"),
    ]
    if any(mark.control is not None for mark in marks):
        entries.append(("EM control of the same client", plots.MUTED, "bar"))
    chart = plots.sorted_dots("Accuracy of every client, sorted, in percent", marks)
    return _section(
        "Clients",
        _figure("Accuracy of every client, sorted, %", plots.legend(entries), chart),
    )


def _embeddings(run: _Run, latest: Row) -> str:
    clients = [client for client in run.clients if client.get("embedding")]
    if not clients:
        return ""
    embeddings = np.array([client["embedding"] for client in clients], float)
    use = _use_table(latest, embeddings.shape[1])
    centred = embeddings - embeddings.mean(0)
    if np.abs(centred).max() <= _SAME:
        note = (
            '<p class="note">The embedding has collapsed: all '
            f"{len(clients)} clients have the same one (to {_SAME:g}), so the deployed "
            "networks do not depend on the client through it.</p>"
        )
        return _section("Embeddings", note, use)
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((len(clients), 2))
    shares = np.zeros(2)
    rank = min(2, len(spread))
    places[:, :rank] = (left * spread)[:, :rank]
    shares[:rank] = 100 * spread[:rank] ** 2 / np.sum(spread**2)
    marks = [
        plots.Mark(f"client {client['client']}", x, y, bool(client["participating"]))
        for client, (x, y) in zip(clients, places.tolist(), strict=True)
    ]
    labels = [f"component {i + 1} ({share:.0f} %)" for i, share in enumerate(shares)]
    name = f"Embeddings of {len(clients)} clients on their two main components"
    entries = [
        ("participating", plots.PARTICIPATING, "dot"),
        ("not participating", plots.NOVEL, "diamond"),
    ]
    chart = plots.point_map(name, marks, (labels[0], labels[1]))
    figure = _figure(f"{name} (share of variance)", plots.legend(entries), chart)
    reach = float(np.linalg.norm(centred, axis=1).max())
    note = (
        "<p>No client's embedding is further than "
        f"{reach:.2g} from their mean; the map is scaled to fill its frame.</p>"
    )
    uses = [latest.get(f"collapse_{kind}") for kind in ("participating", "novel")]
    known = [value for value in uses if value is not None]
    most = math.log(embeddings.shape[1])
    if known and max(known) < _LITTLE_USE * most:
        note = (
            '<p class="note">The embedding has all but collapsed: its use is under '
            f"{_LITTLE_USE:.0%} of the most possible, and no client is further than "
            f"{reach:.2g} from the mean. The map magnifies these differences.</p>"
        )
    return _section("Embeddings", use, note, f'<div class="map">{figure}</div>')


def _use_table(latest: Row, size: int) -> str:
    """How much the deployed networks depend on the client, where it was measured."""
    quantities = (
        (
            "embedding use I, nats",
            "collapse_{participating}",
            "I = H(mean e) - mean H(e), with H the entropy: 0 means the embedding is "
            "the same for every input, so it is ignored; the most is "
            f"ln {size} = {math.log(size):.2f}.",
        ),
        (
            "distance of networks",
            "{pacc}_distance",
            "Relative distance between the networks deployed by two clients: 0 means "
            "that all clients get one network.",
        ),
        (
            "swapped accuracy, %",
            "{pacc}_swapped",
            "Every client tested with its neighbour's deployed state: no worse than "
            "with its own means that nothing is personal.",
        ),
    )
    kinds = (
        {"participating": "participating", "pacc": "pacc"},
        {"participating": "novel", "pacc": "zacc"},
    )
    rows: list[tuple[object, ...]] = []
    for name, pattern, meaning in quantities:
        values = [latest.get(pattern.format(**kind)) for kind in kinds]
        shown = [None if value is None else f"{value:.4g}" for value in values]
        if pattern == "{pacc}_swapped":
            own = [latest.get(kind["pacc"]) for kind in kinds]
            shown = [
                f"{text} (own {value:.4g})" if text and value is not None else text
                for text, value in zip(shown, own, strict=True)
            ]
        if any(shown):
            rows.append((name, *shown, meaning))
    headings = ("quantity", "participating", "not participating", "meaning")
    return _table(headings, rows) if rows else ""


def _communication(latest: Row) -> str:
    kinds = ("numbers", "bytes", "bytes_total")
    sizes = {
        name: [latest.get(f"{way}_{kind}") for kind in kinds]
        for way, name in (("up", "client to server"), ("down", "server to client"))
    }
    sizes["both"] = [
        None if None in pair else sum(pair)
        for pair in zip(*sizes.values(), strict=True)
    ]
    rows = [
        (name, *row, _bytes(row[-1]))
        for name, row in sizes.items()
        if row != [None] * len(kinds)
    ]
    if not rows:
        return ""
    headings = (
        "direction",
        "numbers per client and round",
        "bytes per client and round",
        "bytes in all",
        "",
    )
    table = _table(headings, rows)
    return _section("Communication", f'<div class="scroll">{table}</div>')


def _configuration(run: _Run, latest: Row) -> str:
    facts = {
        "commit": run.about.get("commit") or "unknown",
        "device": run.about.get("device") or "unknown",
        "state digest (SHA-256)": latest.get("state_sha256") or "none yet",
    }
    rows = [
        (name, _Html(f"<code>{escape(str(v))}</code>")) for name, v in facts.items()
    ]
    return _section(
        "Configuration",
        _table(("", ""), rows).replace(
            "<thead><tr><th></th><th></th></tr></thead>", ""
        ),
        _pairs("Configuration", run.about.get("config")),
        _pairs("Plan", latest.get("plan")),
        _pairs("Package versions", run.about.get("versions")),
    )


# --- sections of a comparison ---------------------------------------------------------


def _comparison_table(
    runs: Sequence[_Run], path: str, labels: Sequence[str], rows: Sequence[Row]
) -> str:
    extra = list(dict.fromkeys(key for row in rows for key in row))
    values = [_latest(run) for run in runs]
    columns = [
        (key, heading)
        for key, heading in _SUMMARY_COLUMNS
        if any(key in value for value in values)
    ]
    table = []
    for run, label, row, value in zip(runs, labels, rows, values, strict=True):
        own = os.path.join(os.path.abspath(run.folder), "report.html")
        link = os.path.relpath(own, os.path.dirname(os.path.abspath(path)))
        name = f'<a href="{quote(link.replace(os.sep, "/"))}">{escape(label)}</a>'
        cells: list[object] = [_Html(name), *(row.get(key) for key in extra)]
        cells += [value.get(key) for key, _ in columns]
        table.append(cells)
    headings = ["run", *extra, *(heading for _, heading in columns)]
    return f'<div class="scroll">{_table(headings, table)}</div>'


def _overlaid(runs: Sequence[_Run], labels: Sequence[str]) -> str:
    """A chart per accuracy with a line per run."""
    styles = [
        # Runs beyond the palette use its colours again, broken.
        (
            plots.PALETTE[i % len(plots.PALETTE)],
            ("solid", "dashed", "dotted")[i // len(plots.PALETTE) % 3],
        )
        for i in range(len(runs))
    ]
    entries = [(label, *style) for label, style in zip(labels, styles, strict=True)]
    figures = []
    for key, name in _METRICS.items():
        lines = [
            plots.Line(label, _points(run, key), *style)
            for run, label, style in zip(runs, labels, styles, strict=True)
        ]
        chart = plots.line_chart(
            f"{name} in percent against round", lines, y_ceiling=100
        )
        figures.append(_figure(f"{name}, % ({_MEANINGS[key]})", chart))
    return f'{plots.legend(entries)}<div class="grid">{"".join(figures)}</div>'


def _shared_partition(runs: Sequence[_Run]) -> str:
    """The picture of the partition if all runs have the same one."""
    partitions = [run.partition for run in runs if run.partition is not None]
    if not partitions:
        return ""
    first, names = partitions[0][:2], partitions[0][2]
    shared = all(
        np.array_equal(counts, first[0])
        and np.array_equal(participating, first[1])
        and labels == names
        for counts, participating, labels in partitions
    )
    if shared and len(partitions) == len(runs):
        return _partition(runs[0])
    return _section("Partition", "<p>The runs do not share one partition.</p>")
