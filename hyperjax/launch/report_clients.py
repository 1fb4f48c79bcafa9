"""Who took part: scores by client and by family, and who holds what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hyperjax.data import picture
from hyperjax.launch import charts, pages
from hyperjax.launch.finished import Row, Run

# More clients than this are shown by histograms and quantiles.
MANY_CLIENTS = 120
_ROWS = 60  # of the table of many
# More dots than this make a page by hundreds of kB larger, and nobody tells them apart.
MANY_DOTS = 2000
_WORST = 5


def families(run: Run, latest: Row) -> pages.Html:
    """Who has which network, what each sends and how well it does."""
    known = latest.get("families")
    if not known or len(known) < 2:
        return pages.Html("")
    rows = []
    for name, facts in known.items():
        own = [c for c in run.clients if c.get("family") == name]
        scores = [c["accuracy"] for c in own if c.get("accuracy") is not None]
        ids = [c["client"] for c in own]
        rows.append(
            (
                name,
                facts["clients"],
                f"{min(ids)} to {max(ids)}" if ids else None,
                float(np.mean(scores)) if scores else None,
                float(np.std(scores)) if scores else None,
                facts["up_numbers"],
                facts["down_numbers"],
                pages.num_bytes(facts["up_bytes"]),
                pages.num_bytes(facts["down_bytes"]),
            )
        )
    headings = (
        *(
            "network",
            "clients",
            "numbers",
            "pACC, mean over clients %",
            "± over clients",
        ),
        *("numbers up", "numbers down", "bytes up", "bytes down"),
    )
    words = pages.text(
        "Clients have networks of several kinds; a family are those with one. What is "
        "sent is per client and round; elsewhere on this page it is the mean over all."
    )
    return pages.section("Families", words, pages.tabular("families", headings, rows))


def clients(run: Run) -> pages.Html:
    """Every client's accuracy: a dot each, or a histogram of many; all in a table."""
    tested = [c for c in run.clients if c.get("accuracy") is not None]
    if not tested:
        return pages.Html("")
    sides = {
        charts.kind(side): [c for c in tested if bool(c["participating"]) is side]
        for side in (True, False)
    }
    sides = {name: side for name, side in sides.items() if side}
    title = "accuracy of a client, %"
    if len(tested) <= MANY_CLIENTS:
        rows: list[dict[str, Any]] = []
        for name, side in sides.items():
            gap = 2 * bool(rows)
            for c in sorted(side, key=lambda c: c["accuracy"]):
                row = {"series": name, "x": len(rows) + gap, "y": c["accuracy"]}
                row |= {"client": c["client"], "samples": c["train_samples"]}
                if c.get("accuracy_em") is not None:
                    row["EM control"] = c["accuracy_em"]
                rows.append(row)
        chart = pages.chart("Accuracy of every client", charts.sorted_dots(rows, title))
    else:
        values = {name: [c["accuracy"] for c in side] for name, side in sides.items()}
        chart = pages.chart("Accuracy of clients", charts.histogram(values, title))
    spreads = [(name, *_quantiles(side)) for name, side in sides.items()]
    headings = ("clients", "number", "least", "10 %", "25 %", "median", "75 %", "90 %")
    worst = sorted(tested, key=lambda c: c["accuracy"])[:_WORST]
    said = ", ".join(f"{c['client']} ({c['accuracy']:.1f} %)" for c in worst)
    return pages.section(
        "Clients",
        chart,
        pages.tabular("quantiles", (*headings, "most"), spreads),
        pages.text(f"Lowest: client {said}."),
        _client_table(run.clients),
    )


def _quantiles(side: Sequence[Row]) -> tuple[float, ...]:
    values = [c["accuracy"] for c in side]
    found = np.percentile(values, [0, 10, 25, 50, 75, 90, 100])
    return len(values), *map(float, found)


def _client_table(rows: Sequence[Row]) -> str:
    """All clients, or of many those served worst, folded."""
    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if all(not isinstance(row.get(key), list | dict) for row in rows)
    ]
    name = f"All {len(rows)} clients"
    if len(rows) > MANY_CLIENTS:
        by = sorted(rows, key=lambda row: row.get("accuracy") or 0.0)
        rows = by[:_ROWS]
        name = f"The {_ROWS} clients served worst; clients.json has all"
    table = [[row.get(key) for key in keys] for row in rows]
    headings = [key.replace("_", " ") for key in keys]
    return pages.folded(name, pages.tabular("clients", headings, table))


def partition(run: Run) -> pages.Html:
    """Who holds how much of each class: a picture, or quantiles of many clients."""
    if run.partition is None:
        return pages.Html("")
    counts, participating, names = run.partition
    num, num_classes = counts.shape
    said = (
        f"Samples of {num_classes} classes over {num} clients, "
        f"{int(participating.sum())} of them participating"
    )
    more = f" {run.unassigned:,} more belong to no client." if run.unassigned else ""
    words = pages.text(f"{said}; {int(counts.sum()):,} samples in all.{more}")
    if max(counts.shape) <= MANY_CLIENTS and np.count_nonzero(counts) <= MANY_DOTS:
        # A dollar sign would start a formula in the picture.
        names = [name.replace("$", r"\$") for name in names]
        figure = picture.partition_picture(
            counts, participating, names, None, run.shift
        )
        shown = pages.picture(said, picture.figure_svg(figure))
        return pages.section("Partition", words, shown)
    entropy = np.concatenate(
        [_entropy(counts[i : i + 4096]) for i in range(0, num, 4096)]
    )
    sides = {charts.kind(True): participating, charts.kind(False): ~participating}
    sides = {name: side for name, side in sides.items() if side.any()}

    def histogram(title: str, values: np.ndarray, note: str) -> str:
        of = {k: values if side.all() else values[side] for k, side in sides.items()}
        return pages.chart(title, charts.histogram(of, title), note)

    return pages.section(
        "Partition",
        words,
        pages.grid(
            histogram("samples of a client", counts.sum(1), "how unequal clients are"),
            *(
                histogram(name, values, "what their images have been through")
                for name, values in run.shift.items()
            ),
            histogram(
                "effective number of classes of a client",
                np.exp(entropy),
                "exp of the entropy of its class shares: 1 has one class",
            ),
        ),
    )


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of the classes of each of some clients, in nats."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    found = -np.sum(share * np.log(share, where=share > 0, out=0 * share), axis=1)
    return found.astype(np.float32)
