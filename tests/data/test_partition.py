"""Partitions: exact properties that hold for every generator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperjax.data import partition

Y = np.repeat(np.arange(5), 40)
OPTIONS = {
    "iid": {},
    "dirichlet": dict(alpha=0.5),
    "mixtures": dict(alpha=0.5),
    "pathological": dict(classes_per_client=2),
    "class_shares": dict(classes_per_client=2),
    "class_draws": dict(classes_per_client=2),
    "majors": dict(classes_per_client=2),
    "groups": dict(num_groups=5, classes_per_client=1),
    "by_client_id": dict(client_ids=np.arange(200) % 10),
}


def rng(seed=0):
    return np.random.default_rng(seed)


def check(parts, num_samples, num_clients):
    """Index arrays that are disjoint, not empty and in range; returns all indices."""
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 and len(part) for part in parts)
    indices = np.sort(np.concatenate(parts))
    assert (np.diff(indices) > 0).all()
    assert indices[0] >= 0 and indices[-1] < num_samples
    return indices


@pytest.mark.parametrize("name", ["iid", "mixtures"])
def test_clients_may_have_so_many_samples_each(name):
    options = {**OPTIONS[name], "samples_per_client": 15}
    parts = partition.partition(name, rng(), Y, 10, **options)
    assert len(check(parts, 200, 10)) == 150
    assert {len(part) for part in parts} == {15}
    with pytest.raises(ValueError, match=r"samples_per_client=21 for .*takes 210"):
        partition.partition(name, rng(), Y, 10, **{**options, "samples_per_client": 21})


def test_mixtures_are_drawn_from_the_dirichlet_distribution():
    y = np.repeat(np.arange(5), 20_000)
    parts = partition.mixtures(rng(), y, 200, alpha=0.3, samples_per_client=100)
    shares = partition.class_counts(y, parts, 5) / 100
    # Variance of a share, and of 100 draws by it: 0.16 / 2.5 + (0.16 - 0.064) / 100.
    np.testing.assert_allclose(shares.var(0), 0.065, rtol=0.3)
    np.testing.assert_allclose(shares.mean(0), 0.2, atol=0.06)


BOOTSTRAP = dict(alpha=0.3, samples_per_client=20)


def test_there_may_be_more_clients_than_samples():
    first, again, other = (
        partition.partition("bootstrap", rng(seed), Y, 1000, **BOOTSTRAP)
        for seed in (0, 0, 1)
    )
    assert all(part.dtype == np.int64 and len(part) == 20 for part in first)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(np.unique(first), np.arange(200))
    # As by `mixtures`: 0.16 / 2.5 + (0.16 - 0.064) / 20.
    shares = partition.class_counts(Y, first, 5) / 20
    np.testing.assert_allclose(shares.var(0), 0.0688, rtol=0.1)
    np.testing.assert_allclose(shares.mean(0), 0.2, atol=0.03)
    # All samples of a class alike.
    times = np.bincount(np.concatenate(first), minlength=200)
    assert times.min() > 60 and times.max() < 150


def test_what_is_apart_is_drawn_apart():
    apart = np.arange(200) % 4 == 0
    parts = np.stack(partition.bootstrap(rng(), Y, 300, **BOOTSTRAP, apart=apart))
    assert not apart[parts[:, :15]].any() and apart[parts[:, 15:]].all()
    # Both by the same shares of the classes.
    train, held_out = (
        partition.class_counts(Y, x, 5) / x.shape[1]
        for x in (parts[:, :15], parts[:, 15:])
    )
    assert np.corrcoef(train.ravel(), held_out.ravel())[0, 1] > 0.8
    with pytest.raises(ValueError, match=r"class 0 has 40 .* another to hold out"):
        partition.bootstrap(rng(), Y, 3, **BOOTSTRAP, apart=Y == 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(samples_per_client=0), "samples_per_client=0 must be at least 1"),
        (dict(alpha=0), "alpha=0 must be positive"),
        (dict(num_clients=0), "num_clients=0 must be at least 1"),
        (dict(y=Y * 1.0), "integer labels"),
    ],
)
def test_samples_must_be_drawn_of_something(options, match):
    given = dict(y=Y, num_clients=3) | BOOTSTRAP | options
    with pytest.raises(ValueError, match=match):
        partition.bootstrap(rng(), given.pop("y"), given.pop("num_clients"), **given)


def test_every_partitioner_is_tested():
    assert set(OPTIONS) == set(partition.PARTITIONERS) - {"bootstrap"}


@pytest.mark.parametrize("name", OPTIONS)
def test_all_samples_are_dealt_once_and_seeds_decide(name):
    first, again, other = (
        partition.partition(name, rng(seed), Y, 10, **OPTIONS[name])
        for seed in (0, 0, 1)
    )
    dealt = len(check(first, 200, 10))
    # Of 5 shares of each class one is nobody's: at most 0.6 / (0.6 + 4 * 0.4) of it.
    # All 5 classes are drawn here: one is missed with probability 0.03 for each seed.
    assert 5 * 29 - 20 <= dealt < 200 if name == "class_shares" else dealt == 200
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


@pytest.mark.parametrize("name", OPTIONS)
def test_clients_are_shuffled(name):
    parts = partition.partition(name, rng(), Y, 10, **OPTIONS[name])
    assert any((np.diff(part) < 0).any() for part in parts)


@pytest.mark.parametrize("name", OPTIONS)
def test_more_clients_than_samples_is_an_error(name):
    with pytest.raises(ValueError, match=r"num_clients=201 .*200 samples"):
        partition.partition(name, rng(), Y, 201, **OPTIONS[name])


@pytest.mark.parametrize("num_clients", [2.5, True, "3", float("nan")])
def test_clients_are_a_whole_number(num_clients):
    with pytest.raises(ValueError, match=r"num_clients=.* must be a whole number"):
        partition.partition("iid", rng(), Y, num_clients)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("y", [Y.astype(float), Y[:, None]])
def test_labels_must_be_a_row_of_integers(name, y):
    with pytest.raises(ValueError, match="integer labels"):
        partition.partition(name, rng(), y, 10, **OPTIONS[name])


@pytest.mark.parametrize(
    ("name", "match"), [("dirichelt", "did you mean 'dirichlet'"), ("x", "iid")]
)
def test_an_unknown_name_gets_the_nearest(name, match):
    with pytest.raises(ValueError, match=match):
        partition.partition(name, rng(), Y, 10)


@given(num_samples=st.integers(1, 60), num_clients=st.integers(1, 60))
@settings(deadline=None, max_examples=20)
def test_iid_sizes_differ_by_one_at_most(num_samples, num_clients):
    num_clients = min(num_clients, num_samples)
    parts = partition.iid(rng(), np.zeros(num_samples, int), num_clients)
    assert len(check(parts, num_samples, num_clients)) == num_samples
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(
    alpha=st.sampled_from([0.1, 1.0, 1e6]),
    num_clients=st.integers(1, 8),
    min_size=st.integers(1, 5),
    capped=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_dirichlet_uses_all_samples_and_keeps_the_least(
    alpha, num_clients, min_size, capped, seed
):
    parts = partition.dirichlet(
        rng(seed), Y, num_clients, alpha=alpha, min_size=min_size, capped=capped
    )
    assert len(check(parts, 200, num_clients)) == 200
    assert min(map(len, parts)) >= min_size
    counts = partition.class_counts(Y, parts, 5)
    assert counts.sum(axis=0).tolist() == [40] * 5


@given(
    alpha=st.sampled_from([1e-4, 0.3, 10.0]),
    num_clients=st.integers(1, 5),
    num_classes=st.integers(5, 12),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_a_client_at_the_cap_gets_no_further_class(
    alpha, num_clients, num_classes, seed
):
    y = rng(seed).permutation(np.repeat(np.arange(num_classes), 30))
    parts = partition.dirichlet(rng(seed), y, num_clients, alpha=alpha, capped=True)
    assert len(check(parts, len(y), num_clients)) == len(y)
    counts = partition.class_counts(y, parts, num_classes)
    before = counts.cumsum(axis=1) - counts
    assert (before * num_clients < len(y))[counts > 0].all()


def test_the_cap_leaves_draws_that_never_reach_it_alone():
    # Nearly equal shares: nobody holds a fifth of the samples before the last class.
    plain, capped = (
        partition.dirichlet(rng(), Y, 5, alpha=1e6, capped=capped)
        for capped in (False, True)
    )
    assert all(map(np.array_equal, plain, capped))


def test_the_cap_serves_whole_classes_to_everybody():
    # Classes stay whole; without the cap two of ten often go to one client.
    y = np.repeat(np.arange(10), 20)
    parts = partition.dirichlet(rng(), y, 10, alpha=1e-6, capped=True)
    assert [len(part) for part in parts] == [20] * 10


def test_dirichlet_goes_from_one_client_per_class_to_equal_shares():
    skewed, even = (
        partition.class_counts(Y, partition.dirichlet(rng(), Y, 4, alpha=alpha), 5)
        for alpha in (1e-3, 1e8)
    )
    assert (skewed.max(axis=0) == 40).all()
    assert (abs(even - 10) <= 1).all()


def test_dirichlet_shares_have_the_variance_of_their_distribution():
    # A share of Dirichlet(a 1_N) has mean 1/N and variance (1/N)(1 - 1/N) / (N a + 1);
    # N = 2, a = 1 is the uniform distribution: 1/12. Error of 300 draws: 0.0043.
    y = np.repeat(np.arange(300), 100)
    parts = partition.dirichlet(rng(), y, 2, alpha=1.0)
    shares = partition.class_counts(y, parts, 300)[0] / 100
    assert abs(shares.mean() - 1 / 2) < 0.05
    assert abs(shares.var() - 1 / 12) < 0.015


def test_dirichlet_ends_for_500_clients_and_100_classes():
    y = np.repeat(np.arange(100), 500)
    parts = partition.dirichlet(rng(), y, 500, alpha=0.3, min_size=10)
    assert len(check(parts, 50_000, 500)) == 50_000
    assert min(map(len, parts)) >= 10


def test_dirichlet_gives_up_with_the_best_it_saw():
    # Five classes that stay whole cannot feed ten clients.
    with pytest.raises(ValueError, match=r"21 draws with alpha=1e-06 .* had 0 in the"):
        partition.dirichlet(rng(), Y, 10, alpha=1e-6, max_redraws=20)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(alpha=0.0), "alpha=0.0 must be positive"),
        (dict(alpha=float("nan")), "alpha=nan must be a finite number, positive"),
        (dict(alpha=float("inf")), "alpha=inf must be a finite number, positive"),
        (dict(alpha="0.5"), "alpha='0.5' must be a finite number"),
        (dict(), "partition='dirichlet' needs alpha"),
        (dict(alpha=1.0, alhpa=2.0), "'alhpa' is unknown; did you mean 'alpha'"),
        (dict(alpha=1.0, min_size=0), "min_size=0 must be at least 1"),
        (dict(alpha=1.0, min_size=float("nan")), "min_size=nan must be a whole number"),
        (dict(alpha=1.0, max_redraws=-1), "max_redraws=-1 must be at least 0"),
        (dict(alpha=1.0, min_size=21), "takes 210 samples; there are 200"),
    ],
)
def test_dirichlet_refuses_what_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        partition.partition("dirichlet", rng(), Y, 10, **options)


@given(
    num_clients=st.integers(1, 12),
    num_classes=st.integers(1, 9),
    each=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_pathological_counts_are_exact(num_clients, num_classes, each, seed):
    each = min(each, num_classes)
    y = rng(seed).permutation(np.repeat(np.arange(num_classes), 12 + seed % 3))
    parts = partition.pathological(rng(seed), y, num_clients, classes_per_client=each)
    check(parts, len(y), num_clients)
    counts = partition.class_counts(y, parts, num_classes)
    assert ((counts > 0).sum(axis=1) == each).all()
    holders = (counts > 0).sum(axis=0)
    assert holders.max() - holders.min() <= 1
    for k in range(num_classes):
        shares = counts[counts[:, k] > 0, k]
        if len(shares):
            assert shares.sum() == 12 + seed % 3
            assert shares.max() - shares.min() <= 1


def test_pathological_leaves_out_classes_without_a_place():
    counts = partition.class_counts(
        Y, partition.pathological(rng(), Y, 3, classes_per_client=1), 5
    )
    assert sorted(counts.sum(axis=0)) == [0, 0, 40, 40, 40]


@pytest.mark.parametrize("name", ["pathological", "class_shares", "class_draws"])
@pytest.mark.parametrize("each", [0, 6])
def test_classes_per_client_are_checked(name, each):
    with pytest.raises(ValueError, match=f"classes_per_client={each} .*5 classes"):
        partition.partition(name, rng(), Y, 10, classes_per_client=each)


def test_pathological_needs_a_sample_for_every_holder():
    y = np.array([0] * 20 + [7])
    with pytest.raises(ValueError, match="class 7 has 1 samples for 3 clients"):
        partition.pathological(rng(), y, 3, classes_per_client=2)


@given(
    num_clients=st.integers(1, 12),
    num_classes=st.integers(1, 9),
    each=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_class_shares_are_as_many_and_as_uneven_as_said(
    num_clients, num_classes, each, seed
):
    each = min(each, num_classes)
    y = rng(seed).permutation(np.repeat(np.arange(num_classes), 1000))
    parts = partition.class_shares(rng(seed), y, num_clients, classes_per_client=each)
    check(parts, len(y), num_clients)
    counts = partition.class_counts(y, parts, num_classes)
    assert ((counts > 0).sum(axis=1) == each).all()
    num_shares = num_clients * each // num_classes + 1
    holders = (counts > 0).sum(axis=0)
    assert holders.max() - holders.min() <= 1 and holders.max() <= num_shares
    smallest = 1000 * 0.4 / (0.4 + (num_shares - 1) * 0.6)
    largest = 1000 * 0.6 / (0.6 + (num_shares - 1) * 0.4)
    assert (counts[counts > 0] >= np.floor(smallest)).all() and counts.max() <= largest


def test_equal_class_shares_by_hand():
    # 10 clients with 2 of 5 classes: 5 shares of 40 samples, one of which is nobody's.
    parts = partition.class_shares(
        rng(), Y, 10, classes_per_client=2, low=0.5, high=0.5
    )
    counts = partition.class_counts(Y, parts, 5)
    assert sorted(np.unique(counts)) == [0, 8]
    assert counts.sum(axis=0).tolist() == [32] * 5
    assert counts.sum(axis=1).tolist() == [16] * 10


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(low=0.0), "low=0.0 must be positive"),
        (dict(low=0.7), "low=0.7 must not exceed high=0.6"),
        (dict(low=float("nan")), "low=nan"),
        (dict(high=float("inf")), "high=inf"),
    ],
)
def test_weights_of_class_shares_are_checked(options, match):
    for name in ("class_shares", "class_draws"):
        with pytest.raises(ValueError, match=match):
            partition.partition(name, rng(), Y, 10, classes_per_client=2, **options)


def test_class_shares_need_a_sample_in_every_share():
    y = np.array([0] * 30 + [7] * 2)
    with pytest.raises(ValueError, match="class 7 has 2 samples for the 3 of 3"):
        partition.class_shares(rng(), y, 3, classes_per_client=2)


@given(
    num_clients=st.integers(1, 12),
    num_classes=st.integers(1, 9),
    each=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_drawn_classes_are_divided_completely(num_clients, num_classes, each, seed):
    each = min(each, num_classes)
    y = rng(seed).permutation(np.repeat(np.arange(num_classes), 1000))
    parts = partition.class_draws(rng(seed), y, num_clients, classes_per_client=each)
    check(parts, len(y), num_clients)
    counts = partition.class_counts(y, parts, num_classes)
    assert ((counts > 0).sum(axis=1) == each).all()
    holders = (counts > 0).sum(axis=0)
    assert set(counts.sum(axis=0)[holders > 0]) == {1000}
    for k in np.flatnonzero(holders):
        shares = counts[counts[:, k] > 0, k]
        least = 1000 * 0.4 / (0.4 + (holders[k] - 1) * 0.6)
        most = 1000 * 0.6 / (0.6 + (holders[k] - 1) * 0.4)
        assert shares.min() >= np.floor(least)
        # Every holder may lose up to one sample, and the first takes them all.
        assert shares.max() <= most + holders[k] and (shares[1:] <= most).all()


def test_equal_class_draws_by_hand():
    # All hold both classes of 11 samples: 3 each, and the 2 left over to the first.
    y = np.repeat([0, 1], 11)
    parts = partition.class_draws(rng(), y, 3, classes_per_client=2, low=0.5, high=0.5)
    counts = partition.class_counts(y, parts, 2)
    assert counts.tolist() == [[5, 5], [3, 3], [3, 3]]


def test_clients_draw_classes_whatever_the_others_draw():
    # 1000 clients with 3 of 10 classes: a class has Binomial(1000, 0.3) holders,
    # deviation 14.5, and two given classes meet at a client with probability 1/15.
    y = np.repeat(np.arange(10), 5000)
    parts = partition.class_draws(rng(), y, 1000, classes_per_client=3)
    held = partition.class_counts(y, parts, 10) > 0
    holders = held.sum(axis=0)
    assert (abs(holders - 300) < 60).all() and holders.std() > 3
    assert abs((held[:, 0] & held[:, 1]).mean() - 1 / 15) < 0.04


def test_a_class_that_nobody_draws_is_nobodys():
    # 400 times a client with 2 of 5 classes: a class is missed with probability 3/5.
    missed = 0
    for seed in range(400):
        part = partition.class_draws(rng(seed), Y, 1, classes_per_client=2)[0]
        assert len(part) == 80
        missed += 0 not in Y[part]
    assert abs(missed / 400 - 3 / 5) < 0.1


def test_majors_are_more_frequent_by_the_ratio():
    y = np.repeat(np.arange(10), 600)
    options = dict(classes_per_client=2, samples_per_client=200)
    parts = partition.majors(rng(), y, 30, **options)
    counts = partition.class_counts(y, parts, 10)
    assert np.sort(counts, axis=1).tolist() == 30 * [8 * [5] + 2 * [80]]
    assert ((counts == 80).sum(axis=0) == 6).all()
    equal = partition.majors(rng(), y, 30, **options, ratio=1.0)
    assert (partition.class_counts(y, equal, 10) == 20).all()
    # Of what is used up nothing more is taken, and sizes stay.
    few = np.concatenate([y, np.repeat(10, 7)])
    parts = partition.majors(rng(), few, 30, classes_per_client=2)
    assert {len(part) for part in parts} == {len(few) // 30}
    with pytest.raises(ValueError, match=r"ratio=0\.5 must be at least 1"):
        partition.majors(rng(), y, 30, **options, ratio=0.5)


def test_class_draws_need_a_sample_in_every_share():
    y = np.array([0] * 30 + [7] * 2)
    with pytest.raises(ValueError, match="class 7 has 2 samples for the 3 of 3"):
        partition.class_draws(rng(), y, 3, classes_per_client=2)


def test_groups_have_classes_of_their_own():
    # Classes 0 and 1 are the first three clients', 10 samples each cut in 4, 3, 3.
    y = np.repeat(np.arange(5), 10)
    parts = partition.groups(rng(), y, 6, num_groups=2, classes_per_client=2)
    expected = [[n, n, 0, 0, 0] for n in (4, 3, 3)]
    expected += [[0, 0, n, n, 0] for n in (4, 3, 3)]
    assert partition.class_counts(y, parts, 5).tolist() == expected


@pytest.mark.parametrize(
    ("num_clients", "options", "match"),
    [
        (7, dict(num_groups=2, classes_per_client=2), "num_clients=7 and 5 classes"),
        (6, dict(num_groups=3, classes_per_client=2), "multiple of 3 clients and 6 cl"),
        (6, dict(num_groups=0, classes_per_client=2), "num_groups=0"),
        (6, dict(num_groups=2, classes_per_client=6), "classes_per_client=6"),
        (60, dict(num_groups=1, classes_per_client=1), "class 0 has 40 samples"),
    ],
)
def test_groups_must_fit(num_clients, options, match):
    with pytest.raises(ValueError, match=match):
        partition.groups(rng(), Y, num_clients, **options)


def test_client_ids_group_samples():
    ids = np.array([30, 10, 30, 20, 10, 30])
    parts = partition.by_client_id(rng(), np.zeros(6, int), 3, client_ids=ids)
    assert [sorted(part) for part in parts] == [[1, 4], [3], [0, 2, 5]]


def test_client_ids_may_be_names():
    names = np.array(["kim", "ada", "kim", "lee", "ada", "kim"])
    parts = partition.by_client_id(rng(), np.zeros(6, int), 3, client_ids=names)
    assert [sorted(part) for part in parts] == [[1, 4], [0, 2, 5], [3]]


def test_client_ids_are_drawn_if_there_are_more():
    ids = OPTIONS["by_client_id"]["client_ids"]
    parts = partition.by_client_id(rng(), Y, 4, client_ids=ids)
    check(parts, 200, 4)
    owners = [set(ids[part]) for part in parts]
    assert all(len(owner) == 1 for owner in owners) and len(set.union(*owners)) == 4
    assert all(len(part) == 20 for part in parts)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (np.zeros(200, int), "num_clients=2, unseen ones .* has only 1 distinct"),
        (np.zeros(199, int), "199 client ids given for the 200 samples"),
        (np.zeros((200, 1), int), r"client_ids has the shape \(200, 1\)"),
        (np.zeros(200), r"client_ids is float64.*ids.astype\(int\)"),
        (
            np.array([None, *["a"] * 199], object),
            r"client_ids is object.*ids.astype\(str\)",
        ),
        (Y > 2, "client_ids is bool; ids must be integers or names"),
        (np.ma.masked_equal(Y, 3), "client_ids is a masked array"),
    ],
)
def test_client_ids_must_fit(ids, match):
    with pytest.raises(ValueError, match=match):
        partition.by_client_id(rng(), Y, 2, client_ids=ids)


def test_class_counts_by_hand():
    y = np.array([0, 2, 2, 1])
    parts = [np.array([0, 1]), np.array([2]), np.array([], int)]
    counts = partition.class_counts(y, parts, 4)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="from 0 to 2; num_classes=2"):
        partition.class_counts(y, parts, 2)
