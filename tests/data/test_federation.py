"""How a data set is dealt out to participants, novel clients and the test set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperjax.data import federation as federations
from hyperjax.data.ragged import Ragged
from hyperjax.data.sources import load

TABLES = ("train", "held_out", "novel", "test")  # every sample is in one of them


def source(num_samples=600):
    return load("synthetic", num_samples=num_samples, num_classes=5, shape=(2, 2))


def deal(num_samples=600, **options):
    options = {
        "num_clients": 6,
        "num_novel": 3,
        "partition": "iid",
        "seed": 1,
        **options,
    }
    return federations.federate(source(num_samples), **options)


def parts(table):
    return [row[:size] for row, size in zip(table.rows, table.size, strict=True)]


def everything(table):
    return np.concatenate(parts(table)) if table is not None else np.array([], int)


DIRICHLET = dict(partition="dirichlet", alpha=0.5, min_size=8)
STRATIFIED = dict(DIRICHLET, stratified=True)


@pytest.mark.parametrize("options", [{}, DIRICHLET, STRATIFIED])
def test_every_sample_has_one_place(options):
    found = deal(**options)
    rows = np.concatenate([everything(getattr(found, name)) for name in TABLES])
    np.testing.assert_array_equal(np.sort(rows), np.arange(600))
    assert (found.num_clients, found.num_novel, found.num_trainers) == (6, 3, 6)
    assert len(found.test.size) == 1
    assert found.trainers is found.train


def test_a_federation_says_in_a_line_who_there_is_and_of_what():
    images = "1,200 images of 2x2x1, 5 classes)"
    assert repr(deal(1200)) == f"Federation(6 clients + 3 unseen, {images}"
    assert repr(deal(1200, num_novel=0)) == f"Federation(6 clients, {images}"
    assert repr(source(1200)) == f"Source('synthetic', {images}"
    # One of one's own that nobody has looked at yet.
    raw = source()._replace(name="mine", x=[[0, 1]])
    assert repr(raw) == "Source('mine', of list)"


@pytest.mark.parametrize("num_novel", [0, 3])
@pytest.mark.parametrize("test_fraction", [0.0, 0.2])
def test_novel_clients_and_the_test_set_may_be_missing(num_novel, test_fraction):
    found = deal(num_novel=num_novel, test_fraction=test_fraction)
    rows = np.concatenate([everything(getattr(found, name)) for name in TABLES])
    np.testing.assert_array_equal(np.sort(rows), np.arange(600))
    assert found.num_novel == num_novel and len(found.counts) == 6 + num_novel
    novel = (found.novel, found.novel_train, found.novel_held_out)
    assert [table is None for table in novel] == [num_novel == 0] * 3
    assert (found.test is None) == (test_fraction == 0)


@pytest.mark.parametrize("options", [{}, DIRICHLET, STRATIFIED])
def test_novel_clients_are_split_like_participants(options):
    found = deal(**options, eval_fraction=0.25)
    np.testing.assert_array_equal(
        found.novel_held_out.size, np.round(0.25 * found.novel.size)
    )
    for part, *split in zip(
        parts(found.novel),
        parts(found.novel_train),
        parts(found.novel_held_out),
        strict=True,
    ):
        np.testing.assert_array_equal(np.sort(np.concatenate(split)), np.sort(part))
        if "stratified" not in options:
            np.testing.assert_array_equal(np.concatenate(split[::-1]), part)


@given(
    eval_fraction=st.floats(0.01, 0.99),
    alpha=st.sampled_from([0.1, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=20)
def test_stratified_parts_hold_every_class_in_proportion(eval_fraction, alpha, seed):
    options = dict(partition="dirichlet", alpha=alpha, min_size=3, seed=seed)
    options["eval_fraction"] = eval_fraction
    y = source().y
    found, plain = deal(**options, stratified=True), deal(**options)
    # Stratification moves samples between the two parts of a client alone.
    np.testing.assert_array_equal(found.held_out.size, plain.held_out.size)
    np.testing.assert_array_equal(found.novel.rows, plain.novel.rows)
    np.testing.assert_array_equal(found.counts, plain.counts)
    for held_out, counts in zip(parts(found.held_out), found.counts, strict=False):
        exact = len(held_out) * counts / counts.sum()
        got = np.bincount(y[held_out], minlength=5)
        assert (np.abs(got - exact) < 1).all()
        # Largest remainders: nobody rounded up lost less than somebody rounded down.
        up = got > exact
        if up.any() and (got < exact).any():
            assert (exact % 1)[up].min() >= (exact % 1)[got < exact].max() - 1e-9


def test_a_stratified_split_by_hand():
    # 10 of class 0, 4 of class 1, 1 of class 2; 5 are held out. In proportion that is
    # 50/15, 20/15 and 5/15: 3, 1 and 0, and the sample missing goes to the class that
    # lost most, 5/15 each, so to the first of them.
    y = np.array([0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0])
    y, part = np.append(np.full(100, 3), y), np.arange(100, 115)
    train, held_out = federations._set_apart(Ragged.of([part]), y, 1 / 3)
    assert held_out[0].tolist() == [100, 101, 102, 103, 105]
    assert sorted([*train[0], *held_out[0]]) == part.tolist()


def test_pooled_training_has_one_client_with_everything():
    found = deal(**DIRICHLET)
    pooled = found.pooled()
    assert (pooled.num_clients, pooled.num_novel, pooled.num_trainers) == (6, 3, 1)
    np.testing.assert_array_equal(
        np.sort(everything(pooled.trainers)), np.sort(everything(found.train))
    )
    assert pooled.trainers.size.tolist() == [found.train.size.sum()]
    assert found.trainer_ids.tolist() == list(range(6))
    assert pooled.trainer_ids.tolist() == [0] * 6
    assert pooled._replace(trainers=found.trainers) == found
    np.testing.assert_array_equal(pooled.source_prior, found.source_prior)


@pytest.mark.parametrize("options", [{}, DIRICHLET, STRATIFIED])
def test_participants_set_validation_samples_aside(options):
    plain, found = deal(**options), deal(validation_fraction=0.25, **options)
    triples = zip(
        parts(plain.train), parts(found.train), parts(found.validation), strict=True
    )
    for whole, train, validation in triples:
        assert len(validation) == min(max(1, round(0.25 * len(whole))), len(whole) - 1)
        both = np.concatenate([train, validation])
        np.testing.assert_array_equal(np.sort(both), np.sort(whole))
    assert found.trainers is found.train
    # Nobody else loses any, and pixels are normalised by what is trained on.
    for name in ("held_out", "novel", "novel_train", "novel_held_out", "test"):
        for x, y in zip(getattr(plain, name), getattr(found, name), strict=True):
            np.testing.assert_array_equal(x, y)
    assert not np.array_equal(found.pool.mean, plain.pool.mean)
    assert plain.validation is None


def test_newcomers_take_the_place_of_participants():
    found = deal(validation_fraction=0.25, **DIRICHLET)
    new = found.of_novel()
    assert (new.num_clients, new.num_novel, new.num_trainers) == (3, 0, 3)
    assert new.train is found.novel_train and new.trainers is new.train
    assert new.held_out is found.novel_held_out and new.test is found.test
    assert new.novel is new.novel_train is new.validation is None
    assert new.pool is found.pool
    np.testing.assert_array_equal(new.counts, found.counts[6:])
    for part, count in zip(parts(found.novel), new.counts, strict=True):
        labels = np.asarray(new.pool.y)[part]
        np.testing.assert_array_equal(np.bincount(labels, minlength=5), count)
    with pytest.raises(ValueError, match="num_novel is 0"):
        deal(num_novel=0).of_novel()


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
    found = deal(validation_fraction=0.2, **DIRICHLET)
    federations.save_tables(found, tmp_path / "partition.npz")
    saved = np.load(tmp_path / "partition.npz", allow_pickle=False)
    for name in federations.TABLES:
        rows, size = getattr(found, name)
        np.testing.assert_array_equal(saved[f"{name}_rows"], rows)
        np.testing.assert_array_equal(saved[f"{name}_size"], size)
    np.testing.assert_array_equal(saved["counts"], found.counts)
    assert saved["participating"].tolist() == [True] * 6 + [False] * 3
    assert tuple(saved["label_names"]) == found.label_names
    assert saved["num_trainers"] == 6


def test_what_is_not_there_is_not_saved(tmp_path):
    found = deal(num_novel=0, test_fraction=0.0).pooled()
    federations.save_tables(found, tmp_path / "partition.npz")
    saved = np.load(tmp_path / "partition.npz", allow_pickle=False)
    tables = {name for name in saved.files if name.endswith(("_rows", "_size"))}
    assert tables == {"train_rows", "train_size", "held_out_rows", "held_out_size"}
    assert saved["participating"].tolist() == [True] * 6
    assert saved["num_trainers"] == 1


def test_given_ids_make_the_clients():
    ids = np.arange(600) % 9
    found = deal(partition="by_client_id", client_ids=ids)
    whole = [
        np.concatenate(p)
        for p in zip(parts(found.train), parts(found.held_out), strict=True)
    ]
    for part in [*whole, *parts(found.novel)]:
        assert len(set(ids[part])) == 1
    assert len({ids[part[0]] for part in [*whole, *parts(found.novel)]}) == 9


SKEWED = dict(num_clients=2, num_novel=0, partition="class_draws")


DEALT = {*federations.partitions.PARTITIONERS} - {*federations.partitions.SHARED}
SHARED = dict(partition="bootstrap", alpha=0.5, samples_per_client=5, num_novel=0)


def test_nobody_trains_on_what_others_hold_out():
    found = deal(**SHARED, num_clients=2000)
    kept = [set(everything(getattr(found, x))) for x in ("train", "held_out", "test")]
    assert len(set.union(*kept)) == sum(map(len, kept)) == 600 == 600 - found.unassigned
    assert len(kept[1]) == 95  # a fifth of each class, of what is not the test set
    assert set(found.train.size) == {4} and set(found.held_out.size) == {1}
    assert found.counts.sum() == 5 * 2000


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(num_novel=1), "num_novel=1 does not go with .* accepted: 0"),
        (dict(validation_fraction=0.2), "validation_fraction=0.2 does not go"),
        (dict(stratified=True), "stratified=True does not go"),
        (dict(shift="rotation"), "shift='rotation' does not go"),
        (dict(standardise="client"), "'client' does not .* accepted: 'pool' or 'none'"),
        (dict(samples_per_client=1), "samples_per_client=1 must be at least 2"),
    ],
)
def test_what_has_no_meaning_for_samples_in_common(options, match):
    with pytest.raises(ValueError, match=match):
        deal(**SHARED | options, num_clients=2000)


@pytest.mark.parametrize("name", sorted(DEALT))
def test_what_belongs_to_nobody_is_counted(name):
    options = {
        "dirichlet": dict(alpha=0.5),
        "mixtures": dict(alpha=0.5, samples_per_client=50),
        "majors": dict(classes_per_client=1, samples_per_client=50),
        "by_client_id": dict(client_ids=np.arange(600) % 20),
        "groups": dict(num_groups=2, classes_per_client=1),
        "iid": {},
    }.get(name, dict(classes_per_client=1))
    found = deal(partition=name, num_clients=3, num_novel=1, **options)
    rows = np.concatenate([everything(getattr(found, name)) for name in TABLES])
    assert found.unassigned == 600 - len(rows)
    assert (found.unassigned > 0) == (name not in ("iid", "dirichlet"))
    assert found.pooled().unassigned == found.unassigned


def test_samples_of_nobody_are_warned_of_and_saved(caplog, tmp_path):
    # 480 samples to deal out, of which two clients with one class each take a part.
    found = deal(**SKEWED, classes_per_client=1)
    held = (found.counts > 0).any(axis=0)
    missed = ", ".join(str(k) for k in np.flatnonzero(~held))
    (message,) = (r.getMessage() for r in caplog.records)
    assert f"{found.unassigned} of the 480 samples of 'synthetic'" in message
    assert "partition='class_draws'" in message
    assert f"({100 * found.unassigned / 480:.1f} %) belong to no client" in message
    assert f"no client has any of {5 - held.sum()} classes ({missed})" in message
    federations.save_tables(found, tmp_path / "partition.npz")
    with np.load(tmp_path / "partition.npz") as saved:
        assert saved["unassigned"] == found.unassigned


def test_writers_who_are_not_drawn_are_warned_of(caplog):
    ids = np.arange(600) % 20
    found = deal(partition="by_client_id", client_ids=ids, num_clients=6, num_novel=2)
    assert found.unassigned == 480 - found.counts.sum() > 200
    (message,) = (r.getMessage() for r in caplog.records)
    assert f"{found.unassigned} of the 480 samples" in message
    assert "12 of 20 client_ids are not drawn" in message
    said = found.facts()
    assert said["ids"] == "20 whose samples are 30 each"
    assert said["left out"] == (
        f"{found.unassigned} of 480 samples; 12 of 20 client_ids are not drawn"
    )
    assert said["participants"].startswith("6 with ")
    assert deal().facts()["left out"] == "nothing"


def test_many_bytes_are_not_gone_through_for_their_range(monkeypatch):
    assert deal().facts()["read"].endswith(", uint8, 0 to 255")
    monkeypatch.setattr(federations, "_RANGED", 1000)
    assert deal().facts()["read"].endswith(", uint8")


def test_crumbs_are_not_warned_of(caplog):
    found = deal(partition="pathological", num_clients=5, classes_per_client=5)
    assert found.unassigned == 0
    deal()
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(num_clients=0), "num_clients=0 must be at least 1"),
        (dict(num_novel=-1), "num_novel=-1 must be at least 0"),
        (dict(num_clients=2.0), "num_clients=2.0 must be a whole number"),
        (dict(seed=-1), "seed=-1 must be at least 0"),
        (dict(seed=0.5), "seed=0.5 must be a whole number"),
        (dict(test_fraction="0.2"), "test_fraction='0.2' must be a finite number"),
        (dict(validation_fraction=float("inf")), "validation_fraction=inf must be"),
        (dict(client_ids=np.arange(600)), "option of iid='client_ids' is unknown"),
        (dict(partition="by_client_id"), "'by_client_id' needs client_ids"),
        (dict(test_fraction=-0.1), r"test_fraction=-0.1 must lie between 0 and 1"),
        (dict(test_fraction=1.0), r"test_fraction=1.0 must lie between 0 and 1"),
        (dict(eval_fraction=0.0), r"eval_fraction=0.0 must lie between 0 and 1"),
        (dict(eval_fraction=float("nan")), "eval_fraction=nan must be a finite number"),
        (dict(validation_fraction=1.0), "validation_fraction=1.0 must lie between 0"),
        (
            dict(num_clients=200, num_novel=0, validation_fraction=0.5),
            r"client \d+ is left with one sample to train on",
        ),
        (
            dict(num_clients=598),
            "num_clients=598 and num_novel=3 must not be more than the 480",
        ),
        (dict(num_clients=400), r"client \d+ has 1 sample\(s\); a client needs"),
        (
            dict(
                partition="by_client_id",
                client_ids=np.minimum(np.arange(600) // 70, 8) + (np.arange(600) > 598),
                num_clients=8,
                num_novel=2,
                test_fraction=0.0,
            ),
            r"client 9 has 1 sample\(s\); a client needs .* num_novel",
        ),
        (
            dict(partition="by_client_id", client_ids=np.arange(7)),
            "7 client ids given for the 600 samples",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        deal(**options)


def test_digests_tell_pixels_labels_and_shares_apart():
    federation = deal()
    before = federations.digests(federation)
    x, y = np.array(federation.pool.x), np.array(federation.pool.y)
    x.flat[3] ^= 1
    y[3] ^= 1
    rows = federation.train.rows.copy()
    rows[0, 0] ^= 1
    pool = federation.pool
    others = {
        "pixels": federation._replace(pool=pool._replace(x=x)),
        "labels": federation._replace(pool=pool._replace(y=y)),
        "partition": federation._replace(train=federation.train._replace(rows=rows)),
    }
    for part, other in others.items():
        after = federations.digests(other)
        assert [k for k in before if before[k] != after[k]] == [part]
    assert federations.digests(deal()) == before
