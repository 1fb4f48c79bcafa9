"""Imports point one way, and `import hyperjax` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up; a module may import from layers below, and from its own.
LAYERS = (
    ("hyperjax.types", "hyperjax.errors"),
    ("hyperjax.calls", "hyperjax.registry"),
    (
        "hyperjax.compiling",
        "hyperjax.hosts",
        "hyperjax.native",
        "hyperjax.rng",
        "hyperjax.tree",
    ),
    (
        "hyperjax.data",
        "hyperjax.models",
        "hyperjax.hypernets",
        "hyperjax.training",
        "hyperjax.corrections",
        "hyperjax.aggregators",
        "hyperjax.server_optimizers",
    ),
    (
        "hyperjax.wrappers",
        "hyperjax.mixing",
        "hyperjax.over_families",
        "hyperjax.channels",
        "hyperjax.attacks",
        "hyperjax.priors",
    ),
    ("hyperjax.algorithms",),
    ("hyperjax.adaptation", "hyperjax.augmentation"),
    ("hyperjax.engine",),
    ("hyperjax.runs", "hyperjax.flower"),
    ("hyperjax.protocols",),
    ("hyperjax.launch", "hyperjax.sweeps", "hyperjax.__main__", "hyperjax.api"),
)
# Nothing in the engine knows that there are methods.
NEVER = {"hyperjax.engine": "hyperjax.algorithms"}
# What reads configs and draws pages.
COMMANDS = (
    "hyperjax.protocols",
    "hyperjax.launch",
    "hyperjax.sweeps",
    "hyperjax.__main__",
)
HEAVY = (
    "altair",
    "array_record",
    "jinja2",
    "matplotlib",
    "ml_collections",
    "mlxtend",
    "orbax",
    "pandas",
    "scipy",
    "sklearn",
    "statsmodels",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
)


def name_of(path: Path) -> str:
    """The dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(path): path
    for folder in ("hyperjax", "experiments", "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports_of(name: str) -> set[str]:
    """Every module of ours that a module names in an import, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in FILES else str(node.module))
    return {module for module in found if module in FILES}


def layer(name: str) -> int:
    for number, members in enumerate(LAYERS):
        if any(name == m or name.startswith(m + ".") for m in members):
            return number
    raise AssertionError(f"{name} belongs to no layer; add it to LAYERS")


LIBRARY = [name for name in FILES if name.startswith("hyperjax.")]


@pytest.mark.parametrize("name", LIBRARY)
def test_imports_point_down(name):
    for imported in imports_of(name) - {"hyperjax"}:
        assert imported.startswith("hyperjax."), f"{name} imports {imported}"
        assert layer(imported) <= layer(name), f"{name} imports {imported}"
        for above, below in NEVER.items():
            assert not (name.startswith(above) and imported.startswith(below))


def test_nothing_imports_itself_in_a_circle():
    # Packages stand for what their __init__ imports.
    graph = {name: imports_of(name) for name in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


def test_configs_import_protocols_alone():
    for name in FILES:
        if name.startswith("configs"):
            theirs = ("configs", "hyperjax.protocols")
            assert all(i.startswith(theirs) for i in imports_of(name)), name


def test_the_library_imports_no_data_set_reader_checkpointer_or_plotter():
    program = f"""
import importlib, pkgutil, sys
heavy = {HEAVY!r}
def loaded():
    return sorted(set(heavy) & set(sys.modules))
import hyperjax
print("hyperjax:", *loaded())
import jax
print("jax:", *loaded())
for module in pkgutil.walk_packages(hyperjax.__path__, "hyperjax."):
    if module.name.startswith({COMMANDS!r}):
        continue
    importlib.import_module(module.name)
    print(module.name + ":", *loaded())
from jax._src import xla_bridge
print("backends:", *xla_bridge._backends)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    light = [n for n in LIBRARY if not n.startswith(COMMANDS)]
    assert len(lines) == 3 + len(light)
    assert [line for line in lines if not line.endswith(":")] == []


def test_a_command_speaks_before_jax_is_imported():
    program = """
import sys
from hyperjax.launch import main
sys.argv = ["hyperjax", "trian"]
try:
    main.main()
except SystemExit as ended:
    print(ended.code, "jax" in sys.modules)
import hyperjax
print(hyperjax.channels.__name__, hyperjax.federate.__name__, hyperjax.ditto.__name__)
from hyperjax import *
print(federate is hyperjax.federate, "jax" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.splitlines() == [
        "2 False",
        "hyperjax.channels federate ditto",
        "True True",
    ]
    assert "did you mean 'train'?" in result.stderr
