"""What the studies of papers share: two scales, and what a record says of a sweep.

A study is a function `sweep_NAME(add)` of a paper's file and an entry of the same name
in the file's `STUDIES`. It runs in one command, and is recorded in another:

hyperjax sweep --config=experiments/studies/hyperfednet.py:data=mnist5k \
    --workdir=runs/table_iv --sweep=table_iv --sweep='seed=0..2'
python -m experiments.studies.record runs/table_iv --out=experiments/results/FILE.json

`scale=small` is of a size for two cores, minutes to an hour, and the default;
`scale=paper` is the published size. Both go with `data=...` and whatever else the
paper's experiment takes.
"""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from hyperjax.errors import check_choice
from hyperjax.protocols import common

Fields = Mapping[str, Any]  # {"method.name": "fedavg"}: what a point changes
Rows = Mapping[str, Fields]  # {label: what its points change}
Values = dict[str, Any]  # {"pacc": 91.5}: what a run gave
Group = tuple[str, str]  # label, and the other settings that tell its points
Place = tuple[str, str, str]  # data set, partition, label

SCALES = ("small", "paper")


class Study(NamedTuple):
    """What is asked by a sweep, and how its record is read.

    Attributes:
      asks: in a sentence.
      columns: {metric: heading} of the table. Metrics are those of a run's summary and
        last evaluation, and what `measure` and `derive` add.
      rows: {label: fields} of the points that have names; a point has the name of the
        most fields that it has, other swept fields stand beside it.
      baseline: the label that others are compared with, seed by seed.
      compared: the metric that they are compared by.
      published: {(data set, partition, label): {metric: value}} of the paper's tables.
        Runs on "mnist5k" are compared with "mnist". Where other settings tell points
        too it is "label, settings", such as "FedAvg, num_clients=50".
      measure: `(folder of a run) -> values`, beyond what the run says itself.
      derive: changes the values of all groups, {group: {seed: values}}, in place.
      picture: `(folders of all runs) -> SVG text`, which is kept beside the record.
    """

    asks: str
    columns: Mapping[str, str]
    rows: Mapping[str, Fields] = {}
    baseline: str | None = None
    compared: str = "pacc"
    published: Mapping[Place, Values] = {}
    measure: Callable[[Path], Values] | None = None
    derive: Callable[[dict[Group, dict[int, Values]]], None] | None = None
    picture: Callable[[Sequence[Path]], str] | None = None


def scale_of(arg: str) -> tuple[str, str]:
    """Takes `scale=...` out of a config's argument; returns it and the rest.

    Raises:
      ValueError: another scale.

    Example:
      >>> scale_of("fedprox,scale=paper,data=mnist")
      ('paper', 'fedprox,data=mnist')
    """
    items = [item.strip() for item in arg.split(",")] if arg else []
    scales = [item for item in items if item.partition("=")[0] == "scale"]
    scale = scales[-1].partition("=")[2] if scales else SCALES[0]
    check_choice("scale", scale, SCALES)
    return scale, ",".join(item for item in items if item not in scales)


def cpu(cores: int) -> str:
    """Returns what a record says of a machine without an accelerator.

    Example:
      >>> cpu(1).replace(platform.machine(), "x86_64")
      'x86_64 CPU, 1 core'
    """
    return f"{platform.machine()} CPU, {cores} core{'s' if cores > 1 else ''}"


def with_default(arg: str, name: str, value: str) -> str:
    """Returns an argument that says NAME=..., by default `value`.

    Example:
      >>> with_default("fedprox", "data", "digits")
      'fedprox,data=digits'
    """
    items = [item for item in arg.split(",") if item]
    if not any(item.strip().startswith(f"{name}=") for item in items):
        items.append(f"{name}={value}")
    return ",".join(items)


def change(config: ml_collections.ConfigDict, fields: Fields) -> None:
    """Makes an experiment a study's: evaluated at its end; a smoke test stays short."""
    if config.rounds == 2:  # smoke
        fields = {k: v for k, v in fields.items() if k != "rounds"}
    common.change(config, {**fields, "tensorboard": False})
    config.evaluation.every = config.rounds


def chosen(name: str, text: str, known: Iterable[Any]) -> list[str]:
    """Returns what an argument of a sweep names, "a,b"; all that is known if nothing.

    Raises:
      ValueError: a part is not known.

    Example:
      >>> chosen("kinds", "blur,none", ("none", "blur", "noise"))
      ['blur', 'none']
    """
    accepted = [str(each) for each in known]
    found = text.split(",") if text else accepted
    for each in found:
        check_choice(name, each, accepted)
    return found


def add_rows(
    add: Callable[..., None],
    rows: Rows,
    labels: Iterable[str] | None = None,
    **more: Any,
) -> None:
    """Adds a point for each of the named rows, or those of `labels`."""
    for label in labels or rows:
        add({**rows[label], **more})


def named(fields: Fields, rows: Rows) -> str | None:
    """Returns the label of a point: that of the most fields which it has."""
    fitting = [k for k, own in rows.items() if own.items() <= fields.items()]
    return max(fitting, key=lambda label: len(rows[label]), default=None)
