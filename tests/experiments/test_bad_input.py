"""Every mistake is one readable message, made before any work and any file."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import ROOT, launch, small

from hyperjax.engine import checkpoint, schedule
from hyperjax.launch import build, train
from hyperjax.protocols import zero_shot
from hyperjax.runs import loop


def config(**fields):
    """HyperFedZero on digits; `a__b=1` sets `a.b`, of another type too."""
    found = zero_shot.get_config("data=digits")
    found.rounds, found.tensorboard = 2, False
    with found.unlocked(), found.ignore_type():
        found.update_from_flattened_dict(
            {k.replace("__", "."): v for k, v in fields.items()}
        )
    return found


MISTAKES = [
    # Names: what was given, the nearest, and what there is.
    (dict(method__name="hyperfedzro"), r"method.name='hyperfedzro'.*'hyperfedzero'\?"),
    (dict(method__name="nonsense"), r"accepted: .*'fedavg', .*'hyperfedzero'"),
    (
        dict(model__name="lenets"),
        r"model.name='lenets'.*mean 'lenet_s'.*are accepted, near it 'lenet'",
    ),
    (dict(model__name="no.module:Net"), r"model.name='no.module:Net'.*No module"),
    (dict(data__name="digit"), "'digit'.*nearest names: digits"),
    (dict(data__partition="dirichlett"), r"data.partition=.*mean 'dirichlet'.*'iid'"),
    (dict(local__optimizer="sdg"), r"local.optimizer='sdg' is unknown; did you mean"),
    (dict(server__optimizer="fedadm"), r"server.optimizer='fedadm'.*'fedadam'\?"),
    (
        dict(local__optimizer="sgd(momentun=0.9)"),
        r"local.optimizer=sgd='momentun'.*mean 'momentum'",
    ),
    (dict(local__optimizer="sgd(momentum='x')"), r"local.optimizer=.*momentum='x'"),
    (dict(server__optimizer="fedadam(0.1)"), r"server.optimizer=.*not of the form"),
    (dict(local__optimizer="lbfgs"), "local.optimizer='lbfgs'"),
    (dict(server__weights="sizes"), "server.weights='sizes'.*'size'.*'uniform'"),
    (dict(server__sampler="all"), "server.sampler='all'.*'full', 'uniform'"),
    (dict(engine__store="disk"), "engine.store='disk'.*'device', 'host'"),
    (dict(engine__mapper="pmap"), "engine.mapper='pmap'.*'vmap'"),
    (dict(engine__precision="bf16"), "engine.precision='bf16'.*'highest'"),
    (dict(engine__conv_rule="x"), "engine.conv_rule='x'.*'xla'"),
    (dict(method__cv_mode="batch"), "cv_mode='batch'.*'batch_mean'"),
    (dict(method__enter="raw"), "enter='raw'.*'embedding'"),
    (dict(method__condition_source="x"), "condition_source='x'.*'eval_inputs'"),
    (dict(data__split="test"), "split='test'.*'train' alone"),
    # Numbers: what was given and the bound.
    (dict(data__alpha=0.0), "data.alpha=0.0 must be positive"),
    (dict(data__alpha=-1.0), "data.alpha=-1.0 must be positive"),
    (dict(data__num_clients=0), "data.num_clients=0 must be at least 1"),
    (dict(data__num_novel=-1), "data.num_novel=-1 must be at least 0"),
    (
        dict(server__sampler="uniform", server__cohort_size=11),
        "server.cohort_size=11 must be between 1 and data.num_clients=10",
    ),
    (
        dict(server__sampler="uniform", server__cohort_size=0),
        "server.cohort_size=0 must be between 1 and",
    ),
    (dict(rounds=-1), "rounds=-1 must be at least 0"),
    (dict(local__batch_size=0), "local.batch_size=0 must be at least 1"),
    (dict(local__epochs=-1), "local.epochs=-1 must be at least 0"),
    (dict(local__steps=-1), "steps=-1"),
    (dict(local__learning_rate=-0.1), "local.learning_rate=-0.1 must be at least 0"),
    (dict(local__clip_norm=0.0), "clip_norm=0.0 must be positive"),
    (dict(evaluation__every=0), "evaluation.every=0 must be at least 1"),
    (dict(evaluation__batch_size=0), "evaluation.batch_size=0 must be at least 1"),
    (dict(evaluation__clients_per_call=0), "evaluation.clients_per_call=0 must be"),
    (dict(checkpoint__keep=0), "checkpoint.keep=0 must be at least 1"),
    (dict(engine__devices=-1), "devices=-1 must be at least 0"),
    (dict(engine__block_size=0), "block_size=0 must be at least 1"),
    (dict(engine__rounds_per_call=-1), "engine.rounds_per_call=-1 must be at least 0"),
    (dict(method__chunk_size=0), "chunk_size=0 must be at least 1"),
    (dict(method__chunk_embedding_size=0), "chunk_embedding_size=0 must be at least 1"),
    (dict(method__embedding_size=0), "embedding_size=0 must be at least 1"),
    (dict(data__test_fraction=1.5), "data.test_fraction=1.5 must be at least 0 and"),
    (dict(data__eval_fraction=0.0), "eval_fraction=0.0 must lie between 0 and 1"),
    (dict(seed=-1), "seed=-1 must be at least 0"),
    # What the data set cannot give.
    (
        dict(data__num_clients=2000, data__min_size=1),
        "num_clients=2000 and num_novel=5 must not be more than the 1438 samples",
    ),
    (
        dict(data__num_clients=200, data__min_size=10),
        "min_size=10 for each of 205 clients takes 2050 samples; there are 1438",
    ),
    (dict(data__alpha=0.01, data__min_size=60), "never gave every client min_size=60"),
    (dict(data__min_size=0), "min_size=0 must be at least 1"),
    (
        dict(data__num_clients=1000, data__partition="iid"),
        r"client \d+ has 1 sample\(s\); a client needs one to train",
    ),
    (
        dict(data__partition="pathological", data__classes_per_client=11),
        "classes_per_client=11 must lie between 1 and the 10 classes",
    ),
    (
        dict(data__partition="pathological", data__classes_per_client=0),
        "classes_per_client=0 must lie between 1 and the 10 classes",
    ),
    (dict(data__partition="by_client_id"), "needs data.client_ids: ids.npy, or"),
    (
        dict(model__name="lenet", model__hidden=(), engine__conv_rule="xla"),
        r"model LeNet does not accept inputs of shape \(8, 8, 1\)",
    ),
    (dict(data__name="mnist", data__data_dir="/nowhere"), "data_dir='/nowhere' is not"),
]


@pytest.mark.parametrize(("fields", "match"), MISTAKES)
def test_a_mistake_is_named_before_anything_is_written(fields, match, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){match}"):
        train.train(config(**fields), str(folder))
    assert list(tmp_path.iterdir()) == []


def test_a_corrected_mistake_may_use_the_same_folder(tmp_path, monkeypatch):
    with pytest.raises(ValueError):
        train.train(config(data__min_size=0), str(tmp_path / "run"))

    class Enough(Exception):
        pass

    def stop(*args):
        raise Enough

    # Reached: the folder was accepted.
    monkeypatch.setattr(build, "make_experiment", stop)
    with pytest.raises(Enough):
        train.train(config(), str(tmp_path / "run"))


def test_a_diverging_run_stops_and_names_where(tmp_path, monkeypatch):
    diverging = small(local__learning_rate=1e9, local__epochs=1, local__steps=None)
    folder = tmp_path / "run"
    experiment = build.build(diverging)
    monkeypatch.setattr(build, "make_experiment", lambda *args: experiment)
    for _ in range(2):  # the state is intact: it ends the same way again
        with pytest.raises(loop.Diverged) as error:
            train.train(diverging, str(folder))
        message = str(error.value)
        assert re.match(
            r"round [12]: .*(loss|update_norm|state).* (is|are) not finite\.", message
        )
        assert f"after round 0 in {folder / 'checkpoints'}" in message
        assert "local.learning_rate" in message
        checkpoints = [p.name for p in (folder / "checkpoints").iterdir()]
        assert checkpoints == ["round_00000000"]
        assert not (folder / "summary.json").exists()
    template = schedule.abstract_carry(experiment.algorithm, 4)
    assert checkpoint.restore(folder / "checkpoints", template).round == 0


# The command line --------------------------------------------------------------------

DIGITS = "--config=configs/zero_shot.py:data=digits"

COMMANDS = {
    "nearest field": ([DIGITS, "--config.rouns=3"], "rouns.*rounds"),
    "unknown field below": (
        [DIGITS, "--config.local.momentum=1"],
        "local.momentum.*is unknown",
    ),
    "option of others": (
        [DIGITS, "--config.method.mu=1"],
        "method.mu' is unknown to this method; it is an option of fedprox, moon",
    ),
    "place of data": (
        [DIGITS, "--config.data.path=mine.npz"],
        "data.path' is unknown; data of your own are data.name=mine.npz",
    ),
    "type": ([DIGITS, "--config.rounds=abc"], "rounds=abc must be a whole number"),
    "no workdir": (None, "--workdir is required; see --help"),
    "no config": ([], "--config is required; see --help"),
    "no such config": (["--config=configs/nothing.py"], "'configs/nothing.py'"),
    "argument": ([f"{DIGITS},colour=3"], "unknown config argument 'colour'.*alpha"),
    "empty argument": (["--config=zero_shot:"], "--config has nothing after the colon"),
    "argument of no use": ([f"{DIGITS},tuned"], "no rate was chosen for 'hyperf"),
    "argument without value": ([f"{DIGITS},alpha="], "'alpha=' has no value"),
    "argument twice": ([f"{DIGITS},alpha=1,alpha=2"], "'alpha' is given twice"),
    "experiment": (["--config=zeroshot.py:fedprox"], "no file.*did you mean 'zero_sh"),
    "method alone": (["--config=fedprox"], "is a method; .*as in zero_shot:fedprox"),
    "method of it": (["--config=zero_shot:fedprx"], "method='fedprx'.*'fedprox'"),
    "option": ([DIGITS, "--config.method.mu=1"], "method.mu' is unknown"),
    "option of another method": (
        ["--config=zero_shot:fedprox", "--config.method.muu=1"],
        "method.muu' is unknown; did you mean 'method.mu'",
    ),
    "nothing for something": (
        [DIGITS, "--config.rounds=None"],
        "rounds=None must be a",
    ),
    "of no use": (
        [DIGITS, "--config.server.cohort_size=3"],
        "server.cohort_size was given and would change nothing: server.sampler='full'",
    ),
    "two lengths": (
        [DIGITS, "--config.local.epochs=2", "--config.local.steps=3"],
        "local.epochs=2 and local.steps=3 are two lengths",
    ),
    "stray word": ([DIGITS, "more"], "unexpected argument 'more'"),
    "unknown flag": ([DIGITS, "--rounds=3"], "Unknown command line flag 'rounds'"),
    "method": ([DIGITS, "--config.method.name=fedavgg"], "mean 'fedavg'"),
    "data set": ([DIGITS, "--config.data.name=digit"], "nearest names: digits"),
    "data_dir": (
        [DIGITS, "--config.data.name=mnist", "--config.data.data_dir=nowhere"],
        "data_dir='nowhere' is not an existing folder",
    ),
}


@pytest.mark.xdist_group("launcher")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_gives_one_message(name, tmp_path):
    argv, match = COMMANDS[name]
    workdir = [f"--workdir={tmp_path / 'run'}"]
    argv = [DIGITS] if argv is None else [*workdir, *argv]
    result = launch(tmp_path / "said", *argv).result()
    assert result.code == 2
    assert result.out == ""
    # What is found while the data set is read comes after the word of that.
    said = r"([^\n]+ \| reading [^\n]+\n)?error: .+\n\(--debug shows where\)\n\Z"
    assert re.match(said, result.err, re.DOTALL)
    assert re.search(match, result.err, re.DOTALL)
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.xdist_group("launcher")
@pytest.mark.parametrize("name", ["nearest field", "method"])
def test_debug_shows_where(name, tmp_path):
    argv = [f"--workdir={tmp_path / 'run'}", "--debug", *COMMANDS[name][0]]
    result = launch(tmp_path / "said", *argv).result()
    assert result.code not in (0, None)
    assert "Traceback (most recent call last)" in result.err
    assert re.search(COMMANDS[name][1], result.err, re.DOTALL)


@pytest.mark.xdist_group("launcher")
@pytest.mark.parametrize("argv", [["--help"], [DIGITS, "--help"]])
def test_help_comes_first_whatever_else_is_given(argv, tmp_path):
    result = launch(tmp_path / "said", *argv).result()
    assert (result.code, result.err) == (0, "")
    for words in ("Trains one method", "--workdir", "zero_shot", "fedprox", "rounds="):
        assert words in result.out
    assert ("Options of hyperfedzero" in result.out) == (DIGITS in argv)


def test_a_process_of_its_own_says_the_same(tmp_path):
    """The same as above without the helper: what a user types."""
    workdir = tmp_path / "file"
    workdir.write_text("mine")
    result = subprocess.run(
        [sys.executable, "-m", "experiments.train", DIGITS, f"--workdir={workdir}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        f"error: workdir={str(workdir)!r} is a file; give a folder\n"
        "(--debug shows where)\n"
    )
    assert Path(workdir).read_text() == "mine"
