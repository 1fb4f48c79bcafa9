"""What --help prints: everything there is to choose from, a line each."""

import inspect
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

from absl import flags

from hyperjax import models, protocols, registry
from hyperjax.data import partition, sources
from hyperjax.protocols import arguments, common, methods

WIDTH, INDENT = 80, 2
_OURS = ("hyperjax", "experiments", "benchmarks")


def text(doc: str, config: Any = None) -> str:
    """Returns the help of a launcher.

    Args:
      doc: what it does, in the words of its module.
      config: of a run that was named; its method's options are listed too.
    """
    parts = [doc.strip(), table("Flags", _flags())]
    if "config" in flags.FLAGS:
        parts.append(overview())
        if config is not None:
            parts += [options(config, group) for group in ("method", "model")]
    return "\n\n".join(parts)


def overview() -> str:
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
    return "\n\n".join(
        [
            table(
                "Experiments: --config=EXPERIMENT:METHOD,argument=value,...",
                ((name, _experiment(module)) for name, module in experiments.items()),
            ),
            table("Arguments", given),
            table(
                "Methods: METHOD, or --config.method.name=METHOD; your own is "
                "package.module:function",
                ((name, _method(name)) for name in registry.methods()),
            ),
            table(
                "Variants, named as methods are",
                ((name, alias.words) for name, alias in methods.ALIASES.items()),
            ),
            table(
                "Networks: --config.model.name=NETWORK; your own is "
                "package.module:Class",
                ((name, first_line(cls)) for name, cls in models.ZOO.items()),
            ),
            table(
                "Data sets",
                [
                    (", ".join(sources.EMBEDDED), "come with the package"),
                    ("any other name", "of an image set of TensorFlow Datasets"),
                ],
            ),
            table(
                "Partitions: --config.data.partition=NAME",
                (
                    (name, first_line(function))
                    for name, function in partition.PARTITIONERS.items()
                ),
            ),
            table("Fields: --config.FIELD=VALUE, and their defaults", fields),
            "Options of a method or a network are fields, too: with --config=... "
            "--help\nlists them.",
        ]
    )


def options(config: Any, group: str) -> str:
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
    return table(f"Options of {name}", rows)


def table(heading: str, rows: Iterable[tuple[str, str]]) -> str:
    """Returns a heading and two columns, words folded at 80 characters."""
    rows = list(rows)
    widest = max((len(name) for name, _ in rows), default=0)
    column = min(INDENT + widest + 2, 36)
    lines = [textwrap.fill(heading, WIDTH)]
    for name, words in rows:
        start = " " * INDENT + name
        start = start.ljust(column) if len(start) < column else start + "  "
        lines += textwrap.wrap(
            start + words,
            WIDTH,
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
