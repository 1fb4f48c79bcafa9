"""All that is made of a list of runs: tables, figures and a page in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hyperjax.engine.checkpoint import write_atomically
from hyperjax.sweeps import comparison, figures, tables

POINTS, CLIENTS = "points.csv", "clients.csv"
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
      The files: points.csv, clients.csv, table.md, table.tex,
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
    if not live:
        (folder / FIGURES).mkdir(exist_ok=True)
        for name, figure in figures.all_of(*results[1:5]):
            for form in figures.FORMATS:
                path = folder / FIGURES / f"{name}.{form}"
                part = path.with_name(f".{path.name}.part")
                part.write_bytes(figures.rendered(figure, form))
                part.replace(path)
                written.append(path)
    # Last, with links to what is there.
    page = comparison.page(results, folder / PAGE, folder.resolve().name, live)
    write_atomically(folder / PAGE, page)
    return [*written, folder / PAGE]
