"""Makes the tables of RESULTS.md and README.md anew from the records they name.

python -m experiments.studies.results

A table stands between `<!-- record: NAME.json COLUMN,... -->` and `<!-- end -->`, where
NAME is a file of experiments/results and the columns are some of the record's, all by
default. `<!-- across: NAME.json COLUMN -->` has a row for every method and a column for
every setting, with means of one column. Nothing else in the files is touched.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperjax.engine.checkpoint import write_atomically
from hyperjax.errors import check_choice
from hyperjax.launch import cli

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "experiments" / "results"
FILES = ("RESULTS.md", "README.md")
_TABLE = re.compile(
    r"(<!-- (record|across): (\S+\.json)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL
)
# Of settings as headings: what says itself without its field's name.
_FIELDS = re.compile(r"\b(shift|partition)=")


def rewritten(text: str, records: Path = RECORDS) -> str:
    """Returns a text with all its tables as the records have them."""

    def table(match: re.Match) -> str:
        opening, form, name, columns, closing = match.groups()
        record = json.loads((records / name).read_text(encoding="utf-8"))
        chosen = columns.split(",") if columns else list(record["columns"])
        made = markdown(record, chosen) if form == "record" else across(record, *chosen)
        return f"{opening}{made}{closing}"

    return _TABLE.sub(table, text)


def markdown(record: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Returns the table of a record, and a line on where it is from.

    Raises:
      ValueError: a column that the record does not have.
    """
    for column in columns:
        check_choice("column", column, record["columns"])
    table = [dict(_cells(record, row, columns)) for row in record["rows"]]
    # Columns in which nothing stands in any row are left out.
    heads = [h for h in table[0] if any(row[h] not in ("", "–") for row in table)]
    lines = [
        _line(heads),
        "|---" * len(heads) + "|",
        *(_line([row[head] for head in heads]) for row in table),
    ]
    return "\n".join([*lines, "", source(record)]) + "\n"


def across(record: Mapping[str, Any], column: str) -> str:
    """Returns means of one column by method and setting; the best of each are bold.

    A star: a difference from the baseline that is not by chance, of the column that the
    record compares.

    Raises:
      ValueError: a column that the record does not have.
    """
    check_choice("column", column, record["columns"])
    rows = {(row["label"], row["settings"]): row for row in record["rows"]}
    labels, settings = (list(dict.fromkeys(names)) for names in zip(*rows, strict=True))

    def cell(label: str, setting: str) -> str:
        row = rows.get((label, setting), {})
        if row.get(column) is None:
            return "–"
        text = f"{row[column]['mean']:.1f}"
        others = (rows.get((other, setting), {}).get(column) for other in labels)
        best = max(other["mean"] for other in others if other)
        text = f"**{text}**" if row[column]["mean"] == best else text
        pair = row.get("difference") or {}
        sure = column == record["compared"] and pair.get("holm") is not None
        return f"{text}\\*" if sure and pair["holm"] <= 0.05 else text

    heads = [record["columns"][column], *(_FIELDS.sub("", s) for s in settings)]
    lines = [
        _line(heads),
        "|---" * len(heads) + "|",
        *(_line([x, *(cell(x, s) for s in settings)]) for x in labels),
    ]
    return "\n".join([*lines, "", source(record)]) + "\n"


def _cells(
    record: Mapping[str, Any], row: Mapping[str, Any], columns: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yields (heading, cell) of a row from left to right."""
    named = record["columns"]
    diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
    yield "method", row["label"] and row["label"] + diverged
    yield "setting", row["settings"] + ("" if row["label"] else diverged)
    if record["tuning"]:
        yield "rate", f"{row['learning_rate']:g}"
    for column in columns:
        ours, paper = row.get(column), row["published"].get(column)
        yield named[column], spread(ours)
        yield f"paper: {named[column]}", number(paper)
        if ours is None or paper is None:
            yield f"{named[column]} - paper", "–"
        else:
            yield f"{named[column]} - paper", f"{ours['mean'] - paper:+.2f}"
    compared = named.get(record["compared"])
    yield f"{compared} - {record['baseline']}'s", difference(row.get("difference"))


def source(record: Mapping[str, Any]) -> str:
    """Returns a line that says how a table came about."""
    commits = record["commit"].split(", ")
    seeds = ", ".join(map(str, record["seeds"]))
    one = "seed" if len(record["seeds"]) == 1 else "seeds"
    return (
        f"`{record['command']}`; {one} {seeds}; {record['hardware']}; "
        f"{record['date']}; commit {', '.join(c[:9] for c in commits)}."
    )


def spread(value: Mapping[str, Any] | None) -> str:
    """Returns "mean ± deviation"; a dash where a seed has no value."""
    if value is None:
        return "–"
    mean, std = value["mean"], value["std"]
    digits = _format(mean)
    if not std or f"{std:{digits}}" == "0":  # one seed, or a count
        return f"{mean:{digits}}" if mean else "0"
    return f"{mean:{digits}} ± {std:{digits}}"


def difference(pair: Mapping[str, Any] | None) -> str:
    """Returns a paired difference and its 95 % interval; a star: not by chance."""
    if pair is None or pair["difference"] is None:
        return "–"
    if pair["low"] is None:
        return f"{pair['difference']:+.2f}"
    star = "*" if pair["holm"] is not None and pair["holm"] <= 0.05 else ""
    low, high = (f"{pair[end]:+.2f}" for end in ("low", "high"))
    return f"{pair['difference']:+.2f} [{low}, {high}]{star}"


def number(value: float | None) -> str:
    """Returns a number as short as it may be; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _format(value: float) -> str:
    """Two decimals, three below one, none of thousands."""
    size = abs(value)
    if size >= 1000:
        return ",.0f"
    return ".2f" if size >= 1 else ".3f" if size >= 0.001 else ".1e"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Rewrites the files; returns the exit code."""
    for name in FILES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            write_atomically(path, after)
        print(f"{name}: {'written anew' if after != before else 'is current'}")
    return 0


if __name__ == "__main__":
    cli.run(main, needs=())
