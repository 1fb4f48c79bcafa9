"""Studies: their points are sound, and what is said of them fits the points."""

import functools
import importlib
import json
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from experiments.studies import hyperfednet, hyperfedzero, pfedhn, record, study
from hyperjax.launch import build, embedding_maps
from hyperjax.protocols import common
from hyperjax.sweeps import points

PAPERS = (
    "hyperfedzero",
    "hyperfednet",
    "mh_pfedhn",
    "pfedhn",
    "shift",
    "atp",
    "flux",
)
SWEEPS = [
    (paper, name)
    for paper in PAPERS
    for name in points.find_named(f"experiments/studies/{paper}.py")
]
# Data sets, pixels of a side, channels.
SIZES = (
    ("digits", 8, 1),
    ("mnist5k", 28, 1),
    ("fashion_mnist", 28, 1),
    ("cifar10", 32, 3),
)
# Of other sweeps' runs, or of arguments alone.
APART = {"newcomers", "writers"}


def module(paper):
    return importlib.import_module(f"experiments.studies.{paper}")


@functools.cache
def config_of(paper, texts):
    """Reads and checks a point's config; sweeps of a paper have many in common."""
    return points.read(f"experiments/studies/{paper}.py", [], dict(texts))


def points_of(paper, name):
    """What each point of a sweep changes, fields and their texts."""
    of = points.find_named(f"experiments/studies/{paper}.py")
    return [tuple(texts.items()) for texts in points.axis("sweep", name, of)]


def covering(grid):
    """Points with every value, and every set of fields, that there is in a grid."""
    seen, found = set(), []
    for texts in grid:
        new = {*texts, tuple(field for field, _ in texts)} - seen
        if new:
            found.append(texts)
            seen |= new
    return found


@pytest.fixture(autouse=True)
def in_the_repository(repository, monkeypatch):
    monkeypatch.chdir(repository)
    # absl has a flag's value as text, in YAML, for help that nobody asks for here: two
    # fifths of the time in which a point is read.
    monkeypatch.setattr(ml_collections.ConfigDict, "__str__", lambda self: "")


@pytest.mark.parametrize("some", [covering, pytest.param(list, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("paper", "name"), SWEEPS, ids=map("-".join, SWEEPS))
def test_every_sweep_is_a_study_and_its_points_are_sound(paper, name, some):
    of = module(paper).STUDIES[name]
    if name in APART:
        return
    every = points_of(paper, name)
    found = {texts: config_of(paper, texts) for texts in some(every)}
    # What texts mean, as the sweep's record has it.
    values = {}
    for texts, config in found.items():
        flat = common.flat(config)
        values |= {(k, t): t if k.endswith(".name") else flat[k] for k, t in texts}
    labels = {study.named({k: values[k, t] for k, t in p}, of.rows) for p in every}
    if of.rows:
        assert None not in labels
    assert of.baseline is None or of.baseline in labels
    # A table is of methods that are given the same data and the same rounds.
    alike = [config for config in found.values() if not config.data.pooled]
    for field in ("rounds", "data.shrink", "data.split", "local.batch_size"):
        values = {common.flat(config)[field] for config in alike}
        assert len(values) == 1 or paper == "pfedhn", field


def test_what_atp_published_is_of_the_settings_that_records_name():
    of = module("atp").STUDIES["protocol"]
    for fields in module("atp").SHIFTS.values():
        assert ("cifar10", "majors", f"ATP, {record.words(fields)}") in of.published


@pytest.mark.parametrize("paper", PAPERS)
def test_what_is_published_is_of_rows_of_the_study(paper):
    for name, of in module(paper).STUDIES.items():
        for *_, label in of.published:  # settings may follow
            assert any(f"{label}, ".startswith(f"{row}, ") for row in of.rows), label
        metrics = {metric for values in of.published.values() for metric in values}
        assert metrics <= set(of.columns), name
        assert of.baseline is None or of.compared in of.columns, name
        assert hasattr(module(paper), f"sweep_{name}")


@pytest.mark.parametrize("paper", PAPERS)
def test_both_scales(paper):
    get_config = module(paper).get_config
    small, full = get_config(), get_config("scale=paper")
    for config in (small, full):
        build.check(config)
        assert not config.tensorboard
    assert small.data.name in ("digits", "mnist5k") or small.data.shrink == 2
    assert small.rounds <= full.rounds or paper == "pfedhn"
    if paper in ("hyperfednet", "mh_pfedhn", "pfedhn"):  # of any of these sets
        for data, size, depth in SIZES:
            config = get_config(f"data={data}")
            shape = (size // config.data.shrink,) * 2 + (depth,)
            build.make_model(config, shape, 10)
    for sets in {"hyperfednet": hyperfednet.SETS}.get(paper, ()):
        build.check(get_config(f"scale=paper,data={sets}"))
    with pytest.raises(ValueError, match=r"scale='huge'.*'small', 'paper'"):
        get_config("scale=huge")


def test_tables_as_the_paper_prints_them():
    published = hyperfednet.STUDIES["table_ii"].published
    assert published["mnist", "dirichlet", "HFN"] == {"pacc_ft4": 97.91}
    assert published["cifar100", "iid", "HFN"] == {"pacc_ft4": 45.6}
    gains = hyperfednet.STUDIES["table_iv"].published
    fused = {"gain": 50.23, "communication": 33.12}
    assert gains["cifar10", "iid", "HFN+FedFomo"] == fused
    assert {label for *_, label in gains} == set(hyperfednet.UNFUSED)
    table_1 = pfedhn.STUDIES["clients"].published
    assert table_1["cifar100", "class_shares", "FedPer, num_clients=50"] == {
        "pacc": 48.32
    }
    costs = hyperfednet.STUDIES["table_iii"].published["cifar10", "iid", "FedRep"]
    assert costs["to_50"] == 78.86 and "to_60" not in costs


def test_a_point_has_the_name_of_the_most_fields():
    rows = hyperfednet.ALL
    assert study.named(rows["HFN+FedProx"], rows) == "HFN+FedProx"
    assert study.named({**rows["HFN"], "seed": 0}, rows) == "HFN"
    assert study.named({"method.name": "else"}, rows) is None


def test_what_a_fusion_gains_and_costs():
    values = {
        ("FedAvg", "iid"): {0: {"pacc_ft4": 90.0, "to_final": 4.0}, 1: {}},
        ("HFN", "iid"): {0: {"pacc_ft4": 92.0, "to_final": 3.0}},
        ("HFN", "alone"): {0: {"pacc_ft4": 92.0, "to_final": 3.0}},
    }
    hyperfednet.fused(values)
    assert values["HFN", "iid"][0]["gain"] == 2.0
    assert values["HFN", "iid"][0]["communication"] == 75.0
    assert "gain" not in values["HFN", "alone"][0]
    assert "gain" not in values["FedAvg", "iid"][0]


def test_cosines_within_and_between_groups():
    groups = np.arange(20) // 4
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 30))[groups] + 0.1 * rng.normal(size=(20, 30))
    found = hyperfednet.alike(hyperfednet.cosines(rows), groups, draws=99)
    assert found["within"] > 0.9 and abs(found["between"]) < 0.3
    assert found["gap"] == pytest.approx(found["within"] - found["between"])
    assert found["p"] == 0.01  # the true groups alone among a hundred
    apart = hyperfednet.alike(
        hyperfednet.cosines(rng.normal(size=(20, 30))), groups, draws=99
    )
    assert apart["p"] > 0.05
    np.testing.assert_allclose(
        hyperfednet.cosines(np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])),
        [[1, 0, 0.5**0.5], [0, 1, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]],
        atol=1e-12,
    )


@pytest.mark.slow
def test_a_study_from_its_command_to_its_record(tmp_path):
    def go(module, *arguments):
        command = [sys.executable, "-m", f"experiments.{module}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    for _ in range(2):  # the second reads what is there
        go(
            *("sweep", "--config=experiments/studies/hyperfednet.py:data=digits"),
            *("--config.rounds=1", f"--workdir={tmp_path / 'runs'}"),
            *("--sweep=similarity", "--sweep=seed=0..1"),
        )
    folder = next((tmp_path / "runs").glob("*seed=0"))
    kernels, embeddings, groups = hyperfednet.generated(folder)
    # One kernel of 3x3x16x16 numbers, of one tile.
    assert kernels.shape == (20, 2304) and embeddings.shape == (20, 64)
    assert groups.tolist() == [g for g in range(5) for _ in range(4)]
    out = tmp_path / "similarity.json"
    if "+" in json.loads((folder / "config.json").read_text())["commit"]:
        pytest.skip("records are of commits")
    go("studies.record", str(tmp_path / "runs"), f"--out={out}")
    row = json.loads(out.read_text())["rows"][0]
    assert row["within"]["n"] == 2 and row["label"] == "HFN"
    assert out.with_suffix(".svg").read_text().startswith("<svg")


def test_the_picture_of_table_1_is_of_a_run_with_embeddings(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(ValueError, match="no run has embeddings"):
        hyperfedzero.embeddings(folders)
    for t in range(2):
        values = {"pacc": {"embedding": np.eye(3) * t}}
        embedding_maps.keep(folders[1], t, values, 3)
    assert "round 1" in hyperfedzero.embeddings(folders)
