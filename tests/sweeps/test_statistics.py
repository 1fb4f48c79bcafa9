"""Statistics over seeds: against tables and formulas, and what is said of little."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from hyperjax.sweeps import statistics
from hyperjax.sweeps.statistics import paired, parse_baseline

A = {0: 70.0, 1: 74.0, 2: 75.0, 3: 73.0, 4: 78.0}
B = {0: 69.0, 1: 71.0, 2: 73.0, 3: 73.0, 4: 74.0}


def test_one_seed_has_no_deviation():
    assert statistics.spread([81.0]) == (81.0, None, 1)
    mean, std, n = statistics.spread([1.0, 2.0, 6.0])
    # Squares 4 + 1 + 9 = 14 over n - 1 = 2.
    assert (mean, n) == (3.0, 3) and std == pytest.approx(math.sqrt(7))


def test_a_paired_difference_has_the_interval_of_the_tables():
    # Differences 1, 3, 2, 0, 4: mean 2, squares 10 over 4, so s = 1.5811 and the
    # error s / sqrt 5 = 0.70711; t(0.975, 4) = 2.7764 in any table.
    found = paired(A, B)
    assert found.difference == 2.0 and found.pairs == 5
    assert found.low == pytest.approx(2 - 2.7764 * 0.70711, abs=1e-4)
    assert found.high == pytest.approx(2 + 2.7764 * 0.70711, abs=1e-4)
    # For 4 degrees of freedom P(|T| > t) = 1 - x (3 - x^2) / 2 at x = t / sqrt(4 + t^2)
    t = 2 / 0.70711
    x = t / math.sqrt(4 + t * t)
    assert found.p == pytest.approx(1 - x * (3 - x * x) / 2, abs=1e-5)
    # Deviations from 74 and 72: products 12 + 0 + 1 - 1 + 8 = 20, squares 34 and 16.
    assert found.correlation == pytest.approx(20 / math.sqrt(34 * 16))


def test_pairs_are_of_shared_seeds_whatever_their_order():
    assert paired({2: 5.0, 0: 1.0, 1: 4.0}, {1: 1.0, 2: 1.0, 7: 0.0}).difference == 3.5
    assert paired({0: 1.0}, {1: 1.0}) == (None, None, None, None, None, 0)
    assert paired({0: 3.0}, {0: 1.0}) == (2.0, None, None, None, None, 1)


def test_equal_differences_give_a_sure_answer_and_no_warning(recwarn):
    assert paired(A, A)[:4] == (0.0, 0.0, 0.0, 1.0)
    assert paired({k: v + 1 for k, v in A.items()}, A)[:4] == (1.0, 1.0, 1.0, 0.0)
    assert not recwarn.list


def test_holm_leaves_out_what_was_not_tested():
    # 0.01 x 3, then max with 0.02 x 2, then 0.03 x 1: never less than before.
    found = statistics.holm([0.03, None, 0.01, 0.02])
    assert found == [
        pytest.approx(0.04),
        None,
        pytest.approx(0.03),
        pytest.approx(0.04),
    ]
    assert statistics.holm([None]) == [None]


def test_verdicts_are_made_after_the_correction():
    assert statistics.verdict(2.0, 0.049) == "better"
    assert statistics.verdict(-2.0, 0.049) == "worse"
    assert statistics.verdict(2.0, 0.051) == "level"
    assert statistics.verdict(2.0, None) is None


def test_the_bootstrap_knows_two_levels():
    # Clients alike within seeds: only seeds vary, and the mean of five of them has
    # the deviation sqrt(2 / 5) of values 1..5 whose variance (ddof 0) is 2.
    low, high = statistics.bootstrap([[v] * 50 for v in (1, 2, 3, 4, 5)])
    assert (low, high) == (pytest.approx(1.8, abs=0.1), pytest.approx(4.2, abs=0.1))
    # Seeds alike, clients 0 and 1 by halves: 2 seeds x 50 clients, a binomial mean.
    low, high = statistics.bootstrap([[0.0, 1.0] * 25] * 2)
    assert (low, high) == (pytest.approx(0.40, abs=0.01), pytest.approx(0.60, abs=0.01))
    assert statistics.bootstrap([[1.0, 2.0]]) is None
    assert statistics.bootstrap([[1, 2, 3], [4, 5]]) == statistics.bootstrap(
        [[1, 2, 3], [4, 5]]
    )


def points(**methods):
    rows = [
        dict(method=method, alpha=alpha, seed=seed, finished=True, pacc=value)
        for method, by_alpha in methods.items()
        for alpha, values in by_alpha.items()
        for seed, value in values.items()
    ]
    wide = pd.DataFrame(rows).rename(columns={"alpha": "data.alpha"})
    wide.insert(0, "point", [f"p{i}" for i in range(len(wide))])
    return wide


BY = ["method", "data.alpha"]


def test_groups_are_compared_with_the_baseline_of_their_other_settings():
    far = {seed: value + 20 for seed, value in B.items()}
    up = {seed: value + 2 + 0.1 * seed for seed, value in B.items()}
    wide = points(fedavg={0.1: B, 1.0: far}, ours={0.1: up, 1.0: far})
    base = parse_baseline("fedavg", statistics.groups_of(wide, BY))
    records = statistics.compare(wide, BY, ["pacc"], base)
    by_name = {tuple(r["group"].values()): r for r in records}
    ours = by_name["ours", 0.1]
    assert ours["baseline"] == {"method": "fedavg", "data.alpha": 0.1}
    assert ours["paired"]["pacc"].difference == pytest.approx(2.2)
    assert ours["verdict"] == {"pacc": "better"}
    assert by_name["ours", 1.0]["verdict"] == {"pacc": "level"}
    assert by_name["fedavg", 0.1]["verdict"] == {}
    # Two comparisons: the smaller p counts twice.
    assert ours["holm"]["pacc"] == pytest.approx(2 * ours["paired"]["pacc"].p)
    assert statistics.best(records, "pacc") == [False, False, True, False]


def test_a_baseline_is_best_if_all_others_are_worse():
    low = {seed: value - 5 - 0.1 * seed for seed, value in A.items()}
    wide = points(fedavg={1.0: A}, ours={1.0: low})
    base = parse_baseline("method.name=fedavg,alpha=1", statistics.groups_of(wide, BY))
    records = statistics.compare(wide, BY, ["pacc"], base)
    assert statistics.best(records, "pacc") == [True, False]
    # Without a baseline nothing is proven.
    plain = statistics.compare(wide, BY, ["pacc"])
    assert statistics.best(plain, "pacc") == [False, False]


def test_a_method_is_compared_whatever_options_the_baseline_lacks():
    groups = [
        {"method": "fedavg", "data.alpha": 0.1, "method.size": None},
        {"method": "fedavg", "data.alpha": 1.0, "method.size": None},
        {"method": "ours", "data.alpha": 0.1, "method.size": 8},
    ]
    assert parse_baseline("fedavg", groups).of(groups[2], groups) == groups[0]
    fixed = parse_baseline("fedavg,alpha=1.0", groups)
    assert fixed.of(groups[2], groups) == groups[1]
    sizes = parse_baseline("size=8", groups)
    assert sizes.of(groups[0], groups) is None  # another method
    with pytest.raises(ValueError, match=r"baseline='fedprox'.*method: fedavg, ours;"):
        parse_baseline("fedprox", groups)
    with pytest.raises(ValueError, match=r"data\.alpha: 0\.1, 1\.0"):
        parse_baseline("beta=3", groups)


def test_rows_are_split_by_group_in_one_pass():
    wide = points(fedavg={0.1: B, None: A}, ours={1.0: B, 0.1: A}).iloc[::-1]
    found = list(statistics.split(wide, BY))
    assert [group for group, _ in found] == statistics.groups_of(wide, BY)
    assert {"method": "fedavg", "data.alpha": None} in [group for group, _ in found]
    for group, own in found:
        pd.testing.assert_frame_equal(own, statistics.members(wide, group))


def test_unfinished_points_are_counted_but_not_averaged():
    wide = points(fedavg={1.0: A})
    wide.loc[wide["seed"] > 2, "finished"] = False
    (record,) = statistics.compare(wide, BY, ["pacc"])
    assert (record["points"], record["finished"]) == (5, 3)
    assert record["spread"]["pacc"].mean == pytest.approx(73.0)


def test_a_seed_that_ran_twice_counts_once():
    wide = points(fedavg={1.0: {0: 1.0, 1: 3.0}})
    twice = pd.concat([wide, wide.assign(pacc=[3.0, 5.0])], ignore_index=True)
    assert statistics.by_seed(twice, "pacc") == {0: 2.0, 1: 4.0}


def test_the_share_of_clients_served_better_pairs_clients_of_one_partition():
    def rows(method, seed, partition, values):
        return [
            dict(
                method=method,
                seed=seed,
                partition=partition,
                client=i,
                participating=i < 2,
                metric="accuracy",
                value=value,
            )
            for i, value in enumerate(values)
        ]

    clients = pd.DataFrame(
        [
            *rows("fedavg", 0, "x", [50.0, 50.0, 50.0]),
            *rows("fedavg", 1, "y", [50.0, 50.0, 50.0]),
            *rows("fedavg", 2, "z", [50.0, 50.0, 50.0]),
            *rows("ours", 0, "x", [60.0, 40.0, 50.0]),
            *rows("ours", 1, "y", [60.0, 70.0, 80.0]),
            *rows("ours", 2, "other", [0.0, 0.0, 0.0]),  # other clients: no pair
        ]
    )
    found = statistics.helped(clients, {"method": "ours"}, {"method": "fedavg"})
    share, (low, high), seeds = found[True]
    assert (share, seeds) == (75.0, 2) and 0 <= low <= 50 and high == 100.0
    assert found[False][0] == 75.0 and not np.isnan(found[False][1]).any()
