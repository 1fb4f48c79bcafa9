"""The launcher: kills, stops, damage and other folders never cost or falsify a run."""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import launched
import numpy as np
import pytest
from launched import Process, Result
from made_runs import undrawn

from hyperjax.engine import checkpoint, log
from hyperjax.engine.progress import Silent
from hyperjax.launch import build, origin, report, saved, train, workdir
from hyperjax.launch.resolve import resolve
from hyperjax.protocols import zero_shot

# One worker runs everything that starts processes, and starts the server once.
pytestmark = pytest.mark.xdist_group("launcher")

ROOT = Path(__file__).parents[2]
DIGITS = (
    "--config=configs/zero_shot.py:fedavg,data=digits",
    "--config.model.hidden=(4,)",
    "--config.rounds=6",
    "--config.evaluation.every=2",
)


# Processes ---------------------------------------------------------------------------


def launch(folder: Path, *argv: str, signal_at: tuple | None = None) -> Process:
    """Starts `python -m experiments.train`; its output goes to files in `folder`.

    `signal_at` = (signal, round): it sends itself the signal right after the results of
    that round are written, which is before the checkpoint of that round.
    """
    first = () if signal_at is None else (_signal_self, *signal_at)
    return launched.launch(folder, "experiments.train", argv, ROOT, *first)


def _signal_self(number: int, round: int) -> None:
    append = log.Recorder._append

    def and_signal(self, name, record):
        append(self, name, record)
        if name == log.METRICS and record["round"] == round:
            os.kill(os.getpid(), number)

    log.Recorder._append = and_signal


# A story in five processes -----------------------------------------------------------


class Story(NamedTuple):
    """One run left alone, and one that was killed twice, stopped and damaged."""

    whole: Path
    broken: Path
    results: dict[str, Result]
    after_stop: list[str]  # checkpoints


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    root = tmp_path_factory.mktemp("story")
    whole, broken = root / "whole", root / "broken"

    def go(name, workdir, signal_at=None):
        argv = (*DIGITS, f"--workdir={workdir}")
        return launch(root / name, *argv, signal_at=signal_at)

    alone = go("alone", whole)
    early = go("early", broken)
    deadline = time.monotonic() + 120
    while not broken.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    early.process.kill()
    results = {"early": early.result()}
    results["killed"] = go("killed", broken, (signal.SIGKILL, 2)).result()
    results["stopped"] = go("stopped", broken, (signal.SIGTERM, 4)).result()
    after_stop = sorted(p.name for p in (broken / "checkpoints").iterdir())
    newest = broken / "checkpoints" / "round_00000004"
    if newest.exists():
        flip(newest)
    results["last"] = go("last", broken).result()
    results["alone"] = alone.result()
    return Story(whole, broken, results, after_stop)


def flip(path: Path) -> None:
    """Flips bytes in the middle of a checkpoint's data."""
    for file in data_files(path):
        content = bytearray(file.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(255 - b for b in content[middle:][:64])
        file.write_bytes(content)


def data_files(path: Path) -> list[Path]:
    """The files with numbers; orbax may keep some twice, and read only one of them."""
    files = [p for p in path.rglob("d/*") if p.is_file()]
    assert files
    return files


def test_the_story_went_as_told(story):
    assert story.results["early"].code == -signal.SIGKILL
    assert story.results["killed"].code == -signal.SIGKILL
    assert story.results["alone"].code == 0, story.results["alone"].err
    assert story.results["last"].code == 0, story.results["last"].err


def test_sigterm_ends_with_a_message_and_a_checkpoint(story):
    stopped = story.results["stopped"]
    assert stopped.code == 0, stopped.err
    assert stopped.out == "Stopped after round 4; the same command continues.\n"
    assert "Traceback" not in stopped.err
    assert story.after_stop == ["round_00000002", "round_00000004"]


def test_damage_is_reported_and_the_checkpoint_before_is_used(story):
    err = story.results["last"].err
    assert err.count("is damaged") == 1
    assert re.search(r"round_00000004 is damaged \(.+\); trying the one before", err)


def test_broken_and_whole_run_have_the_same_bits(story):
    whole, broken = (read(path, "summary.json") for path in (story.whole, story.broken))
    assert whole["state_sha256"] == broken["state_sha256"]
    for name in ("metrics.jsonl", "training.jsonl", "clients.json"):
        assert (story.whole / name).read_bytes() == (story.broken / name).read_bytes()
    timed = {"seconds", "samples_per_second", "compile_seconds"}
    assert without(whole, timed) == without(broken, timed)
    tables = [np.load(path / "partition.npz") for path in (story.whole, story.broken)]
    assert tables[0].files == tables[1].files
    for key in tables[0].files:
        np.testing.assert_array_equal(tables[0][key], tables[1][key])


def read(path: Path, name: str):
    """Reads a JSON file of a run."""
    return json.loads((path / name).read_text())


def without(record: dict, names) -> dict:
    """The record without some of its fields."""
    return {k: v for k, v in record.items() if k not in names}


def test_the_result_is_printed_and_progress_goes_to_stderr(story):
    alone, summary = story.results["alone"], read(story.whole, "summary.json")
    first, second, last = alone.out.splitlines()
    assert first.startswith(f"fedavg on digits: gACC {summary['gacc']:.2f}, ")
    means = ", ".join(
        f"{m[:1]}ACC {summary[f'{m}_mean']:.2f}" for m in ("pacc", "zacc")
    )
    assert second == f"means over clients: {means}"
    assert max(len(first), len(second)) <= 80
    assert last == f"report: {story.whole / 'report.html'}"  # a path to click
    assert "fedavg | reading digits, building fedavg\n" in alone.err
    told = alone.err.partition("fedavg | round")[0]
    assert "read          1,797 images of 8x8x1, uint8, 0 to 255\n" in told
    assert "left out      nothing\n" in told and "participants  " in told
    assert "\x1b" not in alone.err and "\r" not in alone.err
    assert "fedavg | round 6/6 | loss " in alone.err


def test_config_json_says_what_made_the_run(story):
    record = read(story.whole, "config.json")
    assert record["config"]["rounds"] == 6
    assert record["config"]["method"]["name"] == "fedavg"
    assert record["config"]["seed"] == 0
    assert record["commit"] is None or re.fullmatch(
        r"[0-9a-f]{40}\+?", record["commit"]
    )
    assert set(origin.PACKAGES) == set(record["versions"])
    assert record["versions"]["jax"] == jax.__version__
    assert record["format"] == origin.FORMAT and record["history"] == []
    assert record["settings"]["jax_default_prng_impl"] == "threefry2x32"
    assert record["data"].keys() == {"pixels", "labels", "partition"}
    assert all(re.fullmatch("[0-9a-f]{64}", x) for x in record["data"].values())
    assert record["device"] == record["plan"]["device"] == "cpu"
    assert record["plan"]["mapper"] == "map"
    assert record["plan"] == read(story.whole, "summary.json")["plan"]


def test_partition_npz_holds_tables_and_counts(story):
    tables = np.load(story.whole / "partition.npz")
    assert tables["counts"].shape == (15, 10)
    assert tables["participating"].tolist() == [True] * 10 + [False] * 5
    names = ("train", "held_out", "novel", "test")
    rows = [
        row[:size]
        for name in names
        for row, size in zip(
            tables[f"{name}_rows"], tables[f"{name}_size"], strict=True
        )
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(1797))


def test_every_evaluation_is_one_line(story):
    metrics = log.read_lines(story.whole / "metrics.jsonl")
    assert [record["round"] for record in metrics] == [0, 2, 4, 6]
    assert metrics[0]["loss"] is None
    assert all(record["loss"] > 0 for record in metrics[1:])
    for folder in (story.whole, story.broken):
        timing = log.read_lines(folder / "timing.jsonl")
        assert [record["round"] for record in timing] == [0, 2, 4, 6]
        assert all(record["seconds"] > 0 for record in timing)


def test_summary_json_has_what_a_reader_needs(story):
    summary = read(story.whole, "summary.json")
    last = log.read_lines(story.whole / "metrics.jsonl")[-1]
    given = dict(method="fedavg", dataset="digits", rounds=6, seed=0)
    assert summary.items() >= given.items()
    for metric in ("gacc", "pacc", "zacc"):
        for suffix in ("", "_mean", "_std", "_p10", "_em", "_oracle"):
            value = summary[metric + suffix]
            assert 0 <= value <= 100 and value == last[metric + suffix]
    for direction in ("up", "down"):
        # float32, ten clients, six rounds.
        num_bytes = summary[f"{direction}_bytes"]
        assert num_bytes == 4 * summary[f"{direction}_numbers"] > 0
        assert summary[f"{direction}_bytes_total"] == 60 * num_bytes
    for name in ("seconds", "samples_per_second", "compile_seconds"):
        assert summary[name] > 0
    assert re.fullmatch(r"[0-9a-f]{64}", summary["state_sha256"])


def test_clients_json_has_a_row_for_everybody(story):
    rows = read(story.whole, "clients.json")
    assert [row["client"] for row in rows] == list(range(15))
    assert [row["participating"] for row in rows] == [True] * 10 + [False] * 5
    assert all(row["train_samples"] == 0 for row in rows[10:])
    share = [row["accuracy"] * row["eval_samples"] for row in rows[10:]]
    total = sum(row["eval_samples"] for row in rows[10:])
    expected = read(story.whole, "summary.json")["zacc"]
    assert sum(share) / total == pytest.approx(expected, rel=1e-4)


def test_report_and_events_are_there(story):
    for folder in (story.whole, story.broken):
        assert "fedavg" in (folder / "report.html").read_text()
        events = list((folder / "events").iterdir())
        assert events and all(file.stat().st_size > 0 for file in events)
    found = read_events(story.whole / "events")
    assert found["train/loss"].keys() == {1, 2, 3, 4, 5, 6}
    assert found["eval/zacc"].keys() == {0, 2, 4, 6}
    assert found["clients/pacc"].keys() == {0, 2, 4, 6}
    assert found["partition"].keys() == {0}
    assert found["train/samples_per_second"].keys() <= {2, 4, 6}
    last = log.read_lines(story.whole / "metrics.jsonl")[-1]
    assert found["eval/zacc"][6] == pytest.approx(last["zacc"], rel=1e-5)


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """Parses TensorBoard's records: length, its checksum, an event, its checksum."""
    from tensorboardX.proto import event_pb2

    found: dict[str, dict[int, float]] = {}
    for file in filter(Path.is_file, folder.iterdir()):  # beside them hparams
        content, place = file.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            place += size + 16
    return found


# In this process ---------------------------------------------------------------------


def small(**fields):
    """FedAvg on digits for three rounds; `local__steps=1` sets `local.steps`."""
    config = zero_shot.get_config("fedavg")
    config.data.name = "digits"
    config.data.num_clients, config.data.num_novel = 4, 2
    config.data.partition = "iid"
    config.model.hidden = (4,)
    config.local.steps, config.local.batch_size = 4, 16
    config.rounds, config.evaluation.every = 3, 2
    config.tensorboard = False
    config.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in fields.items()}
    )
    return config


def recorded(**fields):
    """The config of `small` as config.json has it."""
    return resolve(small(**fields)).config


@pytest.fixture(autouse=True)
def built_once(monkeypatch):
    """Runs of one config in one process share their compiled programs."""
    monkeypatch.setattr(build, "make_experiment", _build)


@pytest.fixture(scope="module", autouse=True)
def pages():
    with undrawn():
        yield


_really_build = build.make_experiment
_built: dict[str, build.Experiment] = {}


def _build(config, store_dir=None):
    if config.engine.store != "device":
        return _really_build(config, store_dir)
    key = config.to_json()
    if key not in _built:
        _built[key] = _really_build(config, store_dir)
    return _built[key]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of `small()` that nothing happened to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_experiment", _build)
        train.train(small(), str(folder))
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of that run, to be broken."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder but the lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def same_result(run: Path, reference: Path) -> None:
    """Asserts that two runs ended in the same bits."""
    summaries = [
        read(path, "summary.json")["state_sha256"] for path in (run, reference)
    ]
    assert summaries[0] == summaries[1]
    metrics = [(path / "metrics.jsonl").read_bytes() for path in (run, reference)]
    assert metrics[0] == metrics[1]


def test_a_finished_run_is_left_as_it_is(run, monkeypatch, capsys):
    monkeypatch.setattr(train.cli, "use_cores", lambda devices: None)
    before = contents(run)
    assert train.main(small(), str(run)) == 0
    assert contents(run) == before
    assert capsys.readouterr().out.startswith("fedavg on digits: gACC ")
    assert train.train(small(), str(run)) == read(run, "summary.json")


def test_runs_of_several_seeds_share_an_experiment(finished, tmp_path, monkeypatch):
    config = small(data__seed=0)  # of the run's seed in any case
    shared = build.build(config)
    first = train.train(config, tmp_path / "a", experiment=shared, show=Silent)
    assert first["state_sha256"] == read(finished, "summary.json")["state_sha256"]
    monkeypatch.setattr(build, "make_experiment", pytest.fail)
    seconds = shared.simulator.program.seconds
    config.seed = 1
    other = train.train(config, tmp_path / "b", experiment=shared, show=Silent)
    assert shared.simulator.program.seconds == seconds > 0
    assert other["seed"] == 1 and other["state_sha256"] != first["state_sha256"]
    assert read(tmp_path / "b", "config.json")["config"]["seed"] == 1


def test_a_run_killed_before_its_summary_gets_one(run, finished):
    for name in ("summary.json", "clients.json", "report.html"):
        (run / name).unlink()
    summary = train.train(small(), str(run))
    same_result(run, finished)
    # No program of rounds was made for it.
    assert summary["flops"] == read(finished, "summary.json")["flops"] > 0
    assert read(run, "clients.json") == read(finished, "clients.json")
    assert (run / "report.html").exists()


def truncate(path: Path) -> None:
    for file in data_files(path):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete(path: Path) -> None:
    for file in data_files(path):
        file.unlink()


# orbax leaves an event loop behind when it cannot read.
broken_reads = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@broken_reads
@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_the_newest_checkpoint_may_be_damaged(damage, run, finished, caplog):
    (run / "summary.json").unlink()
    damage(run / "checkpoints" / "round_00000003")
    with caplog.at_level(logging.WARNING):
        train.train(small(), str(run))
    (message,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert "round_00000003" in message
    same_result(run, finished)


@broken_reads
def test_a_run_with_no_intact_checkpoint_is_left_as_it_is(run):
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").iterdir():
        flip(path)
    before = contents(run)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged, or"):
        train.train(small(), str(run))
    assert contents(run) == before


class Killed(BaseException):
    """Stands for SIGKILL where the rest of the process would not matter."""


@contextlib.contextmanager
def kill_at(monkeypatch, owner, name: str, call: int = 1):
    """Ends the run at the given call of a function, before it does anything."""
    function, calls = getattr(owner, name), iter(range(1, 10**6))

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (origin, "describe", 1),
        (checkpoint.Saver, "save", 1),
        (checkpoint.Saver, "save", 2),
        (train.log.Recorder, "evaluation", 2),
        (train.results, "per_client", 1),
    ],
)
def test_a_kill_between_any_two_files_costs_nothing(
    owner, name, call, tmp_path, finished, monkeypatch
):
    run = tmp_path / "run"
    with kill_at(monkeypatch, owner, name, call):
        train.train(small(), str(run))
    train.train(small(), str(run))
    same_result(run, finished)


def test_a_kill_in_the_middle_of_a_checkpoint_costs_nothing(
    tmp_path, finished, monkeypatch
):
    run = tmp_path / "run"
    with kill_at(monkeypatch, checkpoint, "write_atomically", 4):
        train.train(small(), str(run))
    unfinished = [
        p for p in (run / "checkpoints").iterdir() if not (p / "digest.json").exists()
    ]
    assert len(unfinished) == 1
    train.train(small(), str(run))
    same_result(run, finished)


@pytest.mark.slow
def test_a_killed_run_in_bfloat16_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    config = small(engine__precision="bfloat16")
    train.train(config, str(tmp_path / "whole"))
    with kill_at(monkeypatch, checkpoint.Saver, "save", 2):
        train.train(config, str(tmp_path / "broken"))
    train.train(config, str(tmp_path / "broken"))
    same_result(tmp_path / "broken", tmp_path / "whole")
    assert read(tmp_path / "whole", "summary.json")["plan"]["precision"] == "bfloat16"


@pytest.mark.slow
def test_a_killed_run_with_samples_on_the_host_goes_on(tmp_path, monkeypatch):
    near = small(engine__store="host", server__sampler="uniform", server__cohort_size=2)
    train.train(near, str(tmp_path / "near"))
    config = near.copy_and_resolve_references()
    config.engine.pool, config.engine.pool_mb = "host", 1
    with kill_at(monkeypatch, checkpoint.Saver, "save", 2):
        train.train(config, str(tmp_path / "broken"))
    train.train(config, str(tmp_path / "broken"))
    same_result(tmp_path / "broken", tmp_path / "near")
    plan = read(tmp_path / "broken", "summary.json")["plan"]
    assert (plan["pool"], plan["store"]) == ("host", "host")


def test_stops_between_evaluations_keep_the_bits(tmp_path, monkeypatch):
    config = small(engine__rounds_per_call=1)
    train.train(config, str(tmp_path / "whole"))
    for call in (3, 2):  # before the checkpoints of rounds 2 and 3
        with kill_at(monkeypatch, checkpoint.Saver, "save", call):
            train.train(config, str(tmp_path / "broken"))
    restored = sorted(p.name for p in (tmp_path / "broken" / "checkpoints").iterdir())
    assert restored == ["round_00000001", "round_00000002"]
    train.train(config, str(tmp_path / "broken"))
    same_result(tmp_path / "broken", tmp_path / "whole")


def test_another_config_is_refused_by_its_fields(run):
    (run / "summary.json").unlink()
    before = contents(run)
    config = small(rounds=2, local__learning_rate=0.5)
    with pytest.raises(ValueError, match="made by another config") as error:
        train.train(config, str(run))
    message = str(error.value)
    assert "rounds: 3 there, 2 given" in message
    assert "local.learning_rate: 0.01 there, 0.5 given" in message
    assert message.count(" there, ") == 2
    assert contents(run) == before


def test_a_finished_run_goes_on_with_more_rounds_and_other_evaluations(run, tmp_path):
    """It ends in the bits of a run that had these rounds from the start."""
    train.train(small(rounds=5), str(tmp_path / "whole"))
    fields = dict(evaluation__every=1, evaluation__thresholds=(1,), checkpoint__keep=3)
    longer = small(rounds=5, **fields)
    train.train(longer, str(run))
    summaries = [read(path, "summary.json") for path in (run, tmp_path / "whole")]
    assert summaries[0]["state_sha256"] == summaries[1]["state_sha256"]
    assert summaries[0]["rounds"] == 5 and summaries[0]["reach"][0]["threshold"] == 1
    metrics = log.read_lines(run / "metrics.jsonl")
    assert [r["round"] for r in metrics] == [0, 2, 3, 4, 5]
    record = read(run, "config.json")
    assert (
        record["config"]["rounds"] == 5 and record["config"]["evaluation"]["every"] == 1
    )
    (change,) = record["history"]
    assert change["round"] == 3
    assert (
        change["changed"].items()
        >= {
            "config.rounds": [3, 5],
            "config.evaluation.every": [2, 1],
            "config.checkpoint.keep": [2, 3],
        }.items()
    )
    # Asked for more and stopped at once, it may end where it was after all.
    plan, data = record["plan"], record["data"]
    origin.describe(run, recorded(rounds=9, **fields), plan, data, 5)
    train.train(longer, str(run))
    before = contents(run)
    with pytest.raises(ValueError, match=r"rounds: 5 there, 4 given"):
        train.train(small(rounds=4, **fields), str(run))
    train.train(longer, str(run))
    assert contents(run) == before


def test_a_finished_run_is_summed_up_as_it_is_asked_for_now(run, finished):
    before = contents(run)
    # Where the data are, and what is written on the way, changes nothing at the end.
    same = small(data__download=True, evaluation__every=1, tensorboard=True)
    train.train(same, str(run))
    assert contents(run) == before
    summary = train.train(small(evaluation__thresholds=(1, 2)), str(run))
    assert [r["threshold"] for r in summary["reach"]] == [1, 2]
    same_result(run, finished)


def test_a_run_that_would_have_been_another_one_is_not_made_longer(run):
    plan = read(run, "config.json")["plan"] | {"marks": {"local.milestones": [2, 4]}}
    data = read(run, "config.json")["data"]
    origin.describe(run, recorded(), plan, data, 1)  # as if it had been so all along
    before = contents(run)
    longer = recorded(rounds=6)
    with pytest.raises(ValueError, match=r"3 rounds .*local.milestones: \[2\] there"):
        marks = {"local.milestones": [4, 8]}
        origin.describe(run, longer, plan | dict(marks=marks), data, 3)
    assert contents(run) == before
    marks = {"local.milestones": [2, 5]}  # not yet reached
    origin.describe(run, longer, plan | dict(marks=marks), data, 3)
    assert read(run, "config.json")["config"]["rounds"] == 6


@pytest.mark.parametrize(
    ("setting", "value", "was"),
    [
        ("jax_default_prng_impl", "rbg", "threefry2x32"),
        ("jax_threefry_partitionable", False, "True"),
        ("jax_default_matmul_precision", "bfloat16", "None"),
        ("jax_random_seed_offset", 1, "0"),
    ],
)
def test_other_random_numbers_or_products_are_refused(setting, value, was, run):
    (run / "summary.json").unlink()
    before, now = contents(run), getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        words = f"{setting}: {was} there, {value} now.*{setting.upper()}={was}"
        with pytest.raises(ValueError, match=words):
            train.train(small(), str(run))
    finally:
        jax.config.update(setting, now)
    assert contents(run) == before


@pytest.mark.parametrize("part", ["pixels", "labels", "partition"])
def test_other_data_are_refused(part, run):
    record, before = read(run, "config.json"), contents(run)
    other = {**record["data"], part: "0" * 64}
    with pytest.raises(ValueError, match=f"other data: {part} differ"):
        origin.describe(run, recorded(), record["plan"], other, 3)
    assert contents(run) == before


def test_other_circumstances_are_told_and_kept(run, caplog):
    record = read(run, "config.json")
    record["versions"]["jax"], record["commit"] = "0.0.1", "abc"
    (run / "config.json").write_text(json.dumps(record))
    other = dict(device="H100", rounds_per_call=1, conv_rule="auto, oneDNN 9.9")
    plan = record["plan"] | other
    with caplog.at_level(logging.WARNING):
        origin.describe(run, recorded(rounds=5), plan, record["data"], 3)
    (message,) = [r.getMessage() for r in caplog.records]
    told = ("versions.jax: 0.0.1 there", "commit: abc there", "H100 now", "9.9 now")
    for words in told:
        assert words in message
    assert "rounds_per_call" not in message
    after = read(run, "config.json")
    assert after["versions"]["jax"] == jax.__version__
    assert after["history"][-1]["changed"]["versions.jax"] == ["0.0.1", jax.__version__]


@pytest.mark.parametrize("epochs", [None, 1, 2])
def test_what_a_run_was_given_is_what_it_is_given_again(epochs, tmp_path):
    given = recorded(local__epochs=epochs, local__steps=None)
    origin.describe(tmp_path, given, {"device": "cpu"}, {})
    assert origin.changes(tmp_path, given) == {}
    origin.compare(tmp_path, given)


def test_a_run_of_an_older_version_goes_on_with_defaults(run):
    record = read(run, "config.json")
    for name in ("settings", "data", "flags", "history"):
        del record[name]
    del record["config"]["uplink"], record["config"]["data"]["stratified"]
    (run / "config.json").write_text(json.dumps(record))
    origin.compare(run, recorded())
    assert saved.load_config(str(run), "run").data.stratified is False
    with pytest.raises(ValueError, match=r"data.stratified: False there, True"):
        train.train(small(data__stratified=True), str(run))
    origin.describe(run, recorded(), record["plan"], {"labels": "0"}, 3)
    assert read(run, "config.json")["data"] == {"labels": "0"}


@pytest.mark.parametrize("format", [None, 2])
def test_a_run_whose_state_is_laid_out_otherwise_is_refused(format, run):
    record = read(run, "config.json")
    del record["format"]
    record |= {} if format is None else {"format": format}
    (run / "config.json").write_text(json.dumps(record))
    before = contents(run)
    for field, read_it in (
        ("workdir", lambda: train.train(small(), str(run))),
        ("workdir", lambda: train.train(small(rounds=9), str(run))),
        ("run", lambda: saved.load(str(run), "run")),
        ("run", lambda: saved.load_config(str(run), "run")),
    ):
        with pytest.raises(ValueError, match="older version") as error:
            read_it()
        assert str(error.value) == (
            f"{field}={str(run)!r} was made by an older version of hyperjax and can be "
            "neither continued nor served by this one"
        )
    assert contents(run) == before
    report.run_report(str(run))  # what it found is still told
    digest = read(run, "summary.json")["state_sha256"]
    assert digest in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'.*config.json' is not readable .*put a copy back"),
        ('{"config"', "'.*config.json' is not readable"),
        ("[1]", "it holds no dict"),
        ('{"format": 99}', "newer version of hyperjax, format 99"),
        ('{"config": {"rounds": 3}}', "config.json' is not that of a run"),
    ],
)
def test_a_damaged_or_foreign_config_json_is_named(text, words, run):
    (run / "config.json").write_text(text)
    before = contents(run)
    for read_it in (
        lambda: train.train(small(), str(run)),
        lambda: saved.load(str(run), "run"),
    ):
        with pytest.raises(ValueError, match=f"(?s){words}"):
            read_it()
    assert contents(run) == before


def test_other_damaged_files_are_named_or_written_anew(run, finished, caplog):
    (run / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json' is not readable .*remove it"):
        train.train(small(), str(run))
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_bytes(b"\xff\n{}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl': line 1 is not JSON"):
        train.train(small(), str(run))
    shutil.copy(finished / "metrics.jsonl", run)
    (run / "partition.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"partition.npz' is not an .npz.*remove it"):
        saved.load(str(run), "run")
    with caplog.at_level(logging.WARNING):
        train.train(small(), str(run))
    assert "partition.npz' is not an .npz file" in caplog.text
    same_result(run, finished)
    tables = [np.load(path / "partition.npz") for path in (run, finished)]
    assert tables[0].files == tables[1].files


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (train.report, "run_report"),
        (train.results, "per_client"),
        (train.reach, "of_records"),
    ],
)
def test_what_fails_after_the_last_round_is_repaired(
    owner, name, run, finished, monkeypatch
):
    for file in ("summary.json", "clients.json", "report.html"):
        (run / file).unlink()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(OSError, match="No space left"):
            train.train(small(), str(run))
    train.train(small(), str(run))
    same_result(run, finished)
    assert read(run, "clients.json") == read(finished, "clients.json")
    assert (run / "report.html").exists()


def test_a_lost_record_of_the_last_round_is_written_again(run, finished, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train.embedding_maps, "keep", lambda folder, *rest: seen.append(rest)
    )
    (run / "summary.json").unlink()
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # cut off in the middle of a line
    train.train(small(), str(run))
    here, there = (read(p, "summary.json") for p in (run, finished))
    assert here["state_sha256"] == there["state_sha256"]
    there, here = (log.read_lines(p / "metrics.jsonl") for p in (finished, run))
    assert [r["round"] for r in here] == [r["round"] for r in there] == [0, 2, 3]
    assert here[-1]["pacc"] == there[-1]["pacc"]
    ((round, values, num, whom),) = seen  # of embeddings
    assert round == 3 and {"pacc", "zacc"} <= values.keys()
    assert num == 4 and [*whom["pacc"]] == [0, 1, 2, 3] and [*whom["zacc"]] == [0, 1]


def test_a_summary_that_is_none_and_clients_that_cannot_be_read(run, finished):
    (run / "clients.json").write_text("[")
    train.train(small(), str(run))
    assert read(run, "clients.json") == read(finished, "clients.json")
    (run / "summary.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"summary\.json' is not that of a run; remove"
    ):
        train.train(small(), str(run))


def test_what_is_summed_up_anew_was_trained_as_it_was(run):
    for name in ("config.json", "summary.json"):
        about = read(run, name)
        about |= dict(commit="then", seconds=123.0, samples_per_second=4.5)
        (run / name).write_text(json.dumps(about))
    summary = train.train(small(evaluation__thresholds=(1,)), str(run))
    assert summary["reach"][0]["threshold"] == 1
    assert (summary["seconds"], summary["samples_per_second"]) == (123.0, 4.5)
    assert read(run, "config.json")["commit"] == "then"


def test_a_run_without_checkpoints_is_not_trained_again_for_other_numbers(run):
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    assert train.train(small(), str(run))["finished"]
    for other in (dict(rounds=5), dict(evaluation__thresholds=(1,))):
        with pytest.raises(ValueError, match="has no checkpoint left"):
            train.train(small(**other), str(run))
    assert contents(run) == before


def test_of_two_lengths_in_an_old_config_steps_counted(run):
    about = read(run, "config.json")
    del about["format"]
    about["config"]["local"]["epochs"] = 1
    assert about["config"]["local"]["steps"]
    (run / "config.json").write_text(json.dumps(about))
    assert origin.read(run)["config"]["local"]["epochs"] is None


def test_files_that_are_missing_at_the_end_are_written_anew(run, finished):
    for name in ("clients.json", "partition.npz", "report.html"):
        (run / name).unlink()
        train.train(small(), str(run))
        assert (run / name).exists()
        same_result(run, finished)


def test_a_refusal_leaves_nothing_however_late(tmp_path, monkeypatch):
    """Of folders and files; what was there before stays."""

    def refuse(*args):
        raise ValueError("not like this")

    (tmp_path / "mine").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").touch()
    before = sorted(tmp_path.rglob("*"))
    late = (train, "_newest"), (train.loop, "start"), (train.results, "record")
    for owner, name in late:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            for name in ("a/b/run", "mine", "locked"):
                with pytest.raises(ValueError, match="not like this"):
                    train.train(small(tensorboard=True), str(tmp_path / name))
                assert sorted(tmp_path.rglob("*")) == before


def test_a_refusal_of_a_run_that_was_there_leaves_it(run, monkeypatch):
    """Also of one that has no checkpoint yet."""
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    before = contents(run)

    def refuse(*args):
        raise ValueError("not like this")

    monkeypatch.setattr(train, "_newest", refuse)
    with pytest.raises(ValueError, match="not like this"):
        train.train(small(), str(run))
    assert contents(run) == before


def no_locks(*args):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize(
    ("flock", "words"), [(None, "has no fcntl"), (no_locks, "No locks available")]
)
def test_where_there_are_no_locks_a_warning_must_do(flock, words, tmp_path, caplog):
    locks = (
        None if flock is None else SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workdir, "fcntl", locks)
        with caplog.at_level(logging.WARNING), workdir.claim(tmp_path / "x"):
            assert (tmp_path / "x").is_dir()
    assert words in caplog.text and "cannot be locked" in caplog.text


def test_a_field_that_only_one_config_has_is_named(run):
    config = small()
    with config.unlocked():
        config.method = dict(name="opt1", embedding_size=3)
    with pytest.raises(ValueError, match=r"embedding_size: \(absent\) there, 3 given"):
        train.train(config, str(run))


def test_the_workdir_must_be_a_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        train.train(small(), str(file))
    with pytest.raises(ValueError, match="cannot be written to: Not a directory"):
        train.train(small(), str(file / "below"))
    assert file.read_text() == "mine"


def test_a_name_that_is_no_text_is_refused(tmp_path):
    """As a narrow locale makes of every name beyond ASCII."""
    with pytest.raises(ValueError, match=r"no text where file names.*PYTHONUTF8=1"):
        train.train(small(), os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "café ü").mkdir()
    with workdir.claim(f"{tmp_path}/café ü/") as folder:
        assert folder.name == "café ü"


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        train.train(small(), str(tmp_path))
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


def test_a_folder_in_use_is_refused(run):
    before = contents(run)
    with workdir.claim(run), pytest.raises(ValueError, match="in use by"):
        train.train(small(), str(run))
    assert contents(run) == before
    train.train(small(), str(run))  # free again


@pytest.mark.slow
def test_all_stores_give_the_same_metrics(tmp_path):
    found = {}
    for name, fields in (
        ("device", {}),
        ("host", dict(engine__store="host")),
        ("files", dict(engine__store="host", engine__memory_map=True)),
    ):
        config = small(**fields, method__keep=("params/head/.*",))
        train.train(config, str(tmp_path / name))
        metrics = log.read_lines(tmp_path / name / "metrics.jsonl")
        assert metrics[0].pop("loss") is None
        found[name] = {(i, k): v for i, r in enumerate(metrics) for k, v in r.items()}
    assert found["host"] == found["files"]
    assert found["device"] == pytest.approx(found["host"], rel=1e-4)
    rows = [np.load(p, mmap_mode="r") for p in (tmp_path / "files/store").glob("*.npy")]
    assert sorted(x.shape for x in rows) == [(4, 4, 10), (4, 10)]
    assert all(np.abs(x).max() > 0 for x in rows)


def test_labels_of_unseen_clients_never_reach_training(finished, tmp_path, monkeypatch):
    # Shares of equal size do not look at labels, so the partition stays.
    config = small()
    assert config.data.partition == "iid"
    source = build.load_source(config.data)
    tables = np.load(finished / "partition.npz")
    y = source.y.copy()
    for name in ("novel", "test", "held_out"):
        parts = zip(tables[f"{name}_rows"], tables[f"{name}_size"], strict=True)
        for rows, size in parts:
            y[rows[:size]] = (y[rows[:size]] + 1 + np.arange(size) % 9) % 10
    monkeypatch.setattr(build, "load_source", lambda data: source._replace(y=y))
    monkeypatch.setattr(build, "make_experiment", _really_build)
    other = train.train(config, str(tmp_path / "run"))
    plain = read(finished, "summary.json")
    assert other["state_sha256"] == plain["state_sha256"]
    for metric in ("pacc", "zacc", "gacc"):
        assert other[metric] != plain[metric]


def test_no_rounds_is_an_evaluation(tmp_path):
    summary = train.train(small(rounds=0), str(tmp_path / "run"))
    assert summary["up_bytes_total"] == 0 and summary["samples_per_second"] is None
    assert [r["round"] for r in log.read_lines(tmp_path / "run/metrics.jsonl")] == [0]


def test_one_client_on_each_side_is_enough(tmp_path):
    config = small(data__num_clients=1, data__num_novel=1, rounds=1)
    summary = train.train(config, str(tmp_path / "run"))
    assert summary["plan"]["devices"] == 1
    assert len(read(tmp_path / "run", "clients.json")) == 2


def test_in_one_place_nothing_is_sent(tmp_path):
    config = small(data__pooled=True, server__sampler="full", rounds=1)
    config.evaluation.thresholds = (1,)
    summary = train.train(config, str(tmp_path / "run"))
    costs = [v for k, v in summary.items() if re.search("(up|down)_(bytes|numbers)", k)]
    assert len(costs) == 6 and not any(costs)
    assert [r["cost"] for r in summary["reach"]] == [0]


@pytest.mark.slow
def test_a_call_of_rounds_is_traced_if_asked_for(tmp_path):
    config = small(rounds=4)
    traced = train.train(config, tmp_path / "traced", profile=True)
    plain = train.train(config, tmp_path / "plain")
    assert traced["state_sha256"] == plain["state_sha256"]
    assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "traced" / "profile").rglob("perfetto_trace.json.gz"))
    assert not (tmp_path / "plain" / "profile").exists()
