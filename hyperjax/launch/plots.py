"""Small charts as inline SVG text: lines, sorted dots and a map of points.

Every function returns one `<svg>` element that scales to its container, carries a title
for readers that do not see it, and a title per mark for the mouse. Equal arguments give
equal text. Nothing here needs a display or a script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

PARTICIPATING = "#2a6f97"
NOVEL = "#e07a3f"
INK = "#3d4450"
MUTED = "#7b8494"
_GRID = "#e8ebf0"
# After the colours above, hues that stay apart in print and for colour-blind readers.
PALETTE = (
    PARTICIPATING,
    NOVEL,
    "#4f9d69",
    "#8b5fbf",
    "#c9a227",
    "#c44e6c",
    "#5fb3c8",
    "#8c6d5a",
    INK,
    "#a3b04a",
)
_DASHES = {
    "solid": 'stroke-width="2"',
    "dashed": 'stroke-width="1.2" stroke-dasharray="5 3"',
    "dotted": 'stroke-width="1.2" stroke-dasharray="1.5 2.5"',
}
# Beyond this many points a line shows no marks of its own.
_MAX_MARKS = 60
# Beyond this many points names would cover one another.
_MAX_NAMES = 40

Point = tuple[float, float]


class Line(NamedTuple):
    """One line of a chart; `style` is solid, dashed or dotted."""

    label: str
    points: Sequence[Point]
    color: str
    style: str = "solid"


class Mark(NamedTuple):
    """One client in a chart; `control` is a second value drawn as a short bar."""

    name: str
    x: float
    y: float
    participating: bool
    control: float | None = None


@dataclass(frozen=True)
class _Frame:
    """Maps values to pixels; margins leave room for the tick labels."""

    width: float
    height: float
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    left: float = 52
    right: float = 14
    top: float = 10
    bottom: float = 40

    def x(self, value: float) -> float:
        low, high = self.x_limits
        inner = self.width - self.left - self.right
        return self.left + inner * (value - low) / ((high - low) or 1)

    def y(self, value: float) -> float:
        low, high = self.y_limits
        inner = self.height - self.top - self.bottom
        return self.height - self.bottom - inner * (value - low) / ((high - low) or 1)


def nice_ticks(
    low: float, high: float, target: int = 5, whole: bool = False
) -> list[float]:
    """Returns round numbers that enclose [low, high], about `target` steps apart.

    Args:
      low: smallest value to enclose.
      high: largest value; if it does not exceed `low`, a range around both is made.
      target: the number of steps aimed at.
      whole: steps are whole numbers.

    Returns:
      At least two ascending numbers.
    """
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Returns evenly spaced ticks as text, with no more digits than tell them apart.

    Example:
      >>> tick_labels([0.30000000000000004, 0.35])
      ['0.3', '0.35']
    """
    labels: list[str] = []
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    for digits in range(3, 16):
        # Sums of steps miss zero by rounding.
        labels = [f"{0.0 if abs(t) < 1e-9 * step else t:.{digits}g}" for t in ticks]
        if all(
            abs(float(label) - tick) <= 1e-6 * step
            for label, tick in zip(labels, ticks, strict=True)
        ):
            break
    # Exponents only where figures would be long.
    return [
        f"{float(label):,.10g}" if 1000 <= abs(float(label)) < 1e6 else label
        for label in labels
    ]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str = "round",
    y_ceiling: float | None = None,
    size: tuple[int, int] = (520, 290),
) -> str:
    """Draws lines over a common axis of whole numbers.

    Args:
      title: what the chart shows, for readers that do not see it.
      lines: points that are not finite are left out.
      x_label: name of the horizontal axis.
      y_ceiling: the vertical axis ends here at most; 100 for percentages.
      size: width and height in pixels before scaling.

    Returns:
      An `<svg>` element; says so if there is nothing to draw.
    """
    lines = [line._replace(points=_finite(line.points)) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return _svg(title, *size, [_text(size[0] / 2, size[1] / 2, "no values yet")])
    xs, ys = [x for x, _ in points], [y for _, y in points]
    y_ticks = nice_ticks(min(ys), max(ys))
    if y_ceiling is not None:
        y_ticks = [tick for tick in y_ticks if tick <= max(y_ceiling, max(ys))]
    top = max(y_ticks[-1], max(ys))
    x_limits = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs), min(xs) + 1)
    frame = _Frame(*size, x_limits, (y_ticks[0], top))
    x_ticks = [t for t in nice_ticks(*x_limits, 6, True) if _inside(t, x_limits)]
    parts = _axes(frame, x_ticks, y_ticks, x_label)
    # Thin lines first, so that the main ones stay on top.
    for line in sorted(lines, key=lambda line: line.style == "solid"):
        parts += _draw_line(frame, line)
    return _svg(title, *size, parts)


def sorted_dots(
    title: str, marks: Sequence[Mark], size: tuple[int, int] = (1080, 300)
) -> str:
    """Draws one dot per client in ascending order of `y`, participating ones first.

    A dashed line shows each group's plain mean. `x` of the marks is not used.

    Args:
      title: what the chart shows.
      marks: one per client; `y` and `control` in percent.
      size: width and height in pixels before scaling.

    Returns:
      An `<svg>` element.
    """
    groups = [
        sorted((m for m in marks if m.participating is kind), key=lambda m: m.y)
        for kind in (True, False)
    ]
    gap = max(1.0, 0.03 * len(marks))
    values = [m.y for m in marks]
    values += [m.control for m in marks if m.control is not None]
    y_ticks = [t for t in nice_ticks(min(values), max(values)) if t <= 100]
    end = len(marks) + (gap if all(groups) else 0.0)
    top = max(y_ticks[-1], max(values))
    frame = _Frame(*size, (-0.5, end - 0.5), (y_ticks[0], top))
    parts, start = _axes(frame, [], y_ticks, ""), 0.0
    for group in groups:
        if group:
            parts += _draw_group(frame, group, start)
            start += len(group) + gap
    return _svg(title, *size, parts)


def point_map(
    title: str,
    marks: Sequence[Mark],
    axis_labels: tuple[str, str],
    size: tuple[int, int] = (640, 480),
) -> str:
    """Draws clients at (x, y) with one scale for both axes, so distances are true.

    Args:
      title: what the map shows.
      marks: circles take part in training, diamonds do not.
      axis_labels: names of the two axes.
      size: width and height in pixels before scaling.

    Returns:
      An `<svg>` element; names stand beside the marks if there are few.
    """
    width, height = size
    xs, ys = [m.x for m in marks], [m.y for m in marks]
    frame = _Frame(width, height, (0, 1), (0, 1), left=34, right=34, top=24)
    inner_width = width - frame.left - frame.right
    inner_height = height - frame.top - frame.bottom
    span_x, span_y = max(xs) - min(xs), max(ys) - min(ys)
    # Values per pixel: the tighter axis decides for both.
    scale = 1.06 * max(span_x / inner_width, span_y / inner_height) or 1.0
    half_x, half_y = scale * inner_width / 2, scale * inner_height / 2
    mid_x, mid_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    frame = _Frame(
        width,
        height,
        (mid_x - half_x, mid_x + half_x),
        (mid_y - half_y, mid_y + half_y),
        left=frame.left,
        right=frame.right,
        top=frame.top,
    )
    bottom = height - frame.bottom + 10
    parts = [
        f'<rect x="{frame.left - 20}" y="{frame.top - 14}" '
        f'width="{inner_width + 40}" height="{inner_height + 24}" rx="6" '
        f'fill="none" stroke="{_GRID}"/>',
        _text(width / 2, bottom + 22, axis_labels[0], color=MUTED),
        _text(10, height / 2, axis_labels[1], color=MUTED, turn=True),
    ]
    for mark in marks:
        parts += _draw_place(frame, mark, len(marks) <= _MAX_NAMES)
    return _svg(title, width, height, parts)


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """Returns a list of (label, colour, kind) as HTML.

    The kind is solid, dashed, dotted, dot, diamond or bar.
    """
    items = [
        f'<li><svg width="26" height="10" aria-hidden="true">'
        f"{_swatch(color, kind)}</svg>{escape(label)}</li>"
        for label, color, kind in entries
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _swatch(color: str, kind: str) -> str:
    """The sample beside a legend's label."""
    if kind == "dot":
        return f'<circle cx="13" cy="5" r="4" fill="{color}"/>'
    if kind == "diamond":
        return _diamond(13, 5, 4.5, color)
    if kind == "bar":
        return f'<path d="M8 5H18" stroke="{color}" stroke-width="2"/>'
    return f'<path d="M1 5H25" stroke="{color}" {_DASHES[kind]}/>'


def _draw_line(frame: _Frame, line: Line) -> list[str]:
    """A polyline and, on a solid line of few points, a dot per point."""
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    name = escape(line.label)
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{line.color}" '
        f'stroke-linejoin="round" {_DASHES[line.style]}><title>{name}</title>'
        "</polyline>"
    ]
    if len(places) == 1 or (line.style == "solid" and len(places) <= _MAX_MARKS):
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{line.color}">'
            f"<title>{name}: {y:.4g} at {x:g}</title></circle>"
            for (px, py), (x, y) in zip(places, line.points, strict=True)
        ]
    return parts


def _draw_group(frame: _Frame, group: Sequence[Mark], start: float) -> list[str]:
    """Dots of one group from position `start` on, its mean and its name."""
    participating = group[0].participating
    color = PARTICIPATING if participating else NOVEL
    spacing = frame.x(1) - frame.x(0)
    # Neighbours may touch, but hundreds of dots still need to be seen.
    radius = min(5.0, max(1.6, 0.45 * spacing))
    mean = sum(mark.y for mark in group) / len(group)
    left, right = frame.x(start - 0.5), frame.x(start + len(group) - 0.5)
    parts = [
        f'<path d="M{left:.1f} {frame.y(mean):.1f}H{right:.1f}" stroke="{color}" '
        f'stroke-dasharray="5 3"><title>mean {mean:.2f}</title></path>'
    ]
    for index, mark in enumerate(group):
        px, py = frame.x(start + index), frame.y(mark.y)
        if mark.control is not None:
            reach = min(6.0, max(1.5, 0.4 * spacing))
            parts.append(
                f'<path d="M{px - reach:.1f} {frame.y(mark.control):.1f}'
                f'h{2 * reach:.1f}" stroke="{MUTED}" stroke-width="1.4"/>'
            )
        shape = (
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius:.1f}" fill="{color}"'
            ' fill-opacity=".85"/>'
            if participating
            else _diamond(px, py, radius * 1.2, color)
        )
        parts.append(f"<g><title>{escape(mark.name)}</title>{shape}</g>")
    word = "participating" if participating else "not participating"
    label = f"{word} ({len(group)}), mean {mean:.1f}"
    # A narrow group at the right edge would push its centred name out of the picture.
    middle = min((left + right) / 2, frame.width - 105)
    parts.append(_text(middle, frame.height - 16, label, color=color))
    return parts


def _draw_place(frame: _Frame, mark: Mark, named: bool) -> list[str]:
    """One client of a map."""
    px, py = frame.x(mark.x), frame.y(mark.y)
    shape = (
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{PARTICIPATING}"'
        ' fill-opacity=".8"/>'
        if mark.participating
        else _diamond(px, py, 6, NOVEL)
    )
    parts = [f"<g><title>{escape(mark.name)}</title>{shape}</g>"]
    if named:
        number = mark.name.rsplit(" ", 1)[-1]
        parts.append(_text(px + 8, py - 5, number, color=MUTED, size=10))
    return parts


def _axes(
    frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str
) -> list[str]:
    """Horizontal grid lines, tick labels and the name of the horizontal axis."""
    right, floor = frame.width - frame.right, frame.height - frame.bottom
    parts = []
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = frame.y(tick)
        parts.append(f'<path d="M{frame.left} {y:.1f}H{right}" stroke="{_GRID}"/>')
        parts.append(_text(frame.left - 7, y + 4, label, MUTED, anchor="end"))
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        parts.append(_text(frame.x(tick), floor + 16, label, color=MUTED))
    middle = (frame.left + right) / 2
    return [*parts, _text(middle, frame.height - 6, x_label, color=MUTED)]


def _diamond(x: float, y: float, radius: float, color: str) -> str:
    r = radius
    return (
        f'<path d="M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f}l{-r:.1f} {r:.1f}'
        f'l{-r:.1f} {-r:.1f}z" fill="#fff" stroke="{color}" stroke-width="1.8"/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    color: str = INK,
    anchor: str = "middle",
    size: int = 11,
    turn: bool = False,
) -> str:
    """A piece of text; `turn` makes it read upwards."""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" '
        f'font-size="{size}"{turned}>{escape(text)}</text>'
    )


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    name = escape(title)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}">'
        f"<title>{name}</title>{''.join(parts)}</svg>"
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if all(map(math.isfinite, point))]


def _inside(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
