"""How a data set is dealt out to participants, unseen clients and the test set."""

import numpy as np
import pytest

from hyperjax.data import federation as federations
from hyperjax.data.sources import load

TABLES = ("train", "held_out", "novel", "test")


def source(num_samples=600):
    return load("synthetic", num_samples=num_samples, num_classes=5, shape=(2, 2))


def deal(num_samples=600, **options):
    options = {
        "num_clients": 6,
        "num_novel": 3,
        "partition_name": "iid",
        "seed": 1,
        **options,
    }
    return federations.federate(source(num_samples), **options)


def parts(table):
    return [row[:size] for row, size in zip(table.rows, table.size, strict=True)]


DIRICHLET = dict(partition_name="dirichlet", alpha=0.5, min_size=8)


@pytest.mark.parametrize("options", [{}, DIRICHLET])
def test_every_sample_has_one_place(options):
    found = deal(**options)
    rows = np.concatenate([r for name in TABLES for r in parts(getattr(found, name))])
    np.testing.assert_array_equal(np.sort(rows), np.arange(600))
    assert (found.num_clients, found.num_novel) == (6, 3)
    assert len(found.test.size) == 1


def test_sizes_follow_the_fractions():
    # 600: 120 to test; 480 over 9 clients are 53 or 54; of them a quarter is held out.
    found = deal(test_fraction=0.2, eval_fraction=0.25)
    assert found.test.size.tolist() == [120]
    assert set(found.novel.size) <= {53, 54}
    whole = found.train.size + found.held_out.size
    assert set(whole) <= {53, 54} and whole.sum() + found.novel.size.sum() == 480
    np.testing.assert_array_equal(found.held_out.size, np.round(0.25 * whole))


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_extreme_fractions_leave_one_sample_on_each_side(share):
    found = deal(eval_fraction=share)
    assert min(found.held_out.size.min(), found.train.size.min()) == 1


def test_counts_are_of_all_samples_of_all_clients():
    found, y = deal(**DIRICHLET), source().y
    assert found.counts.shape == (9, 5)
    whole = [
        np.concatenate(p)
        for p in zip(parts(found.train), parts(found.held_out), strict=True)
    ]
    for row, part in zip(found.counts, [*whole, *parts(found.novel)], strict=True):
        np.testing.assert_array_equal(row, np.bincount(y[part], minlength=5))


def test_the_source_prior_is_that_of_training_samples():
    found, y = deal(**DIRICHLET), source().y
    labels = y[np.concatenate(parts(found.train))]
    expected = np.bincount(labels, minlength=5) / len(labels)
    np.testing.assert_allclose(found.source_prior, expected)


def test_pixels_are_normalised_by_training_samples():
    found, x = deal(), source().x
    pixels = x[np.concatenate(parts(found.train))] / 255.0
    np.testing.assert_allclose(found.pool.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.pool.std, pixels.std((0, 1, 2)), rtol=1e-5)


def tables(found):
    return [np.concatenate(parts(getattr(found, name))).tolist() for name in TABLES]


@pytest.mark.parametrize("options", [{}, DIRICHLET])
def test_the_seed_decides_everything(options):
    assert tables(deal(**options)) == tables(deal(**options))
    other = tables(deal(**options, seed=2))
    assert all(a != b for a, b in zip(tables(deal(**options)), other, strict=True))


def test_tables_are_saved_exactly(tmp_path):
    found = deal(**DIRICHLET)
    federations.save_tables(found, tmp_path / "partition.npz")
    saved = np.load(tmp_path / "partition.npz", allow_pickle=False)
    for name in TABLES:
        rows, size = getattr(found, name)
        np.testing.assert_array_equal(saved[f"{name}_rows"], rows)
        np.testing.assert_array_equal(saved[f"{name}_size"], size)
    np.testing.assert_array_equal(saved["counts"], found.counts)
    assert saved["participating"].tolist() == [True] * 6 + [False] * 3
    assert tuple(saved["label_names"]) == found.label_names


def test_given_ids_make_the_clients():
    ids = np.arange(600) % 9
    found = deal(partition_name="by_client_id", client_ids=ids)
    whole = [
        np.concatenate(p)
        for p in zip(parts(found.train), parts(found.held_out), strict=True)
    ]
    for part in [*whole, *parts(found.novel)]:
        assert len(set(ids[part])) == 1
    assert len({ids[part[0]] for part in [*whole, *parts(found.novel)]}) == 9


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(num_clients=0), "num_clients=0 must be at least 1"),
        (dict(num_novel=0), "num_novel=0 must be at least 1"),
        (dict(test_fraction=0.0), r"test_fraction=0.0 must lie between 0 and 1"),
        (dict(test_fraction=1.0), r"test_fraction=1.0 must lie between 0 and 1"),
        (dict(eval_fraction=-0.1), r"eval_fraction=-0.1 must lie between 0 and 1"),
        (dict(eval_fraction=float("nan")), "eval_fraction=nan must lie between"),
        (dict(num_clients=598), "num_clients=601 must lie between 1 and the 480"),
        (dict(num_clients=400), r"client \d+ has 1 sample\(s\); a participant needs"),
        (
            dict(partition_name="by_client_id", client_ids=np.arange(7)),
            "7 client ids given for the 600 samples of 'synthetic'",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        deal(**options)
