"""Sections of the page about one run."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from html import escape

import numpy as np

from hyperjax.data import picture
from hyperjax.launch import finished, pages, plots
from hyperjax.launch.finished import Row, Run

METRICS = {"gacc": "gACC", "pacc": "pACC", "zacc": "zACC", "vacc": "vACC"}
_COLORS = {
    "gacc": plots.INK,
    "pacc": plots.PARTICIPATING,
    "zacc": plots.NOVEL,
    "vacc": plots.MUTED,
}
_CONTROLS = {"_em": ("EM control", "dashed"), "_oracle": ("oracle", "dotted")}
MEANINGS = {
    "gacc": "global test set",
    "pacc": "clients that take part",
    "zacc": "clients never trained on",
    "vacc": "what they set aside for validation",
}
_FINE_TUNED = re.compile(r"(pacc|zacc)_ft(\d+)(_mean|_not_finite)?")
_FINE_TUNED_COLUMNS = {
    ("pacc", ""): "participants, %",
    ("pacc", "_mean"): "participants, mean over clients, %",
    ("zacc", ""): "unseen clients, %",
    ("zacc", "_mean"): "unseen clients, mean over clients, %",
}
# Embeddings that differ by less are one embedding in float32.
_SAME = 1e-6
# Below this share of its most, embedding use is called small.
_LITTLE_USE = 0.01
# More clients than this scroll sideways rather than shrink out of sight.
_WIDE_CLIENTS = 150


def headline(run: Run, latest: Row, heading: str) -> str:
    """What ran, and whether it came to its end."""
    rounds = latest.get("rounds", "?")
    finished = latest.get("finished") is True
    state = "finished" if finished else "not finished"
    note = ""
    if not finished:
        done = run.metrics[-1]["round"] if run.metrics else 0
        note = (
            '<p class="note">This run is not finished: evaluated up to round '
            f"{done} of {escape(str(rounds))}. Numbers are of that evaluation.</p>"
        )
    facts = f"seed {latest.get('seed', '?')} · {rounds} rounds · {state}"
    return (
        f'<header><h1>{escape(heading)}</h1><p class="muted">{escape(facts)}</p>'
        f"{note}</header>"
    )


def cards(latest: Row) -> str:
    """The main numbers, a card each."""
    cards = []
    for key, name in METRICS.items():
        bad = latest.get(f"{key}_not_finite")
        if bad:
            line = f"outputs of the network for {bad} of them are not finite"
            cards.append(_card(name, pages.NOTHING, MEANINGS[key], line))
        if key not in latest:
            continue
        # The global test set is one client.
        weighted = "" if key == "gacc" else ", weighted by samples"
        lines = [MEANINGS[key] + weighted]
        controls = [
            f"{label} {latest[key + suffix]:.2f}"
            for suffix, (label, _) in _CONTROLS.items()
            if key + suffix in latest
        ]
        lines += [" · ".join(controls)] if controls else []
        if key != "gacc" and f"{key}_mean" in latest:
            spread = f"mean over clients {latest[f'{key}_mean']:.2f}"
            if f"{key}_std" in latest:
                spread += f" ± {latest[f'{key}_std']:.2f}"
            if f"{key}_p10" in latest:
                spread += f", tenth percentile {latest[f'{key}_p10']:.2f}"
            lines.append(spread)
        cards.append(_card(name, pages.percent(latest[key]), *lines))
    best = latest.get("best_by_validation")
    if best:
        line = f"round {best['round']}, where vACC was {best['vacc']:.2f}"
        value = pages.percent(best["pacc"])
        cards.append(_card("pACC, best by validation", value, line))
    if "up_bytes" in latest and "down_bytes" in latest:
        up, down = latest["up_bytes"], latest["down_bytes"]
        line = f"up {pages.num_bytes(up)} · down {pages.num_bytes(down)}"
        cards.append(_card("Per client and round", pages.num_bytes(up + down), line))
    if "seconds" in latest:
        compile_seconds = latest.get("compile_seconds")
        line = (
            ""
            if compile_seconds is None
            else f"of it compiling {compile_seconds:.1f} s"
        )
        cards.append(_card("Wall time", f"{latest['seconds']:,.1f} s", line))
    if "samples_per_second" in latest:
        cards.append(
            _card("Samples per second", f"{latest['samples_per_second']:,.0f}")
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(name: str, value: str, *lines: str) -> str:
    small = "".join(f"<small>{escape(line)}</small>" for line in lines if line)
    return f'<div class="card">{escape(name)}<b>{escape(value)}</b>{small}</div>'


def curves(run: Run) -> str:
    """Charts of accuracy, loss and further quantities against round."""
    if not run.metrics:
        return pages.section("Curves", "<p>No evaluation yet.</p>")
    lines, entries = [], []
    for key, name in METRICS.items():
        points = finished.points(run, key)
        if points:
            lines.append(plots.Line(name, points, _COLORS[key]))
            entries.append((name, _COLORS[key], "solid"))
    num_metrics = len(lines)
    for suffix, (label, style) in _CONTROLS.items():
        extra = [
            plots.Line(f"{name} {label}", found, _COLORS[key], style)
            for key, name in METRICS.items()
            if (found := finished.points(run, key + suffix))
        ]
        lines += extra
        if extra:
            entries.append((label, plots.MUTED, style))
    note = (
        "<p>EM control: the same outputs, reweighted by class shares estimated from "
        "them (label-shift EM), without training. Oracle: reweighted by the true "
        "class shares, which no client knows.</p>"
        if len(lines) > num_metrics
        else ""
    )
    figures = []
    if lines:
        chart = plots.line_chart(
            "Accuracy in percent against round", lines, y_ceiling=100
        )
        figures.append(pages.figure("Accuracy, %", plots.legend(entries), chart))
    loss = plots.Line("loss", finished.points(run, "loss"), plots.INK)
    if loss.points:
        figures.append(
            pages.figure(
                "Local training loss",
                plots.legend([("mean over the last round", plots.INK, "solid")]),
                plots.line_chart("Local training loss against round", [loss]),
            )
        )
    return pages.section(
        "Curves",
        note,
        f'<div class="grid">{"".join(figures)}</div>' if figures else "",
        _further_quantities(run),
    )


def _further_quantities(run: Run) -> str:
    """Small charts of the training quantities that have no place of their own."""
    placed = (*METRICS, "collapse_", "up_bytes", "down_bytes")
    keys = dict.fromkeys(key for row in run.metrics for key in row)
    figures = []
    for key in keys:
        points = [
            p for p in finished.points(run, key) if isinstance(p[1], numbers.Real)
        ]
        if key in ("round", "loss", "seconds") or key.startswith(placed) or not points:
            continue
        line = plots.Line(key, points, plots.PARTICIPATING)
        chart = plots.line_chart(f"{key} against round", [line], size=(380, 200))
        figures.append(pages.figure(key.replace("_", " "), chart))
    return f'<div class="grid small">{"".join(figures)}</div>' if figures else ""


def fine_tuning(latest: Row) -> str:
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
                row[metric, suffix] = value
    if not found:
        return ""
    columns = [
        c for c in _FINE_TUNED_COLUMNS if any(c in row for row in found.values())
    ]
    table = pages.table(
        ("fine-tuning epochs", *(_FINE_TUNED_COLUMNS[column] for column in columns)),
        [(k, *(row.get(c) for c in columns)) for k, row in sorted(found.items())],
    )
    note = (
        "<p>Accuracy on a client's held-out samples after so many local epochs on its "
        "other samples, from what the server deploys. Weighted by samples, unless it "
        "is the mean over clients.</p>"
    )
    if bad:
        note += (
            f'<p class="note">{pages.NOTHING}: for some clients the outputs of the '
            "fine-tuned network are not finite, so there is no accuracy.</p>"
        )
    return pages.section("Fine-tuning", note, f'<div class="scroll">{table}</div>')


def partition(run: Run) -> str:
    """A picture of who holds how much of each class."""
    if run.partition is None:
        return ""
    counts, participating, names = run.partition
    # A dollar sign would start a formula in the picture.
    names = [name.replace("$", r"\$") for name in names]
    figure = picture.partition_picture(counts, participating, names, None)
    name = (
        f"Samples of {counts.shape[1]} classes over {counts.shape[0]} clients, "
        f"{int(participating.sum())} of them participating"
    )
    nobodys = f" {run.unassigned:,} more belong to no client." if run.unassigned else ""
    wide = " wide" if len(counts) > _WIDE_CLIENTS else ""
    return pages.section(
        "Partition",
        f"<p>{name}; {int(counts.sum()):,} samples in all.{nobodys}</p>",
        f'<div class="picture{wide}" role="img" aria-label="{name}">',
        picture.figure_svg(figure),
        "</div>",
    )


def clients(run: Run) -> str:
    """A chart of every client's accuracy."""
    marks, tested = [], [c for c in run.clients if c.get("accuracy") is not None]
    for client in tested:
        control = client.get("accuracy_em")
        name = f"client {client['client']}: {client['accuracy']:.2f} %"
        name += "" if control is None else f", EM control {control:.2f} %"
        name += f", {client['train_samples']:,} training samples"
        where = (0.0, client["accuracy"], bool(client["participating"]), control)
        marks.append(plots.Mark(name, *where))
    if not marks:
        return ""
    entries = [*_groups(marks), ("mean of a group", plots.MUTED, "dashed")]
    if any(mark.control is not None for mark in marks):
        entries.append(("EM control of the same client", plots.MUTED, "bar"))
    chart = plots.sorted_dots("Accuracy of every client, sorted, in percent", marks)
    return pages.section(
        "Clients",
        pages.figure(
            "Accuracy of every client, sorted, %", plots.legend(entries), chart
        ),
    )


def _groups(marks: Sequence[plots.Mark]) -> list[tuple[str, str, str]]:
    """Legend entries of the groups of clients that are there."""
    kinds = {mark.participating for mark in marks}
    entries = {
        True: ("participating", plots.PARTICIPATING, "dot"),
        False: ("not participating", plots.NOVEL, "diamond"),
    }
    return [entry for kind, entry in entries.items() if kind in kinds]


def embeddings(run: Run, latest: Row) -> str:
    """A map of clients' embeddings, and what they are good for."""
    clients = [client for client in run.clients if client.get("embedding")]
    if not clients:
        return ""
    embeddings = np.array([client["embedding"] for client in clients], float)
    use = _use_table(latest, embeddings.shape[1])
    centred = embeddings - embeddings.mean(0)
    if np.abs(centred).max() <= _SAME:
        note = (
            '<p class="note">The embedding has collapsed: all '
            f"{len(clients)} clients have the same one (to {_SAME:g}), so the deployed "
            "networks do not depend on the client through it.</p>"
        )
        return pages.section("Embeddings", note, use)
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((len(clients), 2))
    shares = np.zeros(2)
    rank = min(2, len(spread))
    places[:, :rank] = (left * spread)[:, :rank]
    shares[:rank] = 100 * spread[:rank] ** 2 / np.sum(spread**2)
    marks = [
        plots.Mark(f"client {client['client']}", x, y, bool(client["participating"]))
        for client, (x, y) in zip(clients, places.tolist(), strict=True)
    ]
    labels = [f"component {i + 1} ({share:.0f} %)" for i, share in enumerate(shares)]
    name = f"Embeddings of {len(clients)} clients on their two main components"
    chart = plots.point_map(name, marks, (labels[0], labels[1]))
    legend = plots.legend(_groups(marks))
    figure = pages.figure(f"{name} (share of variance)", legend, chart)
    reach = float(np.linalg.norm(centred, axis=1).max())
    note = (
        "<p>No client's embedding is further than "
        f"{reach:.2g} from their mean; the map is scaled to fill its frame.</p>"
    )
    uses = [latest.get(f"collapse_{kind}") for kind in ("participating", "novel")]
    known = [value for value in uses if value is not None]
    most = math.log(embeddings.shape[1])
    if known and max(known) < _LITTLE_USE * most:
        note = (
            '<p class="note">The embedding has all but collapsed: its use is under '
            f"{_LITTLE_USE:.0%} of the most possible, and no client is further than "
            f"{reach:.2g} from the mean. The map magnifies these differences.</p>"
        )
    return pages.section("Embeddings", use, note, f'<div class="map">{figure}</div>')


def _use_table(latest: Row, size: int) -> str:
    """How much the deployed networks depend on the client, where it was measured."""
    quantities = (
        (
            "embedding use I, nats",
            "collapse_{participating}",
            "I = H(mean e) - mean H(e), with H the entropy: 0 means the embedding is "
            "the same for every input, so it is ignored; the most is "
            f"ln {size} = {math.log(size):.2f}.",
        ),
        (
            "distance of networks",
            "{pacc}_distance",
            "Relative distance between the networks deployed by two clients: 0 means "
            "that all clients get one network.",
        ),
        (
            "swapped accuracy, %",
            "{pacc}_swapped",
            "Every client tested with its neighbour's deployed state: no worse than "
            "with its own means that nothing is personal.",
        ),
    )
    kinds = {
        "participating": {"participating": "participating", "pacc": "pacc"},
        "not participating": {"participating": "novel", "pacc": "zacc"},
    }
    kinds = {name: kind for name, kind in kinds.items() if kind["pacc"] in latest}
    rows: list[tuple[object, ...]] = []
    for name, pattern, meaning in quantities:
        values = [latest.get(pattern.format(**k)) for k in kinds.values()]
        shown = [None if value is None else f"{value:.4g}" for value in values]
        if pattern == "{pacc}_swapped":
            own = [latest.get(kind["pacc"]) for kind in kinds.values()]
            shown = [
                f"{text} (own {value:.4g})" if text and value is not None else text
                for text, value in zip(shown, own, strict=True)
            ]
        if any(shown):
            rows.append((name, *shown, meaning))
    headings = ("quantity", *kinds, "meaning")
    return pages.table(headings, rows) if rows else ""


def communication(latest: Row) -> str:
    """A table of what is sent."""
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
        (name, *row, pages.num_bytes(row[-1]))
        for name, row in sizes.items()
        if row != [None] * len(kinds)
    ]
    if not rows:
        return ""
    headings = (
        "direction",
        "numbers per client and round",
        "bytes per client and round",
        "bytes in all",
        "",
    )
    table = pages.table(headings, rows)
    return pages.section(
        "Communication", f'<div class="scroll">{table}</div>', _reached(latest)
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
    note = (
        "<p>Rounds are counted from 0, and what is reached in round 0 is free. Between "
        "evaluations nothing is seen: the first number is for the round after the last "
        "evaluation below the accuracy, the second for the first evaluation at it.</p>"
    )
    table = pages.table(("pACC, %", "reached in round", "numbers until then"), rows)
    return f'<h3>Cost to an accuracy</h3>{note}<div class="scroll">{table}</div>'


def _between(least: int, most: int) -> str:
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def configuration(run: Run, latest: Row) -> str:
    """Where the run came from: commit, device, configuration, versions."""
    facts = {
        "commit": run.about.get("commit") or "unknown",
        "device": run.about.get("device") or "unknown",
        "state digest (SHA-256)": latest.get("state_sha256") or "none yet",
    }
    rows = [
        (name, pages.Html(f"<code>{escape(str(v))}</code>"))
        for name, v in facts.items()
    ]
    return pages.section(
        "Configuration",
        pages.table(("", ""), rows).replace(
            "<thead><tr><th></th><th></th></tr></thead>", ""
        ),
        pages.folded("Configuration", run.about.get("config")),
        pages.folded("Plan", latest.get("plan")),
        pages.folded("Package versions", run.about.get("versions")),
    )
