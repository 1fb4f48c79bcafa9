r"""Our rate beside every simulator that is installed, on the same work.

python -m benchmarks.peers --presets=B32q,A32q,A128q,C32q \
    --torch=PYTHON --at=drjax=PYTHON --json=peers.json

Presets, see `workload`: A is a LeNet (6 and 16 channels), B an MLP (784-200-200-10), C
a ResNet-20 with GroupNorm, P pfl-research's own benchmark on CIFAR-10 (5x5 kernels, 32
and 64 channels, 50 images a client); the number is the batch size, and "q" means one
local epoch instead of four. Every side is one process on one core, the same core, in
turn with ours; --repeats times. Rates are samples per CPU second of the fastest round,
which another program on the machine changes least; wall seconds are beside them.

A peer is looked for in this interpreter; --torch=PYTHON names one that has PyTorch, in
which the plain loop and PyTorch's peers are looked for, and --at=NAME=PYTHON, which may
be repeated, the one of a single peer. Who is not there is left out by name. How to
install each, in an environment of its own:

  torch   pip install torch numpy
  pfl     pip install torch numpy pfl
  drjax   pip install drjax
  fedjax  pip install fedjax==0.0.17 jax==0.4.30 jaxlib==0.4.30 dm-haiku==0.0.12 \
            optax==0.2.3 chex==0.1.86 "numpy<2" "scipy<1.14"

The exit code is 0 if every preset meets its bar: the least ratio of our rate to that of
the better of PyTorch's loop and pfl. It is 1 if one does not, or if neither is there.
Where oneDNN is built into ours, see `hyperjax.native`, our version says so, and the bar
of C is higher.
"""

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.peers.workload import BARS, JUDGED, NATIVE_BARS, PRESETS, Workload
from benchmarks.round_time import about, write
from hyperjax.errors import check_at_least, check_choice
from hyperjax.launch import cli
from hyperjax.launch.pages import text_table

FOLDER = Path(__file__).parent
OURS = "hyperjax"
# What of PyTorch and what of JAX it is built on; each by the module it imports.
PEERS = {"torch": "torch", "pfl": "torch", "drjax": "jax", "fedjax": "jax"}
COLUMNS = (
    ("preset", "preset"),
    ("peer", "peer"),
    ("version", "version"),
    ("samples_per_cpu_second", "samples / CPU s"),
    ("seconds", "s / round"),
    ("loss", "loss"),
    ("ratio", "ours / its"),
    ("bar", "bar"),
)


def interpreters(torch: str | None, at: list[str]) -> dict[str, str]:
    """Returns the interpreter in which each peer is looked for."""
    found = {
        name: (torch or sys.executable) if built_on == "torch" else sys.executable
        for name, built_on in PEERS.items()
    }
    for text in at:
        name, _, path = text.partition("=")
        check_choice("--at", name, PEERS)
        found[name] = path
    return found


def has(python: str, module: str) -> bool:
    """Returns whether an interpreter can import a module."""
    command = [python, "-c", f"import {module}"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError as error:
        raise ValueError(f"{python!r} is no Python: {error.strerror}") from error


def measure(name: str, python: str, preset: str, limit: int) -> dict[str, Any] | None:
    """Runs one side once; None if it takes longer than `limit` seconds."""
    command = [python, str(FOLDER / f"run_{name}.py"), preset]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=limit
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        raise ValueError(f"{name}, {preset}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def best(work: Workload, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums repeats up: the fastest round of all."""
    cpu = min(t for record in records for t in record["cpu_seconds"])
    samples = work.cohort * work.steps * work.batch
    return {
        "version": records[0]["version"],
        "loss": records[0]["loss"],
        "seconds": min(t for record in records for t in record["seconds"]),
        "samples_per_cpu_second": samples / cpu,
        "repeats": records,
    }


def compare(
    preset: str, there: dict[str, str], repeats: int, limit: int
) -> list[dict[str, Any]]:
    """Returns a record of each side of a preset, ours first."""
    sides: dict[str, list] = {OURS: [], **{name: [] for name in there}}
    for _ in range(repeats):
        for name in list(sides):
            python = there.get(name, sys.executable)
            record = measure(name, python, preset, limit)
            said = f"{preset}: {name}"
            if record is None:
                if name == OURS:
                    raise ValueError(f"{said} took longer than --limit={limit} seconds")
                del sides[name]
                said += f" takes longer than {limit} s, and is left out"
            else:
                sides[name].append(record)
            print(said, file=sys.stderr, flush=True)
    found = [
        {"preset": preset, "peer": name, **best(PRESETS[preset], records)}
        for name, records in sides.items()
    ]
    ours = found[0]["samples_per_cpu_second"]
    native = sides[OURS][0].get("onednn")
    jax = importlib.metadata.version("jax")
    found[0]["version"] = f"{jax}, oneDNN {native}" if native else jax
    for record in found[1:]:
        record["ratio"] = ours / record["samples_per_cpu_second"]
    judged = [record for record in found if record["peer"] in JUDGED]
    if judged:
        nearest = min(judged, key=lambda record: record["ratio"])
        bars = NATIVE_BARS if native else BARS
        nearest["bar"] = bars[preset.removesuffix("q")]
    return found


def verdict(records: list[dict[str, Any]]) -> tuple[int, str]:
    """Returns the exit code, and what there is to say of the bars."""
    judged = [record for record in records if "bar" in record]
    missed = [r for r in judged if r["ratio"] < r["bar"]]
    if not judged:
        return 1, "Nobody is installed to compare with: see --help."
    lines = [
        f"{r['preset']}: {r['ratio']:.2f} of {r['peer']}, the best that is judged; bar "
        f"{r['bar']}: {'missed' if r in missed else 'met'}"
        for r in judged
    ]
    return (1 if missed else 0), "\n".join(lines)


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a record as text."""
    digits = {"samples_per_cpu_second": ",.0f", "seconds": ".3f", "ratio": ".2f"}
    digits["loss"] = ".3f"
    texts = {k: format(record[k], f) for k, f in digits.items() if k in record}
    return {name: "" for name, _ in COLUMNS} | record | texts


def main() -> int:
    f = flags.FLAGS
    check_at_least(1, repeats=f.repeats, limit=f.limit)
    for preset in f.presets:
        check_choice("--presets", preset, PRESETS)
    there, absent = {}, []
    for name, python in interpreters(f.torch, f.at).items():
        if has(python, name):
            there[name] = python
        else:
            absent.append(name)
    if absent:
        print(f"Not installed, and left out: {', '.join(absent)}.", file=sys.stderr)
    records: list[dict[str, Any]] = []
    for preset in f.presets:
        records += compare(preset, there, f.repeats, f.limit)
        write(f.json, [{**record, **about()} for record in records])
    table = text_table([shown(record) for record in records], COLUMNS)
    code, words = verdict(records)
    print(
        f"One process on one core of {platform.machine()} each.\n\n{table}\n\n{words}"
    )
    return code


if __name__ == "__main__":
    flags.DEFINE_list("presets", ["B32q", "A32q", "A128q", "C32q"], "What is run.")
    cli.define_path("torch", None, "A Python with PyTorch, and its peers if installed.")
    flags.DEFINE_multi_string("at", [], "NAME=PYTHON of a single peer; repeatable.")
    flags.DEFINE_integer("repeats", 2, "How often each side is run.")
    flags.DEFINE_integer("limit", 300, "Seconds that a side may take in all.")
    cli.define_path("json", None, "File for the records.")
    cli.run(main, needs=())
