"""Arrays of many clients in one, and the rectangle that they stand for."""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperjax import models, training, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.data import clients, federation, partition, ragged, sources
from hyperjax.data.ragged import Ragged, Rows
from hyperjax.runs import experiment, loop

SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=12)


def parts_of(sizes):
    draws = np.random.default_rng(sum(sizes))
    return [draws.integers(0, 100, n) for n in sizes]


@given(SIZES, st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_it_is_a_list_of_arrays(sizes, start, stop):
    parts = parts_of(sizes)
    found = Ragged.of(parts)
    assert len(found) == len(parts) and found.size.tolist() == sizes
    for mine, theirs in zip(found, parts, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    some = found[start:stop]
    assert [x.tolist() for x in some] == [x.tolist() for x in parts[start:stop]]
    np.testing.assert_array_equal(found[-1], parts[-1])
    odd = found.where(found.flat % 2 == 1)
    assert [x.tolist() for x in odd] == [x[x % 2 == 1].tolist() for x in parts]
    np.testing.assert_array_equal(
        found.owners(), np.repeat(np.arange(len(sizes)), sizes)
    )
    twice = found.map(lambda x: 2 * x, np.int16)
    assert [x.tolist() for x in twice] == [(2 * x).tolist() for x in parts]
    with pytest.raises(IndexError):
        found[len(parts)]
    with pytest.raises(ValueError, match="in a row"):
        found[::2]


@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_rows_are_the_rectangle(sizes):
    parts, width = parts_of(sizes), max(1, *sizes) + 2
    whole = np.zeros((len(sizes), width), np.int32)
    for i, part in enumerate(parts):
        whole[i, : len(part)] = part
    rows = Rows(Ragged.of(parts), width)
    assert rows.shape == whole.shape and len(rows) == len(whole)
    last = len(sizes) - 1
    for which in (
        *(0, -1, slice(None), slice(1, None), np.array([last, 0, 0]), whole[:, 0] > 50),
        *((0, slice(2)), (slice(None), 0), (np.array([0, last]), 1)),
    ):
        found = rows[which]
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, whole[which])
    np.testing.assert_array_equal(rows, whole)
    np.testing.assert_array_equal(np.stack(list(rows)), whole)
    wider = np.asarray(rows.widened(width + 3))
    np.testing.assert_array_equal(wider, np.pad(whole, ((0, 0), (0, 3))))
    with pytest.raises(IndexError):
        rows[len(sizes)]


@pytest.mark.parametrize("num", [127, 128, 129, 2**15 - 1, 2**15, 2**15 + 1])
def test_places_have_room_for_the_last_one(num, monkeypatch):
    monkeypatch.setattr(clients, "LARGE", 0)
    table = clients.table([np.arange(num - 1), np.arange(1)])
    assert table.size.tolist() == [num - 1, 1]
    np.testing.assert_array_equal(table.rows[0], np.arange(num - 1))
    np.testing.assert_array_equal(np.asarray(table.rows)[0], np.arange(num - 1))


def test_few_at_once_are_dealt_the_same(monkeypatch):
    y = np.random.default_rng(3).integers(0, 5, 400)
    apart = np.arange(400) % 5 == 0

    def deal():
        draws = np.random.default_rng(7)
        return partition.partition(
            *("bootstrap", draws, y, 50), alpha=0.3, samples_per_client=9, apart=apart
        )

    whole = deal()
    for module in (ragged, partition.even):
        monkeypatch.setattr(module, "AT_ONCE", 7)
    few = deal()
    assert [x.tolist() for x in few] == [x.tolist() for x in whole]
    counts = partition.class_counts(y, few, 5)
    by_hand = [np.bincount(y[part], minlength=5) for part in whole]
    np.testing.assert_array_equal(counts, by_hand)


@pytest.fixture(scope="module")
def dealt():
    """The same federation with rectangles, and without any."""

    def deal():
        return federation.federate(
            sources.load("synthetic(num_samples=300)"),
            num_clients=40,
            partition="bootstrap",
            alpha=1.0,
            samples_per_client=12,
        )

    with pytest.MonkeyPatch.context() as patch:
        plain = deal()
        patch.setattr(clients, "LARGE", 0)
        patch.setattr(ragged, "AT_ONCE", 7)
        return plain, deal()


def test_a_federation_without_rectangles_is_the_same(dealt, tmp_path):
    plain, large = dealt
    assert isinstance(large.train.rows, Rows) and isinstance(large.test.rows, Rows)
    assert not isinstance(plain.train.rows, Rows)
    assert large.train.rows.nbytes < plain.train.rows.nbytes / 3
    assert federation.digests(large) == federation.digests(plain)
    np.testing.assert_array_equal(large.source_prior, plain.source_prior)
    for name, one in (("plain", plain), ("large", large)):
        federation.save_tables(one, tmp_path / f"{name}.npz")
    with np.load(tmp_path / "plain.npz") as a, np.load(tmp_path / "large.npz") as b:
        assert set(a.files) == set(b.files) > {"train_rows", "counts"}
        for name in a.files:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])
    pooled = large.pooled().trainers
    np.testing.assert_array_equal(pooled.rows, plain.pooled().trainers.rows)
    wide = large.widened({"train": 64}).train.rows
    np.testing.assert_array_equal(wide, plain.widened({"train": 64}).train.rows)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["device", "host"])
def test_a_run_without_rectangles_is_the_same(dealt, store):
    digests = set()
    for data in dealt:
        classes = data.num_classes
        network = models.MLP(classes, hidden=(4,))
        model = models.from_linen(network, data.pool.x.shape[1:], classes)
        local = training.Local(optimizer=optax.sgd(0.1), batch_size=4)
        made = experiment.experiment(
            data,
            fedavg(model, local=local),
            experiment.Settings(rounds=2, every=1),
            sampler="uniform",
            cohort_size=4,
            devices=1,
            store=store,
        )
        state = loop.start(made)
        for call in loop.rounds(made, state):
            state = call.state
        values = made.evaluator.evaluate(0, state.carry, state.round)
        digests.add(tree.sha256((jax.device_get(state.carry), values)))
    assert len(digests) == 1


def test_moments_count_samples_as_often_as_they_are_there():
    draws = np.random.default_rng(0)
    x = draws.integers(0, 256, (30, 4, 4, 3), np.uint8)
    rows = draws.integers(0, 30, 1000)
    for found, exact in zip(
        clients.moments(x, rows), clients.moments(x[rows], np.arange(1000)), strict=True
    ):
        np.testing.assert_array_equal(found, exact)
