"""Studies: their configs are sound, their tables are what the runs gave."""

import json

import pytest

from experiments import build, embedding_sizes, grid, personalised, server_side, train

SCALE = personalised.Scale(rounds=4, data_dir="somewhere")


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
    found = grid.over_seeds([{"a": 1.0, "b": None}, {"a": 4.0}], ("a", "b", "c"))
    # Mean 2.5; deviation with n - 1: sqrt(2 x 1.5^2).
    assert found == {"a": [2.5, pytest.approx(2.1213203)]}
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


def test_a_row_of_the_personalised_table():
    rates = {0.1: 60.0, 0.03: None}
    row = personalised.row_of(
        "FedAvg", "mnist", True, rates, [summary(50.0), None, summary(60.0)]
    )
    assert row["learning_rate"] == 0.1 and row["diverged"] == 1
    assert row["paper"] == 98.96  # iid
    assert row["pacc_ft4"] == [59.0, pytest.approx(7.0710678)]
    assert row["cpr"] == 30 and row["curve"] == {1: 35.0, 3: 55.0}
    reached = {r["threshold"]: r["cost"] for r in row["reach"]}
    assert (reached[30], reached[50], reached[60]) == (30, 90, None)
    assert "59.00 ± 7.07" in personalised.as_text({"rows": [row]})
    assert json.loads(json.dumps(row)) == json.loads(json.dumps(row))
    empty = personalised.row_of("FedAvg", "mnist", True, rates, [None])
    assert empty["diverged"] == 1 and "pacc_ft4" not in empty


def test_a_row_of_the_server_side_table():
    best = dict(best_by_validation=dict(round=2, pacc=58.0, vacc=61.0))
    row = server_side.row_of("pfedhn", "pFedHN", [summary(50.0, **best), None])
    assert row["paper"] == 90.83 and row["diverged"] == 1
    assert row["pacc"] == [50.0, 0.0] and row["best"] == [58.0, 0.0]
    assert "58.00 ± 0.00" in server_side.as_text({"rows": [row]})


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
