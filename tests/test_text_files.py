"""Text files are UTF-8 whatever the locale: whoever opens one says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("hyperjax", "experiments", "configs", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def left_to_the_locale(source: str) -> list[int]:
    """Lines that open a text file, or read a program's words, in no encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        given = {k.arg: k.value for k in node.keywords}
        text = name in ("read_text", "write_text")
        of = getattr(getattr(node.func, "value", None), "id", None)
        opens = name in ("open", "fdopen", "NamedTemporaryFile")
        of_bytes = ("os", "Image", "archive")  # the last is a ZipFile
        if opens and not (name == "open" and of in of_bytes):
            modes = [a for a in node.args if isinstance(a, ast.Constant)]
            mode = given.get("mode") or (modes[-1] if modes else None)
            text = "b" not in str(getattr(mode, "value", "r"))
        if name in ("run", "Popen", "check_output"):
            text = "text" in given or "universal_newlines" in given
        if text and "encoding" not in given:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_text_is_left_to_the_locale(path):
    assert left_to_the_locale(path.read_text(encoding="utf-8")) == []


def test_what_is_left_to_the_locale_is_found():
    source = """
open("a")
open("a", "rb")
open("a", "w", encoding="utf-8")
path.open("w")
path.read_text()
subprocess.run(["git"], text=True)
subprocess.run(["git"], text=True, encoding="utf-8")
"""
    assert left_to_the_locale(source) == [2, 5, 6, 7]
