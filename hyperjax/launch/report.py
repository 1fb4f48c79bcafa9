"""Self-contained HTML pages about finished and running experiments.

python -m experiments.report RUN_FOLDER... [--out=page.html]

One run gets its page anew (report.html in its folder), several a page that compares
them (comparison.html in the folder they share). They may be finished or not. A page
holds its own style and pictures, so it opens anywhere and can be sent as it is. The
same files give the same page.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from hyperjax.engine.checkpoint import write_atomically
from hyperjax.launch import cli, finished, outputs, pages, plots
from hyperjax.launch import report_sections as sections
from hyperjax.launch.finished import Row, Run

_SUMMARY_COLUMNS: pages.Columns = (
    ("method", "method"),
    ("dataset", "data set"),
    ("seed", "seed"),
    ("rounds", "rounds"),
    ("gacc", "gACC %"),
    ("pacc", "pACC %"),
    ("pacc_mean", "pACC, mean of clients %"),
    ("zacc", "zACC %"),
    ("zacc_mean", "zACC, mean of clients %"),
    ("zacc_em", "zACC EM %"),
    ("zacc_oracle", "zACC oracle %"),
    ("zacc_p10", "zACC p10 %"),
    ("up_bytes", "up, bytes"),
    ("down_bytes", "down, bytes"),
    ("seconds", "seconds"),
    ("finished", "finished"),
)
# Settings that say where a run is made, and not what comes out.
_ANYWHERE = re.compile(
    r"data\.(data_dir|download)|engine\..*|checkpoint\..*|tensorboard"
)


def run_report(workdir: str, path: str | None = None) -> str:
    """Writes a page about one run, finished or not.

    Args:
      workdir: the run's folder; files other than `config.json` may be missing.
      path: where the page goes; `report.html` in the run's folder if None.

    Returns:
      The path of the page. It is replaced as a whole, never seen half written.

    Raises:
      FileNotFoundError: the folder holds no `config.json`.
      ValueError: a file of the run is damaged.
    """
    run = finished.read(workdir)
    latest = finished.latest_of(run)
    heading = (
        f"{latest.get('method', 'run')} on {latest.get('dataset', 'unknown data')}"
    )
    body = [
        sections.headline(run, latest, heading),
        sections.cards(latest),
        sections.curves(run),
        sections.fine_tuning(latest),
        sections.partition(run),
        sections.clients(run),
        sections.embeddings(run, latest),
        sections.communication(latest),
        sections.configuration(run, latest),
    ]
    path = path or os.path.join(workdir, "report.html")
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
      path: where the page goes; links to the runs' own pages, where these are there,
        are relative to it.
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
    runs = [finished.read(workdir) for workdir in workdirs]
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
        _apart(runs, labels),
        pages.section("Summary", _comparison_table(runs, path, labels, rows)),
        _overlaid(runs, labels),
        _shared_partition(runs),
    ]
    write_atomically(path, pages.page(title, body))
    return path


def differing(configs: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the settings in which runs differ beside their method, by field.

    Args:
      configs: as config.json has them. Options of a method are compared among its own
        runs.

    Returns:
      {"group.field": a value for each run, "" where it has none of it}.
    """
    flat = [dict(pages.flatten(config)) for config in configs]
    found = {}
    for field in dict.fromkeys(field for config in flat for field in config):
        if field == "method.name" or _ANYWHERE.fullmatch(field):
            continue
        values = [config.get(field, "") for config in flat]
        if field.startswith("method."):
            seen: dict[str, set[str]] = {}
            for config, value in zip(flat, values, strict=True):
                seen.setdefault(config.get("method.name", ""), set()).add(value)
            if all(len(of_one) == 1 for of_one in seen.values()):
                continue
        if len(set(values)) > 1:
            found[field] = values
    return found


def _apart(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """What differs between runs beside the method, and in whom."""
    heading = "Settings that differ beside the method"
    found = differing([run.about.get("config", {}) for run in runs])
    if not found:
        return pages.section(heading, "<p>They share every other setting.</p>")
    rows = []
    for field, values in found.items():
        name = pages.Html(f"<code>{escape(field)}</code>")
        for value in dict.fromkeys(values):
            who = [k for k, v in zip(labels, values, strict=True) if v == value]
            rows.append((name, value or pages.NOTHING, ", ".join(who)))
            name = pages.Html("")
    table = pages.table(("field", "value", "runs"), rows)
    return pages.section(heading, f'<div class="scroll">{table}</div>')


def _comparison_table(
    runs: Sequence[Run], path: str, labels: Sequence[str], rows: Sequence[Row]
) -> str:
    extra = list(dict.fromkeys(key for row in rows for key in row))
    values = [finished.latest_of(run) for run in runs]
    columns = [
        (key, heading)
        for key, heading in _SUMMARY_COLUMNS
        if any(key in value for value in values)
    ]
    table = []
    for run, label, row, value in zip(runs, labels, rows, values, strict=True):
        own = os.path.join(os.path.abspath(run.folder), "report.html")
        name = escape(label)
        if os.path.exists(own):
            link = os.path.relpath(own, os.path.dirname(os.path.abspath(path)))
            name = f'<a href="{quote(link.replace(os.sep, "/"))}">{name}</a>'
        cells: list[object] = [pages.Html(name), *(row.get(key) for key in extra)]
        cells += [value.get(key) for key, _ in columns]
        table.append(cells)
    headings = ["run", *extra, *(heading for _, heading in columns)]
    return f'<div class="scroll">{pages.table(headings, table)}</div>'


def _overlaid(runs: Sequence[Run], labels: Sequence[str]) -> str:
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
    for key, name in sections.METRICS.items():
        lines = [
            plots.Line(label, finished.points(run, key), *style)
            for run, label, style in zip(runs, labels, styles, strict=True)
        ]
        lines = [line for line in lines if line.points]
        if not lines:
            continue
        chart = plots.line_chart(
            f"{name} in percent against round", lines, y_ceiling=100
        )
        figures.append(pages.figure(f"{name}, % ({sections.MEANINGS[key]})", chart))
    heading = "Accuracy against round"
    if not figures:
        return pages.section(heading, "<p>No evaluation yet.</p>")
    grid = f'<div class="grid">{"".join(figures)}</div>'
    return pages.section(heading, plots.legend(entries), grid)


def _shared_partition(runs: Sequence[Run]) -> str:
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
        return sections.partition(runs[0])
    return pages.section("Partition", "<p>The runs do not share one partition.</p>")


def main(folders: Sequence[str], out: str | None) -> int:
    """Writes the page of one run or several; returns the exit code.

    Raises:
      ValueError: no folders, one of them holds no run, or `out` cannot be written.
    """
    if not folders:
        raise ValueError(
            "give the folder of a run, or of several to be compared: "
            "python -m experiments.report RUN_FOLDER... [--out=page.html]"
        )
    # By their real paths, each once.
    runs = list(dict.fromkeys(Path(f).expanduser().resolve() for f in folders))
    for run in runs:
        finished.read(str(run))  # refuses what is none
    shared = Path(os.path.commonpath([run.parent for run in runs]))
    usual = runs[0] / "report.html" if len(runs) == 1 else shared / "comparison.html"
    path = outputs.files(out=str(usual) if out is None else out)["out"]
    if len(runs) == 1:
        print(f"report: {run_report(str(runs[0]), str(path))}")
        return 0
    for run in runs:
        if not (run / "report.html").exists():
            with contextlib.suppress(OSError):  # others' runs may be read only
                run_report(str(run))
    labels = [str(run.relative_to(shared)) for run in runs]
    folders = [str(run) for run in runs]
    title = f"{len(runs)} runs"
    print(f"report: {comparison_report(folders, str(path), title, labels)}")
    return 0


def launch() -> None:
    """Runs the command with what the command line says."""
    out = cli.define_path("out", None, "File for the page.")
    cli.run(lambda *folders: main(folders, out.value), needs=(), takes_arguments=True)
