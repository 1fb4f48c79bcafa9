"""The long table and what is written of several runs."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from made_runs import make_run, undrawn

import hyperjax
from hyperjax.launch import finished, report
from hyperjax.sweeps import figures, long, outputs, record, tables


@pytest.fixture(scope="module", autouse=True)
def drawing():
    with undrawn():
        yield


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two methods x two settings x three seeds; the last is not finished."""
    folder = tmp_path_factory.mktemp("sweep")
    number = 0
    reach = dict(threshold=50, round=7, missed=3, cost=21000, least_cost=12000)
    for method, better in (("fedavg", 0.0), ("hyperfedzero", 5.0)):
        for alpha in (0.1, 1.0):
            for seed in range(3):
                make_run(
                    folder / f"points/p{number}",
                    method=method,
                    rounds=8,
                    seed=seed,
                    shift=better + seed + 0.1 * better * seed,
                    finished=number < 11,
                    settings={"data.alpha": alpha, "method.size": 4},
                    at_end={"reach": [reach], "pacc_ft1": 90.0 + better + seed},
                )
                number += 1
    return folder


@pytest.fixture(scope="module")
def written(sweep, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    files = outputs.write(folder, [sweep], ["data.alpha"], "fedavg", live=True)
    assert {f.name for f in files} >= {p.name for p in folder.iterdir() if p.is_file()}
    return folder


def test_a_row_per_point_round_and_metric(sweep):
    table = hyperjax.table(sweep)
    head = ["point", "method", "seed", "finished", "data.alpha"]
    about = ["round", "seconds", "bytes", "metric", "value"]
    assert list(table) == head + about
    assert list(table["point"].unique()) == [f"p{i}" for i in range(12)]
    assert not table.duplicated(["point", "round", "metric"]).any()
    row = table[
        (table.point == "p4") & (table.metric == "pacc") & (table["round"] == 4)
    ]
    metrics = (sweep / "points/p4/metrics.jsonl").read_text().splitlines()
    (value,) = row["value"]
    assert value == json.loads(metrics[1])["pacc"]
    assert list(row[["seconds", "bytes", "data.alpha"]].iloc[0]) == [6.0, 48000, 1.0]


def test_the_table_has_every_round_of_training_and_the_scores_at_the_end(sweep):
    table = hyperjax.table([sweep / "points/p0", sweep / "points/p1"])
    one = table[table.point == "p0"]
    assert list(one[one.metric == "update_norm"]["round"]) == list(range(9))
    final = one[one["round"] == 8].set_index("metric")["value"]
    assert final["pacc_ft1"] == 90.0 and final["run_seconds"] == 61.25
    # 3000 numbers are 12000 bytes both ways.
    assert final["numbers_to_50"] == 21000 and final["bytes_to_50"] == 84000
    assert set(table["finished"]) == {True} and "seed" in table


def test_points_are_found_at_any_depth_each_once_and_in_order(sweep, tmp_path):
    points = long.points([sweep, sweep / "points" / "p3", sweep / "points" / "p10"])
    assert [head["point"] for head, _ in points] == [f"p{i}" for i in range(12)]
    with pytest.raises(FileNotFoundError, match="or below: not a run folder"):
        hyperjax.table(tmp_path)


def test_settings_that_follow_from_the_method_set_no_points_apart(tmp_path):
    clip = {"fedavg": 1.0, "fedper": None}
    for method, value in clip.items():
        for alpha in (0.1, 0.5):
            settings = {"local.clip_norm": value, "data.alpha": alpha}
            make_run(tmp_path / f"{method}{alpha}", method=method, settings=settings)
    (head, _), *_ = long.points(tmp_path)
    assert "data.alpha" in head and "local.clip_norm" not in head


def test_what_is_written_reads_back_exactly(sweep, written):
    table = long.table(sweep, ["data.alpha"])
    read = pd.read_csv(written / "points.csv")
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    read = pd.read_parquet(written / "points.parquet")
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    clients = pd.read_csv(written / "clients.csv")
    pd.testing.assert_frame_equal(
        clients, long.clients(sweep, ["data.alpha"]), check_dtype=False
    )
    one = clients[(clients.point == "p3") & (clients.metric == "accuracy")]
    assert list(one["client"]) == list(range(15)) and one["participating"].sum() == 10


def test_values_of_several_types_are_text_in_parquet():
    mixed = pd.DataFrame({"hidden": ["(64,)", 32, None], "seed": [0, 1, 2]})
    read = pd.read_parquet(io.BytesIO(outputs.parquet(mixed)))
    assert read["hidden"].dropna().tolist() == ["(64,)", "32"]
    assert read["seed"].tolist() == [0, 1, 2]
    assert mixed["hidden"].tolist()[1] == 32  # the table itself stays


def test_the_table_has_a_row_per_group(written):
    text = (written / "table.md").read_text()
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| method | alpha | n | gACC % | pACC %" in head
    assert "numbers to 50 %" in head and "bytes in all" in head
    # Shifts 0, 1, 2 before 1 - exp(-4): mean 88 + 1, deviation 1, by that factor.
    assert rows[0].startswith("| fedavg | 0.1 | 3 |") and "87.55 ± 0.98" in rows[0]
    assert rows[3].startswith("| hyperfedzero | 1 | 2 of 3 |")
    # Shifts 5 + 1.5 s against s: 5.5 on average, s / sqrt(n) = 0.29, t = 4.30.
    difference = rows[8]
    assert difference.startswith("| hyperfedzero | 0.1 | 3 |")
    assert re.search(r"\+5\.40 [↑=] \[\+4\.18, \+6\.62\]", difference)
    frame = pd.read_csv(written / "table.csv")
    assert list(frame["pacc:n"]) == [3, 3, 3, 2]
    assert frame["pacc:difference"][2] == pytest.approx(5.5 * (1 - 2.718281828**-4))
    assert set(frame["pacc:verdict"].dropna()) <= {"better", "worse", "level"}


def test_published_values_stand_beside_ours(sweep, tmp_path):
    paper = {"fedavg, alpha=0.1": {"pacc": 90.0}}
    outputs.write(tmp_path, [sweep], ["data.alpha"], paper=paper, live=True)
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert "| pACC % | paper | ours - paper |" in rows[0]
    assert "| 87.55 ± 0.98 | 90.00 | -2.45 |" in rows[2]
    with pytest.raises(ValueError, match="paper='fedprox' is none of the groups: fed"):
        outputs.write(tmp_path, [sweep], ["data.alpha"], paper={"fedprox": {}})


def test_a_baseline_may_be_missing_only_while_runs_go_on(sweep, tmp_path):
    with pytest.raises(ValueError, match="baseline='fedprox' is none of the groups"):
        outputs.write(tmp_path, [sweep], baseline="fedprox")
    assert not any(tmp_path.iterdir())
    outputs.write(tmp_path, [sweep], baseline="fedprox", live=True)
    assert "baseline" not in (tmp_path / "table.md").read_text()


def test_numbers_and_signs_survive_latex():
    assert tables._tex("a_b 5% ± -1.2 ↑") == r"a\_b 5\% $\pm$ $-1.2$ $\uparrow$"
    assert tables._tex("[+0.10, -3]") == "[$+0.10$, $-3$]"
    assert tables._tex("95 % (n - 1), x-ray, 2-3") == r"95 \% (n - 1), x-ray, 2-3"


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
@pytest.mark.parametrize("packages", ["booktabs", "booktabs,graphicx"])
def test_the_latex_table_compiles_and_fits_the_text(written, tmp_path, packages):
    (tmp_path / "paper.tex").write_text(
        rf"\documentclass[twocolumn]{{article}}\usepackage{{{packages}}}"
        rf"\begin{{document}}\input{{{written / 'table.tex'}}}\end{{document}}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").exists()
    if "graphicx" in packages:
        assert "Overfull" not in done.stdout


def test_everything_is_written_of_runs_that_have_ended(tmp_path, monkeypatch):
    drawn = figures.all_of  # of which these are two
    monkeypatch.setattr(
        figures, "all_of", lambda *args: itertools.islice(drawn(*args), 2)
    )
    for seed in range(2):
        for method in ("fedavg", "scaffold"):
            folder = tmp_path / f"runs/{method}{seed}"
            make_run(folder, method=method, rounds=4, seed=seed, shift=3.0 * seed)
    (tmp_path / "out").mkdir()
    files = outputs.write(tmp_path / "out", [tmp_path / "runs"], (), "fedavg")
    there = {p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(files) == there
    names = {p.relative_to(tmp_path / "out").as_posix() for p in there}
    tables = {"points.csv", "points.parquet", "clients.csv", "table.tex"}
    assert {*tables, "report.html"} <= names
    assert {f"figures/curves_bytes.{form}" for form in ("pdf", "svg", "png")} <= names
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "4 runs in 2 groups · 4 finished" in page
    assert 'href="figures"' in page and "location.reload" not in page


def test_more_groups_than_lines_can_tell_apart_have_no_lines(tmp_path):
    runs = []
    for i in range(figures.MOST + 1):
        runs += [tmp_path / f"run{i}"]
        make_run(runs[-1], method=f"method{i}")
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, chosen in ((few, runs[:-1]), (many, runs)):
        folder.mkdir()
        outputs.write(folder, chosen, live=True)
    said = f"{figures.MOST + 1} groups are more than lines can tell apart"
    assert said in (many / "report.html").read_text()
    assert said not in (few / "report.html").read_text()
    assert len((many / "table.csv").read_text().splitlines()) == figures.MOST + 2


def test_points_that_failed_are_named_on_the_page(tmp_path):
    make_run(tmp_path / "a", rounds=4)
    entries = [
        {"name": "a", "status": "finished", "message": ""},
        {"name": "b", "status": "failed", "message": "no <room>"},
    ]
    content = json.dumps({"points": entries})
    (tmp_path / finished.SWEEP).write_text(content, encoding="utf-8")
    outputs.write(tmp_path, [tmp_path / "a"], live=True)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "b: failed: no &lt;room&gt;" in page and "a: finished" not in page
    assert "setTimeout(() => location.reload()" in page


def test_the_report_of_a_sweep_has_the_sweeps_own_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "all_of", lambda *_: iter(()))
    entries = []
    for method in ("fedavg", "scaffold"):
        make_run(tmp_path / method, method=method, rounds=4)
        fields = {"method.name": method}
        entry = {"name": method, "status": record.FINISHED, "message": ""}
        entries.append({**entry, "fields": fields})
    content = {"format": record.FORMAT, "points": entries, "baseline": "fedavg"}
    content["fields"] = ["method.name"]
    (tmp_path / finished.SWEEP).write_text(json.dumps(content), encoding="utf-8")
    assert report.main([str(tmp_path)], None) == 0
    assert "Differences to the baseline (fedavg)" in (tmp_path / "table.md").read_text()
    assert report.main([str(tmp_path)], None, "scaffold") == 0
    assert "the baseline (scaffold)" in (tmp_path / "table.md").read_text()
