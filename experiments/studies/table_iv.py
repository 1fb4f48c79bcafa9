"""Table IV of HyperFedNet from runs that were recorded before studies were sweeps.

python -m experiments.studies.table_iv

Reads benchmarks/results/personalised.json, writes a record in the form of
`studies.record`. Points gained are of each seed; of curves the older record has the
mean over seeds alone, so that communication is one number.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from experiments.studies import hyperfednet
from experiments.studies.results import RECORDS, ROOT
from hyperjax.engine.checkpoint import write_atomically
from hyperjax.launch import cli
from hyperjax.sweeps import statistics

OLDER = ROOT / "benchmarks" / "results" / "personalised.json"
PARTITIONS = {"Dirichlet(0.5)": "dirichlet", "iid": "iid"}
SETS = ("mnist", "fashion_mnist")
DATE = "2026-11-21 to 2026-11-26"


def record(older: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of table IV from one of all methods."""
    study, settings = hyperfednet.STUDIES["table_iv"], older["settings"]
    known = {(r["data"], r["partition"], r["method"]): r for r in older["rows"]}
    rows, used = [], []
    for data, partition in itertools.product(SETS, PARTITIONS):
        for label, name in hyperfednet.UNFUSED.items():
            fused, alone = (known[data, partition, x] for x in (label, name))
            used += [fused, alone]
            gains = [
                a - b for a, b in zip(fused["per_seed"], alone["per_seed"], strict=True)
            ]
            share = 100 * to_final(fused) / to_final(alone)
            place = data, PARTITIONS[partition], label
            values = {
                hyperfednet.TUNED: fused["per_seed"],
                "gain": gains,
                "communication": [share],
                "to_final": [to_final(fused)],
            }
            rows.append(
                dict(
                    label=label,
                    settings=f"{data}, {partition}",
                    learning_rate=fused["learning_rate"],
                    diverged=fused["diverged"],
                    published=dict(study.published[place]),
                    seconds=[round(seconds) for seconds in fused["seconds"]],
                    **{k: statistics.spread(v)._asdict() for k, v in values.items()},
                )
            )
            for k in (hyperfednet.TUNED, "gain"):
                rows[-1][k]["per_seed"] = dict(
                    zip(settings["seeds"], values[k], strict=True)
                )
    commits = sorted({commit for row in used for commit in row["commits"]})
    return dict(
        study="table_iv",
        asks=study.asks,
        scale="small",
        config="experiments/studies/hyperfednet.py:data=mnist",
        command="python -m experiments.studies.table_iv",
        seeds=settings["seeds"],
        commit=", ".join(commits),
        date=DATE,
        hardware=older["machine"],
        versions=older["versions"],
        tuning={
            "fields": ["local.learning_rate"],
            "by": hyperfednet.TUNED,
            "seed": settings["search_seed"],
            "tried": settings["rates"],
        },
        columns={k: v for k, v in study.columns.items() if k in rows[0]},
        compared="gain",
        baseline=None,
        settings=settings,
        rows=rows,
    )


def to_final(row: Mapping[str, Any]) -> float:
    """Returns millions of numbers until the last round's accuracy was first met."""
    curve = [(int(t) + 1, accuracy) for t, accuracy in row["curve"].items()]
    first = next(t for t, accuracy in curve if accuracy >= curve[-1][1])
    return first * row["cpr"] / 1e6


def main() -> int:
    """Writes the record; returns the exit code."""
    found = record(json.loads(OLDER.read_text(encoding="utf-8")))
    path = RECORDS / "hyperfednet_table_iv.json"
    write_atomically(path, json.dumps(found, indent=1) + "\n")
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    cli.run(main, needs=())
