"""The main job in small: HyperFedZero, FedAvg and the controls on real MNIST images.

python -m experiments.demo [--workdir=runs/demo]

Each method has its own run folder; a demo that was stopped continues, and one that is
finished only shows its table again.
"""

import time
from typing import Any

from absl import flags

from hyperjax.launch import cli, outputs, pages, report, train
from hyperjax.protocols import zero_shot

RUNS = (
    ("FedAvg", "fedavg", "fedavg"),
    ("FedAvg, own learning rate", "fedavg_tuned", "fedavg,tuned"),
    ("HyperFedZero", "hyperfedzero", "hyperfedzero"),
    ("Control: constant embedding", "constant_embedding", "constant_embedding"),
    ("Control: Opt.1", "opt1", "opt1"),
)
COLUMNS = (
    ("method", "method"),
    ("gacc", "gACC"),
    ("pacc", "pACC"),
    ("zacc", "zACC"),
    ("zacc_mean", "zACC, mean"),
    ("down_numbers", "numbers down"),
    ("up_numbers", "numbers up"),
    ("bytes", "bytes/client/round"),
    ("seconds", "seconds"),
)


def rows_of(label: str, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The row of a run, and those of its label-shift controls, if it has any."""
    sent = summary["down_bytes"] + summary["up_bytes"]
    row = dict(summary, method=label, bytes=sent)
    variants = [row]
    for suffix, name in (
        ("em", "+ label-shift EM"),
        ("oracle", "+ true prior (oracle)"),
    ):
        scores = {m: summary.get(f"{m}_{suffix}") for m in ("gacc", "pacc", "zacc")}
        scores["zacc_mean"] = None  # of controls there is none
        if any(score is not None for score in scores.values()):
            variants.append({**row, **scores, "method": f"  {name}", "seconds": None})
    return variants


def main(workdir: str, is_smoke: bool) -> int:
    """Runs or continues every method; returns the exit code."""
    cli.use_cores(0)
    began = time.perf_counter()
    root = outputs.folder("workdir", workdir)
    rows, folders = [], []
    for label, name, arg in RUNS:
        config = zero_shot.get_config(arg + (",data=digits,smoke" if is_smoke else ""))
        folder, asked = str(root / name), list[bool]()
        stopping = train.signals_kept_in(asked)
        try:
            summary = train.train(config, folder, name, stopping=stopping)
            if any(asked):
                raise train.Stopped(config.rounds)
        except train.Stopped as stop:
            print(f"Stopped in {name} after round {stop}; `make demo` continues.")
            return 0
        rows += rows_of(label, summary)
        folders.append(folder)
    images = "8x8 digits" if is_smoke else "MNIST (5,000 images)"
    print(
        f"\n{images}, 10 participating and 5 unseen clients, Dirichlet 1.0. "
        "Accuracy in percent:\ngACC on the global test set, pACC on participants, zACC "
        'on unseen clients, without fine-tuning; weighted by samples, "mean" over '
        "clients.\n"
    )
    there = [key for key, _ in COLUMNS if any(r.get(key) is not None for r in rows)]
    print(pages.text_table(rows, [(k, name) for k, name in COLUMNS if k in there]))
    page = report.comparison_report(
        folders,
        str(root / "report.html"),
        f"HyperFedZero and its controls on {images}",
    )
    print(f"\n{time.perf_counter() - began:.0f} seconds.\nreport: {page}")
    return 0


if __name__ == "__main__":
    _WORKDIR = cli.define_path("workdir", "runs/demo", "Folder of the runs.")
    _SMOKE = flags.DEFINE_bool("smoke", False, "Two rounds a method, on 8x8 digits.")
    cli.run(lambda: main(_WORKDIR.value, _SMOKE.value))
