"""What --help prints: everything there is to choose from, a line each."""

import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

from absl import flags

from hyperjax import models, protocols, registry
from hyperjax.data import partition, shift, sources
from hyperjax.protocols import arguments, common, methods

WIDTH, INDENT = 80, 2
WIDEST = 100  # columns that a line is read across with ease
_OURS = ("hyperjax", "experiments", "benchmarks")


def text(doc: str, config: Any = None, width: int | None = None) -> str:
    """Returns the help of a launcher.

    Args:
      doc: what it does, in the words of its module.
      config: of a run that was named: its values, and nothing that is to choose from.
      width: of lines; as wide as the terminal by default, within reason.
    """
    width = width or min(shutil.get_terminal_size().columns, WIDEST)
    parts = [doc.strip(), table("Flags", _flags(), width)]
    if "config" in flags.FLAGS:
        parts.append(overview(width) if config is None else named(config, width))
    return "\n\n".join(parts)


def named(config: Any, width: int = WIDTH) -> str:
    """Returns what a run that was named is: its experiment, fields and options."""
    parts, values = [], common.flat(config)
    if config.get("experiment") in protocols.NAMES:
        parts.append((protocols.find(config.experiment).__doc__ or "").strip())
    fields = []
    for name, (default, words) in common.FIELDS.items():
        usual, value = _shown(default), _shown(values.get(name))
        words += "" if value == usual else f" [default: {usual}]"
        fields.append((f"{name}={value}", words))
    parts.append(table("Fields of this run: --config.FIELD=VALUE", fields, width))
    parts += [options(config, group, width) for group in ("method", "model")]
    return "\n\n".join([*parts, "--help without --config lists all there is."])


def overview(width: int = WIDTH) -> str:
    """Returns tables of experiments, methods, networks, data sets and fields."""
    experiments = {name: protocols.find(name) for name in protocols.NAMES}
    own = {k: v for module in experiments.values() for k, v in module.EXTRA.items()}
    takes = {
        name: ", ".join(k for k, e in experiments.items() if name in e.EXTRA)
        for name in own
    }
    given = [
        (name, arguments.WORDS[name] + (f" ({takes[name]})" if name in own else ""))
        for name in (*arguments.SHARED, *own)
        if name != "method"
    ]
    fields = [
        (f"{name}={_shown(default)}", words)
        for name, (default, words) in common.FIELDS.items()
    ]
    tables: list[tuple[str, Iterable[tuple[str, str]]]] = [
        (
            "Experiments: --config=EXPERIMENT:METHOD,argument=value,...",
            ((name, _experiment(module)) for name, module in experiments.items()),
        ),
        ("Arguments", given),
        (
            "Methods: METHOD, or --config.method.name=METHOD; your own is "
            "package.module:function",
            ((name, _method(name)) for name in registry.methods()),
        ),
        (
            "Variants, named as methods are",
            ((name, alias.words) for name, alias in methods.ALIASES.items()),
        ),
        (
            "Networks: --config.model.name=NETWORK; your own is package.module:Class",
            ((name, first_line(cls)) for name, cls in models.ZOO.items()),
        ),
        (
            "Data sets",
            [
                *sources.EMBEDDED.items(),
                (
                    "mine.npz",
                    "arrays; table.csv, folder/, LEAF's file.json, "
                    "package.module:function",
                ),
                ("{a,b}.npz", "several sets, each a domain"),
                ("any other name", "of an image set of TensorFlow Datasets"),
            ],
        ),
        (
            "Partitions: --config.data.partition=NAME",
            (
                (name, first_line(function))
                for name, function in partition.PARTITIONERS.items()
            ),
        ),
        (
            "Shifts: --config.data.shift=KIND",
            shift.WORDS.items(),
        ),
        ("Fields: --config.FIELD=VALUE, and their defaults", fields),
    ]
    end = (
        "Options of a method or a network are fields, too: --config=EXPERIMENT:METHOD "
        "--help lists them, and the values of that run."
    )
    found = [table(heading, rows, width) for heading, rows in tables]
    return "\n\n".join([*found, textwrap.fill(end, width)])


def options(config: Any, group: str, width: int = WIDTH) -> str:
    """Returns a table of the options of a config's method or network."""
    name, chosen = config[group].name, config[group]
    known = registry.options(registry.find(name)) if group == "method" else {}
    rows = [
        (
            f"{group}.{option}={_shown(chosen[option])}",
            known[option].doc if known else "",
        )
        for option in (known or sorted(set(chosen) - {"name"}))
        if option in chosen
    ]
    return table(f"Options of {name}", rows, width)


def table(heading: str, rows: Iterable[tuple[str, str]], width: int = WIDTH) -> str:
    """Returns a heading and two columns, words folded at a width."""
    rows = list(rows)
    widest = max((len(name) for name, _ in rows), default=0)
    column = min(INDENT + widest + 2, 36)
    lines = [textwrap.fill(heading, width)]
    for name, words in rows:
        start = " " * INDENT + name
        start = start.ljust(column) if len(start) < column else start + "  "
        lines += textwrap.wrap(
            start + words,
            width,
            subsequent_indent=" " * column,
            drop_whitespace=True,
            break_on_hyphens=False,
        ) or [start]
    return "\n".join(line.rstrip() for line in lines)


def first_line(thing: Any) -> str:
    """Returns the first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _method(name: str) -> str:
    return first_line(inspect.getmodule(registry.find(name)))


def _experiment(module: Any) -> str:
    presets = ", ".join(module.PRESETS)
    return f"{first_line(module)} Data: {presets}. Method: {module.DEFAULT}."


def _shown(value: Any) -> str:
    if value is None or isinstance(value, type):
        return "None"
    return repr(value).replace(" ", "")


def _flags() -> list[tuple[str, str]]:
    """This launcher's own flags."""
    found = []
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith(_OURS) or module == sys.argv[0]:
            # Of a flag that may be repeated absl says so at the end.
            found += [
                (f"--{flag.name}", flag.help.partition(";\n")[0]) for flag in defined
            ]
    return sorted(found)
