"""Folders of runs as `train` leaves them, with made-up results."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hyperjax.data import picture
from hyperjax.launch import charts, pages


def _blank(*args) -> Figure:
    figure = Figure((1, 1))
    FigureCanvasAgg(figure)
    return figure


CHARTS = ("lines", "places", "histogram", "boxes", "sorted_dots")


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Pages have places for charts and pictures, and nothing in them.

    Drawing takes longer than a small run. Tests of pages, and pages of runs that are
    processes, have everything.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "drawing", lambda: "")
        for name in CHARTS:
            patch.setattr(charts, name, lambda *args, **kwargs: "{}")
        patch.setattr(picture, "partition_picture", _blank)
        patch.setattr(picture, "figure_svg", lambda figure: "<svg></svg>")
        yield


def _accuracies(share: float, shift: float) -> dict[str, float]:
    """All accuracies of one evaluation after a share of the training."""
    values = {}
    for name, best in (("gacc", 70.0), ("pacc", 88.0), ("zacc", 81.0)):
        value = 10 + (best + shift - 10) * (1 - math.exp(-4 * share))
        values |= {name: value, f"{name}_mean": value - 0.5, f"{name}_p10": value - 9}
        values |= {f"{name}_std": 0.0 if name == "gacc" else 4.2}
        values |= {f"{name}_em": value - 4, f"{name}_oracle": value + 3}
    return values


def _evaluation(round_: int, rounds: int, shift: float) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    row: dict[str, Any] = _accuracies(round_ / rounds, shift)
    row |= {"round": round_, "loss": 2.3 / (1 + round_) if round_ else None}
    row |= {"pacc_swapped": 55.0, "zacc_swapped": 57.0, "pacc_distance": 0.0412}
    row |= {"collapse_participating": 1.25, "collapse_novel": 1.1}
    row |= {"up_bytes_total": 4000 * round_, "down_bytes_total": 8000 * round_}
    return row | {"dispersion": 0.1 * round_, "update_norm": 1 / (1 + round_)}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def make_run(
    folder: Path,
    method: str = "hyperfednet",
    finished: bool = True,
    clients: int = 15,
    novel: int = 5,
    classes: int = 10,
    rounds: int = 40,
    collapsed: bool = False,
    shift: float = 0.0,
    seed: int = 0,
    settings: Mapping[str, Any] = {},
    at_end: Mapping[str, Any] = {},
) -> str:
    """Writes the files that a run leaves behind; returns the folder.

    `settings` are further fields of the config, by their dotted names; `at_end` goes
    into the summary.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    config: dict[str, Any] = {
        "seed": seed,
        "rounds": rounds,
        "data": {"name": "digits", "labels": [3, 1]},
        "method": {"name": method, "rate": 0.05},
    }
    for field, value in settings.items():
        group, _, name = field.rpartition(".")
        (config.setdefault(group, {}) if group else config)[name] = value
    about = {
        "config": config,
        "commit": "0123abc",
        "versions": {"jax": "0.4.30"},
        "device": "cpu x 2",
        "started": "2026-11-26T14:05:59+00:00",
        "plan": {"clients_at_once": 5},
        "data": {"partition": f"digest of seed {seed}"},
    }
    write_json(folder / "config.json", about)
    done = rounds if finished else rounds // 2
    evaluations = [_evaluation(t, rounds, shift) for t in range(0, done + 1, 4)]
    write_lines(folder / "metrics.jsonl", evaluations)
    trained = [
        {
            "round": t,
            "loss": 2.3 / (1 + t),
            "update_norm": 1 / (1 + t),
            "samples": 640.0,
        }
        for t in range(1, done + 1)
    ]
    write_lines(folder / "training.jsonl", trained)
    times = [{"round": e["round"], "seconds": 1.5 * e["round"]} for e in evaluations]
    write_lines(folder / "timing.jsonl", times)
    counts = rng.multinomial(60, rng.dirichlet(np.full(classes, 0.3), clients))
    participating = np.arange(clients) < clients - novel
    names = np.array([f"class {k}" for k in range(classes)])
    np.savez(
        folder / "partition.npz",
        counts=counts,
        participating=participating,
        label_names=names,
    )
    if not finished:
        return str(folder)
    summary = {**evaluations[-1], "method": method, "dataset": "digits", "seed": seed}
    summary |= {"rounds": rounds, "up_numbers": 1000, "down_numbers": 2000}
    summary |= {"up_bytes": 4000, "down_bytes": 8000, "seconds": 61.25}
    summary |= {"samples_per_second": 12345.6, "compile_seconds": 8.5}
    summary |= {"plan": about["plan"], "state_sha256": "feed" * 16, "finished": True}
    write_json(folder / "summary.json", summary | dict(at_end))
    embeddings = rng.dirichlet(np.full(6, 0.4), clients)
    if collapsed:
        embeddings = np.full((clients, 6), 1 / 6) + rng.uniform(0, 1e-9, (clients, 6))
    rows = []
    for client in range(clients):
        accuracy = float(rng.uniform(60, 98))
        rows.append(
            {
                "client": client,
                "participating": bool(participating[client]),
                "train_samples": int(counts[client].sum()),
                "eval_samples": 12,
                "accuracy": accuracy,
                "accuracy_em": accuracy - 6,
                "embedding": embeddings[client].tolist(),
            }
        )
    write_json(folder / "clients.json", rows)
    return str(folder)
