"""Records that survive kills, and numbers for people."""

import json
import sys
import types

import numpy as np
import pytest

from hyperjax.data.picture import partition_picture
from hyperjax.engine import log
from hyperjax.launch.resolve import resolve
from hyperjax.protocols import zero_shot


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1 / 3, 0.333333),
        (np.float32(1e-7), 1e-07),
        (1234567.0, 1234570.0),
        (float("nan"), None),
        (float("inf"), None),
        (np.int64(12345678), 12345678),
        (np.array([0.5, np.nan]), [0.5, None]),
        ({"a": (np.float32(0.25), None)}, {"a": [0.25, None]}),
        (True, True),
        ("name", "name"),
    ],
)
def test_plain_values_are_json_with_six_digits(value, expected):
    found = log.jsonable(value)
    assert found == expected and type(found) is type(expected)
    json.dumps(found, allow_nan=False)


def test_records_are_appended_and_times_kept_apart(tmp_path):
    recorder = log.Recorder(tmp_path, -1, tensorboard=False)
    recorder.evaluation({"round": 0, "loss": None}, 1.23456)
    recorder.evaluation({"round": 2, "loss": np.float32(0.1)}, 2.5)
    info = {"loss": np.array([0.2, 0.1], np.float32), "by_class": np.zeros((2, 3))}
    recorder.rounds(0, info)
    recorder.close()
    assert lines(tmp_path / log.TRAINING) == [
        {"round": 1, "loss": 0.2},
        {"round": 2, "loss": 0.1},
    ]
    assert lines(tmp_path / log.METRICS) == [
        {"round": 0, "loss": None},
        {"round": 2, "loss": 0.1},
    ]
    assert lines(tmp_path / log.TIMING) == [
        {"round": 0, "seconds": 1.235},
        {"round": 2, "seconds": 2.5},
    ]
    assert not (tmp_path / log.EVENTS).exists()


@pytest.mark.parametrize(
    ("finished", "kept"), [(-1, []), (0, [0]), (2, [0, 2]), (3, [0, 2]), (9, [0, 2, 4])]
)
@pytest.mark.parametrize("torn", ["", "{", '{"round": 6, "lo', '{"round": 6}x', "\0\0"])
def test_records_after_the_checkpoint_are_cut_off(finished, kept, torn, tmp_path):
    for name in (log.METRICS, log.TIMING, log.TRAINING):
        text = "".join(json.dumps({"round": r, "x": 0.1}) + "\n" for r in (0, 2, 4))
        (tmp_path / name).write_text(text + torn)
    recorder = log.Recorder(tmp_path, finished, tensorboard=False)
    for name in (log.METRICS, log.TIMING, log.TRAINING):
        assert [record["round"] for record in lines(tmp_path / name)] == kept
    recorder.evaluation({"round": 10}, 1.0)
    assert [r["round"] for r in lines(tmp_path / log.METRICS)] == [*kept, 10]


def test_seconds_go_on_where_a_process_ended(tmp_path):
    first = log.Recorder(tmp_path, -1, tensorboard=False)
    for round, seconds in ((0, 1.0), (2, 5.0), (4, 7.0)):
        first.evaluation({"round": round}, seconds)
    log.Recorder(tmp_path, 2, tensorboard=False).evaluation({"round": 4}, 3.0)
    assert [r["seconds"] for r in lines(tmp_path / log.TIMING)] == [1.0, 5.0, 8.0]


def test_rewritten_records_are_the_same_bytes(tmp_path):
    recorder = log.Recorder(tmp_path, -1, tensorboard=False)
    record = {"round": 0, "a": 1 / 3, "b": 1e-9, "c": None, "d": np.float32(99.9)}
    recorder.evaluation(record, 0.1)
    before = (tmp_path / log.METRICS).read_bytes()
    log.Recorder(tmp_path, 0, tensorboard=False)
    assert (tmp_path / log.METRICS).read_bytes() == before


def test_reading_leaves_a_torn_line(tmp_path):
    path = tmp_path / "x.jsonl"
    assert log.read_lines(path) == []
    path.write_text('{"round": 0}\n{"rou')
    assert log.read_lines(path) == [{"round": 0}]


def test_events_are_written(tmp_path):
    recorder = log.Recorder(tmp_path, -1, tensorboard=True)
    recorder.rounds(0, {"loss": np.array([1.0, 0.5]), "image": np.zeros((2, 3))})
    values = {"zacc": 50.0, "loss": None, "pacc": float("nan"), "x": np.float32("inf")}
    recorder.evaluation({"round": 2, **values}, 0.1)
    recorder.close()
    (file,) = (tmp_path / log.EVENTS).iterdir()
    content = file.read_bytes()
    assert content.count(b"train/loss") == 2 and content.count(b"eval/zacc") == 1
    assert b"image" not in content and b"eval/loss" not in content
    assert b"eval/round" not in content
    assert b"eval/pacc" not in content and b"eval/x" not in content


def test_events_hold_clients_settings_and_a_picture(tmp_path):
    settings = {"data.alpha": 0.5, "model.hidden": (4,), "start.run": None}
    recorder = log.Recorder(tmp_path, -1, settings=settings)
    figure = partition_picture(np.eye(2), np.ones(2, bool))
    recorder.picture("partition", figure)
    clients = {"pacc": np.array([50.0, np.nan, 70.0]), "zacc": np.array([np.nan])}
    recorder.evaluation({"round": 0, "pacc": 60.0}, 0.1, clients)
    recorder.rounds(0, {"loss": np.ones(2)}, rate=123.0)
    recorder.summary({"pacc": 61.0, "zacc": None, "finished": True, "plan": {}})
    recorder.close()
    content = b"".join(
        file.read_bytes()
        for file in (tmp_path / log.EVENTS).iterdir()
        if file.is_file()
    )
    assert content.count(b"clients/pacc") == 1 and b"clients/zacc" not in content
    assert b"PNG" in content and b"train/samples_per_second" in content
    (file,) = (tmp_path / log.EVENTS / "hparams").iterdir()
    hparams = file.read_bytes()
    assert b"data.alpha" in hparams and b"(4,)" in hparams
    assert b"pacc" in hparams and b"finished" not in hparams


def test_a_tracker_hears_what_is_written(tmp_path, monkeypatch):
    heard = []
    tracker = types.ModuleType("a_tracker")
    tracker.init = lambda **given: heard.append(given)
    tracker.log = lambda row, step=None: heard.append((step, row))
    tracker.finish = lambda: heard.append("finished")
    monkeypatch.setitem(sys.modules, "a_tracker", tracker)
    settings = {"seed": 3, "data.labels": [1, 2], "start.run": None}
    run = tmp_path / "run"
    run.mkdir()
    recorder = log.Recorder(run, -1, False, "a_tracker", settings)
    recorder.evaluation({"round": 0, "pacc": np.float32(50), "zacc": None}, 0.1)
    recorder.rounds(0, {"loss": np.array([2.0, 1.0])}, rate=10.0)
    recorder.summary({"pacc": 60.0, "method": "fedavg"})
    recorder.close()
    config = {"seed": 3, "data.labels": "[1, 2]", "start.run": "None"}
    assert heard == [
        {"project": "hyperjax", "name": "run", "config": config},
        (0, {"eval/pacc": 50.0}),
        (1, {"train/loss": 2.0}),
        (2, {"train/loss": 1.0}),
        (2, {"train/samples_per_second": 10.0}),
        (None, {"summary/pacc": 60.0}),
        "finished",
    ]


@pytest.mark.parametrize("name", ["no_such_tracker", "no_such.tracker", "."])
def test_a_tracker_that_is_not_installed_is_refused_before_work(name):
    log.check_tracker("")
    log.check_tracker("json")
    with pytest.raises(ValueError, match="no such package is installed; pip install"):
        log.check_tracker(name)
    config = zero_shot.get_config("fedavg,data=digits")
    config.tracker = name
    with pytest.raises(ValueError, match="tracker="):
        resolve(config)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (7620, "2h07m"),
        (360000, "100h00m"),
    ],
)
def test_durations(seconds, text):
    assert log.duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (47104, "47.1 kB"),
        (5652480, "5.65 MB"),
        (2.5e9, "2.5 GB"),
        (1.2345e12, "1.234 TB"),
        (3e15, "3000 TB"),
    ],
)
def test_sizes(num_bytes, text):
    assert log.size(num_bytes) == text


@pytest.mark.parametrize("num_bytes", [999_600, 999_999, 999_999_999])
def test_sizes_never_need_an_exponent(num_bytes):
    assert "e" not in log.size(num_bytes)
