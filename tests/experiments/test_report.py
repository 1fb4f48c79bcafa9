"""Reports of runs: what they say, that they stand alone, and text tables."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import make_run, write_json, write_lines

from experiments import demo
from hyperjax.launch import pages, plots, report

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Checker(HTMLParser):
    """Fails where tags do not nest; keeps attributes that load or lead elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        links = ("src", "href", "xlink:href", "data", "srcset")
        self.links += [value or "" for name, value in attrs if name in links]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag


def _read(path: str | Path) -> tuple[str, list[str]]:
    """A page's text and links, after a check that it is well formed."""
    text = Path(path).read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(text)
    assert checker.open == []
    return text, checker.links


def test_run_report_shows_everything(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = report.run_report(folder)
    assert path == os.path.join(folder, "report.html")
    text, _ = _read(path)
    for part in (
        "hyperfednet on digits",
        "seed 0 · 40 rounds · finished",
        "EM control 75.70 · oracle 82.70",
        "clients never trained on, weighted by samples",
        "mean over clients 79.20 ± 4.20, tenth percentile 70.70",
        "up 4 kB · down 8 kB",
        "61.2 s",
        "12,346",
        "Partition",
        "class 3",
        "Accuracy of every client",
        "Embeddings of 15 clients",
        "the most is ln 6 = 1.79",
        "57 (own 79.7)",
        "client to server",
        "160,000",
        "<code>data.labels</code>",
        "[3, 1]",
        "clients_at_once",
        "0.4.30",
        "0123abc",
        "cpu x 2",
        "feed" * 16,
        "update norm",
    ):
        assert part in text, part
    assert not list(Path(folder).glob("*.tmp"))


def test_same_files_same_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    first = Path(report.run_report(folder)).read_bytes()
    assert Path(report.run_report(folder)).read_bytes() == first


def test_pages_stand_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    own = report.run_report(folder)
    both = report.comparison_report([folder], str(tmp_path / "all.html"), "All")
    for path in (own, both):
        text, links = _read(path)
        assert all(link.startswith("#") or link == "run/report.html" for link in links)
        assert "<script" not in text and "@import" not in text
        assert not re.findall(r"url\((?!#)", text)
        addresses = re.findall(r'([\w:]+)="https?://', text)
        assert all(name.startswith("xmlns") for name in addresses)


def test_names_are_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('&')</script>"
    folder = make_run(tmp_path / "run", method=bad)
    path = tmp_path / "all.html"
    report.comparison_report([folder], str(path), bad, [bad], [{bad: bad}])
    for page in (report.run_report(folder), path):
        text, _ = _read(page)
        assert "<script" not in text
        assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)" in text


def _without(folder: str, *metrics: str) -> str:
    """Takes metrics out of a run's files, and the unseen clients with "zacc"."""
    gone = (*metrics, "collapse_novel") if "zacc" in metrics else metrics
    path = Path(folder)

    def keep(row: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if not key.startswith(gone)}

    lines = (path / "metrics.jsonl").read_text().splitlines()
    write_lines(path / "metrics.jsonl", [keep(json.loads(line)) for line in lines])
    write_json(
        path / "summary.json", keep(json.loads((path / "summary.json").read_text()))
    )
    if "zacc" in metrics:
        rows = json.loads((path / "clients.json").read_text())
        rows = [row for row in rows if row["participating"]]
        write_json(path / "clients.json", rows)
    return folder


@pytest.mark.parametrize(
    "missing", [("zacc",), ("gacc",), ("zacc", "gacc"), ("pacc", "zacc", "gacc")]
)
def test_what_was_not_measured_is_left_out(tmp_path: Path, missing: tuple) -> None:
    novel = 0 if "zacc" in missing else 5
    folder = _without(make_run(tmp_path / "run", novel=novel), *missing)
    own, _ = _read(report.run_report(folder))
    path = report.comparison_report([folder], str(tmp_path / "all.html"), "All")
    both, _ = _read(path)
    there = [name for name in ("gacc", "pacc", "zacc") if name not in missing]
    assert both.count("<polyline") == len(there)
    assert own.count('<div class="card">') == len(there) + 3
    for text in (own, both):
        assert "None" not in text and "no values yet" not in text
        assert ("not participating" in text) == ("zacc" not in missing)
        for name in ("gACC", "pACC", "zACC"):
            assert (name in text) == (name.lower() in there)
    assert ("No evaluation yet" in both) == (not there)


def test_a_run_without_a_metric_beside_one_with_it(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "whole"), make_run(tmp_path / "part", novel=0)]
    _without(folders[1], "zacc", "gacc")
    path = report.comparison_report(folders, str(tmp_path / "all.html"), "All")
    text, _ = _read(path)
    assert text.count("<polyline") == 4 and 'points=""' not in text
    assert "None" not in text


def test_the_best_round_by_validation_has_a_card(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = tmp_path / "run/summary.json"
    best = dict(round=3, vacc=61.5, pacc=58.25)
    summary = json.loads(path.read_text()) | dict(vacc=60.0, best_by_validation=best)
    write_json(path, summary)
    text, _ = _read(report.run_report(folder))
    assert "58.25 %" in text and "round 3, where vACC was 61.50" in text
    assert "what they set aside for validation" in text


def test_fine_tuning_is_a_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    plain, _ = _read(report.run_report(folder))
    assert "<h2>Fine-tuning</h2>" not in plain
    path = tmp_path / "run/summary.json"
    summary = json.loads(path.read_text())
    for k in (8, 0, 16):
        summary |= {f"pacc_ft{k}": 40.0 + k, f"pacc_ft{k}_mean": 41.5 + k}
    write_json(path, summary | {"zacc_ft8": 33.0})
    text, _ = _read(report.run_report(folder))
    (section,) = re.findall("<h2>Fine-tuning</h2>.*?</section>", text)
    rows = re.findall("<tr>(.*?)</tr>", section)
    cells = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert [cell.split(",")[0] for cell in cells[0][1:]] == [
        "participants",
        "participants",
        "unseen clients",
    ]
    assert cells[1:] == [
        ["0", "40.00", "41.50", "–"],
        ["8", "48.00", "49.50", "33.00"],
        ["16", "56.00", "57.50", "–"],
    ]


def test_what_is_not_finite_is_a_dash_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = tmp_path / "run/summary.json"
    summary = json.loads(path.read_text())
    none = {k: None for k in summary if k.startswith("zacc")}
    tuned = {"pacc_ft4": None, "pacc_ft4_mean": None, "pacc_ft4_not_finite": 2}
    best = dict(round=3, vacc=61.5, pacc=None)
    bad = dict(zacc_not_finite=3, best_by_validation=best)
    write_json(path, summary | none | tuned | bad)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | none
    (tmp_path / "run/metrics.jsonl").write_text(
        "\n".join([*lines[:-1], json.dumps(last)])
    )
    text, _ = _read(report.run_report(folder))
    assert "zACC<b>–</b>" in text
    assert "outputs of the network for 3 of them are not finite" in text
    assert "<td>4</td><td>–</td><td>–</td>" in re.sub(' class="num"', "", text)
    assert "the outputs of the fine-tuned network are not finite" in text
    assert "pACC, best by validation<b>–</b>" in text
    assert "None" not in text and "nan" not in text
    page = report.comparison_report([folder], str(tmp_path / "all.html"), "All")
    assert "None" not in _read(page)[0]


def test_cost_to_an_accuracy_has_its_resolution(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = tmp_path / "run/summary.json"
    reach = [
        dict(threshold=50, round=4, missed=-1, cost=400, least_cost=0, full_cost=500),
        dict(threshold=60, round=5, missed=4, cost=500, least_cost=500, full_cost=600),
        dict(threshold=70, round=9, cost=900, full_cost=1000),  # as runs had it before
    ]
    write_json(path, json.loads(path.read_text()) | {"reach": reach})
    text, _ = _read(report.run_report(folder))
    for part in ("<td>0 to 4</td><td>0 to 400</td>", "<td>5</td><td>500</td>"):
        assert part in text
    assert "<td>9</td><td>900</td>" in text


def test_the_launcher_makes_the_page_of_one_run_or_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_run(tmp_path / "a/one")
    make_run(tmp_path / "a/two", finished=False)
    for folders, out, page in (
        (["~/a/one"], None, "a/one/report.html"),
        (["~/a/one/", "~/a/one"], "~/new/x.html", "new/x.html"),
        (["~/a/one", "~/a/two"], None, "a/comparison.html"),
    ):
        assert report.main(folders, out) == 0
        assert capsys.readouterr().out == f"report: {tmp_path / page}\n"
        assert (tmp_path / page).exists()
    # The unfinished run had no page yet; the link would lead nowhere.
    _, links = _read(tmp_path / "a/comparison.html")
    assert [x for x in links if x[0] != "#"] == ["one/report.html", "two/report.html"]
    assert (tmp_path / "a/two/report.html").exists()


def test_the_launcher_refuses_what_is_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="give the folder of a run"):
        report.main([], None)
    for other in (str(tmp_path), f"{run}/config.json", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=re.escape(other)):
            report.main([run, other], None)
    with pytest.raises(ValueError, match=r"--out=.* is not a file"):
        report.main([run], str(tmp_path))
    assert not list(tmp_path.rglob("*.html"))


def test_the_launcher_takes_folders_from_the_command_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    command = [sys.executable, "-m", "experiments.report"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and done.stderr.startswith("error: give the folder")
    done = subprocess.run(
        [*command, run, f"--out={tmp_path / 'x.html'}"],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0 and (tmp_path / "x.html").exists(), done.stderr


@pytest.mark.parametrize(
    "name", ["config.json", "summary.json", "clients.json", "partition.npz"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"7", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{re.escape(name)}.*(damaged|remove it|put a copy back)"
    ):
        report.run_report(run)


def test_rows_of_the_demo_leave_out_controls_that_are_not_there() -> None:
    summary = dict(down_bytes=1, up_bytes=2, seconds=3.0, pacc=50.0, pacc_em=40.0)
    plain, em = demo.rows_of("FedAvg", summary)
    assert plain["bytes"] == 3 and plain["pacc"] == 50.0
    assert em["pacc"] == 40.0 and em["zacc"] is None and "EM" in em["method"]


def test_collapsed_embedding_is_said_not_drawn(tmp_path: Path) -> None:
    text, _ = _read(report.run_report(make_run(tmp_path / "run", collapsed=True)))
    assert "The embedding has collapsed: all 15 clients" in text
    assert "component 1" not in text


def test_almost_collapsed_embedding_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    plain, _ = _read(report.run_report(folder))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    summary |= {"collapse_participating": 3e-5, "collapse_novel": 2e-5}
    write_json(tmp_path / "run/summary.json", summary)
    text, _ = _read(report.run_report(folder))
    assert "all but collapsed" in text and "component 1" in text
    assert "all but collapsed" not in plain


def test_without_embeddings_no_section(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    clients = json.loads((tmp_path / "run/clients.json").read_text())
    for client in clients:
        del client["embedding"], client["accuracy_em"]
    write_json(tmp_path / "run/clients.json", clients)
    text, _ = _read(report.run_report(folder))
    assert "<h2>Embeddings</h2>" not in text
    assert "Accuracy of every client" in text


def test_run_in_progress(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    with open(tmp_path / "run/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"round": 24, "lo')  # being written while the report is made
    text, _ = _read(report.run_report(folder))
    assert "This run is not finished: evaluated up to round 20 of 40" in text
    assert "hyperfednet on digits" in text
    assert "30.0 s" in text  # from timing.jsonl
    assert "<h2>Clients</h2>" not in text


def test_run_that_has_only_started(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"seed": 1, "method": {"name": "fedavg"}}
    write_json(folder / "config.json", {"config": config, "commit": None})
    text, _ = _read(report.run_report(str(folder)))
    assert "No evaluation yet" in text
    assert "not finished" in text


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        report.run_report(str(tmp_path))


def test_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text("{oops\n" + metrics.read_text())
    with pytest.raises(ValueError, match="line"):
        report.run_report(folder)


def test_hundred_clients_and_classes_stay_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", clients=100, novel=20, classes=100)
    path = report.run_report(folder)
    _read(path)
    assert os.path.getsize(path) < 2e6


def test_comparison_of_two_runs(tmp_path: Path) -> None:
    first = make_run(tmp_path / "runs/one & two", "fedavg")
    second = make_run(tmp_path / "runs/other", "pfedhn", shift=-5.0)
    for folder in (first, second):
        report.run_report(folder)
    path = str(tmp_path / "pages.html")
    rows = [{"rate": 0.1}, {"rate": 0.2}]
    assert report.comparison_report([first, second], path, "Sweep", rows=rows) == path
    text, links = _read(path)
    assert "runs/one%20%26%20two/report.html" in links
    assert "runs/other/report.html" in links
    assert "fedavg" in text and "pfedhn" in text and "0.20" in text
    assert text.count("<h2>Partition</h2>") == 1 and "class 3" in text
    for label in ("one &amp; two", "other"):
        # Once in each of three charts.
        assert len(re.findall(f"<polyline[^>]*><title>{label}</title>", text)) == 3


def _config(name: str, **fields: Any) -> dict[str, Any]:
    """The config of a run in a method; `local__steps=1` sets `local.steps`."""
    config: dict[str, Any] = {"seed": 0, "method": {"name": name}, "local": {"rate": 1}}
    config |= {"engine": {"devices": 0}, "data": {"data_dir": None}}
    for field, value in fields.items():
        group, _, name = field.rpartition("__")
        (config[group] if group else config)[name] = value
    return config


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([_config("a"), _config("b", method__mu=0.1)], {}),
        ([_config("a"), _config("b", local__rate=2)], {"local.rate": ["1", "2"]}),
        ([_config("a"), _config("a", seed=3)], {"seed": ["0", "3"]}),
        ([_config("a"), _config("b", local__clip=5)], {"local.clip": ["", "5"]}),
        ([_config("a", engine__devices=2), _config("b", data__data_dir="x")], {}),
        (
            [_config("a", method__mu=1), _config("a", method__mu=2), _config("b")],
            {"method.mu": ["1", "2", ""]},
        ),
        ([_config("a", method__mu=1), _config("b", method__mu=2)], {}),
    ],
)
def test_what_differs_beside_the_method(configs: list, expected: dict) -> None:
    assert report.differing(configs) == expected


def test_a_comparison_says_first_what_differs(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", method="fedavg")]
    path = report.comparison_report(folders, str(tmp_path / "all.html"), "All")
    text, _ = _read(path)
    heading = "<h2>Settings that differ beside the method</h2>"
    assert f"{heading}<p>They share every other setting.</p>" in text
    folders.append(make_run(tmp_path / "c", rounds=20, seed=7))
    path = report.comparison_report(folders, str(tmp_path / "all.html"), "All")
    text, _ = _read(path)
    assert text.index(heading) < text.index("<h2>Summary</h2>")
    row = "<td><code>rounds</code></td><td>40</td><td>a, b</td></tr><tr><td></td>"
    assert f"{row}<td>20</td><td>c</td>" in text
    assert "<td>7</td><td>c</td>" in text


def test_comparison_with_other_partitions(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    path = report.comparison_report(folders, str(tmp_path / "all.html"), "Seeds")
    text, _ = _read(path)
    assert "do not share one partition" in text and "class 3" not in text


def test_comparison_checks_lengths(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = str(tmp_path / "all.html")
    with pytest.raises(ValueError, match="1 runs with 2 labels"):
        report.comparison_report([folder], path, "All", ["a", "b"])
    with pytest.raises(ValueError, match="0 runs"):
        report.comparison_report([], path, "All")


def test_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    path = Path(report.run_report(folder))
    before = path.read_bytes()
    monkeypatch.setattr(report.os, "replace", _refuse)
    with pytest.raises(OSError, match="disk"):
        report.run_report(folder)
    assert path.read_bytes() == before
    assert not list(Path(folder).glob("*.tmp"))


def _refuse(*_: object) -> None:
    raise OSError("no room on disk")


def test_text_table() -> None:
    rows = [
        {"name": "fedavg", "acc": 71.234, "size": 1234567, "done": True},
        {"name": "pfedhn", "acc": None, "size": np.int64(12), "done": False},
    ]
    columns = [("name", "method"), ("acc", "%"), ("size", "bytes"), ("done", "done")]
    assert pages.text_table(rows, [*columns, ("gone", "gone")]) == "\n".join(
        [
            "method      %      bytes  done  gone",
            "------  -----  ---------  ----  ----",
            "fedavg  71.23  1,234,567  yes   -",
            "pfedhn      -         12  no    -",
        ]
    )
    assert pages.text_table([], columns[:2]) == "method  %\n------  -"


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 100, False, [0, 20, 40, 60, 80, 100]),
        (0.31, 0.52, False, [0.3, 0.35, 0.4, 0.45, 0.5, 0.55]),
        (0, 3, True, [0, 1, 2, 3]),
    ],
)
def test_nice_ticks(low: float, high: float, whole: bool, expected: list) -> None:
    assert plots.nice_ticks(low, high, whole=whole) == pytest.approx(expected)


@pytest.mark.parametrize("value", [-2.0, 0.0, 1e-9, 3e7])
def test_nice_ticks_around_one_value(value: float) -> None:
    ticks = plots.nice_ticks(value, value)
    assert ticks[0] < value < ticks[-1] and ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        ([0.7071, 0.70715, 0.7072], ["0.7071", "0.70715", "0.7072"]),
        ([0.1 * 3, 0.35], ["0.3", "0.35"]),
        ([-5e-19, 0.1], ["0", "0.1"]),
        ([0.0, 2500.0, 12500.0], ["0", "2,500", "12,500"]),
        ([0.0, 2e6], ["0", "2e+06"]),
        ([1000.0, 1000.5], ["1,000", "1,000.5"]),
        ([7.0], ["7"]),
        ([], []),
    ],
)
def test_tick_labels(ticks: list[float], expected: list[str]) -> None:
    assert plots.tick_labels(ticks) == expected


def test_line_chart_of_little() -> None:
    assert "no values yet" in plots.line_chart("empty", [])
    one = plots.line_chart("one", [plots.Line("a", [(0, 5.0), (1, math.inf)], "#000")])
    assert one.count("<circle") == 1 and "inf" not in one
