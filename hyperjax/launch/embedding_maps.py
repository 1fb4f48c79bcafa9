"""Clients' embeddings over rounds: kept at evaluations, and drawn as maps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperjax.data.picture import GRID, INK, MUTED
from hyperjax.engine import log
from hyperjax.engine.checkpoint import write_atomically
from hyperjax.launch.workdir import EMBEDDINGS
from hyperjax.runs import likeness
from hyperjax.runs.results import Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 60  # clients of either kind whose embeddings are kept
_MOST_MAPS, _MOST_NAMES = 6, 24


def begin(folder: Path, finished_rounds: int) -> None:
    """Cuts off what a run has of rounds after those that a checkpoint goes on from."""
    path = folder / EMBEDDINGS
    if path.exists():
        kept = [r for r in log.read_lines(path) if r["round"] <= finished_rounds]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def keep(
    folder: Path,
    round: int,
    values: Mapping[str, Values],
    num_clients: int,
    whom: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Appends clients' embeddings of an evaluation; nothing of a method without them.

    Args:
      folder: of the run.
      round: that was evaluated.
      values: per-client values by metric, from `Evaluator.evaluate`.
      num_clients: N; unseen ones are numbered from N on.
      whom: as of `results.per_client`.
    """
    found: dict[str, list[Any]] = {"client": [], "participating": [], "embedding": []}
    for metric, takes_part in (("pacc", True), ("zacc", False)):
        rows = likeness.embedding_of(values.get(metric, {}))
        if rows is None:
            continue
        rows = rows[:MOST]
        places = np.arange(len(rows)) if whom is None else whom[metric][: len(rows)]
        found["client"] += (places + num_clients * (not takes_part)).tolist()
        found["participating"] += [takes_part] * len(rows)
        found["embedding"] += log.jsonable(rows)
    if found["client"]:
        with open(folder / EMBEDDINGS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"round": round, **found}) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Returns what `keep` wrote of each round, where all of it is finite."""
    rounds = {record["round"]: record for record in log.read_lines(folder / EMBEDDINGS)}
    return [
        record
        for record in rounds.values()
        if all(None not in row for row in record["embedding"])
    ]


def spread(records: Sequence[Mapping[str, Any]]) -> float:
    """Returns the furthest that a client ever was from the mean of its round."""
    far = 0.0
    for record in records:
        values = np.array(record["embedding"], float)
        far = max(far, float(np.linalg.norm(values - values.mean(0), axis=1).max()))
    return far


def picture(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws clients' embeddings after several rounds on the same two components.

    Components are the main ones of all rounds and clients together. A client has one
    colour throughout, and those that do not take part another mark.

    Args:
      records: as from `read`, of one round or more.

    Returns:
      A figure that belongs to no window.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    at, shares = _components([record["embedding"] for record in records])
    chosen = np.linspace(0, len(records) - 1, min(_MOST_MAPS, len(records)))
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    ids = sorted({client for record in records for client in record["client"]})
    scale = matplotlib.colormaps["turbo"](np.linspace(0.04, 0.96, len(ids)))
    colors = dict(zip(ids, scale, strict=True))
    figure = Figure(
        figsize=(2.4 * columns + 1.4, 2.3 * rows + 0.5), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(chosen) :]:
        axis.remove()
    for axis, place in zip(axes.flat, chosen.round().astype(int), strict=False):
        record = records[place]
        for client, takes_part, (x, y) in zip(
            record["client"], record["participating"], at[place], strict=True
        ):
            axis.plot(x, y, color=colors[client], **_mark(takes_part))
        axis.set_title(f"round {record['round']}", fontsize=9, color=INK)
        axis.grid(color=GRID)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=7, colors=INK)
        axis.locator_params(nbins=5)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("bottom", "left"):
            axis.spines[side].set_color(MUTED)
    titles = [f"component {i + 1} ({share:.0f} %)" for i, share in enumerate(shares)]
    figure.supxlabel(titles[0], fontsize=9, color=INK)
    figure.supylabel(titles[1], fontsize=9, color=INK)
    kinds = dict(zip(records[-1]["client"], records[-1]["participating"], strict=True))
    entries = [
        Line2D([], [], linestyle="", color=colors[c], label=str(c), **_mark(kinds[c]))
        for c in (kinds if len(kinds) <= _MOST_NAMES else ())
    ] or [
        Line2D([], [], linestyle="", color=MUTED, label=name, **_mark(takes_part))
        for name, takes_part in (("participating", True), ("unseen", False))
        if takes_part in kinds.values()
    ]
    figure.legend(
        handles=entries,
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        title="client" if len(kinds) <= _MOST_NAMES else None,
        title_fontsize=8,
        labelcolor=INK,
    )
    # Laid out anew at each drawing, a figure would never give the same file twice.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _components(rounds: Sequence[Any]) -> tuple[list[np.ndarray], np.ndarray]:
    """Places [N, 2] by round, and shares of variance, %."""
    values = [np.array(each, float) for each in rounds]
    whole = np.concatenate(values)
    mean = whole.mean(0)
    _, size, axes = np.linalg.svd(whole - mean, full_matrices=False)
    two = np.zeros((whole.shape[1], 2))
    rank = min(2, len(size))
    two[:, :rank] = axes[:rank].T
    shares = np.zeros(2)
    shares[:rank] = 100 * size[:rank] ** 2 / max(float(np.sum(size**2)), 1e-30)
    return [(each - mean) @ two for each in values], shares


def _mark(takes_part: bool) -> dict[str, Any]:
    """How a client is drawn."""
    if takes_part:
        return dict(marker="o", markersize=5, markeredgewidth=0, alpha=0.85)
    return dict(marker="^", markersize=6, markerfacecolor="none", markeredgewidth=1.2)
