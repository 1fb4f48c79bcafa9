"""The comparison: what is run where, and when a bar is met; no times are judged."""

import sys

import numpy as np
import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import workload


def test_every_preset_has_a_bar_and_whole_batches():
    assert {name.removesuffix("q") for name in workload.PRESETS} == {*workload.BARS}
    for work in workload.PRESETS.values():
        assert work.samples % work.batch == 0
        assert work.steps == work.epochs * (work.samples // work.batch)
        assert work.cohort <= work.clients


def test_all_sides_get_the_same_cohorts_and_images():
    work = workload.PRESETS["A32q"]._replace(clients=5, cohort=3, samples=32)
    x, y = workload.images(work)
    assert x.shape == (5, 32, 28, 28, 1) and x.dtype == np.uint8
    assert y.shape == (5, 32) and set(np.unique(y)) <= set(range(workload.CLASSES))
    np.testing.assert_array_equal(x, workload.images(work)[0])
    scaled = workload.normalised(x)
    assert scaled.dtype == np.float32 and abs(scaled.mean()) < 0.1
    assert workload.cohort(work, 4) == workload.cohort(work, 4)
    assert len({*workload.cohort(work, 4)}) == 3


def test_where_peers_are_looked_for():
    found = peers.interpreters("/a/python", ["drjax=/b/python"])
    assert found == {
        "torch": "/a/python",
        "pfl": "/a/python",
        "drjax": "/b/python",
        "fedjax": sys.executable,
    }
    with pytest.raises(ValueError, match="flwr"):
        peers.interpreters(None, ["flwr=/b/python"])
    assert peers.has(sys.executable, "json")
    assert not peers.has(sys.executable, "no_such_module")


def record(preset, cpu, **more):
    return {"version": "1", "loss": 1.0, "seconds": [2.0], "cpu_seconds": cpu, **more}


def test_ratios_are_of_the_fastest_rounds_and_the_best_peer_is_judged(monkeypatch):
    times = {"hyperjax": [1.0, 1.2], "torch": [2.0, 1.4], "pfl": [3.0, 2.9]}
    monkeypatch.setattr(
        peers,
        "measure",
        lambda name, python, preset, limit: record(preset, times[name]),
    )
    found = peers.compare("A32q", {"torch": "t", "pfl": "p"}, repeats=2, limit=9)
    assert [r["peer"] for r in found] == ["hyperjax", "torch", "pfl"]
    work = workload.PRESETS["A32q"]
    assert found[0]["samples_per_cpu_second"] == work.cohort * work.steps * work.batch
    assert [r.get("ratio") for r in found] == pytest.approx([None, 1.4, 2.9])
    assert [r.get("bar") for r in found] == [None, 1.3, None]
    code, words = peers.verdict(found)
    assert code == 0 and "A32q: 1.40 of torch, the best that is judged" in words
    times["torch"] = [1.2]
    code, words = peers.verdict(
        peers.compare("A32q", {"torch": "t"}, repeats=1, limit=9)
    )
    assert code == 1 and words.endswith("bar 1.3: missed")


def test_convolutions_of_onednn_have_a_higher_bar(monkeypatch):
    monkeypatch.setattr(
        peers, "measure", lambda *_: record("C32q", [1.0], onednn="3.2.0")
    )
    ours, theirs = peers.compare("C32q", {"torch": "t"}, repeats=1, limit=9)
    assert ours["version"].endswith(", oneDNN 3.2.0") and theirs["bar"] == 1.05


def test_nobody_to_compare_with_is_no_success(monkeypatch):
    monkeypatch.setattr(
        peers, "measure", lambda name, python, preset, limit: record(preset, [1.0])
    )
    code, words = peers.verdict(peers.compare("B32q", {}, repeats=1, limit=9))
    assert code == 1 and "Nobody is installed" in words


def test_who_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(
        peers,
        "measure",
        lambda name, *_: None if name == "drjax" else record("A32", [1.0]),
    )
    found = peers.compare("A32", {"drjax": "d", "torch": "t"}, repeats=2, limit=9)
    assert [r["peer"] for r in found] == ["hyperjax", "torch"]
    monkeypatch.setattr(peers, "measure", lambda *_: None)
    with pytest.raises(ValueError, match="hyperjax took longer than --limit=9"):
        peers.compare("A32", {}, repeats=1, limit=9)
