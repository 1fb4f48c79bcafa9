"""HyperFedNet's accuracy against what it sends, by embedding size: a picture.

python -m experiments.studies.embedding_sizes --workdir=runs/sizes --data_dir=... \
    [--sizes=1,2,4] [--seeds=0,1,2] [--rates=0.03] [--json=FILE] [--picture=FILE.svg]

The paper's figure 7 (arXiv:2402.18445) at the size of `studies.personalised`: n in
1, 2, ..., 128, participants' accuracy after fine-tuning against the numbers of a round
trip, which grow with n squared. The learning rate is that of n = 64.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.studies import grid, personalised
from hyperjax.engine.checkpoint import write_atomically
from hyperjax.errors import check_choice
from hyperjax.launch import cli, outputs, plots
from hyperjax.launch.pages import text_table
from hyperjax.protocols import personalised as experiment

TUNED = f"pacc_ft{personalised.TUNED}"
COLUMNS = (
    ("size", "n"),
    ("cpr", "numbers/round"),
    (TUNED, "tuned"),
    ("pacc_ft0", "before"),
)


def picture(rows: list[Mapping[str, Any]]) -> str:
    """Returns accuracy over log2 of the numbers per round trip, as SVG text."""
    lines = [
        plots.Line(
            label,
            [(math.log2(row["cpr"]), row[key][0]) for row in rows if row.get(key)],
            color,
            style,
        )
        for key, label, color, style in (
            (TUNED, "after fine-tuning", plots.PARTICIPATING, "solid"),
            ("pacc_ft0", "before", plots.NOVEL, "dashed"),
        )
    ]
    chart = plots.line_chart(
        "accuracy (solid: after fine-tuning, dashed: before) by embedding size",
        lines,
        "log2 of numbers per round trip, n = 1, 2, ..., 128",
        100,
    )
    return chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def main(
    workdir: str,
    data: str,
    base: personalised.Scale,
    sizes: Sequence[str],
    seeds: Sequence[str],
    rates: Sequence[str],
    json: str | None,
    svg: str,
) -> int:
    """Runs the sweep; prints the table, writes record and picture."""
    cli.use_cores(0)
    check_choice("data", data, experiment.PRESETS)
    numbers = grid.whole_numbers("seeds", seeds)
    widths = grid.whole_numbers("sizes", sizes, least=1)
    tried = grid.positive_numbers("rates", rates)
    root = outputs.folder("workdir", workdir)
    files = outputs.files(json=json, picture=svg)
    searched = personalised.search("HFN", data, base, root, tried)
    rate = grid.best(searched)
    record = grid.record(
        data=data, rounds=base.rounds, seeds=numbers, learning_rate=rate
    )
    for size in widths:
        scale = base._replace(embedding_size=size)
        found = [
            grid.result(
                personalised.scaled("HFN", data, False, seed, rate, scale),
                root / f"n{size}_{seed}",
            )
            for seed in numbers
        ]
        row = personalised.row_of("HFN", data, False, searched, found)
        kept = (TUNED, "pacc_ft0", "cpr", "per_seed", "diverged", "commits")
        record["rows"].append({"size": size} | {k: row[k] for k in kept if k in row})
        grid.write(record, files.get("json"))
    shown = [{k: grid.shown(row.get(k)) for k, _ in COLUMNS} for row in record["rows"]]
    print(text_table(shown, COLUMNS))
    write_atomically(files["picture"], picture(record["rows"]) + "\n")
    print(f"picture: {files['picture']}")
    return 0


if __name__ == "__main__":
    _WORKDIR = cli.define_path("workdir", "runs/embedding_sizes", "Folder of runs.")
    _PICTURE = cli.define_path("picture", "runs/embedding_sizes.svg", "Picture.")
    _DATA = flags.DEFINE_string("data", "mnist", "Data set.")
    _DATA_DIR = cli.define_path("data_dir", None, "Folder of prepared TFDS sets.")
    _SIZES = flags.DEFINE_list("sizes", [str(2**i) for i in range(8)], "n.")
    _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    _RATES = flags.DEFINE_list(
        "rates", [str(r) for r in personalised.RATES], "Learning rates."
    )
    _ROUNDS = flags.DEFINE_integer("rounds", 30, "Rounds.")
    _JSON = cli.define_path("json", None, "File for the results.")
    cli.run(
        grid.guarded(
            lambda: main(
                _WORKDIR.value,
                _DATA.value,
                personalised.Scale(data_dir=_DATA_DIR.value, rounds=_ROUNDS.value),
                sizes=_SIZES.value,
                seeds=_SEEDS.value,
                rates=_RATES.value,
                json=_JSON.value,
                svg=_PICTURE.value,
            )
        )
    )
