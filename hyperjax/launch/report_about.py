"""What ran, what it sent, and how to run it again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hyperjax import protocols
from hyperjax.engine import log
from hyperjax.launch import origin, pages, workdir
from hyperjax.launch.finished import Row, Run
from hyperjax.protocols import common

_FILES = (
    *(workdir.SUMMARY, log.METRICS, log.TRAINING, log.TIMING),
    *(workdir.CLIENTS, workdir.EMBEDDINGS, workdir.PARTITION, workdir.CONFIG),
)


def headline(run: Run, latest: Row, heading: str) -> pages.Html:
    """What ran, and whether it came to its end."""
    rounds = latest.get("rounds", "?")
    done = latest.get("finished") is True
    note = ""
    if not done:
        last = run.metrics[-1]["round"] if run.metrics else 0
        note = pages.text(
            f"This run is not finished: evaluated up to round {last} of {rounds}. "
            "Numbers are of that evaluation.",
            note=True,
        )
    facts = [f"seed {latest.get('seed', '?')}", f"{rounds} rounds"]
    families = latest.get("families") or {}
    if len(families) > 1:
        facts.append(f"{len(families)} kinds of network: {', '.join(families)}")
    if started := run.about.get("started"):
        facts.append(f"started {started[:16].replace('T', ' ')} UTC")
    facts.append("finished" if done else "not finished")
    return pages.header(heading, " · ".join(facts), note)


def communication(latest: Row) -> pages.Html:
    """What is sent, and what an accuracy cost."""
    kinds = ("numbers", "bytes", "bytes_total")
    sizes = {
        name: [latest.get(f"{way}_{kind}") for kind in kinds]
        for way, name in (("up", "client to server"), ("down", "server to client"))
    }
    sizes["both"] = [
        None if None in pair else sum(pair)
        for pair in zip(*sizes.values(), strict=True)
    ]
    rows = [
        (name, _whole(row[0]), pages.num_bytes(row[1]), pages.num_bytes(row[2]))
        for name, row in sizes.items()
        if row != [None] * len(kinds)
    ]
    if not rows:
        return pages.Html("")
    headings = (
        *("direction", "numbers per client and round", "bytes per client and round"),
        "bytes in all",
    )
    return pages.section(
        "Communication",
        pages.tabular("communication", headings, rows),
        _reached(latest),
    )


def _reached(latest: Row) -> str:
    """What reaching an accuracy cost, as far as evaluations tell."""
    rows = [
        (
            r["threshold"],
            _between(r.get("missed", r["round"] - 1) + 1, r["round"]),
            _between(r.get("least_cost", r["cost"]), r["cost"]),
        )
        for r in latest.get("reach", ())
    ]
    if not rows:
        return ""
    note = pages.text(
        "Rounds are counted from 0, and what is reached in round 0 is free. Between "
        "evaluations nothing is seen: the first number is for the round after the last "
        "evaluation below the accuracy, the second for the first evaluation at it."
    )
    headings = ("pACC, %", "reached in round", "numbers until then")
    return f"<h3>Cost to an accuracy</h3>{note}{pages.tabular('reach', headings, rows)}"


def _between(least: float, most: float) -> str:
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _whole(value: Any) -> Any:
    """A mean over families is no whole number, but shown as one."""
    return None if value is None else round(value)


def configuration(run: Run, latest: Row, linked: bool) -> pages.Html:
    """How to run it again, what was changed, and where the run came from."""
    about = run.about
    config = about.get("config", {})
    changed, command = _as_command(config)
    facts: list[tuple[str, object]] = [
        ("commit", pages.code(about.get("commit") or "unknown")),
        ("device", pages.code(about.get("device") or "unknown")),
        (
            "state digest (SHA-256)",
            pages.code(latest.get("state_sha256") or "none yet"),
        ),
    ]
    files = [name for name in _FILES if linked and (Path(run.folder) / name).exists()]
    if files:
        links = ", ".join(pages.link(name, name) for name in files)
        facts.append(("files of the run", pages.Html(links)))
    own = [(field, str(value)) for field, value in changed.items()]
    return pages.section(
        "Configuration",
        pages.facts(facts),
        pages.command(command) if command else "",
        f"<h3>Changed from the experiment's defaults</h3>{pages.facts(own)}"
        if own
        else "",
        pages.folded("All settings", pages.nested(config)),
        pages.folded("Plan", pages.nested(latest.get("plan"))),
        pages.folded("Package versions", pages.nested(about.get("versions"))),
    )


def _as_command(config: Row) -> tuple[dict[str, Any], str | None]:
    """Settings that are not its experiment's, and a command that gives them all."""
    flat = common.flat(config)
    name = config.get("experiment")
    if name not in protocols.NAMES:
        return {}, None
    method, data = flat.get("method.name"), flat.get("data.name")
    argument = f"{name}:{method},data={data}"
    try:
        usual = common.flat(
            origin.as_json(protocols.find(name).get_config(f"{method},data={data}"))
        )
    except Exception:  # a method or data of one's own, or of another version
        return {}, None
    changed = {k: v for k, v in flat.items() if k not in usual or usual[k] != v}
    flags = "".join(f" \\\n  --config.{k}={_flag(v)}" for k, v in changed.items())
    return changed, f"hyperjax train --config={argument} --workdir=NEW_FOLDER{flags}"


def _flag(value: Any) -> str:
    if isinstance(value, list):
        value = origin.as_tuples(value)
    text = str(value)
    return text if re.fullmatch(r"[\w.+-]+", text) else f"'{text}'"
