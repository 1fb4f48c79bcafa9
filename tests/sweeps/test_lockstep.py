"""Points side by side: what becomes of each, whatever becomes of the others."""

import contextlib
import types
from pathlib import Path

import numpy as np
import pytest

from hyperjax.engine import schedule
from hyperjax.engine.progress import Silent
from hyperjax.launch import train
from hyperjax.protocols import zero_shot
from hyperjax.runs import loop
from hyperjax.runs.experiment import Settings
from hyperjax.sweeps import lockstep
from hyperjax.sweeps.points import Point

ROUNDS = 4
WELL = {name: {"server": 10} for name in "abc"}


class Pretended:
    """Stands for `together.Together`: the state is the sum of the rounds done."""

    at_once = size = 3

    def __init__(self, simulators, plan, mesh):
        self.program = types.SimpleNamespace(seconds=0.0, watcher=None)
        self.calls = []
        Pretended.last = self

    def run(self, members, roots, carries, start, num_rounds):
        self.calls.append((list(members), start, num_rounds))
        rounds = range(start + 1, start + num_rounds + 1)
        found = []
        for member, carry in zip(members, carries, strict=True):
            bad = member in self.diverge and 3 in rounds
            loss = np.full(num_rounds, np.nan if bad else 1.0)
            state = carry.server + np.sum(rounds)
            info = {"samples": np.ones(num_rounds), "loss": loss}
            found.append((schedule.Carry(state, {}, {}), info))
        return found


@pytest.fixture
def run(monkeypatch):
    """Runs points that begin at given rounds, and returns how each ended."""
    monkeypatch.setattr(lockstep.together, "Together", Pretended)
    closed = []

    def steps(config, path, label, show, experiment, stopping, page):
        settings, state = experiment.settings, experiment.first
        with contextlib.ExitStack() as stack, stopping() as stop:
            stack.callback(closed.append, label)
            while state.round < settings.rounds:
                if stop():
                    raise train.Stopped(state.round)
                if label == "fails":
                    raise OSError("disk full")
                call = yield experiment, state
                state = call.state
            return {"server": int(state.carry.server)}

    monkeypatch.setattr(train, "steps", steps)

    def go(first=(0, 0, 0), diverge=(), names=("a", "b", "c")):
        closed.clear()
        monkeypatch.setattr(Pretended, "diverge", diverge, raising=False)
        points = [Point(name, {}, zero_shot.get_config()) for name in names]
        experiments = {
            name: types.SimpleNamespace(
                simulator=None,
                settings=Settings(rounds=ROUNDS, every=2),
                first=loop.State(at, schedule.Carry(np.sum(range(at + 1)), {}, {})),
                plan={},
            )
            for name, at in zip(names, first, strict=True)
        }
        ends = {}
        lockstep.run(
            points,
            experiments,
            Path(),
            "map",
            Silent(),
            lambda point, result: ends.update({point.name: result}),
        )
        assert sorted(closed) == sorted(names)
        return ends

    return go


def test_all_make_the_same_rounds_in_one_call(run):
    assert run() == WELL
    assert Pretended.last.calls == [([0, 1, 2], 0, 2), ([0, 1, 2], 2, 2)]


def test_those_that_are_behind_catch_up_first(run):
    assert run(first=(2, 0, 4)) == WELL
    assert Pretended.last.calls == [([1], 0, 2), ([0, 1], 2, 2)]


def test_one_that_diverges_or_fails_does_not_end_the_others(run):
    ends = run(diverge=[1])
    assert isinstance(ends["b"], loop.Diverged) and ends["b"].last_good == 2
    assert ends["a"] == ends["c"] == {"server": 10}
    ends = run(names=("a", "fails", "c"))
    assert isinstance(ends["fails"], OSError)
    assert ends["a"] == ends["c"] == {"server": 10}


def test_it_stops_when_asked_to(run, monkeypatch):
    asked = iter([False] * 4 + [True] * 9)  # three begin, one goes on
    monkeypatch.setattr(
        train, "stop_signals", lambda: contextlib.nullcontext(lambda: next(asked))
    )
    with pytest.raises(train.Stopped):
        run()
    assert Pretended.last.calls == [([0, 1, 2], 0, 2)]


def test_a_plan_that_cannot_be_is_refused_by_name():
    def point(**fields):
        config = zero_shot.get_config()
        config.update_from_flattened_dict({f"engine.{k}": v for k, v in fields.items()})
        return [Point("a", {}, config)]

    assert lockstep.plan("auto", point()) == "sequence"  # on the CPU
    assert lockstep.plan("vmap", point()) == "vmap"
    assert lockstep.plan("sequence", point(store="host")) == "sequence"
    with pytest.raises(ValueError, match="--plan='pmap' is unknown"):
        lockstep.plan("pmap", point())
    for fields in (dict(store="host"), dict(devices=2)):
        with pytest.raises(ValueError, match=r"--plan=map goes with engine.store='dev"):
            lockstep.plan("map", point(**fields))
