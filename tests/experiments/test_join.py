"""Newcomers join a finished run, and rounds are chosen by validation."""

import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from made_runs import undrawn

from hyperjax import tree
from hyperjax.engine import log
from hyperjax.launch import build, join, origin, saved, train
from hyperjax.launch.resolve import resolve
from hyperjax.protocols import families as families_experiment
from hyperjax.protocols import pfedhn, zero_shot

# One worker runs all, and compiles each program once.
pytestmark = pytest.mark.xdist_group("join")


def small(config, **fields):
    """A few rounds on digits, with unseen clients."""
    config.data.num_novel, config.tensorboard = 2, False
    config.evaluation.every, config.evaluation.finetune_epochs = 1, ()
    config.local.batch_size = 16
    config.checkpoint.keep = 3  # also that of the first state
    config.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in fields.items()}
    )
    return config


_really_load = saved.load
_loaded: dict[str, saved.Run] = {}


def _load(path, field="workdir"):
    if path not in _loaded:
        _loaded[path] = _really_load(path, field)
    run = _loaded[path]
    return run._replace(config=run.config.copy_and_resolve_references())


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Every run that has ended is read once."""
    with pytest.MonkeyPatch.context() as patch, undrawn():
        patch.setattr(saved, "load", _load)
        patch.setattr(train.cli, "use_cores", lambda devices: None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """MH-pFedHN over two sizes of network, with samples for validation."""
    config = families_experiment.get_config("data=digits,clients=4,smoke")
    config.families = ("mlp", "mh_mlp")
    config = small(
        config,
        method__output_size=8192,
        method__hidden_size=2,
        method__embedding_size=2,
        method__num_layers=1,
        data__validation_fraction=0.25,
    )
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.train(config, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def joined(finished, tmp_path_factory):
    """Its two newcomers."""
    folder = tmp_path_factory.mktemp("joined") / "run"
    train.train(join.joining(finished, rounds=2), str(folder))
    return str(folder)


def untrained(path, copy):
    """A copy of a run with nothing but its first state."""
    shutil.copytree(path, copy)
    first, *later = sorted((copy / "checkpoints").glob("round_*"))
    assert first.name == "round_00000000"
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    return str(copy)


def phi(path):
    """{path: array} of a run's hypernetwork."""
    return tree.by_path(saved.load(path).restored.carry.server.phi)


def tables(path):
    return jax.tree.leaves(saved.load(path).restored.carry.server.tables)


def test_newcomers_with_known_networks_learn_their_embeddings_alone(
    finished, joined, tmp_path
):
    before, after = phi(finished), phi(joined)
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name])
    start, old = (
        tables(untrained(path, tmp_path / name))
        for name, path in (("start", joined), ("old", finished))
    )
    for x, y in zip(start, tables(joined), strict=True):
        assert x.shape[0] == 1 and np.any(x != y)
    # They are drawn anew: none is where a participant's was.
    for x, y in zip(start, old, strict=True):
        assert not np.any(np.all(x == y, axis=(1, 2)))
    # The two newcomers are the two unseen clients of the run.
    rows = json.loads(Path(joined, "clients.json").read_text())
    with np.load(f"{finished}/partition.npz") as there:
        held_out, trained_on = there["novel_held_out_size"], there["novel_train_size"]
    assert [r["eval_samples"] for r in rows] == held_out.tolist()
    assert [r["train_samples"] for r in rows] == trained_on.tolist()
    assert "zacc" not in json.loads(Path(joined, "summary.json").read_text())


@pytest.mark.slow
def test_heads_of_new_sizes_are_trained_beside_the_embeddings(finished, tmp_path):
    config = join.joining(finished, families=["mlp", "attack_lenet"], rounds=1)
    path = str(tmp_path / "joined")
    train.train(config, path)
    before, after = phi(finished), phi(path)
    start = small(config, rounds=0)
    train.train(start, str(tmp_path / "start"))
    first = phi(str(tmp_path / "start"))
    for name, x in after.items():
        if name in before:  # the extractor and the head of `mlp`
            np.testing.assert_array_equal(x, before[name])
        else:
            assert name.startswith("heads/") and np.any(x != first[name])
    assert after.keys() - before.keys() and before.keys() - after.keys()


@pytest.mark.slow
def test_a_join_that_was_stopped_continues_to_the_same_bits(finished, tmp_path):
    config = join.joining(finished, rounds=2)
    whole = train.train(config, str(tmp_path / "whole"))

    def stop(*args):
        signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "_check_finite", stop)
        with pytest.raises(train.Stopped):
            train.train(config, str(tmp_path / "parts"))
    parts = train.train(config, str(tmp_path / "parts"))
    assert parts["state_sha256"] == whole["state_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("families", [(), ("mlp", "attack_lenet")], ids=["one", "two"])
def test_pfedhn_embeds_newcomers(families, tmp_path):
    config = pfedhn.get_config("data=digits,clients=4,smoke")
    config.server.cohort_size = 3  # more than there are newcomers
    config = small(config, families=families, model__name="mlp", local__steps=1)
    config.method.hidden_size, config.method.num_hidden = 2, 1
    train.train(config, str(tmp_path / "run"))
    joined = join.joining(str(tmp_path / "run"), rounds=2)
    train.train(joined, str(tmp_path / "joined"))
    before, after = phi(str(tmp_path / "run")), phi(str(tmp_path / "joined"))
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name])


def test_the_best_round_is_that_of_validation(finished):
    summary = json.loads((Path(finished) / "summary.json").read_text())
    records = log.read_lines(Path(finished) / "metrics.jsonl")
    best = max(records, key=lambda r: r["vacc"])
    found = summary["best_by_validation"]
    assert found["round"] == best["round"]
    assert (found["pacc"], found["vacc"]) == (best["pacc"], best["vacc"])
    assert summary["pacc"] == records[-1]["pacc"]  # of the last round


@pytest.mark.parametrize("part", ["share_heads", "share_extractor"])
def test_other_networks_do_not_join_parts_that_are_not_shared(
    part, finished, monkeypatch
):
    run = saved.load(finished, "run")
    run.config.method[part] = False
    shape = tuple(run.facts["sample_shape"].tolist())
    model = build.make_model(run.config, shape, len(run.facts["label_names"]))
    algorithm = build.make_algorithm(run.config, model)
    server = jax.eval_shape(algorithm.server.init, jax.random.key(0))
    carry = run.restored.carry._replace(server=server)
    apart = run._replace(
        algorithm=algorithm, restored=run.restored._replace(carry=carry)
    )
    monkeypatch.setitem(_loaded, "apart", apart)
    # Of the same network in another place, "00_mh_mlp", nothing was trained either.
    for others in (["mh_mlp"], ["mlp", "attack_lenet"]):
        with pytest.raises(ValueError, match=rf"families=.*{part}=False.*own$"):
            join.joining("apart", families=others)
    # The run's own find every part again: nothing but embeddings is left to train.
    freeze = join.joining("apart", rounds=1).method.freeze
    for path in tree.paths(server.phi):
        assert any(re.fullmatch(pattern, path) for pattern in freeze), path


def test_what_cannot_be_joined_is_refused(finished, joined, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"run='nowhere' holds no run"):
        join.joining("nowhere")
    fields = dict(data__name="digits", model__hidden=(4,), rounds=0)
    config = small(zero_shot.get_config("fedavg"), **fields)
    (tmp_path / "fedavg").mkdir()
    about = resolve(config).config, {"device": "cpu"}, {}
    origin.describe(tmp_path / "fedavg", *about)
    other = saved.load(finished, "run")._replace(config=config)
    monkeypatch.setitem(_loaded, str(tmp_path / "fedavg"), other)
    with pytest.raises(
        ValueError, match=r"'fedavg', whose server has no hypernet.*pfedhn"
    ):
        join.joining(str(tmp_path / "fedavg"))
    with pytest.raises(ValueError, match=r"families.*'nonsense'"):
        join.joining(finished, families=["nonsense"])
    config = join.joining(finished)
    with pytest.raises(ValueError, match="itself one of newcomers"):
        join.joining(joined)
    assert config.rounds == 2
    assert join.continued(joined, [], None).to_dict() == config.to_dict()
    assert join.continued(str(tmp_path / "new"), [], None) is None
    for folder, run, message in (
        (finished, finished, "holds a run of other clients than newcomers"),
        (tmp_path / "fedavg", finished, "holds a run of other clients"),
        (joined, tmp_path / "fedavg", "holds newcomers to run='.*', not to '.*"),
    ):
        with pytest.raises(ValueError, match=rf"workdir='{folder}' {message}"):
            join.main(str(run), str(folder), [], None, None)
    # Of a run that is no longer there the newcomers go on.
    assert join.main("gone", joined, [], None, None) == 0
    experiment = build.build(config)
    mistakes = [
        (dict(method__freeze=("heads/77/.*",)), "matches no variable"),
        (dict(start__take=("phi/(",)), r"start.take has 'phi/\('"),
        (dict(start__take=("phi/.*", "tabels/.*")), "'tabels/.*' matches no variable"),
        (dict(start__take=("tables/.*",)), "is float32.* in the run to start from"),
        (dict(data__seed=9), "are not those of start.run"),
    ]
    for fields, message in mistakes:
        wrong = small(config.copy_and_resolve_references(), **fields)
        # What is taken from the run is nothing that is built.
        same = experiment if fields.keys() == {"start__take"} else None
        with pytest.raises(ValueError, match=message):
            train.train(wrong, str(tmp_path / "y"), experiment=same)
        assert not (tmp_path / "y" / "config.json").exists()
