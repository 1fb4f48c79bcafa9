"""Studies: their configs are sound, their tables are what the runs gave."""

import ast
import json
from pathlib import Path

import pytest

from experiments.studies import embedding_sizes, grid, personalised, server_side, study
from hyperjax.launch import build, outputs, train

SCALE = personalised.Scale(rounds=4, data_dir="somewhere")
ROOT = Path(__file__).parents[2]
LAUNCHERS = [
    p for folder in ("experiments", "benchmarks") for p in ROOT.glob(f"{folder}/*.py")
]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_functions_take_arguments_not_flags_of_a_launch(path):
    """What is defined where a module is launched is not there when it is imported."""
    parts = ast.parse(path.read_text()).body
    launch = [
        p for p in parts if isinstance(p, ast.If) and "__main__" in ast.dump(p.test)
    ]
    assert len(launch) <= 1

    def names(trees, context):
        nodes = (node for tree in trees for node in ast.walk(tree))
        return {
            node.id
            for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, context)
        }

    rest = [part for part in parts if part not in launch]
    only_there = names(launch, ast.Store) - names(rest, ast.Store)
    assert not only_there & names(rest, ast.Load)


def test_a_study_is_configured_from_a_notebook():
    scale = study.Scale("digits", None, 4)
    config = study.configure("fedavg", 0.5, 7, scale, 0.25)
    build.check(config)
    assert (config.seed, config.rounds, config.data.name) == (7, 4, "digits")
    assert (config.data.alpha, config.local.learning_rate) == (0.5, 0.25)


def test_outputs_are_judged_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("")
    found = outputs.files(json="~/new/x.json", picture=str(tmp_path / "file"), no=None)
    assert found == {"json": tmp_path / "home/new/x.json", "picture": tmp_path / "file"}
    assert found["json"].parent.is_dir()
    for given in ("", str(tmp_path), f"{tmp_path}/file/x.json", f"{tmp_path}/file/a/x"):
        with pytest.raises(ValueError, match=r"--json=.* is not a f"):
            outputs.files(picture=f"{tmp_path}/other/x.svg", json=given)
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(outputs.os, "access", lambda *_: False)  # root may write all
    with pytest.raises(ValueError, match=r"--json='.*x': '.*' cannot be written to"):
        outputs.files(json=str(tmp_path / "other/x"))
    with pytest.raises(ValueError, match=r"--workdir='.*other' *: '.*' cannot be wri"):
        outputs.folder("workdir", tmp_path / "other")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (study, (study.Scale(), ["1.0"], ["0"])),
        (personalised, (SCALE, ["mnist"], ["iid"], ["HFN"], ["0"], ["0.1"])),
        (embedding_sizes, ("mnist", SCALE, ["1"], ["0"], ["0.1"])),
        (server_side, ("pfedhn", server_side.Scale(), ["Local"], ["0"])),
    ],
)
def test_studies_refuse_an_output_before_they_train(
    module, arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(module.cli, "use_cores", lambda devices: None)
    monkeypatch.setattr(train, "train", None)  # which would be a TypeError
    rest = ["x.svg"] if module is embedding_sizes else []
    with pytest.raises(ValueError, match=r"--json=.* is not a file"):
        module.main(str(tmp_path / "runs"), *arguments, str(tmp_path), *rest)
    assert not (tmp_path / "runs").exists()


def test_lists_of_whole_numbers():
    assert grid.whole_numbers("seeds", ["0", "12"]) == [0, 12]
    for given in ([], ["x"], ["-1"], ["1.5"], [""]):
        with pytest.raises(ValueError, match=r"--sizes=.* whole numbers from 1 on"):
            grid.whole_numbers("sizes", given, least=1)
    with pytest.raises(ValueError, match=r"--sizes=2,0: .* from 1 on, such as 1,2"):
        grid.whole_numbers("sizes", ["2", "0"], least=1)


def test_lists_of_positive_numbers():
    assert grid.positive_numbers("rates", ["0.1", "3e-2"]) == [0.1, 0.03]
    for given in ([], ["x"], ["0.1", "0"], ["-1"], ["inf"], ["nan"]):
        with pytest.raises(ValueError, match=r"--rates=.*: expected numbers above 0"):
            grid.positive_numbers("rates", given)


def test_a_single_rate_is_not_searched(tmp_path):
    found = personalised.search("HFN", "mnist", SCALE, tmp_path, [0.03])
    assert grid.best(found) == 0.03 and not list(tmp_path.iterdir())


def test_means_and_deviations_over_seeds():
    seeds = [{"a": 1.0, "b": None, "d": 1.0}, {"a": 4.0, "d": None}]
    found = grid.over_seeds(seeds, ("a", "b", "c", "d"))
    # Mean 2.5; deviation with n - 1: sqrt(2 x 1.5^2). One seed has no "d", so no mean.
    assert found == {"a": [2.5, pytest.approx(2.1213203)], "d": None}
    assert grid.over_seeds([{"a": 1.0}], ("a",)) == {"a": [1.0, 0.0]}
    assert grid.shown([2.5, 0.123]) == "2.50 ± 0.12"
    assert grid.shown(7) == 7 and grid.shown(None) is None


def test_what_diverged_has_no_accuracy(tmp_path, monkeypatch):
    def diverge(*args):
        raise FloatingPointError

    monkeypatch.setattr(train, "train", diverge)
    assert grid.result(None, tmp_path) is None
    assert grid.best({0.1: None, 0.03: 12.0}) == 0.03


@pytest.mark.parametrize("label", personalised.METHODS)
@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_personalised_configs_are_sound_and_alike(label, data):
    config = personalised.scaled(label, data, False, 3, 0.1, SCALE)
    build.check(config)
    for field, rounds in build.marks(config).items():  # milestones, a warm-up
        assert all(0 < round < SCALE.rounds for round in rounds), field
    other = personalised.scaled("FedAvg", data, False, 3, 0.1, SCALE)
    assert config.server.cohort_size == other.server.cohort_size == 5
    assert config.data.num_clients == other.data.num_clients == 20
    # Centralised training is one client's, of which an epoch is what a quarter of the
    # users do in four; FedDyn clips and pFedMe has plain SGD, as published.
    # FedRep counts epochs itself.
    apart = {
        "Centre": {"pooled", "epochs"},
        "FedRep": {"epochs"},
    }.get(label, {"clip_norm", "optimizer"})
    for group in ("data", "local", "evaluation"):
        ours, theirs = (c[group].to_dict() for c in (config, other))
        differing = {k for k, v in ours.items() if v != theirs[k]}
        assert differing <= apart, group
    for method, pair in personalised.PUBLISHED[data].items():
        assert method in personalised.METHODS and len(pair) == 2


@pytest.mark.parametrize(
    ("study", "label"), [(s, m) for s, ms in server_side.STUDIES.items() for m in ms]
)
def test_server_side_configs_are_sound_and_alike(study, label):
    scale = server_side.Scale(rounds=20)
    config = server_side.configure(study, label, 3, scale)
    build.check(config)
    other = server_side.configure(
        study, next(iter(server_side.STUDIES[study])), 3, scale
    )
    assert config.data == other.data and config.local == other.local
    if study == "pfedhn":  # as many visits of clients
        one_by_one = config.method.name == "pfedhn"
        cohort = config.server.cohort_size if one_by_one else config.data.num_clients
        assert config.rounds * cohort == 20
        assert (config.server.sampler == "full") != one_by_one


def summary(pacc, **more):
    scores = {f"{m}_ft{k}": pacc + k for m in ("pacc", "zacc") for k in (0, 4)}
    sent = dict(up_numbers=10, down_numbers=20, up_bytes=40.0, down_bytes=80.0)
    curve = {2: pacc - 20.0, 4: pacc}
    return dict(
        pacc=pacc, seconds=1.0, commit="c", curve=curve, **scores, **sent, **more
    )


def test_a_row_of_the_personalised_table(tmp_path):
    rates = {0.1: 60.0, 0.03: None}
    row = personalised.row_of(
        "FedAvg", "mnist", True, rates, [summary(50.0), None, summary(60.0)]
    )
    assert row["learning_rate"] == 0.1 and row["diverged"] == 1
    assert row["paper"] == 98.96  # iid
    assert row["pacc_ft4"] == [59.0, pytest.approx(7.0710678)]
    assert row["cpr"] == 30 and row["curve"] == {1: 35.0, 3: 55.0}
    reached = {r["threshold"]: (r["least_cost"], r["cost"]) for r in row["reach"]}
    assert reached[30] == (0, 30) and reached[60] == (None, None)
    assert reached[50] == (60, 90)  # rounds were evaluated two by two
    row["cpr"], row["reach"][2] = (
        30e6,
        {**row["reach"][2], "least_cost": 60e6, "cost": 90e6},
    )
    text = personalised.as_text({"rows": [row]})
    assert "59.00 ± 7.07" in text and "60.00 to 90.00" in text
    assert "FedAvg (1 diverged)" in text
    assert json.loads(json.dumps(row)) == json.loads(json.dumps(row))
    lost = summary(60.0) | {"curve": {2: None, 4: 60.0}, "pacc_ft4": None}
    row = personalised.row_of("FedAvg", "mnist", True, rates, [summary(50.0), lost])
    assert row["pacc_ft4"] is None
    assert [r["missed"] for r in row["reach"] if r["round"]] == [-1, -1, -1]
    grid.write({"rows": [row]}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["curve"] == {
        "1": None,
        "3": 55.0,
    }
    empty = personalised.row_of("FedAvg", "mnist", True, rates, [None])
    assert empty["diverged"] == 1 and "pacc_ft4" not in empty


def test_the_table_of_the_study_compares_means_with_the_paper():
    row = dict(alpha=1.0, method="HyperFedZero", published_zacc=95.49, diverged=2)
    row |= dict(zacc=[93.94, 0.31], zacc_mean=[94.0, 0.3], noise_scale=None)
    heading, _, line, *note = study.as_text({"rows": [row]}).splitlines()
    assert heading.split("  ")[-1] == "seconds"
    assert '("mean"), which' in " ".join(note)
    assert heading.index("zACC, mean") < heading.index("paper")
    assert "93.94 ± 0.31  " in line and "HyperFedZero (2 diverged)" in line
    assert line.index("94 ± 0.3 ") < line.index("95.49")


def test_a_row_of_the_server_side_table():
    best = dict(best_by_validation=dict(round=2, pacc=58.0, vacc=61.0))
    row = server_side.row_of("pfedhn", "pFedHN", [summary(50.0, **best), None])
    assert row["paper"] == 90.83 and row["diverged"] == 1
    assert row["pacc"] == [50.0, 0.0] and row["best"] == [58.0, 0.0]
    assert "58.00 ± 0.00" in server_side.as_text({"rows": [row]})
    none = summary(50.0) | dict(best_by_validation=None)
    assert "best" not in server_side.row_of("pfedhn", "pFedHN", [none])


def test_the_picture_has_a_point_for_every_size():
    rows = [
        {
            "size": n,
            "cpr": 640 * n,
            "pacc_ft4": [50.0 + n, 1.0],
            "pacc_ft0": [40.0, 1.0],
        }
        for n in (1, 2, 4)
    ]
    picture = embedding_sizes.picture(rows)
    assert picture.startswith("<svg xmlns=") and picture.count("<polyline") == 2
    assert picture.count("<circle") == 3


@pytest.mark.slow
def test_studies_run_and_continue(tmp_path):
    import subprocess
    import sys

    def go(module, *arguments):
        command = [sys.executable, "-m", f"experiments.{module}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    small = ("--seeds=0", f"--workdir={tmp_path / 'a'}")
    for _ in range(2):  # the second reads what is there
        done = go(
            *("server_side", "--data=mnist5k", "--study=pfedhn", "--rounds=10"),
            *(*small, "--methods=Local,pFedHN", f"--json={tmp_path / 'x.json'}"),
        )
        assert "90.83" in done.stdout
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 2
    small = ("--seeds=0", f"--workdir={tmp_path / 'b'}", "--data=mnist5k")
    done = go("personalised", *small, "--methods=FedAvg", "--rounds=2")
    assert done.stdout.count("FedAvg") == 2
    picture = tmp_path / "p.svg"
    go(
        *("embedding_sizes", "--sizes=1,2", "--rounds=2", f"--picture={picture}"),
        *("--seeds=0", f"--workdir={tmp_path / 'c'}", "--data=mnist5k"),
    )
    assert picture.read_text().startswith("<svg")
    for _ in range(2):
        done = go(
            *("gradient_inversion", "--images=2", "--steps=2", "--restarts=1"),
            *(f"--workdir={tmp_path / 'd'}", f"--picture={picture}"),
        )
        assert "HFN, white box, label known" in done.stdout
    assert "image 2/2" not in done.stdout and picture.read_text().startswith("<svg")
