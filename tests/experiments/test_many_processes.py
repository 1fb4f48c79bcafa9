"""Runs of several processes on this machine: the same bits, one end, one message."""

import json
import re
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from launched import Result
from test_train import launch

pytestmark = pytest.mark.xdist_group("launcher")

FEDAVG = (
    "--config=configs/zero_shot.py:fedavg,data=digits,clients=6,novel=2",
    "--config.model.name=mlp",
    "--config.model.hidden=(8,)",
    "--config.rounds=4",
    "--config.evaluation.every=2",
)


def start(folder: Path, count: int, *argv: str, signal_at=None, last=(), devices=None):
    """Starts the processes of one run, whose folder is `folder`/run.

    `signal_at` = (process, signal, round), see `launch`; `last` are arguments of the
    last process alone.
    """
    with socket.socket() as trial:
        trial.bind(("", 0))
        port = trial.getsockname()[1]
    found = []
    for i in range(count):
        which = (f"--num_processes={count}", f"--process_id={i}") if count > 1 else ()
        which += (f"--coordinator=localhost:{port}",) if count > 1 else ()
        own = signal_at[1:] if signal_at and signal_at[0] == i else None
        more = last if i == count - 1 else ()
        found.append(
            launch(
                folder / f"{time.monotonic_ns()}",
                *(*argv, f"--config.engine.devices={devices or 2}", *which, *more),
                f"--workdir={folder / 'run'}",
                signal_at=own,
            )
        )
    return found


def run(*args, **options) -> list[Result]:
    return [process.result() for process in start(*args, **options)]


def read(folder: Path) -> tuple[str, bytes]:
    """The digest of a run's state, and all its records."""
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return summary["state_sha256"], (folder / "run" / "metrics.jsonl").read_bytes()


def errors(results: list[Result]) -> list[str]:
    """The one line of each that says what went wrong."""
    found = [re.findall("^error: (.*)$", r.err, re.MULTILINE) for r in results]
    assert all(len(lines) == 1 for lines in found), found
    return [lines[0] for lines in found]


class Story(NamedTuple):
    whole: Path  # of one process
    parted: Path  # of two, stopped and continued
    stopped: list[Result]
    continued: list[Result]


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    root = tmp_path_factory.mktemp("hosts")
    whole, parted = root / "whole", root / "parted"
    alone = start(whole, 1, *FEDAVG)
    stopped = run(parted, 2, *FEDAVG, signal_at=(1, signal.SIGTERM, 2))
    continued = run(parted, 2, *FEDAVG)
    assert [process.result().code for process in alone] == [0]
    return Story(whole, parted, stopped, continued)


def test_sigterm_to_one_stops_all_after_the_same_round(story):
    assert [r.code for r in story.stopped] == [0, 0], story.stopped[1].err
    assert (
        "Stopped after round 2; the same command continues.\n" in story.stopped[0].out
    )


def test_two_processes_have_the_bits_of_one_with_two_devices(story):
    assert [r.code for r in story.continued] == [0, 0], story.continued[1].err
    assert read(story.parted) == read(story.whole)
    assert (story.parted / "run" / "report.html").exists()


def test_a_process_with_another_config_is_refused_everywhere(tmp_path):
    results = run(tmp_path, 2, *FEDAVG, last=("--config.seed=1",))
    assert [r.code for r in results] == [2, 2]
    said = "process 1 has seed=1 and process 0 0; all of a run's processes must have"
    assert all(line.startswith(said) for line in errors(results))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_process_0_cannot_have_is_refused_everywhere(story):
    results = run(story.parted, 2, *FEDAVG, "--config.local.batch_size=7")
    assert [r.code for r in results] == [2, 2]
    here, there = errors(results)
    assert here == there
    assert "was made by another config" in here


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_costs_nothing(story, tmp_path, killed):
    processes = start(
        tmp_path, 2, *FEDAVG, signal_at=(killed, signal.SIGKILL, 2), devices=2
    )
    processes[killed].process.join(120)
    began = time.monotonic()
    results = [process.result() for process in processes]
    assert time.monotonic() - began < 10
    assert results[killed].code == -signal.SIGKILL
    other = results[1 - killed]
    assert other.code == 3
    assert f"error: process {killed} has ended; its log may say why. " in other.err
    assert "Traceback" not in other.err
    assert [r.code for r in run(tmp_path, 2, *FEDAVG)] == [0, 0]
    assert read(tmp_path) == read(story.whole)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 3, 6])
def test_sigterm_during_start_up_stops_all(tmp_path, seconds):
    processes = start(tmp_path, 2, *FEDAVG, "--config.rounds=1000")
    time.sleep(seconds)
    processes[1].process.terminate()
    results = [process.result() for process in processes]
    assert [r.code for r in results] == [0, 0], results[0].err


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in read(folder)[1].splitlines()]


def check_close(folder: Path, other: Path) -> None:
    """Not to the bit: sums over more than two processes come in another order."""
    for one, two in zip(records(folder), records(other), strict=True):
        assert one == pytest.approx(two, rel=1e-5, nan_ok=True)


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(story, tmp_path):
    parted, whole = tmp_path / "parted", tmp_path / "whole"
    for count, rounds, devices in ((2, 2, 2), (1, 4, 2), (3, 8, 3)):
        more = f"--config.rounds={rounds}"
        results = run(parted, count, *FEDAVG, more, devices=devices)
        assert [r.code for r in results] == [0] * count, results[0].err
        if rounds == 4:
            assert read(parted) == read(story.whole)
    (alone,) = run(whole, 1, *FEDAVG, "--config.rounds=8")
    assert alone.code == 0, alone.err
    assert [record["round"] for record in records(parted)] == [0, 2, 4, 6, 8]
    check_close(parted, whole)


SCAFFOLD = (  # every client keeps parameters
    "--config=configs/zero_shot.py:scaffold,data=digits,clients=6,novel=2",
    "--config.model.name=mlp",
    "--config.model.hidden=(8,)",
    "--config.local.epochs=1",
    "--config.evaluation.every=2",
)
STORES = {
    "device": (),
    "host": ("--config.engine.store=host", "--config.engine.memory_map=True"),
}


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_state_of_clients_goes_from_owners_to_other_owners(tmp_path, store):
    parted, whole = tmp_path / "parted", tmp_path / "whole"
    argv = (*SCAFFOLD, *STORES[store])
    for count, rounds, devices in ((2, 2, 2), (1, 4, 2), (3, 6, 3)):
        more = f"--config.rounds={rounds}"
        results = run(parted, count, *argv, more, devices=devices)
        assert [r.code for r in results] == [0] * count, results[-1].err
        if store == "host":
            # Of 6 clients, all of whom took part, process 0 has its own alone.
            files = list((parted / "run" / "store").rglob("rows_*.npy"))
            assert files
            there = [np.load(file).reshape(6, -1).any(1) for file in files]
            assert np.any(there, axis=0).tolist() == [i < 6 // count for i in range(6)]
        if rounds < 6:
            (alone,) = run(whole, 1, *argv, more)
            assert alone.code == 0, alone.err
            assert read(parted) == read(whole)
    (alone,) = run(whole, 1, *argv, more)
    assert alone.code == 0, alone.err
    check_close(parted, whole)


SHORT = ("--config.rounds=2", "--config.evaluation.every=2")


@pytest.mark.slow
def test_four_processes_agree_with_four_devices_of_one(tmp_path):
    more = (*FEDAVG, *SHORT)
    results = run(tmp_path / "parted", 4, *more, devices=4)
    assert [r.code for r in results] == [0] * 4, results[0].err
    (alone,) = run(tmp_path / "alone", 1, *more, devices=4)
    assert alone.code == 0, alone.err
    check_close(tmp_path / "parted", tmp_path / "alone")


METHODS = {
    "hyperfedzero": ("--config=configs/zero_shot.py:hyperfedzero,data=digits",),
    "hyperfednet": (
        "--config=configs/personalised.py:hyperfednet,data=digits,clients=4",
        "--config.local.epochs=1",
    ),
    "scaffold": (
        "--config=configs/zero_shot.py:scaffold,data=digits",
        "--config.model.name=mlp",
        "--config.engine.store=host",
    ),
    "families": ("--config=configs/families.py:mh_pfedhn,data=digits",),
    "pfedhn": ("--config=configs/pfedhn.py:pfedhn,data=digits",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_other_methods_have_the_same_bits_too(tmp_path, name):
    argv = (*METHODS[name], *SHORT)
    alone = start(tmp_path / "alone", 1, *argv)
    results = run(tmp_path / "parted", 2, *argv)
    assert [r.code for r in results] == [0, 0], results[1].err
    assert alone[0].result().code == 0
    parted, whole = read(tmp_path / "parted"), read(tmp_path / "alone")
    assert parted[1] == whole[1]
    # One client after another is one device's work, and how many threads a device's
    # products have depends on how many devices its process has.
    assert parted[0] == whole[0] or name == "pfedhn"
