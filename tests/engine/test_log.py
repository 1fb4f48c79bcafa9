"""Records that survive kills, and numbers for people."""

import json

import numpy as np
import pytest

from hyperjax.engine import log


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
    found = log.plain(value)
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
