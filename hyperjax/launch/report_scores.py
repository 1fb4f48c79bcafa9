"""What came out: the main numbers, every accuracy, and fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hyperjax.launch import pages
from hyperjax.launch.finished import Row

METRICS = {"gacc": "gACC", "pacc": "pACC", "zacc": "zACC", "vacc": "vACC"}
MEANINGS = {
    "gacc": "global test set",
    "pacc": "clients that take part",
    "zacc": "clients never trained on",
    "vacc": "what they set aside for validation",
}
COLUMNS = {
    "": "weighted by samples %",
    "_mean": "mean over clients %",
    "_std": "± over clients",
    "_p10": "tenth percentile %",
    "_em": "EM control %",
    "_oracle": "oracle %",
    "_swapped": "swapped %",
    "_sample": "sample by sample %",
}
_OF_CLIENTS = ("_mean", "_std", "_p10")  # which the global test set has none of
_FINE_TUNED = re.compile(r"(pacc|zacc)_ft(\d+)(_mean|_not_finite)?")
_TUNED_COLUMNS = {
    ("pacc", ""): "participants %",
    ("pacc", "_mean"): "participants, mean over clients %",
    ("zacc", ""): "unseen clients %",
    ("zacc", "_mean"): "unseen clients, mean over clients %",
}


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
    columns = [s for s in COLUMNS if any(m + s in latest for m in there)]
    if not there:
        return pages.Html("")
    rows = [
        (
            *(METRICS[m], _whose(latest, m)),
            *(
                None if m == "gacc" and s in _OF_CLIENTS else _float(latest.get(m + s))
                for s in columns
            ),
        )
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
        "accuracies", ("", "of", *(COLUMNS[s] for s in columns)), rows
    )
    return pages.section("Accuracy", pages.text(" ".join(said)) if said else "", table)


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


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
