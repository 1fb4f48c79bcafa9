"""Sections of the page about one run."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperjax import protocols
from hyperjax.data import picture
from hyperjax.engine import log
from hyperjax.launch import charts, embedding_maps, origin, pages, workdir
from hyperjax.launch.charts import Series
from hyperjax.launch.finished import Row, Run
from hyperjax.protocols import common
from hyperjax.runs import likeness

METRICS = {"gacc": "gACC", "pacc": "pACC", "zacc": "zACC", "vacc": "vACC"}
MEANINGS = {
    "gacc": "global test set",
    "pacc": "clients that take part",
    "zacc": "clients never trained on",
    "vacc": "what they set aside for validation",
}
_COLUMNS = {
    "": "weighted by samples %",
    "_mean": "mean over clients %",
    "_std": "± over clients",
    "_p10": "tenth percentile %",
    "_em": "EM control %",
    "_oracle": "oracle %",
    "_swapped": "swapped %",
    "_sample": "sample by sample %",
}
_FINE_TUNED = re.compile(r"(pacc|zacc)_ft(\d+)(_mean|_not_finite)?")
_TUNED_COLUMNS = {
    ("pacc", ""): "participants %",
    ("pacc", "_mean"): "participants, mean over clients %",
    ("zacc", ""): "unseen clients %",
    ("zacc", "_mean"): "unseen clients, mean over clients %",
}
# What is measured in training: unit or range, and what it says.
_QUANTITIES = {
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
_FILES = (
    *(workdir.SUMMARY, log.METRICS, log.TRAINING, log.TIMING),
    *(workdir.CLIENTS, workdir.EMBEDDINGS, workdir.PARTITION, workdir.CONFIG),
)
# Embeddings that differ by less are one embedding in float32.
_SAME = 1e-6
# Below this share of its most, embedding use is called small.
_LITTLE_USE = 0.01
# A line that moves by less than this share of itself is no trend.
_CONSTANT = 0.005
# More clients than this are shown by histograms and quantiles.
MANY_CLIENTS = 120
# More dots than this make a page by hundreds of kB larger, and nobody tells them apart.
MANY_DOTS = 2000
_WORST, _MOST_PLACES = 5, 400


def headline(run: Run, latest: Row, heading: str) -> pages.Html:
    """What ran, and whether it came to its end."""
    rounds = latest.get("rounds", "?")
    done = latest.get("finished") is True
    note = ""
    if not done:
        last = run.metrics[-1]["round"] if run.metrics else 0
        note = pages.text(
            f"This run is not finished: evaluated up to round {last} of {rounds}. "
            "Numbers are of that evaluation.",
            note=True,
        )
    facts = [f"seed {latest.get('seed', '?')}", f"{rounds} rounds"]
    families = latest.get("families") or {}
    if len(families) > 1:
        facts.append(f"{len(families)} kinds of network: {', '.join(families)}")
    if started := run.about.get("started"):
        facts.append(f"started {started[:16].replace('T', ' ')} UTC")
    facts.append("finished" if done else "not finished")
    return pages.header(heading, " · ".join(facts), note)


def cards(latest: Row) -> str:
    """The main numbers, a card each."""
    found = []
    for key, name in METRICS.items():
        bad = latest.get(f"{key}_not_finite")
        if bad:
            line = f"outputs of the network for {bad} of them are not finite"
            found.append(pages.card(name, pages.NOTHING, _whose(latest, key), line))
        elif key in latest:
            lines = [_whose(latest, key)]
            if key != "gacc" and f"{key}_mean" in latest:  # the test set is one client
                spread = f"mean over clients {latest[f'{key}_mean']:.2f}"
                if f"{key}_std" in latest:
                    spread += f" ± {latest[f'{key}_std']:.2f}"
                lines.append(spread)
            found.append(pages.card(name, pages.percent(latest[key]), *lines))
    best = latest.get("best_by_validation")
    if best:
        line = f"round {best['round']}, where vACC was {best['vacc']:.2f}"
        value = pages.percent(best["pacc"])
        found.append(pages.card("pACC, best by validation", value, line))
    if "up_bytes" in latest and "down_bytes" in latest:
        up, down = latest["up_bytes"], latest["down_bytes"]
        line = f"up {pages.num_bytes(up)} · down {pages.num_bytes(down)}"
        value = pages.num_bytes(up + down)
        found.append(pages.card("Per client and round", value, line))
    if "seconds" in latest:
        spent = latest.get("compile_seconds")
        lines = [] if spent is None else [f"of it compiling {spent:.1f} s"]
        if "samples_per_second" in latest:
            lines.append(f"{latest['samples_per_second']:,.0f} samples/s in training")
        found.append(pages.card("Wall time", f"{latest['seconds']:,.1f} s", *lines))
    return f'<div class="cards">{"".join(found)}</div>' if found else ""


def _whose(latest: Row, metric: str) -> str:
    """Of whom a metric is, and of how many where some are drawn."""
    whose = MEANINGS[metric]
    if metric in (drawn := latest.get("sampled") or {}):
        num, of = drawn[metric]
        whose += f", a sample of {num:,} of {of:,}"
    return whose


def accuracies(latest: Row) -> pages.Html:
    """Every accuracy of the last evaluation, beside its controls."""
    there = [m for m in METRICS if m in latest]
    columns = [s for s in _COLUMNS if any(m + s in latest for m in there)]
    if not there:
        return pages.Html("")
    rows = [
        (METRICS[m], _whose(latest, m), *(_float(latest.get(m + s)) for s in columns))
        for m in there
    ]
    said = []
    if "_em" in columns:
        said.append(
            "EM control: the same outputs, reweighted by class shares estimated from "
            "them (label-shift EM), without training. Oracle: reweighted by the true "
            "class shares, which no client knows."
        )
    if "_swapped" in columns:
        said.append("Swapped: every client tested with its neighbour's network.")
    table = pages.tabular(
        "accuracies", ("", "of", *(_COLUMNS[s] for s in columns)), rows
    )
    return pages.section("Accuracy", pages.text(" ".join(said)) if said else "", table)


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
        unit, meaning = _QUANTITIES.get(key, ("", ""))
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


def fine_tuning(latest: Row) -> pages.Html:
    """Accuracy before and after local epochs on a client's own labelled samples."""
    found: dict[int, dict[tuple[str, str], float | None]] = {}
    bad = False
    for key, value in latest.items():
        match = _FINE_TUNED.fullmatch(key)
        if match:
            metric, epochs, suffix = match.groups(default="")
            row = found.setdefault(int(epochs), {})
            if suffix == "_not_finite":
                bad = True
                row |= {(metric, ""): None, (metric, "_mean"): None}
            else:
                row[metric, suffix] = _float(value)
    if not found:
        return pages.Html("")
    columns = [c for c in _TUNED_COLUMNS if any(c in row for row in found.values())]
    table = pages.tabular(
        "fine_tuning",
        ("epochs", *(_TUNED_COLUMNS[column] for column in columns)),
        [(k, *(row.get(c) for c in columns)) for k, row in sorted(found.items())],
    )
    said = (
        "Accuracy on a client's held-out samples after so many local epochs on its "
        "other samples, from what the server deploys. Of unseen clients these are a "
        "part of the samples that zACC above is of, all of theirs."
    )
    worse = _gets_worse(found)
    if worse:
        said += f" Fine-tuning makes {worse} worse here."
    note = pages.Html("")
    if bad:
        note = pages.text(
            f"{pages.NOTHING}: for some clients the outputs of the fine-tuned network "
            "are not finite, so there is no accuracy.",
            note=True,
        )
    return pages.section("Fine-tuning", pages.text(said), note, table)


def _gets_worse(found: Mapping[int, Mapping[tuple[str, str], float | None]]) -> str:
    """Whose accuracy is lower after the most epochs than after the fewest."""
    fewest, most = found[min(found)], found[max(found)]
    who = {"pacc": "participants", "zacc": "unseen clients"}
    pairs = {name: (fewest.get((m, "")), most.get((m, ""))) for m, name in who.items()}
    return " and ".join(
        name
        for name, (a, b) in pairs.items()
        if a is not None and b is not None and b < a
    )


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of the classes of each of some clients, in nats."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    found = -np.sum(share * np.log(share, where=share > 0, out=0 * share), axis=1)
    return found.astype(np.float32)


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
        svg = picture.figure_svg(figure)
        shown = f'<div class="picture" role="img" aria-label="{said}">{svg}</div>'
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
        rows = by[:MANY_CLIENTS]
        name = f"The {MANY_CLIENTS} clients served worst; clients.json has all"
    table = [[row.get(key) for key in keys] for row in rows]
    headings = [key.replace("_", " ") for key in keys]
    return pages.folded(name, pages.tabular("clients", headings, table))


def embeddings(run: Run, latest: Row) -> pages.Html:
    """A map of clients' embeddings, how they moved, and what they are good for."""
    known = [c for c in run.clients if likeness.embedding_of(c) is not None]
    moved = _embeddings_by_round(run)
    if not known:
        return pages.section("Embeddings", moved)
    values = np.array([likeness.embedding_of(client) for client in known], float)
    use = _use_table(latest, values.shape[1])
    centred = values - values.mean(0)
    if np.abs(centred).max() <= _SAME:
        note = pages.text(
            f"The embedding has collapsed: all {len(known)} clients have the same one "
            f"(to {_SAME:g}), so the deployed networks do not depend on the client "
            "through it.",
            note=True,
        )
        return pages.section("Embeddings", note, use, moved)
    reach = float(np.linalg.norm(centred, axis=1).max())
    uses = [latest.get(f"collapse_{side}") for side in ("participating", "novel")]
    there = [value for value in uses if value is not None]
    most = math.log(values.shape[1])
    if there and max(there) < _LITTLE_USE * most:
        note = pages.text(
            "The embedding has all but collapsed: its use is under "
            f"{_LITTLE_USE:.0%} of the most possible, and no client is further than "
            f"{reach:.2g} from the mean. A map would show what means nothing.",
            note=True,
        )
        return pages.section("Embeddings", note, use, moved)
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    at = np.zeros((len(known), 2))
    shares = np.zeros(2)
    rank = min(2, len(spread))
    at[:, :rank] = (left * spread)[:, :rank]
    shares[:rank] = 100 * spread[:rank] ** 2 / np.sum(spread**2)
    step = -(-len(known) // _MOST_PLACES)
    rows = [
        {
            "series": charts.kind(bool(client["participating"])),
            "x": x,
            "y": y,
            "name": f"client {client['client']}",
            "short": str(client["client"]),
        }
        for client, (x, y) in list(zip(known, at.tolist(), strict=True))[::step]
    ]
    titles = [f"component {i + 1} ({share:.0f} %)" for i, share in enumerate(shares)]
    spec = charts.places(rows, charts.GROUPS, *titles, named=len(known) <= 40)
    name = f"Embeddings of {len(known)} clients on their two main components"
    said = (
        "In brackets the share of variance. No client is further than "
        f"{reach:.2g} from the mean."
    )
    if step > 1:
        said += f" One client in {step} is drawn."
    chart = pages.grid(pages.chart(name, spec, said))
    return pages.section("Embeddings", use, chart, moved)


def _embeddings_by_round(run: Run) -> str:
    """Maps of several rounds, unless clients never had different embeddings."""
    records = run.embeddings
    if len(records) < 2 or embedding_maps.spread(records) <= _SAME:
        return ""
    said = (
        "Every client's embedding after several rounds, on the two main components of "
        "all rounds together: a colour is a client throughout, triangles are unseen "
        "ones. In brackets the share of variance. No client was ever further than "
        f"{embedding_maps.spread(records):.2g} from the mean of its round."
    )
    svg = picture.figure_svg(embedding_maps.picture(records))
    shown = f'<div class="picture" role="img" aria-label="{said}">{svg}</div>'
    return f"<h3>Embeddings over rounds</h3>{pages.text(said)}{shown}"


def _use_table(latest: Row, size: int) -> str:
    """How much the deployed networks depend on the client, where it was measured."""
    quantities = (
        (
            "embedding use I, nats",
            "collapse_{side}",
            "I = H(mean e) - mean H(e), with H the entropy: 0 means the embedding is "
            "the same for every input, so it is ignored; the most is "
            f"ln {size} = {math.log(size):.2f}.",
        ),
        (
            "distance of networks",
            "{acc}_distance",
            "Relative distance between the networks deployed by two clients: 0 means "
            "that all clients get one network.",
        ),
        (
            "swapped accuracy, %",
            "{acc}_swapped",
            "Every client tested with its neighbour's deployed state: no worse than "
            "with its own means that nothing is personal.",
        ),
    )
    sides = {
        "participating": {"side": "participating", "acc": "pacc"},
        "unseen": {"side": "novel", "acc": "zacc"},
    }
    sides = {name: side for name, side in sides.items() if side["acc"] in latest}
    rows: list[tuple[object, ...]] = []
    for name, pattern, meaning in quantities:
        values = [latest.get(pattern.format(**side)) for side in sides.values()]
        shown = [None if value is None else f"{value:.4g}" for value in values]
        if pattern == "{acc}_swapped":
            own = [latest.get(side["acc"]) for side in sides.values()]
            shown = [
                f"{text} (own {value:.4g})" if text and value is not None else text
                for text, value in zip(shown, own, strict=True)
            ]
        if any(shown):
            rows.append((name, *shown, meaning))
    if not rows:
        return ""
    table = pages.tabular("embeddings", ("quantity", *sides, "meaning"), rows)
    return f'<div class="words">{table}</div>'


def communication(latest: Row) -> pages.Html:
    """What is sent, and what an accuracy cost."""
    kinds = ("numbers", "bytes", "bytes_total")
    sizes = {
        name: [latest.get(f"{way}_{kind}") for kind in kinds]
        for way, name in (("up", "client to server"), ("down", "server to client"))
    }
    sizes["both"] = [
        None if None in pair else sum(pair)
        for pair in zip(*sizes.values(), strict=True)
    ]
    rows = [
        (name, _whole(row[0]), pages.num_bytes(row[1]), pages.num_bytes(row[2]))
        for name, row in sizes.items()
        if row != [None] * len(kinds)
    ]
    if not rows:
        return pages.Html("")
    headings = (
        *("direction", "numbers per client and round", "bytes per client and round"),
        "bytes in all",
    )
    return pages.section(
        "Communication",
        pages.tabular("communication", headings, rows),
        _reached(latest),
    )


def _reached(latest: Row) -> str:
    """What reaching an accuracy cost, as far as evaluations tell."""
    rows = [
        (
            r["threshold"],
            _between(r.get("missed", r["round"] - 1) + 1, r["round"]),
            _between(r.get("least_cost", r["cost"]), r["cost"]),
        )
        for r in latest.get("reach", ())
    ]
    if not rows:
        return ""
    note = pages.text(
        "Rounds are counted from 0, and what is reached in round 0 is free. Between "
        "evaluations nothing is seen: the first number is for the round after the last "
        "evaluation below the accuracy, the second for the first evaluation at it."
    )
    headings = ("pACC, %", "reached in round", "numbers until then")
    return f"<h3>Cost to an accuracy</h3>{note}{pages.tabular('reach', headings, rows)}"


def _between(least: float, most: float) -> str:
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def configuration(run: Run, latest: Row, linked: bool) -> pages.Html:
    """How to run it again, what was changed, and where the run came from."""
    about = run.about
    config = about.get("config", {})
    changed, command = _as_command(config)
    facts: list[tuple[str, object]] = [
        ("commit", pages.code(about.get("commit") or "unknown")),
        ("device", pages.code(about.get("device") or "unknown")),
        (
            "state digest (SHA-256)",
            pages.code(latest.get("state_sha256") or "none yet"),
        ),
    ]
    files = [name for name in _FILES if linked and (Path(run.folder) / name).exists()]
    if files:
        links = ", ".join(pages.link(name, name) for name in files)
        facts.append(("files of the run", pages.Html(links)))
    own = [(field, str(value)) for field, value in changed.items()]
    return pages.section(
        "Configuration",
        pages.facts(facts),
        pages.command(command) if command else "",
        f"<h3>Changed from the experiment's defaults</h3>{pages.facts(own)}"
        if own
        else "",
        pages.folded("All settings", pages.nested(config)),
        pages.folded("Plan", pages.nested(latest.get("plan"))),
        pages.folded("Package versions", pages.nested(about.get("versions"))),
    )


def _as_command(config: Row) -> tuple[dict[str, Any], str | None]:
    """Settings that are not its experiment's, and a command that gives them all."""
    flat = common.flat(config)
    name = config.get("experiment")
    if name not in protocols.NAMES:
        return {}, None
    method, data = flat.get("method.name"), flat.get("data.name")
    argument = f"{name}:{method},data={data}"
    try:
        usual = common.flat(
            origin.as_json(protocols.find(name).get_config(f"{method},data={data}"))
        )
    except Exception:  # a method or data of one's own, or of another version
        return {}, None
    changed = {k: v for k, v in flat.items() if k not in usual or usual[k] != v}
    flags = "".join(f" \\\n  --config.{k}={_flag(v)}" for k, v in changed.items())
    return changed, f"hyperjax train --config={argument} --workdir=NEW_FOLDER{flags}"


def _flag(value: Any) -> str:
    if isinstance(value, list):
        value = origin.as_tuples(value)
    text = str(value)
    return text if re.fullmatch(r"[\w.+-]+", text) else f"'{text}'"


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _whole(value: Any) -> Any:
    """A mean over families is no whole number, but shown as one."""
    return None if value is None else round(value)
