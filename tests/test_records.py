"""RESULTS.md and README.md say what the records say."""

import json
import re

import pytest

from experiments.studies import results

NAMES = ("method", "size")  # a row's name in its record


def tables(text: str) -> list[tuple[str, list[list[str]]]]:
    """Returns (record, rows) of every table; the record is the last one named."""
    found = []
    record, rows = "", []
    for line in [*text.splitlines(), ""]:
        named = re.findall(r"`(\w+\.json)`", line)
        record = named[-1] if named else record
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append((record, rows[2:]))  # without heading and rule
            rows = []
    return found


@pytest.fixture(scope="module")
def shown(repository):
    text = (repository / "RESULTS.md").read_text()
    elsewhere = "<!-- (record|across|of two records).*?<!-- end -->"
    return tables(re.sub(elsewhere, "", text, flags=re.DOTALL))


@pytest.mark.parametrize("name", results.FILES)
def test_tables_of_studies_are_current(name, repository):
    text = (repository / name).read_text(encoding="utf-8")
    assert results.rewritten(text) == text, "python -m experiments.studies.results"


def test_records_of_studies_say_where_they_are_from(repository):
    shown = "".join((repository / name).read_text() for name in results.FILES)
    for path in (repository / "experiments" / "results").glob("*.json"):
        record = json.loads(path.read_text())
        assert record["study"] in path.stem and record["scale"] in ("small", "paper")
        marks = (f"<!-- {form}: {path.name} " for form in ("record", "across"))
        assert any(mark in shown for mark in marks), f"nobody shows {path.name}"
        assert record["seeds"] and re.fullmatch("[0-9a-f]{40}.*", record["commit"])
        assert record["hardware"] and record["date"] and record["settings"]
        text = path.read_text()
        assert "/tmp" not in text and "/home" not in text and "/work" not in text


def test_every_mean_and_deviation_is_in_the_record(shown, repository):
    assert len(shown) >= 5
    compared = 0
    for record, rows in shown:
        path = repository / "benchmarks" / "results" / record
        known: dict[str, set[str]] = {}
        for row in json.loads(path.read_text())["rows"]:
            name = next(str(row[key]) for key in NAMES if key in row)
            pairs = [v for v in row.values() if isinstance(v, list) and len(v) == 2]
            numbers = [v for v in pairs if all(isinstance(x, float) for x in v)]
            texts = {f"{mean:.2f} ± {std:.2f}" for mean, std in numbers}
            known.setdefault(name, set()).update(texts)
        for name, *cells in rows:
            assert name in known, f"{record} has no row {name!r}"
            wrong = {cell for cell in cells if "±" in cell} - known[name]
            assert not wrong, f"{record}, {name}: {wrong}"
            compared += sum("±" in cell for cell in cells)
    assert compared > 100


def test_every_record_is_shown_somewhere(repository):
    text = "".join(
        (repository / name).read_text()
        for name in ("RESULTS.md", "README.md", "benchmarks/README.md")
    )
    for path in (repository / "benchmarks" / "results").iterdir():
        assert path.name in text, f"nobody says what {path.name} is"
