"""Self-contained HTML pages about finished and running experiments, and text tables.

A page holds its own style and pictures, so it opens anywhere and can be sent as it is.
The same files give the same page.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from experiments import pages, plots
from hyperjax.data import picture
from hyperjax.engine.checkpoint import write_atomically
from hyperjax.engine.log import read_lines

Row = Mapping[str, Any]

_METRICS = {"gacc": "gACC", "pacc": "pACC", "zacc": "zACC", "vacc": "vACC"}
_COLORS = {
    "gacc": plots.INK,
    "pacc": plots.PARTICIPATING,
    "zacc": plots.NOVEL,
    "vacc": plots.MUTED,
}
_CONTROLS = {"_em": ("EM control", "dashed"), "_oracle": ("oracle", "dotted")}
_MEANINGS = {
    "gacc": "global test set",
    "pacc": "clients that take part",
    "zacc": "clients never trained on",
    "vacc": "what they set aside for validation",
}
_FINE_TUNED = re.compile(r"(pacc|zacc)_ft(\d+)(_mean)?")
_FINE_TUNED_COLUMNS = {
    ("pacc", ""): "participants, %",
    ("pacc", "_mean"): "participants, mean over clients, %",
    ("zacc", ""): "unseen clients, %",
    ("zacc", "_mean"): "unseen clients, mean over clients, %",
}
# Embeddings that differ by less are one embedding in float32.
_SAME = 1e-6
# Below this share of its most, embedding use is called small.
_LITTLE_USE = 0.01
# More clients than this scroll sideways rather than shrink out of sight.
_WIDE_CLIENTS = 150
_SUMMARY_COLUMNS: pages.Columns = (
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
    body += [
        _fine_tuning(latest),
        _partition(run),
        _clients(run),
        _embeddings(run, latest),
    ]
    body += [_communication(latest), _configuration(run, latest)]
    path = os.path.join(workdir, "report.html")
    write_atomically(path, pages.page(heading, body))
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
        pages.section("Summary", _comparison_table(runs, path, labels, rows)),
        _overlaid(runs, labels),
        _shared_partition(runs),
    ]
    write_atomically(path, pages.page(title, body))
    return path


# --- reading and writing --------------------------------------------------------------


def _read_run(folder: str) -> _Run:
    about = _read_json(folder, "config.json")
    if about is None:
        raise FileNotFoundError(f"no config.json in {folder!r}: not a run folder")
    records = read_lines(Path(folder) / "metrics.jsonl")
    seconds = {
        row["round"]: row["seconds"]
        for row in read_lines(Path(folder) / "timing.jsonl")
    }
    metrics: list[Row] = [
        {"seconds": seconds.get(row["round"]), **row} for row in records
    ]
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
        if key not in latest:
            continue
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
        cards.append(_card(name, pages.percent(latest[key]), *lines))
    best = latest.get("best_by_validation")
    if best:
        line = f"round {best['round']}, where vACC was {best['vacc']:.2f}"
        cards.append(_card("pACC, best by validation", f"{best['pacc']:.2f} %", line))
    if "up_bytes" in latest and "down_bytes" in latest:
        up, down = latest["up_bytes"], latest["down_bytes"]
        line = f"up {pages.num_bytes(up)} · down {pages.num_bytes(down)}"
        cards.append(_card("Per client and round", pages.num_bytes(up + down), line))
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
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(name: str, value: str, *lines: str) -> str:
    small = "".join(f"<small>{escape(line)}</small>" for line in lines if line)
    return f'<div class="card">{escape(name)}<b>{escape(value)}</b>{small}</div>'


def _points(run: _Run, key: str) -> list[plots.Point]:
    return [(row["round"], row[key]) for row in run.metrics if row.get(key) is not None]


def _curves(run: _Run) -> str:
    if not run.metrics:
        return pages.section("Curves", "<p>No evaluation yet.</p>")
    lines, entries = [], []
    for key, name in _METRICS.items():
        points = _points(run, key)
        if points:
            lines.append(plots.Line(name, points, _COLORS[key]))
            entries.append((name, _COLORS[key], "solid"))
    num_metrics = len(lines)
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
    note = (
        "<p>EM control: the same outputs, reweighted by class shares estimated from "
        "them (label-shift EM), without training. Oracle: reweighted by the true "
        "class shares, which no client knows.</p>"
        if len(lines) > num_metrics
        else ""
    )
    figures = []
    if lines:
        chart = plots.line_chart(
            "Accuracy in percent against round", lines, y_ceiling=100
        )
        figures.append(pages.figure("Accuracy, %", plots.legend(entries), chart))
    loss = plots.Line("loss", _points(run, "loss"), plots.INK)
    if loss.points:
        figures.append(
            pages.figure(
                "Local training loss",
                plots.legend([("mean over the last round", plots.INK, "solid")]),
                plots.line_chart("Local training loss against round", [loss]),
            )
        )
    return pages.section(
        "Curves",
        note,
        f'<div class="grid">{"".join(figures)}</div>' if figures else "",
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
        figures.append(pages.figure(key.replace("_", " "), chart))
    return f'<div class="grid small">{"".join(figures)}</div>' if figures else ""


def _fine_tuning(latest: Row) -> str:
    """Accuracy before and after local epochs on a client's own labelled samples."""
    found: dict[int, dict[tuple[str, str], float]] = {}
    for key, value in latest.items():
        match = _FINE_TUNED.fullmatch(key)
        if match:
            metric, epochs, suffix = match.groups(default="")
            found.setdefault(int(epochs), {})[metric, suffix] = value
    if not found:
        return ""
    columns = [
        c for c in _FINE_TUNED_COLUMNS if any(c in row for row in found.values())
    ]
    table = pages.table(
        ("fine-tuning epochs", *(_FINE_TUNED_COLUMNS[column] for column in columns)),
        [(k, *(row.get(c) for c in columns)) for k, row in sorted(found.items())],
    )
    note = (
        "<p>Accuracy on a client's held-out samples after so many local epochs on its "
        "other samples, from what the server deploys. Weighted by samples, unless it "
        "is the mean over clients.</p>"
    )
    return pages.section("Fine-tuning", note, f'<div class="scroll">{table}</div>')


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
    return pages.section(
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
    entries = [*_groups(marks), ("mean of a group", plots.MUTED, "dashed")]
    if any(mark.control is not None for mark in marks):
        entries.append(("EM control of the same client", plots.MUTED, "bar"))
    chart = plots.sorted_dots("Accuracy of every client, sorted, in percent", marks)
    return pages.section(
        "Clients",
        pages.figure(
            "Accuracy of every client, sorted, %", plots.legend(entries), chart
        ),
    )


def _groups(marks: Sequence[plots.Mark]) -> list[tuple[str, str, str]]:
    """Legend entries of the groups of clients that are there."""
    kinds = {mark.participating for mark in marks}
    entries = {
        True: ("participating", plots.PARTICIPATING, "dot"),
        False: ("not participating", plots.NOVEL, "diamond"),
    }
    return [entry for kind, entry in entries.items() if kind in kinds]


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
        return pages.section("Embeddings", note, use)
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
    chart = plots.point_map(name, marks, (labels[0], labels[1]))
    legend = plots.legend(_groups(marks))
    figure = pages.figure(f"{name} (share of variance)", legend, chart)
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
    return pages.section("Embeddings", use, note, f'<div class="map">{figure}</div>')


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
    kinds = {
        "participating": {"participating": "participating", "pacc": "pacc"},
        "not participating": {"participating": "novel", "pacc": "zacc"},
    }
    kinds = {name: kind for name, kind in kinds.items() if kind["pacc"] in latest}
    rows: list[tuple[object, ...]] = []
    for name, pattern, meaning in quantities:
        values = [latest.get(pattern.format(**k)) for k in kinds.values()]
        shown = [None if value is None else f"{value:.4g}" for value in values]
        if pattern == "{pacc}_swapped":
            own = [latest.get(kind["pacc"]) for kind in kinds.values()]
            shown = [
                f"{text} (own {value:.4g})" if text and value is not None else text
                for text, value in zip(shown, own, strict=True)
            ]
        if any(shown):
            rows.append((name, *shown, meaning))
    headings = ("quantity", *kinds, "meaning")
    return pages.table(headings, rows) if rows else ""


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
        (name, *row, pages.num_bytes(row[-1]))
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
    table = pages.table(headings, rows)
    return pages.section("Communication", f'<div class="scroll">{table}</div>')


def _configuration(run: _Run, latest: Row) -> str:
    facts = {
        "commit": run.about.get("commit") or "unknown",
        "device": run.about.get("device") or "unknown",
        "state digest (SHA-256)": latest.get("state_sha256") or "none yet",
    }
    rows = [
        (name, pages.Html(f"<code>{escape(str(v))}</code>"))
        for name, v in facts.items()
    ]
    return pages.section(
        "Configuration",
        pages.table(("", ""), rows).replace(
            "<thead><tr><th></th><th></th></tr></thead>", ""
        ),
        pages.folded("Configuration", run.about.get("config")),
        pages.folded("Plan", latest.get("plan")),
        pages.folded("Package versions", run.about.get("versions")),
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
        cells: list[object] = [pages.Html(name), *(row.get(key) for key in extra)]
        cells += [value.get(key) for key, _ in columns]
        table.append(cells)
    headings = ["run", *extra, *(heading for _, heading in columns)]
    return f'<div class="scroll">{pages.table(headings, table)}</div>'


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
        lines = [line for line in lines if line.points]
        if not lines:
            continue
        chart = plots.line_chart(
            f"{name} in percent against round", lines, y_ceiling=100
        )
        figures.append(pages.figure(f"{name}, % ({_MEANINGS[key]})", chart))
    heading = "Accuracy against round"
    if not figures:
        return pages.section(heading, "<p>No evaluation yet.</p>")
    grid = f'<div class="grid">{"".join(figures)}</div>'
    return pages.section(heading, plots.legend(entries), grid)


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
    return pages.section("Partition", "<p>The runs do not share one partition.</p>")
