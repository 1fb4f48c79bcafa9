"""What pages have from the package itself, read at each build.

In a page, a fence `{from-code} methods` stands for a table of all methods; likewise any
other function below that returns Markdown. `{from-code} module hyperjax.channels` is a
module's docstring, which is Markdown, too.
"""

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import hyperjax
from hyperjax import adaptation, models, protocols, registry
from hyperjax.data import partition, shift, sources
from hyperjax.launch import main, report_sections
from hyperjax.launch.overview import first_line
from hyperjax.protocols import arguments, common
from hyperjax.protocols import methods as variants_of

ROOT = Path(__file__).parents[1]
PAGES = {
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "RESULTS.md": "results",
    "benchmarks/README.md": "speed",
}
NETWORKS = {"one": "one", "several": "several", "either": "one or several"}


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Returns a Markdown table."""
    lines = [list(heads), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    cells = [[str(cell).replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def code(*values: Any) -> str:
    """Returns values as code, separated by commas."""
    return ", ".join(f"`{value}`" for value in values)


def words(thing: Any) -> str:
    """Returns a docstring."""
    return inspect.getdoc(thing) or ""


def default(value: Any) -> str:
    """Returns a default as one writes it."""
    if value is inspect.Parameter.empty:
        return "must be given"
    return code("None" if isinstance(value, type) else repr(value))


# What there is to choose from --------------------------------------------------------


def experiments() -> str:
    rows = (
        (code(name), first_line(module), code(*module.PRESETS), code(module.DEFAULT))
        for name, module in zip(protocols.NAMES, _experiments(), strict=True)
    )
    return table(("experiment", "what is asked", "data sets", "method"), rows)


def experiment_arguments() -> str:
    extra = {name: None for module in _experiments() for name in module.EXTRA}
    names = [n for n in (*arguments.SHARED, *extra) if n != "method"]
    return table(
        ("argument", "what it is"), ((code(n), arguments.WORDS[n]) for n in names)
    )


def methods() -> str:
    rows = (
        (
            f"[`{name}`](#method-{name.replace('_', '-')})",
            _title(name)[1],
            ", ".join(_papers(name)),
            NETWORKS[registry.families(name)],
        )
        for name in registry.methods()
    )
    return table(("method", "what it does", "paper", "networks of clients"), rows)


def methods_in_full() -> str:
    return "\n\n".join(text for name in registry.methods() for text in _in_full(name))


def variants() -> str:
    found = variants_of.ALIASES.items()
    rows = ((code(name), code(alias.method), alias.words) for name, alias in found)
    return table(("name", "method", "what it is"), rows)


def networks() -> str:
    rows = ((code(name), first_line(cls)) for name, cls in models.ZOO.items())
    return table(("network", "what it is"), rows)


def data() -> str:
    rows = (
        (code(name), f"{len(found.y):,}", code(found.x.shape[1:]), found.num_classes)
        for name, found in ((name, sources.load(name)) for name in sources.EMBEDDED)
    )
    return table(("data set", "samples", "shape of one", "classes"), rows)


def partitions() -> str:
    rows = (
        (code(name), first_line(function), code(*_options(function)))
        for name, function in partition.PARTITIONERS.items()
    )
    return table(("partition", "who has what", "options"), rows)


def shifts() -> str:
    rows = (
        (
            code(kind),
            shift.WORDS[kind],
            ", ".join(f"{name} {_range(law)}" for name, law in laws.items()),
        )
        for kind, laws in shift.KINDS.items()
    )
    return table(("shift", "what differs", "drawn for each client"), rows)


def adaptations() -> str:
    rows = (
        (code(name), first_line(function), code(*_options(function)))
        for name, function in adaptation.ADAPTATIONS.items()
    )
    return table(("adaptation", "what it does", "options"), rows)


def fields() -> str:
    rows = (
        (code(name), default(value), text)
        for name, (value, text) in common.FIELDS.items()
    )
    return table(("field", "default", "what it is"), rows)


def commands() -> str:
    found = main.COMMANDS.items()
    return table(
        ("command", "what it does"), ((code(f"hyperjax {c}"), t) for c, t in found)
    )


# What is measured --------------------------------------------------------------------


def accuracies() -> str:
    found = report_sections.MEANINGS.items()
    return table(("metric", "of whom"), ((code(name), whom) for name, whom in found))


def suffixes() -> str:
    found = report_sections.COLUMNS.items()
    rows = ((code(suffix or "none"), what.removesuffix(" %")) for suffix, what in found)
    return table(("suffix", "what it is"), rows)


def quantities() -> str:
    found = report_sections.QUANTITIES.items()
    rows = ((code(name), unit, what) for name, (unit, what) in found)
    return table(("quantity", "unit or range", "what it is"), rows)


# -------------------------------------------------------------------------------------


def api(name: str) -> str:
    """Returns what a module has to offer, but for what `hyperjax` itself has."""
    found = (getattr(hyperjax, public) for public in hyperjax.__all__)
    elsewhere = [thing.__name__ for thing in found if thing.__module__ == name]
    return f"""## {name}

{words(importlib.import_module(name))}

```{{eval-rst}}
.. automodule:: {name}
   :members:
   :exclude-members: {", ".join(elsewhere)}
```
"""


def file(name: str) -> str:
    """Returns a file of the repository but for its title, its links those of a page."""
    _, _, text = (ROOT / name).read_text(encoding="utf-8").partition("\n")

    def link(found: re.Match) -> str:
        mark, label, path, anchor = found.groups()
        if mark:
            return f"![{label}](/../{path})"
        if path in PAGES:
            return f"[{label}](/{PAGES[path]}.md{anchor or ''})"
        return f"`{path}`" if label == path else f"{label} (`{path}`)"

    return re.sub(r"(!?)\[([^]]*)\]\((?!http|#)([^)#]*)(#[^)]*)?\)", link, text)


def _experiments() -> list[Any]:
    return [protocols.find(name) for name in protocols.NAMES]


def _title(method: str) -> tuple[str, str]:
    name, _, rest = first_line(inspect.getmodule(registry.find(method))).partition(": ")
    return name, rest


def _papers(method: str) -> list[str]:
    text = words(inspect.getmodule(registry.find(method)))
    found = dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text))
    return [f"[{number}](https://arxiv.org/abs/{number})" for number in found]


def _in_full(name: str) -> Iterator[str]:
    method = registry.find(name)
    options = registry.options(method)
    own = {k: o for k, o in options.items() if o.of == name}
    handed = {}
    for option, found in options.items():
        if found.of != name:
            handed.setdefault(found.of, []).append(option)
    yield f"(method-{name.replace('_', '-')})=\n## {name}"
    yield words(inspect.getmodule(method))
    if own:
        rows = ((code(k), default(o.default), o.doc) for k, o in own.items())
        yield table(("option", "default", "what it is"), rows)
    for owner, names in handed.items():
        yield f"Options of `{owner}`: {code(*names)}."


def _options(function: Any) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind is p.KEYWORD_ONLY]


def _range(law: Any) -> str:
    text = f"{law.low:g} to {law.high:g}"
    return f"±({text})" if law.mirrored else text


def with_code(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts into a page what its fences stand for."""

    def text(found: re.Match) -> str:
        app.env.note_reread()  # the next time, too: the code may have changed
        name, *given = found[1].split()
        return globals()[name.replace("-", "_")](*given)

    fence = r"^```\{from-code\} (.*)\n```$"
    source[0] = re.sub(fence, text, source[0], flags=re.MULTILINE)


def as_sphinx_has_it(app, what, name, obj, options, lines) -> None:
    """Leaves docstrings of modules to `api`; adds comments on named tuples' fields.

    Elsewhere * and | are themselves.
    """
    if what == "module":
        lines.clear()
    told = any(line.startswith(":ivar") for line in lines)
    if hasattr(obj, "_fields") and not told:
        found = re.findall(r"^    (\w+): .+?  # (.+)$", inspect.getsource(obj), re.M)
        lines += [f":ivar {field}: {comment}" for field, comment in found]
    for number, line in enumerate(lines):
        stars = re.findall(r"(?<!\\)\*", line)
        line = line.replace("*", r"\*") if len(stars) == 1 else line
        lines[number] = re.sub(r"(?<!\w)\|(?=\w)", r"\|", line)


def is_bare_field(app, what, name, obj, skip, options) -> bool | None:
    """Leaves out fields of named tuples, which signatures have already."""
    return True if words(obj).startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", with_code)
    app.connect("autodoc-process-docstring", as_sphinx_has_it)
    app.connect("autodoc-skip-member", is_bare_field)
    return {"parallel_read_safe": True}
