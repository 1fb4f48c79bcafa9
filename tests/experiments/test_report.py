"""Reports of runs: what they say, that they stand alone, and text tables."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from launched import launch
from made_runs import make_run, undrawn, write_json, write_lines

from experiments import demo
from hyperjax.launch import charts, origin, pages, report
from hyperjax.protocols import zero_shot
from hyperjax.sweeps import figures, long

ROOT = Path(__file__).parents[2]
DRAWING = pages.drawing


@pytest.fixture
def drawn() -> None:
    """For tests that look at charts and pictures."""


@pytest.fixture(autouse=True)
def drawing(request: pytest.FixtureRequest) -> Iterator[None]:
    """What draws charts takes seconds to pack, and charts a second to make."""
    with pytest.MonkeyPatch.context() as patch:
        if "drawn" in request.fixturenames:
            patch.setattr(pages, "drawing", lambda: "")
            yield
        else:
            with undrawn():
                yield


_VOID = {"meta", "br", "hr", "img", "link", "input"}


def _charts(text: str) -> dict[str, dict[str, Any]]:
    """The charts of a page by their headings."""
    found = re.findall(
        r"<figure><h3>(.*?)</h3>.*?"
        r"<script type=\"text/plain\" class=\"spec\">(.*?)</script>",
        text,
        re.S,
    )
    return {
        name: json.loads(gzip.decompress(base64.b64decode(spec)))
        for name, spec in found
    }


def _series(chart: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["series"] for row in chart["data"]["values"]))


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


def test_run_report_shows_everything(drawn, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = report.run_report(folder)
    assert path == os.path.join(folder, "report.html")
    text, links = _read(path)
    for part in (
        "hyperfednet on digits",
        "seed 0 · 40 rounds · started 2026-11-26 14:05 UTC · finished",
        "<small>clients never trained on</small>",
        "mean over clients 79.20 ± 4.20",
        "up 4 kB · down 8 kB",
        "61.2 s",
        "12,346 samples/s",
        "Partition",
        "class 3",
        "the most is ln 6 = 1.79",
        "57 (own 79.7)",
        "client to server",
        "160 kB",
        "<th>data.labels</th>",
        "[3, 1]",
        "clients_at_once",
        "0.4.30",
        "0123abc",
        "cpu x 2",
        "feed" * 16,
        "Did not change: samples 640 (samples a round).",
        "Lowest: client ",
    ):
        assert part in text, part
    row = re.search(r"<td>zACC</td>.*?</tr>", text)[0]
    values = [float(v) for v in re.findall(r'data-v="(.*?)"', row)]
    # By samples, mean, deviation and tenth percentile, EM, oracle, swapped.
    assert values == pytest.approx([79.7, 79.2, 4.2, 70.7, 75.7, 82.7, 57], abs=0.01)
    found = _charts(text)
    assert list(found) == [
        *("gACC, %", "pACC, %", "zACC, %", "loss", "update norm"),
        "Accuracy of every client",
        "Embeddings of 15 clients on their two main components",
    ]
    lines = ["as deployed", "EM control", "oracle", "mean of clients ± std"]
    assert _series(found["zACC, %"]) == lines
    # Every round has its loss, and those that were evaluated their places.
    assert len(found["loss"]["data"]["values"]) == 40
    last = found["zACC, %"]["data"]["values"][-1]
    assert (last["round"], last["bytes"], last["seconds"]) == (40, 480000, 60)
    assert last["high"] - last["low"] == pytest.approx(8.4, abs=0.01)
    assert {"metrics.jsonl", "clients.json", "summary.json"} <= set(links)
    assert not list(Path(folder).glob("*.tmp"))


def test_every_chart_is_one_that_vega_knows(drawn, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(charts, "CHECKED", True)
    for name, clients in (("few", 15), ("many", 150)):
        folder = make_run(tmp_path / name, clients=clients, rounds=8)
        report.run_report(folder)
    folders = [tmp_path / "few", make_run(tmp_path / "c", "fedavg", rounds=8)]
    folders.append(make_run(tmp_path / "d", "fedavg", rounds=8, seed=1))
    path = report.comparison_report(folders, tmp_path / "x.html", "x", (), "fedavg")
    assert "against fedavg" in Path(path).read_text(encoding="utf-8")


def test_a_run_is_made_again_by_the_command_on_its_page(tmp_path: Path) -> None:
    config = origin.as_json(zero_shot.get_config("fedprox,data=digits"))
    folder = tmp_path / "run"
    folder.mkdir()
    config["rounds"], config["local"]["clip_norm"] = 7, 2.5
    write_json(folder / "config.json", {"config": config})
    text, _ = _read(report.run_report(str(folder)))
    (command,) = re.findall("<pre><code>(.*?)</code></pre>", text, re.S)
    assert command.split(" \\\n") == [
        "hyperjax train --config=zero_shot:fedprox,data=digits --workdir=NEW_FOLDER",
        "  --config.local.clip_norm=2.5",
        "  --config.rounds=7",
    ]
    assert "<tr><th>rounds</th><td>7</td></tr>" in text


def test_same_files_same_page(drawn, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    first = Path(report.run_report(folder)).read_bytes()
    assert Path(report.run_report(folder)).read_bytes() == first


def test_pages_stand_alone(drawn, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    own = report.run_report(folder)
    both = report.comparison_report([folder], str(tmp_path / "all.html"), "All")
    for path in (own, both):
        text, links = _read(path)
        others = [link for link in links if not link.startswith("#")]
        assert all((Path(path).parent / link).exists() for link in others)
        assert "<script src" not in text and "@import" not in text
        assert not re.findall(r"url\((?!#)", text)
        addresses = re.findall(r'([\w:]+)="https?://', text)
        assert all(name.startswith("xmlns") for name in addresses)


def test_what_draws_charts_is_packed_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pages, "drawing", DRAWING)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pages, "_bundle", lambda: "packed")
    pages.drawing.cache_clear()
    assert pages.drawing() == "packed"
    (kept,) = (tmp_path / "hyperjax").iterdir()
    assert kept.read_text() == "packed"
    kept.write_text("kept")
    pages.drawing.cache_clear()
    assert pages.drawing() == "kept"
    pages.drawing.cache_clear()


def test_names_are_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('&')</script>"
    folder = make_run(tmp_path / "run", method=bad)
    path = tmp_path / "all.html"
    report.comparison_report([folder], str(path), bad)
    for page in (report.run_report(folder), path):
        text, _ = _read(page)
        assert "<script>alert" not in text
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
    assert [name for name in _charts(both) if name.endswith("%")] == [
        f"{name[0]}ACC, %" for name in there
    ]
    assert own.count('<div class="card">') == len(there) + 2
    for text in (own, both):
        assert "None" not in text and "no values yet" not in text
        assert ("unseen" in text) == ("zacc" not in missing)
        for name in ("gACC", "pACC", "zACC"):
            assert (name in text) == (name.lower() in there)
    assert ("No evaluation yet" in both) == (not there)


def test_a_run_without_a_metric_beside_one_with_it(drawn, tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / name, novel=novel, settings={"data.novel": novel})
        for name, novel in (("whole", 5), ("part", 0))
    ]
    _without(folders[1], "zacc", "gacc")
    path = report.comparison_report(folders, str(tmp_path / "all.html"), "All")
    text, _ = _read(path)
    whole, part = "hyperfednet, novel=5", "hyperfednet, novel=0"
    found = _charts(text)
    assert _series(found["pACC, %"]) == [whole, part]
    assert _series(found["zACC, %"]) == [whole]
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
    (section,) = re.findall("<h2>Fine-tuning</h2>.*?</section>", text, re.S)
    rows = re.findall("<tr>(.*?)</tr>", section)
    cells = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert [re.sub("<.*?>|,.*| %", "", cell) for cell in cells[0][1:]] == [
        "participants",
        "participants",
        "unseen clients",
    ]
    assert "makes" not in section
    write_json(path, summary | {"pacc_ft16": 39.0})
    text, _ = _read(report.run_report(folder))
    assert "Fine-tuning makes participants worse here." in text
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
    assert "<td>4</td><td>–</td><td>–</td>" in re.sub("<td[^>]*>", "<td>", text)
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
    monkeypatch.setattr(figures, "all_of", lambda *_: iter(()))  # see test_figures
    make_run(tmp_path / "a/one")
    make_run(tmp_path / "a/two", finished=False)
    for folders, out, page in (
        (["~/a/one"], None, "a/one/report.html"),
        (["~/a/one/", "~/a/one"], "~/new/x.html", "new/x.html"),
        (["~/a"], "~/new/y.html", "new/y.html"),
        (["~/a/one", "~/a/two"], None, "a/comparison/report.html"),
    ):
        assert report.main(folders, out) == 0
        assert capsys.readouterr().out == f"report: {tmp_path / page}\n"
        assert (tmp_path / page).exists()
    # The unfinished run had no page yet; the link would lead nowhere.
    _, links = _read(tmp_path / "a/comparison/report.html")
    assert links[:2] == ["../one/report.html", "../two/report.html"]
    assert {"points.csv", "table.tex", "figures"} <= set(links)
    assert (tmp_path / "a/two/report.html").exists()


def test_the_launcher_refuses_what_is_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="give the folder of a run"):
        report.main([], None)
    (tmp_path / "empty").mkdir()
    for other in ("empty", "run/config.json", "none"):
        other = str(tmp_path / other)
        with pytest.raises(FileNotFoundError, match=re.escape(other)):
            report.main([run, other], None)
    with pytest.raises(ValueError, match=r"--out=.* is not a file"):
        report.main([run], str(tmp_path))
    new = str(tmp_path / "new/page.html")
    with pytest.raises(ValueError, match=r"^baseline='fedavg' .* is one run; give"):
        report.main([run], new, "fedavg")
    damaged = Path(make_run(tmp_path / "damaged"))
    (damaged / "metrics.jsonl").write_text("{]\n{}\n")
    with pytest.raises(ValueError, match="damaged"):
        report.main([str(damaged)], new)
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.rglob("*.html"))


def test_a_baseline_that_is_none_leaves_no_folder(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(ValueError, match="baseline='nothing' is none of the groups"):
        report.main(folders, str(tmp_path / "new/deep/page.html"), "nothing")
    assert not (tmp_path / "new").exists()


@pytest.mark.xdist_group("launcher")
def test_the_launcher_takes_folders_from_the_command_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    given = [(), (run, f"--out={tmp_path / 'x.html'}")]
    started = [
        launch(tmp_path / f"said{i}", "experiments.report", argv, ROOT)
        for i, argv in enumerate(given)
    ]
    nothing, done = (process.result() for process in started)
    assert nothing.code == 2 and nothing.err.startswith("error: give the folder")
    assert done.code == 0 and (tmp_path / "x.html").exists(), done.err


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
    assert "all but collapsed" in text and "component 1" not in text
    assert '<div class="tabular" data-name="embeddings">' in text  # it scrolls
    assert "all but collapsed" not in plain


def test_series_of_one_colour_differ_and_bars_stay_off_the_axes(drawn) -> None:
    series = [charts.Series("a", "red"), charts.Series("b", "red", "--")]
    rows = [dict(series=s.name, x=1, y=2, name="n", low=1, high=3) for s in series]
    spec = json.loads(charts.places(rows, series, "x", "y"))
    (shape,) = [e["shape"] for e in _encodings(spec) if "shape" in e]
    assert shape["scale"] == {"domain": ["a", "b"], "range": ["circle", "square"]}
    spec = json.loads(charts.lines(rows, series, "y", ("x", "x"), bars=True))
    (dash,) = [e["strokeDash"] for e in _encodings(spec) if "strokeDash" in e]
    assert dash["scale"]["range"] == [[1, 0], [6, 3]]


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["fedavg", "ditto"], None),
        (["fedavg"], None),
        (["fedavg, alpha=1", "fedavg, alpha=2"], "fedavg"),
        (["fedavg, alpha=1"], "fedavg"),
        (["fedavg", "fedavg, alpha=1"], None),
    ],
)
def test_a_legend_has_the_method_of_all_as_its_title(drawn, names, title) -> None:
    series = [charts.Series(name, "red") for name in names]
    rows = [dict(series=name, x=1, y=2, name="n") for name in names]
    for spec in (
        charts.lines(rows, series, "pACC, %", ("x", "x")),
        charts.places(rows, series, "pACC, %", "zACC, %"),
    ):
        color, *_ = [e["color"] for e in _encodings(json.loads(spec))]
        assert color["legend"]["title"] == title
        # By another title what tells lines apart would have a legend of its own.
        told = [
            e.get("strokeDash") or e.get("shape") for e in _encodings(json.loads(spec))
        ]
        assert {other["title"] for other in told if other} == {title}


def test_boxes_say_the_method_of_all_below(drawn) -> None:
    names = ["fedavg, alpha=1", "fedavg, alpha=2"]
    series = [charts.Series(name, "red") for name in names]
    numbers = dict.fromkeys(("p10", "q1", "median", "q3", "p90", "n"), 1)
    rows = [{"series": name, **numbers} for name in names]
    for chosen, title in ((series, "fedavg: accuracy, %"), (series[:0], "accuracy, %")):
        spec = json.loads(charts.boxes(rows, chosen, "accuracy, %"))
        assert {e["x"]["title"] for e in _encodings(spec)} == {title}


def test_a_lone_series_has_a_legend_unless_its_axis_names_it(drawn) -> None:
    series, rows = [charts.Series("loss", "red")], [dict(series="loss", x=1, y=2)]
    known = json.loads(charts.lines(rows, series, "loss, nats", ("x", "x")))
    other = json.loads(charts.lines(rows, series, "pACC, %", ("x", "x")))
    assert all(e["color"]["legend"] is None for e in _encodings(known))
    assert all(e["color"]["legend"] for e in _encodings(other))


@pytest.mark.parametrize(
    "spec",
    [
        charts.lines(
            [dict(series="a", x=x, y=y) for x, y in ((0, 20), (9, 30))],
            [charts.Series("a", "red")],
            "y",
            ("x", "x"),
        ),
        *(
            charts.places(
                [dict(series="a", x=x, y=y, name="n") for x, y in ((20, 20), (90, 30))],
                [charts.Series("a", "red")],
                *("x", "y"),
                diagonal=diagonal,
            )
            for diagonal in (False, True)
        ),
        charts.sorted_dots(
            [dict(series="participating", x=x, y=20 + x) for x in (0, 1)], "y"
        ),
    ],
    ids=["lines", "places", "diagonal", "sorted_dots"],
)
def test_no_mark_lies_on_an_axis(spec: str) -> None:
    svg = vl_convert.vegalite_to_svg(json.dumps(json.loads(spec) | {"width": 400}))
    (width, height), *_ = re.findall(
        r'class="background"[^>]*d="M0.5,0.5h(\d+)v(\d+)', svg
    )
    marks = re.findall(
        r'="(?:point|circle)" transform="translate\(([\d.]+),([\d.]+)\)', svg
    )
    assert len(marks) == 2
    for x, y in marks:
        # Further than the radius of a mark.
        assert 4 < float(x) < int(width) - 4 and 4 < float(y) < int(height) - 4


def _encodings(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer["encoding"] for layer in spec["layer"]]


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


def test_a_thousand_clients_stay_small_and_readable(drawn, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", clients=1100, novel=100, rounds=1000)
    path = report.run_report(folder)
    text, _ = _read(path)
    # What draws the charts has another 407 kB; together under 500, also with maps of
    # embeddings.
    assert len(text) < 70_000
    assert "The 60 clients served worst; clients.json has all" in text
    bars = _charts(text)["Accuracy of clients"]["data"]["values"]
    assert sum(bar["y"] for bar in bars if bar["series"] == "unseen") == 100
    assert "effective number of classes of a client" in _charts(text)
    assert "seed 0 · 1000 rounds · started 2026-11-26 14:05 UTC" in text
    assert "<td>participating</td>" in text and "class 3" not in text


def test_many_classes_of_some_clients_stay_small(drawn, tmp_path: Path) -> None:
    """Dots are drawn while they are few; the page would have another 300 kB."""
    few = make_run(tmp_path / "few", "fedavg", clients=15, classes=95, rounds=3)
    many = make_run(tmp_path / "many", "fedavg", clients=120, classes=95, rounds=3)
    drawn, counted = (_read(report.run_report(folder))[0] for folder in (few, many))
    assert 'class="picture"' in drawn and 'class="picture"' not in counted
    assert len(counted) < 90_000
    assert "effective number of classes of a client" in _charts(counted)


def test_families_have_rows_of_their_own(tmp_path: Path) -> None:
    sizes = dict(up_numbers=10, down_numbers=20, up_bytes=4000, down_bytes=8000)
    kinds = {"00_mlp": dict(clients=6, **sizes), "01_cnn": dict(clients=4, **sizes)}
    folder = make_run(tmp_path / "run", at_end={"families": kinds})
    path = tmp_path / "run/clients.json"
    rows = json.loads(path.read_text())
    for row in rows[:10]:
        row |= {"family": "00_mlp" if row["client"] < 6 else "01_cnn"}
        row |= {"accuracy": 80.0 if row["client"] < 6 else 60.0}
    write_json(path, rows)
    text, _ = _read(report.run_report(folder))
    assert "2 kinds of network: 00_mlp, 01_cnn" in text
    (section,) = re.findall("<h2>Families</h2>.*?</section>", text, re.S)
    found = re.findall("<tr>(.*?)</tr>", section)[1:]
    cells = [re.findall("<td[^>]*>(.*?)</td>", row) for row in found]
    sent = ["10", "20", "4 kB", "8 kB"]
    assert cells[0] == ["00_mlp", "6", "0 to 5", "80.00", "0.00", *sent]
    assert cells[1] == ["01_cnn", "4", "6 to 9", "60.00", "0.00", *sent]


def test_comparison_of_two_runs(drawn, tmp_path: Path) -> None:
    first = make_run(tmp_path / "runs/one & two", "fedavg")
    second = make_run(tmp_path / "runs/other", "pfedhn", shift=-5.0)
    for folder in (first, second):
        Path(folder, "report.html").touch()
    path = str(tmp_path / "pages.html")
    assert report.comparison_report([first, second], path, "Two") == path
    text, links = _read(path)
    assert "runs/one%20%26%20two/report.html" in links
    assert "runs/other/report.html" in links
    assert "All runs share one partition." in text
    for name in ("gACC, %", "pACC, %", "zACC, %"):
        assert _series(_charts(text)[name]) == ["fedavg", "pfedhn"]


def test_seeds_are_one_line_with_a_band(drawn, tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / f"runs/{seed}", seed=seed, shift=4.0 * seed)
    path = report.comparison_report([tmp_path / "runs"], tmp_path / "x.html", "Seeds")
    text, _ = _read(path)
    chart = _charts(text)["pACC, %"]
    assert _series(chart) == ["hyperfednet"]
    last = chart["data"]["values"][-1]
    # 0, 4 and 8 deviate by 4 from 4.
    assert last["n"] == 3 and last["high"] - last["low"] == pytest.approx(
        7.85, abs=0.01
    )
    assert "bands are the sample deviation" in text


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
        ([_config("a"), _config("b", local__rate=2)], {"local.rate": [1, 2]}),
        ([_config("a"), _config("a", seed=3)], {"seed": [0, 3]}),
        ([_config("a"), _config("b", local__clip=5)], {"local.clip": [None, 5]}),
        ([_config("a", engine__devices=2), _config("b", data__data_dir="x")], {}),
        (
            [_config("a", method__mu=1), _config("a", method__mu=2), _config("b")],
            {"method.mu": [1, 2, None]},
        ),
        ([_config("a", method__mu=1), _config("b", method__mu=2)], {}),
    ],
)
def test_what_differs_beside_the_method(configs: list, expected: dict) -> None:
    assert long.differing(configs) == expected


def test_a_comparison_says_first_what_differs(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", method="fedavg")]
    path = report.comparison_report(folders, str(tmp_path / "all.html"), "All")
    text, _ = _read(path)
    heading = "<h2>Settings that differ beside the method</h2>"
    assert f"{heading}<p>They share every other setting.</p>" in text
    folders.append(make_run(tmp_path / "c", rounds=20, seed=7))
    path = report.comparison_report(folders, str(tmp_path / "all.html"), "All")
    text, _ = _read(path)
    assert text.index(heading) < text.index("<h2>Results</h2>")
    # The Runs table says which run has which.
    assert "<td><code>rounds</code></td><td>40 (2 runs); 20 (1 run)</td>" in text
    clipped = {"local.clip_norm": 10.0}
    folders.append(make_run(tmp_path / "d", method="fedprox", settings=clipped))
    path = report.comparison_report(folders, str(tmp_path / "all.html"), "All")
    text, _ = _read(path)
    assert "<td>– (hyperfednet, fedavg); 10 (fedprox)</td>" in text


def test_comparison_with_other_partitions(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    path = report.comparison_report(folders, str(tmp_path / "all.html"), "Seeds")
    text, _ = _read(path)
    assert "<h2>Partitions</h2>" in text
    assert "<code>digest of se</code></td><td" in text


def test_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    path = Path(report.run_report(folder))
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", _refuse)
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
