"""Checkpoints: exact, never half there, never trusted without a look."""

import errno
import hashlib
import io
import json
import logging
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.engine import blocks, checkpoint, stores
from hyperjax.engine.schedule import Carry
from hyperjax.types import ALONE

# orbax leaves an event loop behind when it cannot read.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def carry(value: float = 0.0) -> Carry:
    """A small state with every kind of leaf there is."""
    server = {"w": jnp.arange(300.0).reshape(20, 15) / 7 + value, "step": jnp.int32(3)}
    seen = jnp.array([True, False, True, False])
    # Rows of clients who were never seen are zeros.
    rows = ({"head": seen[:, None] * jnp.full((4, 2), float(value))}, ())
    return Carry(server, {ALONE: rows}, {ALONE: seen})


def with_client_state(rows=None, seen=None) -> Carry:
    """The same, with other client rows or flags."""
    state = carry()
    return state._replace(
        rows=state.rows if rows is None else {ALONE: rows},
        seen=state.seen if seen is None else {ALONE: seen},
    )


def abstract(a):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), a)


class Killed(BaseException):
    """Stands for SIGKILL."""


TEMPLATE = abstract(carry())


def files(folder):
    return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    saved = carry(1 / 3)
    digest = checkpoint.save(tmp_path, 7, saved)
    restored = checkpoint.restore(tmp_path, TEMPLATE)
    assert restored.round == 7 and isinstance(restored.carry, Carry)
    chex.assert_trees_all_equal(restored.carry, jax.device_get(saved))
    assert checkpoint.Saver(None).save(7, restored.carry) == digest


def test_a_person_can_open_one(tmp_path):
    import orbax.checkpoint as ocp

    checkpoint.save(tmp_path, 7, carry())
    with ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(tmp_path / "round_00000007" / "carry")
    assert set(found) == {"server/w", "server/step", "seen"}
    np.testing.assert_array_equal(found["server/w"], carry().server["w"])
    index = json.loads((tmp_path / "round_00000007" / checkpoint.INDEX).read_text())
    assert index["arrays"] == {"rows/0/head": ["float32", [4, 2]]}
    (block,) = index["blocks"][ALONE]
    found = np.fromfile(tmp_path / checkpoint.BLOCKS / block, np.float32)
    np.testing.assert_array_equal(found, np.zeros(4))  # of the two who were seen


def test_two_arrays_under_one_path_are_refused(tmp_path):
    state = carry()._replace(server={"a": {"b": jnp.zeros(1)}, "a/b": jnp.ones(1)})
    with pytest.raises(ValueError, match="several arrays under server/a/b"):
        checkpoint.save(tmp_path, 0, state)
    assert checkpoint.restore(tmp_path, abstract(state)) is None


def test_a_checkpoint_of_an_older_version_is_refused_in_one_sentence(tmp_path, caplog):
    for round in (2, 4):
        checkpoint.save(tmp_path, round, carry(round))
        path = tmp_path / f"round_{round:08d}" / checkpoint.DIGEST
        record = json.loads(path.read_text())
        del record["format"]
        path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="older version") as error:
        checkpoint.restore(tmp_path, TEMPLATE)
    newest = str(tmp_path / "round_00000004")
    assert str(error.value) == f"{newest!r} {checkpoint.OLDER}"
    assert checkpoint.OLDER.startswith("was made by an older version of hyperjax and ")
    assert not caplog.records


def test_sharded_arrays_are_saved_as_any_others(tmp_path):
    from hyperjax.engine import sharding

    saved = sharding.replicate(carry(), sharding.client_mesh(4))
    assert checkpoint.save(tmp_path, 1, saved) == checkpoint.Saver(None).save(
        1, carry()
    )


def test_without_checkpoints_there_is_nothing(tmp_path):
    assert checkpoint.restore(tmp_path, TEMPLATE) is None
    assert checkpoint.restore(tmp_path / "nowhere", TEMPLATE) is None


@pytest.mark.parametrize(("keep", "left"), [(1, [4, 6]), (2, [4, 6]), (3, [2, 4, 6])])
def test_the_newest_are_kept_and_never_fewer_than_two(keep, left, tmp_path):
    for round in (0, 2, 4, 6):
        checkpoint.save(tmp_path, round, carry(round), keep)
    assert sorted(p.name for p in tmp_path.glob("round_*")) == [
        f"round_{round:08d}" for round in left
    ]
    assert len(list((tmp_path / checkpoint.BLOCKS).iterdir())) == len(left)
    restored = checkpoint.restore(tmp_path, TEMPLATE)
    assert restored.round == 6 and restored.carry.rows[ALONE][0]["head"][0, 0] == 6


def test_a_checkpoint_without_its_digest_does_not_count(tmp_path, caplog):
    checkpoint.save(tmp_path, 2, carry(2))
    checkpoint.save(tmp_path, 4, carry(4))
    (tmp_path / "round_00000004" / checkpoint.DIGEST).unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.restore(tmp_path, TEMPLATE).round == 2
    assert not [r for r in caplog.records if "damaged" in r.getMessage()]
    checkpoint.save(tmp_path, 4, carry(5))
    assert (
        checkpoint.restore(tmp_path, TEMPLATE).carry.rows[ALONE][0]["head"][0, 0] == 5
    )


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {"flip": flip, "halve": halve, "delete": os.remove}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_anywhere_is_noticed_or_harmless(damage, tmp_path, caplog):
    """Every file in turn: the newest comes back exactly, or the one before does."""
    checkpoint.save(tmp_path, 2, carry(2))
    checkpoint.save(tmp_path, 4, carry(4))
    digests = {2: tree.sha256(carry(2)), 4: tree.sha256(carry(4))}
    newest = tmp_path / "round_00000004"
    index = json.loads((newest / checkpoint.INDEX).read_text())
    block = tmp_path / checkpoint.BLOCKS / index["blocks"][ALONE][0]
    noticed = 0
    for file in [block, *sorted(newest / name for name in files(newest))]:
        if file.name == checkpoint.DIGEST and damage == "delete":
            continue  # then it was never finished, see above
        content = file.read_bytes()
        DAMAGES[damage](file)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            restored = checkpoint.restore(tmp_path, TEMPLATE)
        assert tree.sha256(restored.carry) == digests[restored.round], file
        said = [r for r in caplog.records if "trying the one before" in r.getMessage()]
        assert len(said) == (restored.round == 2), file
        noticed += restored.round == 2
        file.write_bytes(content)
        if file.name in (block.name, checkpoint.INDEX):
            assert restored.round == 2
    assert noticed >= 4
    assert checkpoint.restore(tmp_path, TEMPLATE).round == 4


def test_all_damaged_is_an_error_that_deletes_nothing(tmp_path):
    for round in (2, 4):
        checkpoint.save(tmp_path, round, carry(round))
        for file in (tmp_path / f"round_{round:08d}").rglob("d/*"):
            file.write_bytes(b"")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged") as error:
        checkpoint.restore(tmp_path, TEMPLATE)
    assert str(tmp_path) in str(error.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (with_client_state(()), "it holds 'rows/0/head', which is that of another"),
        (with_client_state(seen=jnp.zeros(5, bool)), "bool(4,) where bool(5,) is"),
        (with_client_state(seen=jnp.zeros(4)), "bool(4,) where float32(4,) is"),
        (with_client_state(({"head": jnp.ones((4, 3))}, ())), "float32(4, 2) where"),
        (with_client_state(({"head": jnp.ones((4, 2))}, jnp.ones(4))), "'rows/1'"),
    ],
    ids=["fewer leaves", "another shape", "another dtype", "wider rows", "more leaves"],
)
def test_a_checkpoint_of_another_state_is_refused(template, said, tmp_path, caplog):
    template = abstract(template)
    checkpoint.save(tmp_path, 2, carry())
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match="every checkpoint"),
    ):
        checkpoint.restore(tmp_path, template)
    assert said in caplog.text


def test_text_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    checkpoint.write_atomically(path, "old")
    checkpoint.write_atomically(str(path), "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_text(function, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    checkpoint.write_atomically(path, "old")

    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, function, kill)
        with pytest.raises(Killed):
            checkpoint.write_atomically(path, "n" * 10_000)
    assert path.read_text() == "old"
    # What is left is hidden, and the next write takes it away.
    assert all(p.name.startswith(".") for p in tmp_path.iterdir() if p != path)
    checkpoint.write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_only_a_file_system_without_fsync_may_refuse_it(number, tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            checkpoint.write_atomically(tmp_path / "a.json", "new")
    else:
        checkpoint.write_atomically(tmp_path / "a.json", "new")
        assert (tmp_path / "a.json").read_text() == "new"


def test_text_is_utf8_and_bytes_that_are_no_text_are_shown(tmp_path):
    checkpoint.write_atomically(tmp_path / "a.html", "93 ± 1 \udcc3")
    assert (tmp_path / "a.html").read_bytes() == b"93 \xc2\xb1 1 \\udcc3"


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (b"", dict, "Expecting value"),
        (b'{"a": 1', dict, "Expecting ',' delimiter"),
        (b"\xff\xfe{}", dict, "can't decode byte"),
        (b"[]", dict, "it holds no dict"),
        (b"{}", list, "it holds no list"),
    ],
)
def test_damaged_json_is_named_with_what_to_do(content, kind, reason, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.json' is not .*{reason}.*; burn it"):
        checkpoint.read_json(path, "burn it", kind)
    path.write_text('{"a": "\u00b1"}', encoding="utf-8")
    assert checkpoint.read_json(path, "burn it") == {"a": "±"}
    with pytest.raises(FileNotFoundError):
        checkpoint.read_json(tmp_path / "b.json", "burn it")


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "No data left"),
        (b"0\n1\n", "pickled"),
        (b"PK\x03\x04 cut off", "not a zip file"),
        (npz(a=np.arange(9000))[:9000], "not a zip file"),
        (npz(a=np.array([1, None], dtype=object)), "Object arrays"),
        (npz(b=np.arange(3)), "it has no array 'a'"),
        (npy(np.arange(3)), "it holds one array"),
    ],
    ids=["empty", "text", "head", "half", "objects", "another", "npy"],
)
def test_damaged_arrays_are_named_with_what_to_do(content, reason, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.npz' is not .*{reason}.*; burn it"):
        checkpoint.read_npz(path, "burn it", need=("a",))
    whole = npz(a=np.arange(3), x=np.array([None]))
    path.write_bytes(whole)
    found = checkpoint.read_npz(path, "burn it", ("a", "c"), ("a",))
    assert list(found) == ["a"] and found["a"].tolist() == [0, 1, 2]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_count(tmp_path, monkeypatch):
    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "a file is open elsewhere")

    monkeypatch.setattr(shutil, "rmtree", busy)
    for round in (2, 4, 6):
        checkpoint.save(tmp_path, round, carry(round), keep=2)
    assert [p.name[-1] for p in checkpoint.finished(tmp_path)] == ["4", "6"]
    assert (tmp_path / "round_00000002").is_dir()


def test_the_digest_is_written_last(tmp_path, monkeypatch):
    write = checkpoint.write_atomically

    def look(path, text):
        assert (path.parent / "carry").is_dir()
        if path.name != checkpoint.DIGEST:
            return write(path, text)
        assert json.loads(text)["round"] == 3
        raise Killed

    monkeypatch.setattr(checkpoint, "write_atomically", look)
    with pytest.raises(Killed):
        checkpoint.save(tmp_path, 3, carry())
    assert checkpoint.restore(tmp_path, TEMPLATE) is None


def test_saving_leaves_the_arrays_usable(tmp_path):
    kept = carry(1.0)
    checkpoint.save(tmp_path, 1, kept)
    np.testing.assert_array_equal(kept.rows[ALONE][0]["head"][::2], 1.0)


# Blocks of clients -------------------------------------------------------------------

CLIENTS, WIDTH = 4000, 64  # rows of 260 bytes, 252 clients to a block
BLOCK = blocks.BYTES // (4 * WIDTH + 4)


def population(visited=()) -> Carry:
    """A host store of which some clients were visited."""
    spec = {
        "a": jax.ShapeDtypeStruct((WIDTH,), np.float32),
        "b": jax.ShapeDtypeStruct((), np.int32),
    }
    rows, seen = stores.host_zeros(spec, CLIENTS)
    state = Carry({"w": jnp.ones(3)}, {ALONE: rows}, {ALONE: seen})
    visit(state, visited, 1)
    return state


def visit(state, ids, value):
    ids = np.asarray(ids, int)
    rows = state.rows[ALONE]
    rows["a"][ids], rows["b"][ids] = value, value * ids
    state.seen[ALONE][ids] = True


def copied(state):
    return jax.tree.map(lambda x: np.array(x), state)


def of_blocks(folder):
    return {p.name for p in (folder / checkpoint.BLOCKS).iterdir()}


def test_only_blocks_that_changed_are_written(tmp_path, monkeypatch):
    state, saver = population([0, 300, 3999]), checkpoint.Saver(tmp_path)
    saver.save(0, state)
    assert len(of_blocks(tmp_path)) == 3  # of 16: the others were never seen
    written, write = [], blocks.write
    monkeypatch.setattr(blocks, "write", lambda *x: written.append(x[1]) or write(*x))
    changed = np.array([1, 2, BLOCK - 1, 2 * BLOCK])
    visit(state, changed, 2)
    digest = saver.save(1, state, lambda: {ALONE: changed})
    assert len(written) == 2
    found = checkpoint.restore(tmp_path, abstract(state))
    assert found.round == 1
    chex.assert_trees_all_equal(found.carry, copied(state))
    # The same state has the same digest, however it came about, and wherever it is.
    assert digest == checkpoint.save(tmp_path / "whole", 1, state)
    assert digest == checkpoint.Saver(None).save(1, jax.tree.map(jnp.asarray, state))
    other = population([0, 300])
    assert digest != checkpoint.Saver(None).save(1, other)


def test_all_is_written_after_a_save_that_failed(tmp_path, monkeypatch):
    state, saver = population([0]), checkpoint.Saver(tmp_path)
    saver.save(0, state)
    visit(state, [1000], 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            saver.save(1, state, lambda: {ALONE: np.array([1000])})
    visit(state, [2000], 3)
    saver.save(2, state, lambda: {ALONE: np.array([2000])})
    found = checkpoint.restore(tmp_path, abstract(state))
    assert found.round == 2
    chex.assert_trees_all_equal(found.carry, copied(state))


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill(*args):
    raise Killed


@pytest.mark.parametrize("end", [full, kill], ids=["disk full", "kill"])
def test_wherever_saving_ends_the_checkpoint_before_is_whole(
    end, tmp_path, monkeypatch
):
    """At each of what a save does on the disk, up to the last."""
    first = population([0, 300])
    second = copied(first)
    visit(second, [1, 700], 2)
    states = {0: copied(first), 1: copied(second)}
    steps = [(os, "replace"), (shutil, "rmtree"), (os, "unlink")]
    ended = 0
    for owner, name in steps:
        for call in range(1, 9):
            folder = tmp_path / f"{name}_{call}"
            saver = checkpoint.Saver(folder)
            saver.save(0, first)
            calls, real = [], getattr(owner, name)

            def turn(*args, call=call, calls=calls, real=real, of=folder, **rest):
                if any(str(of) in str(a) for a in args):
                    calls.append(args)
                    if len(calls) == call:
                        end()
                return real(*args, **rest)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, turn)
                try:
                    saver.save(1, second, lambda: {ALONE: np.array([1, 700])})
                except (Killed, OSError):
                    ended += 1
            found = checkpoint.restore(folder, abstract(first))
            chex.assert_trees_all_equal(found.carry, states[found.round])
            # Then it goes on, and what was left half is gone.
            checkpoint.Saver(folder).save(2, second)
            found = checkpoint.restore(folder, abstract(first))
            chex.assert_trees_all_equal(found.carry, states[1])
            assert not [x for x in of_blocks(folder) if x.startswith(".")]
            if len(calls) < call:
                break
    assert ended >= 4


def test_blocks_that_no_checkpoint_has_are_removed(tmp_path):
    state, saver = population(), checkpoint.Saver(tmp_path, keep=2)
    for round in range(5):
        visit(state, [7], round + 1)
        saver.save(round, state, lambda: {ALONE: np.array([7])})
        assert len(of_blocks(tmp_path)) == min(round + 1, 2)


def test_a_checkpoint_of_the_format_before_is_read(tmp_path):
    state = jax.device_get(carry(5))
    path = tmp_path / "round_00000003"
    with checkpoint._orbax() as writer:
        writer.save(path / "carry", tree.by_path(state))
    record = {"format": 2, "round": 3, "sha256": tree.sha256(state)}
    (path / checkpoint.DIGEST).write_text(json.dumps(record))
    found = checkpoint.restore(tmp_path, TEMPLATE)
    chex.assert_trees_all_equal(found.carry, state)
    checkpoint.save(tmp_path, 4, carry(6))  # beside one of this format
    assert checkpoint.restore(tmp_path, TEMPLATE).round == 4
    record["sha256"] = "0" * 64
    (path / checkpoint.DIGEST).write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "round_00000004")
    with pytest.raises(ValueError, match="every checkpoint"):
        checkpoint.restore(tmp_path, TEMPLATE)


def test_a_block_holds_those_who_were_seen(tmp_path):
    ids = [0, 1, 300, 3999]
    state = population(ids)
    checkpoint.save(tmp_path, 0, state)
    size = sum(file.stat().st_size for file in (tmp_path / checkpoint.BLOCKS).iterdir())
    assert size == len(ids) * (4 * WIDTH + 4)
    chex.assert_trees_all_equal(
        checkpoint.restore(tmp_path, abstract(state)).carry, copied(state)
    )


def test_blocks_of_the_format_before_are_read(tmp_path):
    """They held rows of all their clients, one leaf after another."""
    state = population([0, 1, 300, 3999])
    checkpoint.save(tmp_path, 3, state)
    path, listed = tmp_path / "round_00000003", []
    rows, seen = state.rows[ALONE], state.seen[ALONE]
    for start in range(0, CLIENTS, BLOCK):
        those = slice(start, start + BLOCK)
        content = rows["a"][those].tobytes() + rows["b"][those].tobytes()
        digest = hashlib.sha256(content).hexdigest() if seen[those].any() else None
        listed.append(digest)
        if digest:
            blocks.write(tmp_path / checkpoint.BLOCKS, digest, content)
    index = json.loads((path / checkpoint.INDEX).read_text())
    index = json.dumps(index | {"blocks": {ALONE: listed}})
    (path / checkpoint.INDEX).write_text(index)
    record = dict(format=3, round=3, sha256=checkpoint._digest(state, index))
    (path / checkpoint.DIGEST).write_text(json.dumps(record))
    found = checkpoint.restore(tmp_path, abstract(state))
    chex.assert_trees_all_equal(found.carry, copied(state))
    checkpoint.save(tmp_path, 4, state)  # beside one of this format
    assert len(of_blocks(tmp_path)) == 2 * 3
    shutil.rmtree(tmp_path / "round_00000004")
    found = checkpoint.restore(tmp_path, abstract(state))
    assert found.round == 3
    chex.assert_trees_all_equal(found.carry, copied(state))


def test_of_many_clients_a_digest_is_of_those_who_were_seen(monkeypatch):
    state = population([0, 300])
    assert checkpoint.state_digest(state) == tree.sha256(state)
    monkeypatch.setattr(checkpoint, "LARGE", 1000)
    digest = checkpoint.state_digest(state)
    assert digest == checkpoint.state_digest(jax.tree.map(jnp.asarray, state))
    assert digest != tree.sha256(state)
    for ids, value in (([301], 1), ([300], 2)):
        other = copied(state)
        visit(other, ids, value)
        assert checkpoint.state_digest(other) != digest


@pytest.mark.parametrize("num", [1, 1000, 10**6, 2**31 - 1])
def test_blocks_are_many_enough_and_few_enough(num):
    for width in (1, 300, 2**20):
        rows = [jax.ShapeDtypeStruct((num, width), np.float32)]
        size = blocks.clients_per_block(rows, num)
        assert 1 <= blocks.count(rows, num) <= blocks.MOST
        assert size == 1 or 4 * width * (size - 1) <= blocks.BYTES + 4 * width * (
            num // blocks.MOST
        )
    assert blocks.count([], num) == 0
