"""Tables of groups of runs: Markdown, LaTeX (booktabs) and CSV of one content."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from hyperjax.engine import log
from hyperjax.sweeps import statistics

NAMES = {"gacc": "gACC", "pacc": "pACC", "zacc": "zACC"}
_TUNED = re.compile(r"([pz]acc)_ft(\d+)")
# Beside the accuracies, in the CSV file: means and deviations alone.
_FURTHER = re.compile(
    r"([gpz]acc)_(mean|std|p10|em|oracle|swapped|distance|sample|ft\d+_mean)"
    r"|collapse_\w+|loss"
)
NOTHING = "–"
_VERDICTS = {"better": "↑", "worse": "↓", "level": "=", None: ""}
_LONG = 40  # letters of a name


class Content(NamedTuple):
    """What all forms of a table show.

    Attributes:
      by: columns that make a group: "method" and settings.
      metrics: accuracies that are compared, in percent.
      records: of `statistics.compare`, one a row.
      costs: by group, the columns of cost: heading to what is shown.
      further: by group, spread of further metrics.
      served: by group, share of clients served better than by the baseline.
      baseline: how it was named, None without one.
      paper: by label of a group, a published value for some metrics.
    """

    by: list[str]
    metrics: list[str]
    records: list[dict[str, Any]]
    costs: list[dict[str, Any]]
    further: list[dict[str, statistics.Spread]]
    served: list[dict[bool, tuple]]
    baseline: str | None
    paper: Mapping[str, Mapping[str, float]]


def content(
    wide: pd.DataFrame,
    clients: pd.DataFrame,
    by: Sequence[str],
    baseline: str | None = None,
    paper: Mapping[str, Mapping[str, float]] | None = None,
) -> Content:
    """Returns what tables of some points show.

    Args:
      wide: a row per point, as from `long.last`.
      clients: as from `long.clients`.
      by: "method" and settings: points that agree in them are one group.
      baseline: METHOD or FIELD=VALUE, see `statistics.parse_baseline`.
      paper: published values, {label of a group: {metric: value}}; see `label`.

    Raises:
      ValueError: the baseline, or a label of `paper`, is none of the groups.
    """
    groups = statistics.groups_of(wide, by)
    labels = [label(group) for group in groups]
    unknown = [name for name in paper or {} if name not in labels]
    if unknown:
        raise ValueError(
            f"paper={unknown[0]!r} is none of the groups: {'; '.join(labels)}"
        )
    base = None if baseline is None else statistics.parse_baseline(baseline, groups)
    metrics = accuracies(wide)
    records = statistics.compare(wide, by, metrics, base)
    done = wide[wide["finished"].astype(bool)]
    names = [c for c in wide if _FURTHER.fullmatch(str(c)) and c not in metrics]
    further, served = [], []
    accurate = clients[clients["metric"] == "accuracy"]
    for record in records:
        own = statistics.members(done, record["group"])
        found = {name: statistics.by_seed(own, name) for name in names}
        further.append(
            {k: statistics.spread(list(v.values())) for k, v in found.items() if v}
        )
        other, group = record["baseline"], record["group"]
        served.append(
            statistics.helped(accurate, group, other)
            if other not in (None, group) and len(accurate)
            else {}
        )
    costs = _costs(done, groups)
    given = paper or {}
    return Content(list(by), metrics, records, costs, further, served, baseline, given)


def accuracies(wide: pd.DataFrame) -> list[str]:
    """Returns the accuracies that there are: as deployed, then fine-tuned."""
    plain = [name for name in NAMES if name in wide]
    tuned = [name for name in wide if _TUNED.fullmatch(str(name))]
    return plain + sorted(tuned, key=lambda name: int(name.rsplit("ft", 1)[1]))


def metric_name(metric: str) -> str:
    """Returns a metric as tables and axes call it.

    Example:
      >>> metric_name("pacc_ft5"), metric_name("zacc")
      ('pACC, 5 epochs tuned', 'zACC')
    """
    tuned = _TUNED.fullmatch(metric)
    if tuned:
        epochs = "epoch" if tuned[2] == "1" else "epochs"
        return f"{NAMES[tuned[1]]}, {tuned[2]} {epochs} tuned"
    return NAMES.get(metric, metric.replace("_", " "))


def short(field: str, fields: Sequence[str]) -> str:
    """Returns the last part of a setting's name, if that is no other's."""
    last = field.rpartition(".")[2]
    return last if sum(f.rpartition(".")[2] == last for f in fields) == 1 else field


def label(group: Mapping[str, Any]) -> str:
    """Returns a group's name.

    Example:
      >>> label({"method": "fedprox", "data.alpha": 0.1, "method.mu": None})
      'fedprox, alpha=0.1'
    """
    parts = [str(group.get("method", ""))]
    parts += [
        f"{short(field, list(group))}={setting(value)}"
        for field, value in group.items()
        if field != "method" and value is not None
    ]
    return ", ".join(part for part in parts if part)


def telling(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns names of groups for where there is little room, each another one.

    Where the groups' own are long they lose what says little: settings that all share,
    and values that more than half of the groups have. And the method, if there is one.

    Example:
      >>> telling([{"method": "fedavg", "rate": x} for x in (0.1, 0.3)])
      ['rate=0.1', 'rate=0.3']
    """
    names = [label(group) for group in groups]
    if max(map(len, names), default=0) > _LONG:
        common = {}
        for field in groups[0]:
            values = [setting(group[field]) for group in groups]
            most = max(set(values), key=values.count)
            if values.count(most) > len(values) / 2:
                common[field] = most
        common.pop("method", None)
        fewer = [
            label({k: v for k, v in group.items() if setting(v) != common.get(k)})
            for group in groups
        ]
        names = [
            short if fewer.count(short) == 1 else whole
            for short, whole in zip(fewer, names, strict=True)
        ]
    parts = [name.partition(", ") for name in names]
    if len(parts) < 2 or len({method for method, *_ in parts}) > 1:
        return names
    return [rest or method for method, _, rest in parts]


def frame(found: Content) -> pd.DataFrame:
    """Returns the numbers of a table, a row per group."""
    rows = []
    zipped = zip(found.records, found.costs, found.further, found.served, strict=True)
    for record, cost, further, served in zipped:
        row = {**record["group"], "points": record["points"]}
        row["finished"] = record["finished"]
        for metric, spread in {**record["spread"], **further}.items():
            row |= {f"{metric}:{k}": v for k, v in spread._asdict().items()}
            pair = record["paired"].get(metric)
            if pair is not None:
                row |= {f"{metric}:{k}": v for k, v in pair._asdict().items()}
                row[f"{metric}:p_holm"] = record["holm"][metric]
                row[f"{metric}:verdict"] = record["verdict"][metric]
            paper = found.paper.get(label(record["group"]), {}).get(metric)
            if paper is not None:
                row[f"{metric}:paper"] = paper
                row[f"{metric}:minus_paper"] = spread.mean - paper
        for participating, (share, interval, seeds) in served.items():
            who = "participants" if participating else "unseen"
            low, high = interval or (None, None)
            row |= {f"{who}_served_better:%": share, f"{who}_served_better:low": low}
            row |= {f"{who}_served_better:high": high}
            row |= {f"{who}_served_better:seeds": seeds}
        if record["baseline"] is not None:
            row["baseline"] = label(record["baseline"])
        rows.append({**row, **{f"cost:{k}": v for k, (v, _) in cost.items()}})
    return pd.DataFrame(rows)


class Part(NamedTuple):
    """One table as text: what it is, its columns, cells, which of them are bold."""

    name: str
    caption: str
    headings: list[str]
    rows: list[list[str]]
    bold: list[list[bool]]


def parts(found: Content) -> list[Part]:
    """Returns what all forms show: results with costs, and differences if any."""
    several = [_results(found)]
    if any(record["paired"] for record in found.records):
        several.append(_differences(found))
    return several


def _heads(found: Content) -> tuple[list[str], list[list[str]]]:
    """Columns that tell the groups apart."""
    fields = [name for name in found.by if name != "method"]
    rows = [
        [str(r["group"]["method"]), *(setting(r["group"][f]) for f in fields)]
        for r in found.records
    ]
    return ["method", *(short(field, fields) for field in fields)], rows


def _results(found: Content) -> Part:
    headings, rows = _heads(found)
    bold = [[False] * len(row) for row in rows]

    def add(heading: str, cells: list[str], marks: list[bool] | None = None) -> None:
        headings.append(heading)
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
        for line, mark in zip(bold, marks or [False] * len(rows), strict=True):
            line.append(mark)

    records = found.records
    add("n", [_count(record) for record in records])
    for metric in found.metrics:
        spreads = [record["spread"].get(metric) for record in records]
        best = statistics.best(records, metric)
        add(f"{metric_name(metric)} %", [mean_and_deviation(s) for s in spreads], best)
        if any(metric in values for values in found.paper.values()):
            given = [
                found.paper.get(label(r["group"]), {}).get(metric) for r in records
            ]
            add("paper", [NOTHING if v is None else f"{v:.2f}" for v in given])
            both = zip(spreads, given, strict=True)
            minus = [s.mean - v if s and v is not None else None for s, v in both]
            add("ours - paper", [NOTHING if v is None else f"{v:+.2f}" for v in minus])
    for kind in dict.fromkeys(kind for cost in found.costs for kind in cost):
        add(kind, [cost[kind][1] if kind in cost else NOTHING for cost in found.costs])
    said = [
        "n: finished runs. Accuracies: mean ± sample deviation over seeds (n - 1), "
        "none for one seed."
    ]
    if any(map(any, bold)):
        said.append(
            "Bold: the best of those with one baseline, where the paired test says so."
        )
    if any("numbers to" in heading for heading in headings):
        said.append(
            "Numbers and bytes to an accuracy (pACC): sent and received by one client "
            "until the first evaluation at it, mean of the runs that reached it."
        )
    return Part("results", " ".join(said), headings, rows, bold)


def _differences(found: Content) -> Part:
    headings, rows = _heads(found)
    headings.append("pairs")
    for row, record in zip(rows, found.records, strict=True):
        pairs = [pair.pairs for pair in record["paired"].values()]
        row.append(str(max(pairs)) if pairs else "baseline")
        for metric in found.metrics:
            pair, verdict = record["paired"].get(metric), record["verdict"].get(metric)
            row.append(_difference(pair, verdict))
    headings += [metric_name(metric) for metric in found.metrics]
    words = {True: "participants served better %", False: "unseen served better %"}
    for kind, heading in words.items():
        if any(kind in served for served in found.served):
            headings.append(heading)
            for row, served in zip(rows, found.served, strict=True):
                row.append(_served(served.get(kind)))
    tested = [p for r in found.records for p in r["paired"].values() if p.p is not None]
    said = [
        f"Differences to the baseline ({found.baseline}) in points, paired by seed, "
        "with 95 % t intervals. ↑ better, ↓ worse, = level after Holm's correction "
        f"over the {len(tested)} comparisons of this table; level does not say that "
        "there is no difference."
    ]
    r = [p.correlation for p in tested if p.correlation is not None]
    if r:
        said.append(f"Correlation of the pairs: {min(r):.2f} to {max(r):.2f}.")
    if any(found.served):
        said.append(
            "Served better: share of clients whose accuracy is above that under the "
            "baseline on the same partition, where equal counts half; 95 % interval by "
            "a bootstrap of seeds, then clients."
        )
    bold = [[False] * len(row) for row in rows]
    return Part("differences", " ".join(said), headings, rows, bold)


def _count(record: Mapping[str, Any]) -> str:
    done, all_ = record["finished"], record["points"]
    return f"{done}" if done == all_ else f"{done} of {all_}"


def markdown(found: Content) -> str:
    """Returns the tables, each with what it needs to be understood."""
    texts = []
    for part in parts(found):
        marked = [
            [f"**{cell}**" if mark else cell for cell, mark in zip(*both, strict=True)]
            for both in zip(part.rows, part.bold, strict=True)
        ]
        lines = [part.headings, ["---"] * len(part.headings), *marked]
        safe = [[cell.replace("|", r"\|") for cell in line] for line in lines]
        texts.append("\n".join(f"| {' | '.join(line)} |" for line in safe))
        texts.append(part.caption)
    return "\n\n".join(texts) + "\n"


def latex(found: Content) -> str:
    """Returns a `table*` for each part; needs booktabs, and graphicx for wide ones."""
    return "\n".join(_latex(part, len(found.by)) for part in parts(found))


def _latex(part: Part, settings: int) -> str:
    cells = [
        [
            rf"\textbf{{{_tex(cell)}}}" if mark else _stacked(cell.split(" [", 1))
            for cell, mark in zip(*both, strict=True)
        ]
        for both in zip(part.rows, part.bold, strict=True)
    ]
    sides = "l" * settings + "r" * (len(part.headings) - settings)
    names = list(map(_stacked, map(_folded, part.headings), sides))
    text = (
        pd.DataFrame(cells, columns=names)
        .style.hide(axis="index")
        .to_latex(
            hrules=True,
            column_format=sides,
            caption=_tex(part.caption),
            label=f"tab:{part.name}",
            environment="table*",
            position_float="centering",
        )
    )
    # A size in which more columns fit; what is wider yet is made as wide as the text.
    begin, end = r"\begin{tabular}", r"\end{tabular}"
    size = (
        r"\footnotesize",
        r"\setlength{\tabcolsep}{2.8pt}",
        r"\providecommand{\resizebox}[3]{#3}% of graphicx",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        begin,
    )
    return text.replace(begin, "\n".join(size)).replace(end, end + "}")


def _folded(heading: str) -> list[str]:
    """The lines of a heading over a narrow column."""
    return textwrap.wrap(heading.replace("_", " "), 11, break_long_words=False)


def _stacked(lines: Sequence[str], side: str = "r") -> str:
    """Lines over one another; an interval's bracket, which was taken off, is back."""
    first, *others = map(_tex, lines)
    if not others:
        return first
    others = [
        f"[{line}" if line.count("]") > line.count("[") else line for line in others
    ]
    # An empty group, since a bracket after a new line would be taken for its height.
    # The rule, which is not seen, keeps it apart from the row above.
    stack = r"\\{}".join([r"\rule{0pt}{2.6ex}" + first, *others])
    return rf"\shortstack[{side}]{{{stack}}}"


def mean_and_deviation(spread: statistics.Spread | None, digits: str = ".2f") -> str:
    """Returns "mean ± deviation", the mean alone for one seed."""
    if spread is None:
        return NOTHING
    if spread.std is None:
        return f"{spread.mean:{digits}}"
    return f"{spread.mean:{digits}} ± {spread.std:{digits}}"


def _difference(pair: statistics.Paired | None, verdict: str | None) -> str:
    if pair is None or pair.difference is None:
        return NOTHING
    if pair.low is None:
        return f"{pair.difference:+.2f}"
    said = f"{pair.difference:+.2f} {_VERDICTS[verdict]}".rstrip()
    return f"{said} [{pair.low:+.2f}, {pair.high:+.2f}]"


def _served(found: tuple | None) -> str:
    if found is None:
        return NOTHING
    share, interval, _ = found
    text = f"{share:.0f}"
    return (
        text if interval is None else f"{text} [{interval[0]:.0f}, {interval[1]:.0f}]"
    )


def _costs(
    done: pd.DataFrame, groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, tuple[float, str]]]:
    """Columns of cost by group: heading to (number, text), means over its runs."""
    columns: dict[str, tuple[str, Any]] = {}
    reached = threshold(done)
    if reached is not None:
        columns[f"numbers to {reached} %"] = (f"numbers_to_{reached}", "{:,.0f}".format)
        columns[f"bytes to {reached} %"] = (f"bytes_to_{reached}", log.size)
    done = done.copy()
    ways = ["up_bytes_total", "down_bytes_total"]
    if set(ways) <= set(done):
        done["bytes_total"] = done[ways].sum(axis=1, min_count=2)
    columns["bytes in all"] = ("bytes_total", log.size)
    columns["FLOPs"] = ("run_flops", "{:.2e}".format)
    columns["seconds"] = ("run_seconds", "{:,.1f}".format)
    columns["of it compiling"] = ("compile_seconds", "{:,.1f}".format)
    found = []
    for group in groups:
        own = statistics.members(done, group)
        row = {}
        for heading, (name, as_text) in columns.items():
            values = own[name].dropna() if name in own else own["seed"][:0]
            if values.empty:
                continue
            text = as_text(float(values.mean()))
            if len(values) < len(own):
                text += f" ({len(values)} of {len(own)})"
            row[heading] = (float(values.mean()), text)
        found.append(row)
    return found


def threshold(done: pd.DataFrame) -> str | None:
    """Returns the highest accuracy that at least half of the runs reached, if any."""
    known = [c for c in done if str(c).startswith("numbers_to_")]
    enough = [c for c in known if 2 * done[c].notna().sum() >= len(done)]
    numbers = [c.removeprefix("numbers_to_") for c in enough]
    return max(numbers, key=float, default=None)


def setting(value: Any) -> str:
    """Returns a value of a setting as text, a long list by its first item.

    Example:
      >>> setting(0.10), setting('["my_nets:Slim", "mlp"]'), setting(None), setting("")
      ('0.1', 'Slim+mlp', '–', '–')
    """
    if value is None or value == "":
        return NOTHING
    if _is_number(value):
        return f"{value:g}"
    text = str(value)
    if not text.startswith('["'):  # as `long` keeps a list of text
        return text
    items = [str(item).rpartition(":")[2] for item in json.loads(text)]
    whole = "+".join(items)
    if len(whole) <= _LONG:
        return whole
    digest = hashlib.sha256(text.encode()).hexdigest()[:4]  # of equal beginnings
    return f"{items[0]}+... ({len(items)}, {digest})"


def _is_number(value: Any) -> bool:
    return isinstance(value, float)


_TEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def _tex(text: str) -> str:
    """Text as LaTeX; numbers with signs, and what has no letter there, as formulas."""
    escaped = "".join(_TEX.get(c, c) for c in text)
    return re.sub(r"(?<![\w.])([+-]\d[\d.,]*\d|[+-]\d)", r"$\1$", escaped)
