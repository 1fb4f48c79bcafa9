"""Interactive charts of pages, as Vega-Lite specifications made with Altair.

Every chart fills the width of its box and tells values under the mouse. A click on a
legend's entry switches that series off or on, dragging moves, the wheel with shift
zooms, and a double click undoes both. Equal arguments give equal text.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hyperjax.data.picture import MUTED, NOVEL, PARTICIPATING

if TYPE_CHECKING:
    import altair as alt

# What a page's reader chooses as the horizontal axis stands for these two.
CHOSEN, CHOSEN_TITLE = "@x", "@axis"
AXES = {
    "round": "round",
    "bytes": "bytes sent, all clients, both ways",
    "seconds": "seconds, compiling included",
}
DASHES = {"-": [1, 0], "--": [6, 3], ":": [2, 3], "-.": [7, 3, 2, 3]}
SHAPES = {"-": "circle", "--": "square", ":": "triangle-up", "-.": "diamond"}
HEIGHT = 250
_MOST_MARKS = 300
_ROOM = 8  # pixels between the outermost marks and the axes, which would hide them


# Whether specifications are checked against Vega-Lite's schema, which takes most of the
# time; tests do.
CHECKED = False


def _specified(draw: Callable[..., Any]) -> Callable[..., str]:
    """Has a chart's specification made as text."""

    @functools.wraps(draw)
    def text(*args: Any, **kwargs: Any) -> str:
        from altair.utils.schemapi import debug_mode

        with debug_mode(CHECKED):
            spec = draw(*args, **kwargs).to_dict(validate=CHECKED)
        spec.pop("config", None)  # the page's
        return json.dumps(spec, separators=(",", ":"))

    return text


class Series(NamedTuple):
    """How one series is drawn; `line` is one of `DASHES`."""

    name: str
    color: str
    line: str = "-"


GROUPS = (
    Series("participating", PARTICIPATING),
    Series("unseen", NOVEL),
)


def kind(participating: bool) -> str:
    """Returns the name of a client's group among `GROUPS`."""
    return GROUPS[not participating].name


@_specified
def lines(
    rows: Sequence[Mapping[str, Any]],
    series: Sequence[Series],
    y: str,
    x: tuple[str, str] = (CHOSEN, CHOSEN_TITLE),
    *,
    bars: bool = False,
    log: float | None = None,
) -> Any:
    """Draws lines with bands, or with error bars.

    Args:
      rows: values under "series", the name of `x`, "y" and, for a band, "low", "high".
      series: in the order of the legend; those without rows are left out.
      y: title of the vertical axis, with its unit.
      x: field and title of the horizontal axis.
      bars: error bars instead of bands.
      log: from this value on the horizontal axis is logarithmic; None: nowhere.
    """
    import altair as alt

    hidden, zoom = _switches()
    kind: dict[str, Any] = {"zero": False}
    axis = alt.Axis(format="~s")
    if log:
        ticks = sorted({row[x[0]] for row in rows})
        with_zero = {"type": "symlog", "constant": log}
        kind = {"type": "log"} if ticks[0] > 0 else with_zero
        axis = alt.Axis(values=ticks, format="~g")
    scale = alt.Scale(nice=False, padding=_ROOM, **kind)
    across = alt.X(f"{x[0]}:Q", title=x[1], scale=scale, axis=axis)
    up = alt.Y("y:Q", title=y, scale=_apart())
    color = _colors(rows, series, "stroke", y)
    dash = _by_line(alt.StrokeDash, DASHES, rows, series)
    shown = alt.Chart().encode(x=across, y=up, color=color)
    names = [x[0], "y", *(k for k in ("low", "high", "n") if any(k in r for r in rows))]
    tips = [
        alt.Tooltip("series:N"),
        *(alt.Tooltip(f"{n}:Q", format=".5~g") for n in names),
    ]
    layers = [
        shown.mark_line(strokeWidth=2).encode(
            opacity=_unless(hidden, 1), strokeDash=dash
        ),
        # Of many points the marks are seen by the mouse alone.
        shown.mark_point(filled=True, size=36).encode(
            opacity=_unless(hidden, 1 if len(rows) <= _MOST_MARKS else 0), tooltip=tips
        ),
    ]
    if any("low" in row for row in rows):
        edges = shown.transform_filter("isValid(datum.low)").encode(
            y=alt.Y("low:Q", title=y, scale=_apart()), y2="high:Q"
        )
        spread = (
            edges.mark_rule().encode(opacity=_unless(hidden, 0.8))
            if bars
            else edges.mark_area().encode(opacity=_unless(hidden, 0.16))
        )
        layers.insert(0, spread)
    layers[0] = layers[0].add_params(hidden, zoom)
    return _sized(alt.layer(*layers, data=_data(rows)), HEIGHT)


@_specified
def places(
    rows: Sequence[Mapping[str, Any]],
    series: Sequence[Series],
    x: str,
    y: str,
    *,
    diagonal: bool = False,
    named: bool = False,
) -> Any:
    """Draws marks at (x, y).

    Args:
      rows: values under "series", "x", "y", "name" and, for the mean of some, "mean".
      series: in the order of the legend.
      x: title of the horizontal axis.
      y: title of the vertical axis.
      diagonal: both axes are alike, and a line shows where values are equal.
      named: a name stands beside each mark.
    """
    import altair as alt

    hidden, zoom = _switches()
    ends = [row[k] for row in rows for k in "xy"]
    scale = _apart()
    if diagonal:
        scale = alt.Scale(domain=[min(ends), max(ends)], nice=True, padding=_ROOM)
    shown = alt.Chart().encode(
        x=alt.X("x:Q", title=x, scale=scale), y=alt.Y("y:Q", title=y, scale=scale)
    )
    tips = [
        alt.Tooltip("name:N"),
        *(alt.Tooltip(f"{n}:Q", format=".4~g") for n in "xy"),
    ]
    big = alt.condition("datum.mean", alt.value(140), alt.value(36))
    layers: list[Any] = [
        shown.mark_point(filled=True)
        .encode(
            color=_colors(rows, series),
            shape=_by_line(alt.Shape, SHAPES, rows, series),
            opacity=_unless(hidden, 0.75),
            size=big,
            tooltip=tips,
        )
        .add_params(hidden, zoom)
    ]
    if named:
        layers.append(
            shown.mark_text(dx=9, dy=-6, fontSize=10, color="currentColor").encode(
                text="short:N", opacity=_unless(hidden, 0.8)
            )
        )
    if diagonal:
        equal = [{"x": v, "y": v} for v in (min(ends), max(ends))]
        line = alt.Chart(_data(equal)).mark_line(color=MUTED, strokeDash=[4, 4])
        both = alt.X("x:Q", scale=scale), alt.Y("y:Q", scale=scale)
        layers.insert(0, line.encode(*both))
    return _sized(alt.layer(*layers, data=_data(rows)), 320 if diagonal else HEIGHT)


@_specified
def histogram(values: Mapping[str, Sequence[float]], x: str, bins: int = 24) -> Any:
    """Draws how many clients have which value, participating and unseen ones."""
    import altair as alt

    # Without copies: there may be a million clients.
    known = [v for v in map(np.asarray, values.values()) if v.size]
    ends = [float(end(v)) for v in known for end in (np.min, np.max)]
    edges = np.histogram_bin_edges(ends, min(bins, max(4, sum(map(len, known)) // 4)))
    rows = [
        {"series": name, "x": float(a), "x2": float(b), "y": int(count)}
        for name, of_one in values.items()
        for a, b, count in zip(
            edges, edges[1:], np.histogram(of_one, edges)[0], strict=False
        )
    ]
    hidden, _ = _switches()
    chart = (
        alt.Chart(_data(rows))
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X("x:Q", title=x, bin="binned", axis=alt.Axis(format="~r")),
            x2="x2:Q",
            y=alt.Y("y:Q", title="clients", stack=None),
            color=_colors(rows, GROUPS),
            opacity=_unless(hidden, 0.55),
            tooltip=["series:N", "x:Q", "x2:Q", "y:Q"],
        )
        .add_params(hidden)
    )
    return _sized(chart, HEIGHT)


@_specified
def boxes(rows: Sequence[Mapping[str, Any]], series: Sequence[Series], x: str) -> Any:
    """Draws quantiles of clients, a line per group.

    Args:
      rows: "series" (its group), "p10", "q1", "median", "q3", "p90", "n".
      series: in their order from above.
      x: title of the horizontal axis.
    """
    import altair as alt

    names = [one.name for one in series]
    # A line for each setting: long names leave room for the boxes.
    own = f"split(slice(datum.label, {_shared(series)}), ', ')"
    axis = alt.Axis(labelExpr=own, grid=False)
    up = alt.Y("series:N", sort=names, title=None, axis=axis)
    x = ": ".join(filter(None, (_headed(series), x)))
    height = max((14 * (1 + name.count(", ")) + 12 for name in names), default=26)
    tips = [alt.Tooltip(f"{n}:Q", format=".4~g") for n in ("p10", "q1", "median", "q3")]
    base = alt.Chart().encode(
        y=up,
        color=_colors(rows, series).legend(None),
        tooltip=["series:N", *tips, alt.Tooltip("p90:Q", format=".4~g"), "n:Q"],
    )

    def across(field: str):
        return alt.X(f"{field}:Q", title=x, scale=alt.Scale(zero=False))

    layers = [
        base.mark_rule(strokeWidth=1.5).encode(x=across("p10"), x2="p90:Q"),
        base.mark_bar(height=12, opacity=0.55).encode(x=across("q1"), x2="q3:Q"),
        base.mark_tick(thickness=2.5, height=16).encode(x=across("median")),
    ]
    return _sized(alt.layer(*layers, data=_data(rows)), height * len(rows) + 10)


@_specified
def sorted_dots(rows: Sequence[Mapping[str, Any]], y: str) -> Any:
    """Draws a dot per client in ascending order, participating ones first.

    Args:
      rows: "series", "x" (place in the order), "y" and what the mouse shows besides.
      y: title of the vertical axis.
    """
    import altair as alt

    hidden, _ = _switches()
    more = [k for k in rows[0] if k not in ("x",)]
    chart = (
        alt.Chart(_data(rows))
        .mark_point(filled=True, size=60)
        .encode(
            x=alt.X(
                "x:Q",
                title="clients, sorted",
                scale=_apart(),
                axis=alt.Axis(labels=False, ticks=False),
            ),
            y=alt.Y("y:Q", title=y, scale=_apart()),
            color=_colors(rows, GROUPS),
            opacity=_unless(hidden, 0.85),
            tooltip=[
                f"{k}:{'N' if isinstance(rows[0][k], str) else 'Q'}" for k in more
            ],
        )
        .add_params(hidden)
    )
    return _sized(chart, HEIGHT)


def _switches() -> tuple[alt.Parameter, alt.Parameter]:
    """What a legend's clicks hide, and moving and zooming."""
    import altair as alt

    # Names of their own are counted through a process, and would differ each time.
    hidden = alt.selection_point(
        "hidden", fields=["series"], bind="legend", toggle="true"
    )
    zoom = alt.selection_interval("zoom", bind="scales", zoom="wheel![event.shiftKey]")
    return hidden, zoom


def _apart() -> alt.Scale:
    """A scale from the least value, which is no mark on the axis."""
    import altair as alt

    return alt.Scale(zero=False, padding=_ROOM)


def _unless(hidden: alt.Parameter, opacity: float) -> Any:
    import altair as alt

    return alt.condition(hidden, alt.value(0.04), alt.value(opacity), empty=False)


def _there(rows: Sequence[Mapping[str, Any]], series: Sequence[Series]) -> list[Series]:
    names = {row["series"] for row in rows}
    return [one for one in series if one.name in names]


def _colors(
    rows: Sequence[Mapping[str, Any]],
    series: Sequence[Series],
    symbol: str = "circle",
    said: str = "",
) -> alt.Color:
    """Colours and their legend, which one series needs unless `said` names it."""
    import altair as alt

    there = _there(rows, series)
    scale = alt.Scale(domain=[s.name for s in there], range=[s.color for s in there])
    shared = _shared(there)
    longest = max((len(one.name) for one in there), default=1) - shared
    columns = 1 if longest > 26 else 2 if longest > 10 else 3  # on a phone
    legend = alt.Legend(
        title=_headed(there),
        columns=columns,
        symbolType=symbol,
        labelExpr=f"slice(datum.label, {shared})",
    )
    known = len(there) == 1 and said.startswith(there[0].name)
    return alt.Color("series:N", scale=scale, legend=None if known else legend)


def _shared(series: Sequence[Series]) -> int:
    """How many letters of the names say what all have, such as their one method."""
    starts = {one.name.partition(", ")[0] for one in series}
    if len(starts) == 1 and all(", " in one.name for one in series):
        return len(starts.pop()) + 2
    return 0


def _headed(series: Sequence[Series]) -> str | None:
    """What all names begin with, which a legend says once."""
    letters = _shared(series)
    return series[0].name[:letters].removesuffix(", ") if letters else None


def _by_line(
    channel: Any,
    looks: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    series: Sequence[Series],
) -> Any:
    """What tells series of one colour apart, in a legend with their colours."""
    import altair as alt

    there = _there(rows, series)
    scale = alt.Scale(
        domain=[s.name for s in there], range=[looks[s.line] for s in there]
    )
    legend: Any = {} if len(there) > 1 else {"legend": None}
    return channel("series:N", scale=scale, title=_headed(there), **legend)


def _data(rows: Sequence[Mapping[str, Any]]) -> alt.Data:
    """Rows whose numbers have as many digits as can be seen."""
    import altair as alt

    return alt.Data(values=[{k: _short(v) for k, v in row.items()} for row in rows])


def _short(value: Any) -> Any:
    if isinstance(value, bool | str) or value is None:
        return value
    if not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.5g}")


def _sized(chart: Any, height: int) -> Any:
    import altair as alt

    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    return chart.properties(width="container", height=height, autosize=fit)
