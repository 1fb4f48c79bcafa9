"""Figures of groups of runs for a paper, in one style; equal results, equal files.

Made without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from hyperjax.data.picture import GRID, INK, MUTED, PALETTE
from hyperjax.sweeps import statistics, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("pdf", "svg", "png")
# Inches, of a page of two columns: the text's width.
WIDTH, PANEL_HEIGHT = 6.9, 2.1
_COLUMNS = 3  # of panels, at most
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # fonts that journals take
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "hyperjax",
}
AXES = {
    "round": "round",
    "bytes": "sent by all clients and to them, bytes",
    "seconds": "seconds, compiling included",
}
_NO_DATES: dict[str, dict[str, None]] = {
    "pdf": dict.fromkeys(("CreationDate", "Creator", "Producer")),
    "svg": dict.fromkeys(("Creator", "Date", "Format", "Type")),
    "png": {"Software": None},
}
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
# Groups that can be told apart in one panel, but for values of one number.
MOST = len(PALETTE) * len(_LINES)
_LEGEND_LINES, _LINE_HEIGHT = 3, 0.17  # that figures have room for; inches
_LABEL = 36  # letters of a line
# Up to so many clients of a group are shown each by a dot.
_MAX_DOTS = 200


def _style() -> Any:
    """Our style, and nothing of the process' own."""
    import matplotlib

    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Has a figure drawn in our style, whatever the process' own is."""

    @functools.wraps(draw)
    def drawn(*args: Any) -> Figure:
        with _style():
            figure = draw(*args)
            # Laid out anew at each drawing, it would give other files each time.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return figure

    return drawn


class Look(NamedTuple):
    """How a group is drawn: by colour, and by line and marker if that is not enough."""

    color: Any
    line: Any
    marker: Any


class Looks(NamedTuple):
    """How groups are drawn, and the legend of it: (words, look) in order.

    Too many for one panel have a panel for each value of the setting `apart`. A
    `method` that all have stands over the legend, whose words leave it out.
    """

    of: dict[str, Look]
    legend: list[tuple[str, Look]]
    apart: str | None = None
    method: str = ""

    @property
    def are_told(self) -> bool:
        """Whether no two groups of a panel look alike."""
        return len({look for _, look in self.legend}) == len(self.legend)

    def panels(self, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        """Returns the rows of each panel, and what to add to its title."""
        if self.apart is None:
            return [("", rows)]
        name = tables.short(self.apart, list(rows))
        return [
            (f", {name}={tables.setting(value)}", rows[rows[self.apart] == value])
            for value in rows[self.apart].unique()
        ]


def looks(groups: Sequence[Mapping[str, Any]]) -> Looks:
    """Returns a line for each value of one setting, and colours for all else.

    The setting is one that has few values, the same for all else; if there are more
    others than colours, each value has a panel instead. Numbers that nothing else
    varies with have colours in their order.
    """
    names = list(groups[0]) if groups else []
    varying = [n for n in names if len({group[n] for group in groups}) > 1]
    crossed = [n for n in varying if n != "method" and _is_crossed(groups, n)]
    crossed.sort(key=lambda n: len({group[n] for group in groups}))
    lined = crossed[0] if len(varying) > 1 and crossed else None
    values = list(dict.fromkeys(group[lined] for group in groups)) if lined else []
    rest = [{k: v for k, v in g.items() if k != lined} for g in groups]
    others = {tables.label(group): group for group in rest}
    words, told = list(others), tables.telling(list(others.values()))
    shades = _shades(rest, [n for n in varying if n != lined])
    colors = shades or {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(words)}
    apart = None
    if lined and not shades and len(words) > len(PALETTE):
        apart, lined = lined, None
    methods = {str(group.get("method", "")) for group in groups}
    said = {short.partition(", ")[0] for short in told}
    method = methods.pop() if len(methods) == 1 and not methods & said else ""
    found = {}
    for group, other in zip(groups, rest, strict=True):
        name = tables.label(other)
        # Beyond the palette its colours come again, with another line.
        kind = (
            values.index(group[lined]) if lined else words.index(name) // len(PALETTE)
        )
        kind %= len(_LINES)
        found[tables.label(group)] = Look(colors[name], _LINES[kind], _MARKERS[kind])
    if not lined:
        pairs = zip(map(tables.label, rest), found.values(), strict=True)
        legend = list(zip(told, dict(pairs).values(), strict=True))
        return Looks(found, legend, apart, method)
    legend = [
        (short, Look(colors[name], "-", "o"))
        for name, short in zip(words, told, strict=True)
    ]
    legend += [
        (f"{tables.short(lined, names)}={tables.setting(value)}", Look(MUTED, *kind))
        for value, kind in zip(values, zip(_LINES, _MARKERS, strict=True), strict=False)
    ]
    return Looks(found, legend, method=method)


def _is_crossed(groups: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether all groups that are else alike have the same few values of a setting."""
    seen: dict[str, set[Any]] = {}
    for group in groups:
        other = tables.label({k: v for k, v in group.items() if k != name})
        seen.setdefault(other, set()).add(group[name])
    first, *others = seen.values()
    return 1 < len(first) <= len(_LINES) and all(values == first for values in others)


def _shades(groups: Sequence[Mapping[str, Any]], varying: Sequence[str]):
    """By group, a scale of colours if they are several values of one number."""
    if len(varying) != 1 or not all(is_number(group[varying[0]]) for group in groups):
        return {}
    import matplotlib

    ordered = {group[varying[0]]: tables.label(group) for group in groups}
    if len(ordered) < 3:
        return {}
    scale = matplotlib.colormaps["viridis"]
    places = np.linspace(0.15, 0.88, len(ordered))  # not its palest, nor darkest
    return {ordered[v]: scale(x) for v, x in zip(sorted(ordered), places, strict=True)}


def all_of(
    long: pd.DataFrame, wide: pd.DataFrame, clients: pd.DataFrame, by: Sequence[str]
) -> Iterator[tuple[str, Figure]]:
    """Yields every figure that the results have something for, with its name.

    None with lines or marks of groups that look alike, which are more than `MOST`.

    Args:
      long: as from `long.table`.
      wide: as from `long.last`.
      clients: as from `long.clients`.
      by: columns that make a group.
    """
    look = looks(statistics.groups_of(wide, by))
    metrics = [m for m in tables.NAMES if m in wide]
    for against in AXES if look.are_told else ():
        if metrics and long[against].nunique() > 1:
            yield f"curves_{against}", curves(long, by, metrics, against, look)
    done = wide[wide["finished"].astype(bool)]
    for field in by:
        if field == "method" or not metrics or len(numbers_of(done, field)) < 2:
            continue
        rest = [name for name in by if name != field]
        if looks(statistics.groups_of(done[done[field].notna()], rest)).are_told:
            name = f"by_{field.replace('.', '_')}"
            last = [m for m in tables.accuracies(done) if m not in metrics][-2:]
            yield name, against_field(done, by, [*metrics, *last], field)
    if len(clients):
        yield "clients", distributions(clients, by, look)
    if {"pacc", "zacc"} <= set(done) and len(done) and look.are_told:
        yield "pacc_zacc", participants_and_unseen(done, by, look)


def rendered(figure: Figure, form: str) -> bytes:
    """Returns a figure as a file of one of `FORMATS`; equal figures, equal bytes."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format=form, dpi=220, metadata=_NO_DATES[form])
    return buffer.getvalue()


def by_round(
    long: pd.DataFrame, by: Sequence[str], metric: str
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yields for every group its mean over seeds by evaluated round.

    Columns of the frames: round, bytes, seconds (means), mean, std (NaN for one seed),
    n.
    """
    rows = long[(long["metric"] == metric) & long["bytes"].notna()]
    for group, own in statistics.split(rows, by):
        own = own.groupby("round")
        frame = own[["bytes", "seconds"]].mean().reset_index()
        for name, how in (("mean", "mean"), ("std", "std"), ("n", "count")):
            frame[name] = own["value"].agg(how).to_numpy()
        yield tables.label(group), frame


@_styled
def curves(
    long: pd.DataFrame,
    by: Sequence[str],
    metrics: Sequence[str],
    against: str,
    look: Looks,
) -> Figure:
    """Draws accuracies against rounds, bytes or seconds, with bands over seeds."""
    shown = [(*part, m) for part in look.panels(long) for m in metrics]
    wide_apart = against == "bytes" and _spans_decades(long)
    figure, axes = _panels(len(shown), min(len(metrics), _COLUMNS))
    for axis, (more, rows, metric) in zip(axes, shown, strict=True):
        for name, frame in by_round(rows, by, metric):
            if wide_apart or (against == "bytes" and not frame["bytes"].any()):
                frame = frame[frame["bytes"] > 0]
            if frame.empty:
                continue
            one = look.of[name]
            x, mean, std = frame[against], frame["mean"], frame["std"].fillna(0)
            alone = one.marker if len(x) == 1 else ""  # of one point there is no line
            axis.plot(
                x, mean, color=one.color, linestyle=one.line, marker=alone, markersize=4
            )
            axis.fill_between(
                x, mean - std, mean + std, color=one.color, alpha=0.18, linewidth=0
            )
        axis.set(title=f"{tables.metric_name(metric)}, %{more}", xlabel=AXES[against])
        if against == "bytes":
            _bytes_axis(axis, wide_apart)
    marks = any(line.get_marker() for axis in axes for line in axis.get_lines())
    _legend(figure, look, _over_seeds(long, by, "band"), marks=marks)
    return figure


@_styled
def against_field(
    done: pd.DataFrame, by: Sequence[str], metrics: Sequence[str], field: str
) -> Figure:
    """Draws accuracies after the last round, and what is sent, against a number."""
    from matplotlib.ticker import EngFormatter

    rest = [name for name in by if name != field]
    done = done[done[field].notna()]
    groups = statistics.groups_of(done, rest)
    look = looks(groups)
    values = numbers_of(done, field)
    titles = {metric: f"{tables.metric_name(metric)}, %" for metric in metrics}
    if {"up_numbers", "down_numbers"} <= set(done):
        done = done.assign(sent=done["up_numbers"] + done["down_numbers"])
        if done["sent"].nunique() > 1:
            titles["sent"] = "numbers per client and round"
    figure, axes = _panels(len(titles))
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for i, group in enumerate(groups):
            own = statistics.members(done, group)
            points = [
                (v, statistics.spread(list(seeds.values())))
                for v in values
                if (seeds := statistics.by_seed(own[own[field] == v], metric))
            ]
            one = look.of[tables.label(group)]
            axis.errorbar(
                _beside([v for v, _ in points], values, i, len(groups)),
                [s.mean for _, s in points],
                [s.std or 0 for _, s in points],
                color=one.color,
                linestyle=one.line,
                marker=one.marker,
                capsize=2,
                elinewidth=0.8,
            )
        if is_geometric(values):
            axis.set_xscale("log")
        else:
            axis.set_xscale("function", functions=_axis_of(values))
        axis.set_xticks(values, [f"{v:g}" for v in values])
        axis.minorticks_off()
        axis.set(title=title, xlabel=field)
        if metric == "sent":
            if done["sent"].min() > 0 and done["sent"].max() > 50 * done["sent"].min():
                axis.set_yscale("log")
            axis.yaxis.set_major_formatter(EngFormatter())
    _legend(figure, look, _over_seeds(done, by, "bars"))
    return figure


@_styled
def distributions(clients: pd.DataFrame, by: Sequence[str], look: Looks) -> Figure:
    """Draws the accuracy of clients: quartiles, whiskers at 10 and 90 %, dots."""
    rows = clients[clients["metric"] == "accuracy"]
    groups = statistics.groups_of(rows, by)
    kinds = sorted(rows["participating"].unique(), reverse=True)
    names = [tables.label(group) for group in groups]
    shown = [textwrap.fill(name, _LABEL) for name in tables.telling(groups)]
    row = 0.24 if not any("\n" in name for name in shown) else 0.34
    figure, axes = _panels(len(kinds), height=0.7 + row * len(groups))
    rng = np.random.default_rng(0)  # of the dots' height alone
    for axis, kind in zip(axes, kinds, strict=True):
        chosen = rows[rows["participating"] == kind]
        for group, own in statistics.split(chosen, by):
            name, values = tables.label(group), own["value"].to_numpy(float)
            at, color = names.index(name), look.of[name].color
            box = axis.boxplot(
                values,
                positions=[at],
                whis=(10, 90),
                widths=0.55,
                orientation="horizontal",
                showfliers=False,
                patch_artist=True,
                manage_ticks=False,
            )
            for part in (
                *box["boxes"],
                *box["whiskers"],
                *box["caps"],
                *box["medians"],
            ):
                part.set(color=color, linewidth=1)
            box["boxes"][0].set(facecolor=(*_rgb(color), 0.15))
            if len(values) <= _MAX_DOTS:
                heights = at + rng.uniform(-0.2, 0.2, len(values))
                axis.scatter(values, heights, s=3, color=color, alpha=0.5, linewidths=0)
        axis.set_yticks(range(len(names)), shown if axis is axes[0] else [])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set(title=f"{'participants' if kind else 'unseen clients'}, %")
    head = f"{look.method}; " if look.method else ""
    figure.supxlabel(
        f"{head}accuracy of clients of all seeds; box: quartiles and median; whiskers: "
        "10 and 90 %",
        fontsize=7,
    )
    return figure


@_styled
def participants_and_unseen(
    done: pd.DataFrame, by: Sequence[str], look: Looks
) -> Figure:
    """Draws zACC against pACC: a small mark per run, a large one per group's mean."""
    shown = look.panels(done)
    figure, axes = _panels(len(shown), width=WIDTH / 2 * min(2, len(shown)), height=2.6)
    for axis, (more, rows) in zip(axes, shown, strict=True):
        for group, own in statistics.split(rows, by):
            own = own.dropna(subset=["pacc", "zacc"])
            if own.empty:
                continue
            one = look.of[tables.label(group)]
            marked = {"color": one.color, "marker": one.marker, "linestyle": ""}
            axis.plot(own["pacc"], own["zacc"], alpha=0.35, markersize=2.5, **marked)
            pacc, zacc = (
                statistics.spread(list(statistics.by_seed(own, m).values()))
                for m in ("pacc", "zacc")
            )
            axis.errorbar(
                pacc.mean,
                zacc.mean,
                xerr=pacc.std or 0,
                yerr=zacc.std or 0,
                elinewidth=0.8,
                markersize=5,
                **marked,
            )
        axis.set(xlabel="pACC, % (participants)", ylabel="zACC, % (unseen clients)")
        axis.set(title=more.removeprefix(", "))
    _legend(figure, look, _over_seeds(done, by, "bars"))
    return figure


def is_number(value: Any) -> bool:
    """Whether a setting is a number."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def numbers_of(wide: pd.DataFrame, field: str) -> list[float]:
    """Returns the values of a setting in order if all are numbers, else none."""
    values = wide[field].dropna().unique().tolist()
    return sorted(values) if all(map(is_number, values)) else []


def is_geometric(values: Sequence[float]) -> bool:
    """Whether values are better spread on a logarithmic axis.

    Example:
      >>> is_geometric([2, 4, 8, 16]), is_geometric([2, 4, 6, 8])
      (True, False)
    """
    if len(values) < 3:
        return len(values) == 2 and min(values) > 0 and max(values) >= 8 * min(values)
    if min(values) <= 0:
        return False

    def unevenness(places):
        steps = np.diff(places)
        return np.std(steps) / np.mean(steps)

    return bool(unevenness(np.log(values)) < unevenness(values))


def logarithmic_from(values: Sequence[float]) -> float | None:
    """Returns from where on an axis is better logarithmic; None: nowhere.

    It is the least value. If that is 0 it is the next one, c, and places are those of
    log(1 + value / c).

    Example:
      >>> logarithmic_from([0.01, 0.1, 1]), logarithmic_from([0, 0.01, 0.1, 1])
      (0.01, 0.01)
      >>> logarithmic_from([0, 1, 2])
    """
    others = [value for value in values if value != 0]
    if len(others) < 2 or min(others) < 0 or not is_geometric(others):
        return None
    return min(others)


def _axis_of(values: Sequence[float]) -> tuple[Callable, Callable]:
    """Where values are on their axis, and the inverse."""
    least = logarithmic_from(values)
    if least is None:
        return np.positive, np.positive
    if min(values) > 0:
        return np.log, np.exp
    return lambda v: np.log1p(v / least), lambda place: least * np.expm1(place)


def _panels(
    num: int,
    columns: int = _COLUMNS,
    width: float = WIDTH,
    height: float = PANEL_HEIGHT,
) -> tuple[Figure, list[Axes]]:
    """A figure with panels, row by row, of a height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if num == 4 == columns + 1 else min(num, columns)
    rows = -(-num // columns)
    figure = Figure(figsize=(width, rows * height + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[num:]:
        axis.remove()
    return figure, list(axes[:num])


def _legend(figure: Figure, look: Looks, title: str, marks: bool = True) -> None:
    from matplotlib.lines import Line2D

    entries = look.legend
    lines = [
        Line2D([], [], color=o.color, linestyle=o.line, label=words)
        for words, o in entries
    ]
    for line, (_, one) in zip(lines, entries, strict=True):
        line.set_marker(one.marker if marks else "")
    longest = max((len(words) for words, _ in entries), default=1)
    # About 19 letters an inch, and the line before them.
    columns = int(figure.get_figwidth() * 19 // (longest + 8))
    columns = max(1, min(len(entries), columns))
    lines_of_text = -(-len(entries) // columns) + bool(look.method)
    more = max(0, lines_of_text - _LEGEND_LINES)
    figure.set_figheight(figure.get_figheight() + more * _LINE_HEIGHT)
    legend = figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=columns,
        title=f"{look.method}\n{title}" if look.method else title,
    )
    legend.get_title().set_multialignment("center")


def _over_seeds(rows: pd.DataFrame, by: Sequence[str], what: str) -> str:
    each = rows.groupby(list(by), dropna=False)["seed"].nunique()
    if each.max() < 2:
        return "one seed"
    num = f"{each.max()}" if each.nunique() == 1 else f"{each.min()} to {each.max()}"
    return f"mean over {num} seeds; {what}: ± sample deviation (n - 1)"


def _beside(
    at: Sequence[float], values: Sequence[float], i: int, num: int
) -> list[float]:
    """Moves the i-th of some groups sideways, so that bars at one value do not hide."""
    share = min(0.012, 0.06 / num) * (i - (num - 1) / 2)  # of the axis
    there, back = _axis_of(values)
    aside = share * (there(max(values)) - there(min(values)))
    return [float(back(there(v) + aside)) for v in at]


def _spans_decades(long: pd.DataFrame) -> bool:
    """Whether runs end so far apart in bytes that the short ones would be specks."""
    ends = long.groupby("point")["bytes"].max()
    ends = ends[ends > 0]
    return len(ends) > 0 and bool(ends.max() > 10 * ends.min())


def _bytes_axis(axis: Axes, log: bool) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    if log:
        axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(numticks=5) if log else MaxNLocator(4))
    axis.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _rgb(color: Any) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(color)
