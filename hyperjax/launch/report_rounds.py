"""What a run went through: accuracies and what training measures, by round."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from hyperjax.data import picture
from hyperjax.launch import charts, pages
from hyperjax.launch.charts import Series
from hyperjax.launch.finished import Row, Run
from hyperjax.launch.report_scores import MEANINGS, METRICS

# What is measured in training: unit or range, and what it says.
QUANTITIES = {
    "loss": ("nats", "mean of the local training loss"),
    "dispersion": ("0 uniform, P - 1 one-hot", "spread of embeddings' entries"),
    "entropy": ("nats", "entropy of embeddings"),
    "noise_scale": ("softplus of the raw scale", "noise on embeddings in training"),
    "update_norm": ("2-norm", "size of the server's step"),
    "gradient_norm": ("2-norm", "what reaches the hypernetwork"),
    "samples": ("samples a round", "what clients went through"),
    "steps": ("steps a round", "minibatches, all clients"),
    "flops": ("FLOPs a round", "multiplications and additions of products"),
}
# A line that moves by less than this share of itself is no trend.
_CONSTANT = 0.005


def curves(run: Run) -> pages.Html:
    """Charts of accuracy and of what training measures."""
    if not run.metrics:
        return pages.section("Curves", pages.text("No evaluation yet."))
    axes = dict(charts.AXES)
    for axis in ("seconds", "bytes"):
        if any(_where(row)[axis] is None for row in run.metrics):
            del axes[axis]
    found = [_accuracy_chart(run, key) for key in METRICS]
    return pages.section("Curves", pages.against(axes), pages.grid(*found))


def _where(row: Row) -> dict[str, Any]:
    """A record's places on all horizontal axes."""
    ways = [row.get(f"{way}_bytes_total") for way in ("up", "down")]
    return {
        "round": row["round"],
        "bytes": None if None in ways else sum(ways),
        "seconds": row.get("seconds"),
    }


def _thinned(rows: Sequence[Any], most: int = 80) -> list[Any]:
    """Rows at equal steps, the last among them, so that no more than `most` are left.

    More could not be told apart in a chart.
    """
    step = -(-len(rows) // most) if rows else 1
    return list(rows[::-1][::step])[::-1]


def _accuracy_chart(run: Run, key: str) -> str:
    """One accuracy, its spread over clients and its controls."""
    names = {"": "as deployed", "_em": "EM control", "_oracle": "oracle"}
    rows: list[dict[str, Any]] = []
    for record in _thinned(run.metrics):
        at = _where(record)
        rows += [
            {"series": name, **at, "y": record[key + suffix]}
            for suffix, name in names.items()
            if record.get(key + suffix) is not None
        ]
        mean, std = record.get(f"{key}_mean"), record.get(f"{key}_std")
        if key != "gacc" and None not in (mean, std):
            edges = {"low": mean - std, "high": mean + std}
            rows.append({"series": "mean of clients ± std", **at, "y": mean, **edges})
    if not rows:
        return ""
    series = [
        Series("as deployed", picture.PARTICIPATING),
        Series("mean of clients ± std", picture.MUTED, ":"),
        Series("EM control", picture.PALETTE[1], "--"),
        Series("oracle", picture.PALETTE[2], "-."),
    ]
    spec = charts.lines(rows, series, f"{METRICS[key]}, %")
    return pages.chart(f"{METRICS[key]}, %", spec, MEANINGS[key])


def training(run: Run) -> pages.Html:
    """Charts of what training measures; what does not move is said in words."""
    records: Sequence[Row] = run.training or run.metrics
    placed = (*METRICS, "collapse_", "up_bytes", "down_bytes")
    found, constant = [], []
    for key in dict.fromkeys(key for row in records for key in row):
        points = [
            (row["round"], row[key])
            for row in records
            if isinstance(row.get(key), numbers.Real)
        ]
        if (
            key in ("round", "seconds", "opening")
            or key.startswith(placed)
            or not points
        ):
            continue
        unit, meaning = QUANTITIES.get(key, ("", ""))
        name = key.replace("_", " ")
        low, high = min(y for _, y in points), max(y for _, y in points)
        if len(points) < 2 or high - low <= _CONSTANT * max(abs(low), abs(high)):
            span = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
            constant.append(f"{name} {span}" + (f" ({unit})" if unit else ""))
            continue
        rows = [{"series": name, "round": x, "y": y} for x, y in _thinned(points)]
        title = f"{name}, {unit}" if unit else name
        series = [Series(name, picture.PARTICIPATING)]
        spec = charts.lines(rows, series, title, ("round", "round"))
        found.append(pages.chart(name, spec, meaning))
    still = f"Did not change: {'; '.join(constant)}." if constant else ""
    return pages.section(
        "Training", pages.grid(*found), pages.text(still) if still else ""
    )
