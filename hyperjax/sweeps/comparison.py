"""The page that lays several runs side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hyperjax.engine.checkpoint import read_json
from hyperjax.launch import charts, finished, pages
from hyperjax.launch.charts import Series
from hyperjax.launch.finished import Run
from hyperjax.launch.report_sections import METRICS
from hyperjax.sweeps import figures, long, statistics, tables, tune

_FEW = 6  # names are listed; more are counted
# So many clients of two groups are compared by a dot each.
_MAX_PAIRS, _MAX_CHARTS = 2000, 6
_FILES = (
    *("points.csv", "points.parquet", "clients.csv"),
    *("table.md", "table.tex", "table.csv", "figures"),
)


class Results(NamedTuple):
    """All that tables, figures and pages are made of.

    Attributes:
      points: what tells each point, and its run.
      table: see `long.table`.
      wide: a row per point, see `long.last`.
      clients: see `long.clients`.
      by: columns that make a group.
      content: of the tables.
    """

    points: list[tuple[dict[str, Any], Run]]
    table: pd.DataFrame
    wide: pd.DataFrame
    clients: pd.DataFrame
    by: list[str]
    content: tables.Content


def read(
    folders: Iterable[str | os.PathLike],
    fields: Sequence[str] = (),
    baseline: str | None = None,
    paper: Mapping[str, Mapping[str, float]] | None = None,
    live: bool = False,
) -> Results:
    """Returns the results of runs.

    Args:
      folders: runs, or folders that hold some.
      fields: settings that make a point; those in which the runs differ if none.
      baseline: METHOD or FIELD=VALUE.
      paper: published values by group, see `tables.content`.
      live: the baseline may be missing yet.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: a run is damaged, or `baseline` or `paper` name no group.
    """
    points = long.points(list(folders), fields)
    table, clients = long.table_of(points), long.clients_of(points)
    wide = long.last(points, table)
    by = [name for name in points[0][0] if name not in ("point", "seed", "finished")]
    try:
        content = tables.content(wide, clients, by, baseline, paper)
    except ValueError:
        if not live:
            raise
        content = tables.content(wide, clients, by)
    return Results(points, table, wide, clients, by, content)


def page(results: Results, path: Path, title: str, live: bool = False) -> str:
    """Returns the page, with links as of a file at `path`."""
    each = statistics.groups_of(results.wide, results.by)
    look, told = figures.looks(each), tables.telling(each)
    head = f"{look.method}, " if look.method else ""  # charts say it over their legends
    names = {tables.label(g): head + t for g, t in zip(each, told, strict=True)}
    series = [Series(names[n], _hex(o.color), o.line) for n, o in look.of.items()]
    done = int(results.wide["finished"].sum())
    num = len(results.points)
    groups = len(series)
    words = (
        f"{num} run{'s' * (num != 1)} in {groups} group{'s' * (groups != 1)} · "
        f"{done} finished"
    )
    body = [
        pages.header(title, words),
        *_noted(path.parent),
        _differing(results),
        _results(results),
        _curves(results, series, look, names),
        _swept(results),
        _places(results, series, look, names),
        _clients(results, series, names),
        _partitions(results),
        _runs(results, path),
        _files(path.parent),
    ]
    if live:
        body.append("<script>setTimeout(() => location.reload(), 15000)</script>")
    return pages.page(title, body)


def _noted(folder: Path) -> list[pages.Html]:
    """What a sweep's record says of points that did not end well, and of choices."""
    try:
        found = read_json(folder / finished.SWEEP, "start the sweep again")
    except FileNotFoundError:
        return []
    said = [
        f"{entry['name']}: {entry['status']}: {entry['message']}"
        for entry in found.get("points", ())
        if entry.get("message")
    ]
    return [pages.text(one, note=True) for one in (*said, *tune.at_the_edge(found))]


def _differing(results: Results) -> str:
    """What differs between runs beside the method, and in whom."""
    found = long.differing([run.about.get("config", {}) for _, run in results.points])
    heading = "Settings that differ beside the method"
    if not found:
        return pages.section(heading, pages.text("They share every other setting."))
    methods = [head["method"] for head, _ in results.points]
    rows = [
        (
            pages.code(field),
            "; ".join(_whose(list(map(tables.setting, values)), methods)),
        )
        for field, values in found.items()
    ]
    table = pages.table(("field", "values"), rows)
    return pages.section(heading, f'<div class="words">{table}</div>')


def _whose(values: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Says each value of a setting, and of which methods it is, or of how many runs."""
    pairs = list(zip(values, methods, strict=True))
    found = []
    for value in dict.fromkeys(values):
        own = dict.fromkeys(m for v, m in pairs if v == value)
        whole = all(v == value for v, m in pairs if m in own)
        num = values.count(value)
        told = whole and 1 < len(set(methods)) > len(own) <= _FEW
        who = ", ".join(own) if told else f"{num} run{'s' * (num != 1)}"
        found.append(f"{value} ({who})")
    return found


def _results(results: Results) -> str:
    parts = []
    for part in tables.parts(results.content):
        rows = [
            [
                pages.Html(f"<b>{pages.cell(cell)}</b>") if mark else cell
                for cell, mark in zip(*both, strict=True)
            ]
            for both in zip(part.rows, part.bold, strict=True)
        ]
        parts += [pages.tabular(part.name, part.headings, rows)]
        parts += [pages.text(part.caption)]
    return pages.section("Results", *parts)


def _curves(
    results: Results,
    series: Sequence[Series],
    look: figures.Looks,
    names: Mapping[str, str],
) -> str:
    if not look.are_told:
        said = (
            f"{len(series)} groups are more than lines can tell apart. Up to "
            f"{figures.MOST} have curves: hyperjax report draws those of the folders "
            "that it is given."
        )
        return pages.section("Curves", pages.text(said))
    axes = {k: v for k, v in charts.AXES.items() if results.table[k].nunique() > 1}
    found = []
    for metric, name in METRICS.items():
        for more, table in look.panels(results.table):
            rows = [
                {"series": names[group], **_point(row)}
                for group, frame in figures.by_round(table, results.by, metric)
                for row in frame.to_dict("records")
            ]
            if rows:
                spec = charts.lines(rows, series, f"{name}, %")
                found.append(pages.chart(f"{name}, %{more}", spec))
    if not found or not axes:
        return pages.section("Curves", pages.text("No evaluation yet."))
    said = pages.text(
        "Means over the seeds of a group; bands are the sample deviation (n - 1) over "
        "them, none for one seed."
    )
    return pages.section("Curves", said, pages.against(axes), pages.grid(*found))


def _point(row: Mapping[Any, Any]) -> dict[str, Any]:
    at = {k: row[k] for k in charts.AXES if not np.isnan(row[k])}
    at |= {"y": row["mean"], "n": row["n"]}
    if not np.isnan(row["std"]):
        at |= {"low": row["mean"] - row["std"], "high": row["mean"] + row["std"]}
    return at


def _swept(results: Results) -> str:
    """Accuracies against every number that the runs differ in."""
    done = results.wide[results.wide["finished"].astype(bool)]
    found = []
    for field in results.by:
        values = figures.numbers_of(done, field) if field != "method" else []
        if len(values) < 2:
            continue
        rest = [name for name in results.by if name != field]
        groups = statistics.groups_of(done[done[field].notna()], rest)
        look = figures.looks(groups)
        if not look.are_told:
            continue
        series = [Series(n, _hex(o.color), o.line) for n, o in look.of.items()]
        for metric in (m for m in tables.NAMES if m in done):
            rows = []
            for group in groups:
                own = statistics.members(done, group)
                for value in values:
                    seeds = statistics.by_seed(own[own[field] == value], metric)
                    if not seeds:
                        continue
                    spread = statistics.spread(list(seeds.values()))
                    row = {"series": tables.label(group), "x": value, "y": spread.mean}
                    row["n"] = spread.n
                    if spread.std is not None:
                        row["low"] = spread.mean - spread.std
                        row["high"] = spread.mean + spread.std
                    rows.append(row)
            name = tables.NAMES[metric]
            spec = charts.lines(
                rows,
                series,
                f"{name}, %",
                ("x", field),
                bars=True,
                log=figures.logarithmic_from(values),
            )
            found.append(pages.chart(f"{name} by {field}", spec))
    said = pages.text("After the last round; bars are the sample deviation over seeds.")
    return pages.section("Swept numbers", *(found and [said, pages.grid(*found)]))


def _places(
    results: Results,
    series: Sequence[Series],
    look: figures.Looks,
    names: Mapping[str, str],
) -> str:
    """zACC against pACC."""
    done = results.wide[results.wide["finished"].astype(bool)]
    if not {"pacc", "zacc"} <= set(done) or done.empty or not look.are_told:
        return ""
    found = []
    note = "A small mark is a run, a large one the mean of its group."
    for more, part in look.panels(done):
        rows: list[dict[str, Any]] = []
        for group, own in statistics.split(part, results.by):
            own = own.dropna(subset=["pacc", "zacc"])
            name = names[tables.label(group)]
            rows += [
                dict(series=name, x=r.pacc, y=r.zacc, name=r.point, mean=False)
                for r in own.itertuples()
            ]
            if len(own) > 1:
                mean = {"x": own["pacc"].mean(), "y": own["zacc"].mean()}
                rows.append(
                    {"series": name, **mean, "name": f"mean of {name}", "mean": True}
                )
        if rows:
            axes = "pACC, % (participants)", "zACC, % (unseen)"
            spec = charts.places(rows, series, *axes)
            found.append(pages.chart(f"zACC against pACC{more}", spec, note))
    return pages.section("Unseen clients against participants", pages.grid(*found))


def _clients(
    results: Results, series: Sequence[Series], names: Mapping[str, str]
) -> str:
    """Quantiles of clients by group, and each client under two groups."""
    rows = results.clients[results.clients["metric"] == "accuracy"]
    if rows.empty:
        return ""
    found = []
    for side in (True, False):
        chosen = rows[rows["participating"] == side]
        quantiles = [
            {"series": names[tables.label(group)], **_quantiles(own["value"])}
            for group, own in statistics.split(chosen, results.by)
        ]
        if quantiles:
            who = "participants" if side else "unseen clients"
            spec = charts.boxes(quantiles, series, "accuracy of a client, %")
            note = "10, 25, 50, 75 and 90 % quantiles over the clients of all seeds."
            found.append(pages.chart(f"Accuracy of {who}", spec, note))
    return pages.section("Clients", pages.grid(*found), pages.grid(*_pairs(results)))


def _quantiles(values: pd.Series) -> dict[str, float]:
    names = ("p10", "q1", "median", "q3", "p90")
    found = np.percentile(values.to_numpy(float), [10, 25, 50, 75, 90])
    return {**dict(zip(names, map(float, found), strict=True)), "n": len(values)}


def _pairs(results: Results) -> Sequence[str]:
    """A chart for each of some groups and its baseline: clients under both."""
    rows = results.clients[results.clients["metric"] == "accuracy"]
    keys = ["seed", "partition", "client", "participating"]
    found = []
    for record in results.content.records:
        group, other = record["group"], record["baseline"]
        if other in (None, group):
            continue
        one, two = (
            statistics.members(rows, g).drop_duplicates(keys).set_index(keys)["value"]
            for g in (group, other)
        )
        both = pd.concat(
            [one, two], axis=1, join="inner", keys=["y", "x"]
        ).reset_index()
        if both.empty:
            continue
        name, base = tables.label(group), tables.label(other)
        dots = [
            {
                "series": charts.kind(r.participating),
                "x": r.x,
                "y": r.y,
                "name": f"client {r.client}, seed {r.seed}",
            }
            for r in both.head(_MAX_PAIRS).itertuples()
        ]
        spec = charts.places(
            dots, charts.GROUPS, f"{base}, %", f"{name}, %", diagonal=True
        )
        note = "A mark is a client; above the line it is served better."
        found.append(pages.chart(f"{name} against {base}", spec, note))
    return found[:_MAX_CHARTS]


def _partitions(results: Results) -> str:
    """Which runs share one partition."""
    shared: dict[str, list[str]] = {}
    for head, run in results.points:
        digest = run.about.get("data", {}).get("partition", "unknown")
        shared.setdefault(digest, []).append(head["point"])
    if len(shared) == 1:
        return pages.section("Partition", pages.text("All runs share one partition."))
    rows = [
        (pages.code(digest[:12]), len(names), ", ".join(names[:_FEW]) + _more(names))
        for digest, names in shared.items()
    ]
    said = pages.text("Clients are the same, sample by sample, in runs of one digest.")
    table = pages.table(("digest", "runs", "which"), rows)
    return pages.section("Partitions", said, f'<div class="words">{table}</div>')


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - _FEW} more" if len(names) > _FEW else ""


def _runs(results: Results, path: Path) -> str:
    """Every run, with its settings and what it came to."""
    metrics = [m for m in METRICS if m in results.wide]
    values = results.wide.set_index("point").to_dict("index")
    last = results.table.groupby("point")["round"].max().to_dict()
    rows = []
    for head, run in results.points:
        own = os.path.join(os.path.abspath(run.folder), "report.html")
        name: object = head["point"]
        if os.path.exists(own):
            target = os.path.relpath(own, path.absolute().parent)
            name = pages.link(target.replace(os.sep, "/"), head["point"])
        settings = [tables.setting(head[field]) for field in results.by]
        found = values.get(head["point"], {})
        scores = [_known(found.get(metric)) for metric in metrics]
        state = "finished" if head["finished"] else "not finished"
        # As text: a seed is no number to round.
        rows.append(
            (
                name,
                *settings,
                str(head["seed"]),
                last.get(head["point"]),
                *scores,
                _known(found.get("run_seconds")),
                state,
            )
        )
    names = [tables.short(field, results.by) for field in results.by]
    headings = ["run", *names, "seed", "rounds", *(f"{METRICS[m]} %" for m in metrics)]
    table = pages.tabular("runs", [*headings, "seconds", "state"], rows)
    return pages.section("Runs", table)


def _files(folder: Path) -> str:
    there = [name for name in _FILES if (folder / name).exists()]
    links = ", ".join(pages.link(name, name) for name in there)
    return pages.section("Files", f"<p>{links}</p>" if links else "")


def _known(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _hex(color: Any) -> str:
    from matplotlib.colors import to_hex

    return to_hex(color)
