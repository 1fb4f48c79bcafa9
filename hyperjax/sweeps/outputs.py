"""All that is made of a list of runs: tables, figures and a page in one folder."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from hyperjax.engine.checkpoint import write_atomically
from hyperjax.sweeps import comparison, figures, tables

POINTS, CLIENTS, PARQUET = "points.csv", "clients.csv", "points.parquet"
FIGURES, PAGE = "figures", "report.html"


def write(
    folder: Path,
    runs: Sequence[Path],
    fields: Sequence[str] = (),
    baseline: str | None = None,
    *,
    live: bool = False,
    paper: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Path]:
    """Writes what runs came to, each file as a whole.

    Args:
      folder: where the files go; it is there.
      runs: folders of runs, finished or not.
      fields: the settings that make a point beside method and seed; those in which
        the runs differ if none are given.
      baseline: METHOD or FIELD=VALUE, which groups are compared with.
      live: the runs go on: tables and page alone, and a baseline may be missing yet.
      paper: published values, {label of a group: {metric: value}}.

    Returns:
      The files: points.csv, points.parquet, clients.csv, table.md, table.tex,
      table.csv, figures/*.{pdf,svg,png} and report.html.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: a run is damaged, or `baseline` or `paper` name no group.
    """
    results = comparison.read(runs, fields, baseline, paper, live)
    texts = {
        POINTS: results.table.to_csv(index=False),
        CLIENTS: results.clients.to_csv(index=False),
        "table.md": tables.markdown(results.content),
        "table.tex": tables.latex(results.content),
        "table.csv": tables.frame(results.content).to_csv(index=False),
    }
    written = []
    for name, text in texts.items():
        write_atomically(folder / name, text)
        written.append(folder / name)
    contents = {folder / PARQUET: parquet(results.table)}
    if not live:
        (folder / FIGURES).mkdir(exist_ok=True)
        for name, figure in figures.all_of(*results[1:5]):
            for form in figures.FORMATS:
                path = folder / FIGURES / f"{name}.{form}"
                contents[path] = figures.rendered(figure, form)
    for path, content in contents.items():
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        part.replace(path)
        written.append(path)
    # Last, with links to what is there.
    page = comparison.page(results, folder / PAGE, folder.resolve().name, live)
    write_atomically(folder / PAGE, page)
    return [*written, folder / PAGE]


def parquet(table: pd.DataFrame) -> bytes:
    """Returns a table as a Parquet file; a column of several types becomes text."""
    table = table.copy()
    for name, column in table.items():
        there = column.dropna()
        if column.dtype == object and len({type(value) for value in there}) > 1:
            table[name] = there.map(str).reindex(table.index)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
