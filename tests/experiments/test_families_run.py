"""Runs whose clients have different networks, through the launcher."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_runs import undrawn

from hyperjax.engine import checkpoint, log
from hyperjax.launch import build, evaluate, train
from hyperjax.protocols import families
from hyperjax.runs.experiment import blocks

# One worker runs all, and compiles each program once.
pytestmark = pytest.mark.xdist_group("families_run")

NETWORKS = ("mlp", "mh_mlp", "mlp")


def small(averaged=False, **fields):
    """MH-pFedHN on digits for two rounds; `data__seed=1` sets `data.seed`."""
    config = families.get_config("data=digits,clients=5,smoke")
    config.families = NETWORKS
    config.server.sequential = not averaged
    config.method.output_size, config.method.hidden_size = 8192, 2
    config.method.embedding_size, config.method.num_layers = 2, 1
    config.data.num_novel, config.data.test_fraction = 2, 0.2
    config.evaluation.every, config.local.epochs = 1, 1
    config.evaluation.finetune_epochs = () if averaged else (1,)
    config.tensorboard = False
    config.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in fields.items()}
    )
    return config


@pytest.fixture(scope="module", autouse=True)
def pages():
    with undrawn():
        yield


_really_build = build.make_experiment
_built: dict[str, build.Experiment] = {}


def _build(config, store_dir=None):
    key = config.to_json()
    if key not in _built:
        _built[key] = _really_build(config, store_dir)
    return _built[key]


@pytest.fixture(autouse=True)
def built_once(monkeypatch):
    """Runs of one config in one process share their compiled programs."""
    monkeypatch.setattr(build, "make_experiment", _build)


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["in turn", "averaged"],
)
def finished(request, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_experiment", _build)
        train.train(small(request.param), str(folder))
    return folder


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def averaged(folder: Path) -> bool:
    """Whether the server steps once a round."""
    return not read(folder, "config.json")["config"]["server"]["sequential"]


def test_the_summary_has_the_costs_of_every_family(finished):
    summary = read(finished, "summary.json")
    # 64-200-200-10 and 64-128-64-10.
    mlp = 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10
    other = 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    found = {}
    sizes = {"00_mlp": (2, mlp), "01_mh_mlp": (2, other), "02_mlp": (1, mlp)}
    for name, (num, numbers) in sizes.items():
        found[name] = dict(
            clients=num,
            down_numbers=numbers,
            up_numbers=numbers,
            down_bytes=4 * numbers,
            up_bytes=4 * numbers,
        )
    assert summary["families"] == found
    # All clients in both rounds.
    total = 2 * 4 * (3 * mlp + 2 * other)
    assert summary["up_bytes_total"] == summary["down_bytes_total"] == total
    assert summary["up_numbers"] == (3 * mlp + 2 * other) / 5
    records = log.read_lines(finished / "metrics.jsonl")
    assert [r["up_bytes_total"] for r in records] == [0, total // 2, total]


def test_the_summary_has_everybodys_scores(finished):
    summary, rows = read(finished, "summary.json"), read(finished, "clients.json")
    # The global test set belongs to no family.
    assert "gacc" not in summary and 0 <= summary["zacc"] <= 100
    assert summary["rounds"] == 2 and summary["finished"]
    assert [row["client"] for row in rows] == list(range(7))
    assert all(isinstance(row["eval_samples"], int) for row in rows)
    for metric, whose in (("pacc", rows[:5]), ("zacc", rows[5:])):
        share = [row["accuracy"] * row["eval_samples"] for row in whose]
        total = sum(row["eval_samples"] for row in whose)
        assert sum(share) / total == pytest.approx(summary[metric], rel=1e-4)
        if not averaged(finished):
            assert 0 <= summary[metric + "_ft1"] <= 100
    assert "mh_pfedhn" in (finished / "report.html").read_text()


def test_what_belongs_to_no_client_is_said(finished):
    # 7 clients with 2 of 10 classes each leave some classes of the digits to nobody.
    summary, page = read(finished, "summary.json"), (finished / "report.html")
    with np.load(finished / "partition.npz") as tables:
        dealt = int(tables["counts"].sum() + tables["test_size"].sum())
    assert summary["unassigned"] == 1797 - dealt > 0
    assert f"{1797 - dealt:,} more belong to no client." in page.read_text()


class Killed(BaseException):
    """Stands for SIGKILL where the rest of the process would not matter."""


def test_a_killed_run_continues_to_the_same_bits(finished, tmp_path, monkeypatch):
    config = small(averaged(finished))
    save, saved = checkpoint.Saver.save, []

    def once(saver, round, *rest):
        if round == 2:
            raise Killed
        saved.append(round)
        return save(saver, round, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", once)
        with pytest.raises(Killed):
            train.train(config, str(tmp_path))
    assert saved == [0, 1] and not (tmp_path / "summary.json").exists()
    train.train(config, str(tmp_path))
    summaries = [read(path, "summary.json") for path in (tmp_path, finished)]
    assert summaries[0]["state_sha256"] == summaries[1]["state_sha256"]
    for name in ("metrics.jsonl", "clients.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_an_unmet_client_cannot_be_served(finished):
    with pytest.raises(ValueError, match=r"different networks.*experiments.join"):
        evaluate.load_run(str(finished))


def test_blocks_of_clients_are_equal_and_leftovers_go_to_the_first():
    found = blocks(("a", "b", "c"), 8)
    assert {k: v.tolist() for k, v in found.items()} == {
        "a": [0, 1, 2],
        "b": [3, 4, 5],
        "c": [6, 7],
    }
    experiment = build.build(small())
    assert experiment.members.names == ("00_mlp", "01_mh_mlp", "02_mlp")
    np.testing.assert_array_equal(experiment.members.family, [0, 0, 1, 1, 2])


def test_one_network_for_all_is_one_family():
    config = small()
    config.families = ()
    found = build.make_model(config, (8, 8, 1), 10)
    assert list(found) == ["00_mlp"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(method=dict(name="fedavg")),
            r"'fedavg' needs one network.*goes with: .*mh",
        ),
        (dict(data__pooled=True), r"data.pooled=True trains one .*families=\('mlp'"),
        (dict(data__num_clients=2), r"num_clients=2 is less than the 3 families"),
        (dict(families=("mlp", "mpl")), r"families='mpl' is unknown; .*mean 'mlp'"),
        (dict(families=("mlp", "no.module:Net")), r"'no.module:Net'.*No module"),
        (dict(method__output_size=0), "output_size=0 must be at least 1"),
        (dict(method__hidden=3), "option of method=mh_pfedhn='hidden'"),
    ],
)
def test_mistakes_are_found_before_any_work(fields, message, tmp_path):
    config = small()
    for name in ("families", "method"):
        if name in fields:
            config[name] = fields.pop(name)
    config.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in fields.items()}
    )
    with pytest.raises(ValueError, match=message):
        train.train(config, str(tmp_path / "run"))
    assert not list(tmp_path.rglob("*.jsonl"))
