"""A picture of a partition: one dot per client and class.

Figures are made without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One palette for pictures, pages and figures: colours that colour-blind readers tell
# apart (Okabe and Ito 2008, without yellow and black).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b7280")
PARTICIPATING, NOVEL = PALETTE[:2]
INK, MUTED, GRID = "#3d4450", "#7b8494", "#e3e7ed"
_SIZE = "#b8bec9"


def partition_picture(
    counts: np.ndarray,
    participating: np.ndarray,
    label_names: Sequence[str] | None = None,
    title: str | None = None,
    shift: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Draws how many samples of each class each client holds.

    Clients are columns, those that participate first, and classes are rows. The area of
    a dot is proportional to the number of samples. Below are what clients' images have
    been through, as bars from the least value of all to the greatest.

    Args:
      counts: [N, K] integers, as from `partition.class_counts`.
      participating: [N] bool; whether the client takes part in training.
      label_names: K names for the rows; None numbers them.
      title: a line above the picture.
      shift: {parameter: [N]}, of those in which clients differ.

    Returns:
      A figure that belongs to no window.

    Raises:
      ValueError: shapes do not fit.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts, participating = np.asarray(counts), np.asarray(participating, bool)
    if counts.ndim != 2 or participating.shape != counts.shape[:1]:
        raise ValueError(
            f"counts must be [N, K] and participating [N], got {counts.shape} and "
            f"{participating.shape}"
        )
    num_clients, num_classes = counts.shape
    names = list(map(str, range(num_classes) if label_names is None else label_names))
    shift = shift or {}
    if len(names) != num_classes:
        raise ValueError(f"{len(names)} label_names for {num_classes} classes")

    # Inches per cell: roomy for ten rows, still apart for a hundred.
    cell = float(np.clip(12 / max(num_clients, num_classes), 0.11, 0.36))
    # Beside the cells: row names, axis names, legend and title, in inches.
    width = cell * num_clients + 0.07 * max(map(len, names), default=0) + 0.6
    height = cell * (num_classes + 2 * len(shift)) + 1.1 + 0.35 * (title is not None)
    # The legend is 4.8 inches wide.
    figure = Figure(figsize=(max(width, 4.8), height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    order = np.argsort(~participating, kind="stable")
    _draw_grid(axes, order, names, cell)
    _draw_dots(axes, counts[order], participating[order], cell)
    _draw_shift(axes, {k: v[order] for k, v in shift.items()}, participating[order])
    num_participating = int(participating.sum())
    if 0 < num_participating < num_clients:
        axes.axvline(num_participating - 0.5, color=INK, linewidth=1, zorder=3)
    if title is not None:
        # Of the figure: with few clients the axes are narrower than words.
        words = dict(color=INK, fontsize=11, weight="bold")
        figure.suptitle(title, x=0.01, ha="left", **words)
    # Laid out anew at each drawing, a figure would never give the same file twice.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def figure_svg(figure: Figure) -> str:
    """Returns the figure as an `<svg>` element; equal figures give equal text."""
    import matplotlib

    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    buffer = io.StringIO()
    # Text stays text: smaller, searchable and in the reader's font.
    with matplotlib.rc_context({"svg.hashsalt": "hyperjax", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue()
    # A hundredth of a point is enough, and a quarter of the bytes less.
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', _shortened, text)
    return text[text.index("<svg") :]


def _shortened(attribute: re.Match) -> str:
    def number(found: re.Match) -> str:
        return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")

    return re.sub(r"\d+\.\d{3,}", number, attribute[0]).replace(" \n", " ")


def figure_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure as a PNG file; equal figures, equal bytes."""
    figure.savefig(path, format="png", dpi=160, metadata={"Software": None})


def _draw_grid(
    axes: Axes, clients: np.ndarray, names: Sequence[str], cell: float
) -> None:
    """Sets ticks, names and faint lines; columns are `clients` from left to right."""
    num_clients, num_classes = len(clients), len(names)
    font = float(np.clip(40 * cell, 5.0, 9.0))
    # A client number needs about 0.3 inches beside its neighbour.
    step = int(np.ceil(0.3 / cell))
    ticks = range(0, num_clients, step)
    axes.set_xticks(
        ticks, [str(clients[tick]) for tick in ticks], fontsize=max(font, 6)
    )
    axes.set_yticks(range(num_classes), names, fontsize=font)
    axes.set_xlim(-0.6, num_clients - 0.4)
    axes.set_ylim(num_classes - 0.4, -0.6)
    axes.set_aspect("equal")
    axes.set_axisbelow(True)
    axes.hlines(range(num_classes), -0.6, num_clients - 0.4, color=GRID, linewidth=0.6)
    axes.vlines(range(num_clients), -0.6, num_classes - 0.4, color=GRID, linewidth=0.6)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("client", color=INK, fontsize=9)
    axes.set_ylabel("class", color=INK, fontsize=9)


def _draw_shift(
    axes: Axes, shift: Mapping[str, np.ndarray], participating: np.ndarray
) -> None:
    """Draws a bar per client and parameter, each two rows high, below the classes."""
    if not shift:
        return
    ticks, names = (
        list(axes.get_yticks()),
        [t.get_text() for t in axes.get_yticklabels()],
    )
    colors = np.where(participating, PARTICIPATING, NOVEL)
    bottom = axes.get_ylim()[0]
    for parameter, values in shift.items():
        least, greatest = float(values.min()), float(values.max())
        bottom += 2.0
        heights = 1.6 * (values - least) / max(greatest - least, 1e-12) + 0.06
        axes.bar(range(len(values)), -heights, 0.6, bottom, color=colors, zorder=2)
        ticks.append(bottom - 0.8)
        names.append(f"{parameter}\n{least:.3g} to {greatest:.3g}")
    axes.set_yticks(ticks, names)
    axes.set_ylim(bottom + 0.3, -0.6)


def _draw_dots(
    axes: Axes, counts: np.ndarray, participating: np.ndarray, cell: float
) -> None:
    """Draws the dots and the legend of colours and of the biggest dot."""
    biggest = max(int(counts.max(initial=0)), 1)
    # Diameter in points; the biggest dot leaves a tenth of its cell free.
    biggest_area = (0.9 * 72 * cell) ** 2
    groups = (
        ("participating", PARTICIPATING, participating),
        ("not participating", NOVEL, ~participating),
    )
    for label, color, chosen in groups:
        if not chosen.any():
            continue
        shown = counts * chosen[:, None]
        # One call per size, because SVG repeats the outline for every call's size but
        # shares it within a call: a tenth of the bytes for 100 x 100.
        for count in np.unique(shown[shown > 0]):
            client, k = np.nonzero(shown == count)
            area = biggest_area * count / biggest
            axes.scatter(client, k, s=area, color=color, linewidths=0, zorder=2)
        # Empty scatters lend the legend a dot of readable size.
        axes.scatter([], [], s=40, color=color, linewidths=0, label=label)
    size_label = f"{biggest} samples"
    axes.scatter([], [], s=biggest_area, color=_SIZE, linewidths=0, label=size_label)
    axes.figure.legend(
        loc="outside lower center",
        ncols=3,
        frameon=False,
        borderpad=0.7,
        fontsize=9,
        labelcolor=INK,
        handlelength=2.6,  # the biggest dot of all is 2.6 letters wide
        handletextpad=0.3,
    )
