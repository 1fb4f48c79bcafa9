"""Draws the README's picture from a recorded study, with the figures that sweeps have.

python docs/picture.py
"""

import json
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from hyperjax.sweeps import figures, statistics  # noqa: E402

RECORD = HERE.parent / "experiments/results/shift_rotation_mnist14.json"
PICTURE = HERE / "_static/rotation.png"


def picture(record: dict) -> bytes:
    """Returns zACC against pACC of a record's methods, as a PNG file."""
    rows = [
        {"method": row["label"], "seed": int(seed), "pacc": pacc, "zacc": zacc}
        for row in record["rows"]
        for (seed, pacc), zacc in zip(
            row["pacc_mean"]["per_seed"].items(),
            row["zacc_mean"]["per_seed"].values(),
            strict=True,
        )
    ]
    done = pd.DataFrame(rows)
    look = figures.looks(statistics.groups_of(done, ["method"]))
    drawn = figures.participants_and_unseen(done, ["method"], look)
    return figures.rendered(drawn, "png")


if __name__ == "__main__":
    PICTURE.write_bytes(picture(json.loads(RECORD.read_text(encoding="utf-8"))))
