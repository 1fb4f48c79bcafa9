"""Processes that agree: what each gives, what one gives, and the end of one."""

import json
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from hyperjax import hosts

ROOT = Path(__file__).parents[1]


@pytest.fixture
def groups():
    """Three processes in one: those of each, and a function that runs one call in all.

    The module's own functions look at `_group`, which is one process's; so each call
    goes to the methods they are made of.
    """
    pairs = [socket.socketpair() for _ in range(2)]
    first = hosts._Group(0, {i: hosts._Line(a) for i, (a, _) in enumerate(pairs, 1)})
    others = [hosts._Group(i, {0: hosts._Line(b)}) for i, (_, b) in enumerate(pairs, 1)]
    every = [first, *others]
    for group in every:
        group.count = len(every)
    yield every
    for group in every:
        group.leave()


def in_all(fn, groups, *values):
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(fn, groups, *values))


def test_all_are_given_what_each_gives(groups):
    found = in_all(lambda group, v: group.values(v), groups, [b"0", b"[1]", b"null"])
    assert found == [[b"0", b"[1]", b"null"]] * 3
    again = in_all(lambda group, v: group.values(v), groups, [b"a", b"b", b"c"])
    assert again == [[b"a", b"b", b"c"]] * 3


def test_arrays_of_process_0_come_to_the_bit(groups, monkeypatch):
    sent = {
        "x": np.array([[-0.0, np.nan], [1e-45, 2.0]], np.float32),
        "none": np.zeros((0, 3), np.int32),
        "flag": np.array(True),
    }
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), sent)
    monkeypatch.setattr(hosts, "_group", groups[0])
    assert hosts.arrays_of_first(sent, template) is sent
    monkeypatch.setattr(hosts, "_group", groups[2])
    found = hosts.arrays_of_first(None, template)
    for name, x in sent.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape
        assert found[name].tobytes() == x.tobytes()


def test_clients_are_parted_in_order(monkeypatch):
    assert hosts.parts(5) == [range(5)] and hosts.part(5) == range(5)
    monkeypatch.setattr(hosts, "count", lambda: 3)
    for num, sizes in ((6, [2, 2, 2]), (7, [3, 3, 1]), (4, [2, 2, 0]), (1, [1, 0, 0])):
        found = hosts.parts(num)
        assert [len(part) for part in found] == sizes
        assert [i for part in found for i in part] == list(range(num))


def test_process_0_asks_the_others_and_is_asked(groups, monkeypatch):
    first, second, third = groups

    def as_one(group, turn):
        """Both in turn, of process 1; the others have nothing to do with it."""
        monkeypatch.setattr(hosts, "_group", group)
        return turn()

    with ThreadPoolExecutor(1) as pool:

        def answer():
            asked = second.next(0)
            second.lines[0].send(b"a", b"rows")
            second.lines[0].send(b"a", b"")
            return asked, second.next(0)

        other = pool.submit(answer)
        found = as_one(first, lambda: hosts.fetched(1, lambda: b"never made"))
        assert found == b"rows"
        assert as_one(first, lambda: hosts.handed(1, b"state")) == b""
        assert other.result(10) == (b"", b"state")

        def ask():
            first.lines[1].send(b"a", b"")
            found = first.next(1), first.next(1)
            first.lines[1].send(b"a", b"state")
            return found

        other = pool.submit(ask)
        assert as_one(second, lambda: hosts.fetched(1, lambda: b"rows")) == b""
        assert as_one(second, lambda: hosts.handed(1, b"")) == b"state"
        assert other.result(10) == (b"rows", b"")
    assert as_one(third, lambda: hosts.fetched(1, lambda: b"never made")) == b""
    assert as_one(third, lambda: hosts.handed(1, b"never sent")) == b""
    assert as_one(first, lambda: hosts.fetched(0, lambda: b"mine")) == b"mine"
    assert as_one(first, lambda: hosts.handed(0, b"mine")) == b"mine"


def test_processes_with_other_values_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(hosts, "gathered", lambda value: [value, value | {"seed": 1}])
    words = "process 1 has seed=1 and process 0 0; all of a run's processes must have"
    with pytest.raises(ValueError, match=words):
        hosts.check_same({"seed": 0, "rounds": 3})
    monkeypatch.setattr(hosts, "gathered", lambda value: [value, value, {"seed": 0}])
    with pytest.raises(ValueError, match="process 2 has rounds=None and process 0 3"):
        hosts.check_same({"seed": 0, "rounds": 3})


def test_devices_are_counted_over_all_processes(monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 2)
    assert hosts.share(4) == 2
    assert hosts.share(0) == 0
    with pytest.raises(ValueError, match=r"engine\.devices=3 counts devices over all"):
        hosts.share(3)


def test_one_process_has_nothing_to_agree_on():
    assert not hosts.several()
    assert hosts.is_first()
    assert hosts.count() == 1
    value = {"a": (1, float("nan"))}
    assert hosts.of_first(value) is value
    assert hosts.arrays_of_first(value, None) is value
    hosts.check_same({"x": object()})
    hosts.meet()
    assert hosts.devices(3) == jax.local_devices()[:3]
    assert hosts.share(3) == 3
    with hosts.joined("localhost:1", 1, 0):
        assert not hosts.several()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("localhost:1", 2, None), "--process_id must be given, too"),
        ((None, None, 0), "--coordinator and --num_processes must be given, too"),
        (("localhost", 2, 0), "--coordinator='localhost' must be HOST:PORT"),
        (("localhost:1", 0, 0), "num_processes=0 must be at least 1"),
        (("localhost:1", 2, 2), r"--process_id=2 must be 0\.\.1"),
        (("localhost:1", 2, -1), r"--process_id=-1 must be 0\.\.1"),
    ],
)
def test_half_a_group_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        hosts.check_flags(*given)


# A process whose own connection is a pipe's end, and what it does at the other's end.
WORKER = """
import json, os, signal, socket, sys, time
from hyperjax import hosts
group = hosts._Group(1, {0: hosts._Line(socket.socket(fileno=int(sys.argv[1])))})
hosts._group = group
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, hosts._ask)
with hosts._ended_together(group):
    try:
        print("ready", flush=True)
        %s
    finally:
        print("tidied", flush=True)
"""


def worker(body):
    """Starts a process in a group; returns it and process 0's end of the line."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER % body, str(theirs.fileno())],
        cwd=ROOT,
        pass_fds=(theirs.fileno(),),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    theirs.close()
    assert process.stdout.readline() == "ready\n"
    return process, ours


def test_the_end_of_process_0_ends_the_others_with_one_line():
    process, line = worker("time.sleep(60)")
    line.close()
    _, err = process.communicate(timeout=20)
    assert process.returncode == hosts.LOST
    assert err == (
        "error: process 0 has ended; its log may say why. The same command continues "
        "the run.\n"
    )


def test_an_error_of_another_process_is_told_and_leaves_nothing_behind():
    process, line = worker("group.values(b'null')")
    content = json.dumps(dict(text="the disk is full", code=2)).encode()
    hosts._Line(line).send(hosts._ERROR, content)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert out == "tidied\n"
    assert err == "error: the disk is full\n"


def test_one_module_names_processes():
    named = re.compile(
        r"jax\.distributed\.|process_index|process_count|multihost_utils|_src"
    )
    found = {
        path.name
        for folder in ("hyperjax", "experiments", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if named.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"hosts.py"}
