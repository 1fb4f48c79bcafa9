"""Self-contained HTML pages about finished and running experiments.

hyperjax report FOLDER... [--baseline=fedavg] [--out=page.html]

One run gets its page anew (report.html in its folder). A folder that holds runs, or
several folders, get a page that compares them, with tables, figures and all results as
CSV: in that folder, or in `comparison` beside several. Runs may be finished or not. A
page holds its own style and scripts, so it opens anywhere and can be sent as it is. The
same files give the same page.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from hyperjax.engine.checkpoint import write_atomically
from hyperjax.launch import cli, finished, pages
from hyperjax.launch import outputs as targets
from hyperjax.launch import report_sections as sections


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
    own = Path(workdir, "report.html")
    path = path or str(own)
    linked = Path(path).absolute().parent == own.absolute().parent
    body = [
        sections.headline(run, latest, heading),
        sections.cards(latest),
        sections.curves(run),
        sections.accuracies(latest),
        sections.fine_tuning(latest),
        sections.families(run, latest),
        sections.training(run),
        sections.communication(latest),
        sections.clients(run),
        sections.embeddings(run, latest),
        sections.partition(run),
        sections.configuration(run, latest, linked),
    ]
    write_atomically(path, pages.page(heading, body))
    return path


def comparison_report(
    folders: Sequence[str | os.PathLike],
    path: str | os.PathLike,
    title: str,
    fields: Sequence[str] = (),
    baseline: str | None = None,
) -> str:
    """Writes a page that lays several runs side by side, and nothing else.

    Args:
      folders: runs, or folders that hold some.
      path: where the page goes; links to the runs' own pages, where these are there,
        are relative to it.
      title: heading of the page.
      fields: settings that make a point; those in which the runs differ if none.
      baseline: METHOD or FIELD=VALUE, which groups are compared with.

    Returns:
      `path`.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: a run is damaged, or `baseline` names no group.
    """
    from hyperjax.sweeps import comparison

    results = comparison.read(folders, fields, baseline)
    write_atomically(path, comparison.page(results, Path(path), title))
    return str(path)


def main(folders: Sequence[str], out: str | None, baseline: str | None = None) -> int:
    """Writes the page of one run or several; returns the exit code.

    Raises:
      ValueError: no folders, `out` cannot be written, or one run and a `baseline`.
      FileNotFoundError: one of the folders holds no run.
    """
    if not folders:
        raise ValueError(
            "give the folder of a run, or of several to be compared: "
            "hyperjax report FOLDER... [--out=page.html]"
        )
    given = list(dict.fromkeys(Path(f).expanduser().resolve() for f in folders))
    with cli.doing("report", "reading runs") as shown:
        runs = finished.find(given)
        shown.stage(f"making pages of {len(runs)} runs")
        page = _written(given, runs, out, baseline)
    print(f"report: {page}")
    return 0


def _written(
    given: list[Path], runs: list[Path], out: str | None, baseline: str | None
) -> str | Path:
    """Writes pages; returns the path of the one to open."""
    from hyperjax.sweeps import outputs, record, results

    if runs == given[:1]:
        if baseline is not None:
            raise ValueError(
                f"baseline={baseline!r} is what other runs are compared with, and "
                f"{str(runs[0])!r} is one run; give several, or a folder of some"
            )
        usual = str(runs[0] / "report.html")
        with targets.file("out", usual if out is None else out) as path:
            return run_report(str(runs[0]), str(path))
    for run in runs:
        if not (run / "report.html").exists():
            with contextlib.suppress(OSError):  # others' runs may be read only
                run_report(str(run))
    if out is not None:
        title = f"{len(runs)} runs"
        with targets.file("out", out) as path:
            return comparison_report(runs, path, title, baseline=baseline)
    folder = given[0]
    if len(given) == 1 and (folder / finished.SWEEP).exists():
        results.write(record.Record(str(folder)), baseline)
        return folder / outputs.PAGE
    if len(given) > 1:
        folder = Path(os.path.commonpath([run.parent for run in runs])) / "comparison"
    targets.folder("out", folder).mkdir(exist_ok=True)
    if baseline is None and (folder / finished.SWEEP).exists():
        results.write(record.Record(str(folder)))  # with its own baseline
    else:
        outputs.write(folder, runs, baseline=baseline)
    return folder / outputs.PAGE


def launch() -> None:
    """Runs the command with what the command line says."""
    out = cli.define_path("out", None, "File for the page, and nothing beside it.")
    baseline = flags.DEFINE_string(
        "baseline", None, "METHOD or FIELD=VALUE, which other runs are compared with."
    )
    cli.run(
        lambda *folders: main(folders, out.value, baseline.value),
        needs=(),
        takes_arguments=True,
    )
