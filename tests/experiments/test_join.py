"""Newcomers join a finished run, and rounds are chosen by validation."""

import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.engine import log
from hyperjax.launch import join, saved, train
from hyperjax.protocols import families as families_experiment
from hyperjax.protocols import pfedhn, zero_shot

# One worker runs all, and compiles each program once.
pytestmark = pytest.mark.xdist_group("join")


def small(config, **fields):
    """A few rounds on digits, with unseen clients."""
    config.data.num_novel, config.tensorboard = 2, False
    config.evaluation.every, config.evaluation.finetune_epochs = 1, ()
    config.local.batch_size = 16
    config.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in fields.items()}
    )
    return config


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
def untrained(finished, tmp_path_factory):
    """Its two newcomers, before their first round."""
    folder = tmp_path_factory.mktemp("untrained") / "run"
    train.train(join.joining(finished, rounds=0), str(folder))
    return str(folder)


def phi(path):
    """{path: array} of a run's hypernetwork."""
    return tree.by_path(saved.load(path).restored.carry.server.phi)


def tables(path):
    return jax.tree.leaves(saved.load(path).restored.carry.server.tables)


def test_newcomers_with_known_networks_learn_their_embeddings_alone(
    finished, untrained, tmp_path
):
    config = join.joining(finished, rounds=2)
    summary = train.train(config, str(tmp_path / "joined"))
    before, after = phi(finished), phi(str(tmp_path / "joined"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name])
    pairs = zip(tables(untrained), tables(str(tmp_path / "joined")), strict=True)
    for x, y in pairs:
        assert x.shape[0] == 1 and np.any(x != y)
    # They are drawn anew: none is where a participant's was.
    old = saved.load_config(finished, "run")
    train.train(small(old, rounds=0), str(tmp_path / "old"))
    paths = untrained, str(tmp_path / "old")
    for x, y in zip(*map(tables, paths), strict=True):
        assert not np.any(np.all(x == y, axis=(1, 2)))
    # The two newcomers are the two unseen clients of the run.
    rows = json.loads((tmp_path / "joined" / "clients.json").read_text())
    with np.load(f"{finished}/partition.npz") as there:
        held_out, trained_on = there["novel_held_out_size"], there["novel_train_size"]
    assert [r["eval_samples"] for r in rows] == held_out.tolist()
    assert [r["train_samples"] for r in rows] == trained_on.tolist()
    assert "zacc" not in summary


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
def test_other_networks_do_not_join_parts_that_are_not_shared(part, finished, tmp_path):
    config = saved.load_config(finished, "run")
    config.method[part] = False
    train.train(small(config, rounds=0), str(tmp_path / "apart"))
    # Of the same network in another place, "00_mh_mlp", nothing was trained either.
    for others in (["mh_mlp"], ["mlp", "attack_lenet"]):
        with pytest.raises(ValueError, match=rf"families=.*{part}=False.*own$"):
            join.joining(str(tmp_path / "apart"), families=others)
    # The run's own find every part again: nothing but embeddings is left to train.
    joined = join.joining(str(tmp_path / "apart"), rounds=1)
    train.train(joined, str(tmp_path / "joined"))
    before, after = phi(str(tmp_path / "apart")), phi(str(tmp_path / "joined"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name])


def test_what_cannot_be_joined_is_refused(finished, untrained, tmp_path):
    with pytest.raises(ValueError, match=r"run='nowhere' holds no run"):
        join.joining("nowhere")
    fields = dict(data__name="digits", model__hidden=(4,), rounds=0)
    config = small(zero_shot.get_config("fedavg"), **fields)
    train.train(config, str(tmp_path / "fedavg"))
    with pytest.raises(
        ValueError, match=r"'fedavg', whose server has no hypernet.*pfedhn"
    ):
        join.joining(str(tmp_path / "fedavg"))
    with pytest.raises(ValueError, match=r"families.*'nonsense'"):
        join.joining(finished, families=["nonsense"])
    config = join.joining(finished, rounds=0)
    with pytest.raises(ValueError, match="itself one of newcomers"):
        join.joining(untrained)
    assert join.continued(untrained, [], None).to_dict() == config.to_dict()
    assert join.continued(str(tmp_path / "new"), [], None) is None
    for folder, run, message in (
        (finished, finished, "holds a run of other clients than newcomers"),
        (tmp_path / "fedavg", finished, "holds a run of other clients"),
        (untrained, tmp_path / "fedavg", "holds newcomers to run='.*', not to '.*"),
    ):
        with pytest.raises(ValueError, match=rf"workdir='{folder}' {message}"):
            join.main(str(run), str(folder), [], None, None)
    # Of a run that is no longer there the newcomers go on.
    assert join.main("gone", untrained, [], None, None) == 0
    config = join.joining(finished)
    mistakes = [
        (dict(method__freeze=("heads/77/.*",)), "matches no variable"),
        (dict(start__take=("phi/(",)), r"start.take has 'phi/\('"),
        (dict(start__take=("phi/.*", "tabels/.*")), "'tabels/.*' matches no variable"),
        (dict(start__take=("tables/.*",)), "is float32.* in the run to start from"),
        (dict(data__seed=9), "are not those of start.run"),
    ]
    for fields, message in mistakes:
        wrong = small(config.copy_and_resolve_references(), **fields)
        with pytest.raises(ValueError, match=message):
            train.train(wrong, str(tmp_path / "y"))
        assert not (tmp_path / "y" / "config.json").exists()
