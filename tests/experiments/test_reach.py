"""Costs of reaching an accuracy, by hand."""

import pytest

from hyperjax.runs.reach import Reach, cost_to_reach, of_curve


def test_first_round_that_meets_each_threshold():
    # Evaluated every other round; 30 is passed on the way to 40, and lost again.
    found = cost_to_reach([0, 2, 4, 6], [12.0, 20.0, 41.0, 35.0], 100, [10, 20, 30, 40])
    assert found == [
        Reach(10, 0, -1, cost=0, least_cost=0, full_cost=100),
        Reach(20, 2, 0, cost=200, least_cost=100, full_cost=300),
        Reach(30, 4, 2, cost=400, least_cost=300, full_cost=500),
        Reach(40, 4, 2, cost=400, least_cost=300, full_cost=500),
    ]


def test_what_an_evaluation_every_few_rounds_leaves_open_is_said():
    # Met somewhere in rounds 0 to 4: charged as if in round 4, perhaps for nothing.
    (reach,) = of_curve({0: 9.0, 5: 60.0, 10: 50.0}, 100, [50])
    assert (reach.missed, reach.round) == (-1, 4)
    assert (reach.least_cost, reach.cost) == (0, 400)
    # Evaluated after every round, nothing is.
    every = of_curve({0: 9.0, 1: 9.5, 2: 60.0, 3: 61.0}, 100, [50])
    assert [(r.least_cost, r.cost) for r in every] == [(100, 100)]


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_round_without_an_accuracy_counts_as_not_evaluated(nothing):
    (reach,) = of_curve({1: 10.0, 2: nothing, 3: 60.0}, 100, [50])
    assert (reach.missed, reach.round, reach.least_cost) == (0, 2, 100)
    (reach,) = of_curve({1: 60.0, 2: nothing}, 100, [50])
    assert (reach.round, reach.cost) == (0, 0)


def test_what_is_never_reached_has_no_cost():
    assert cost_to_reach([0, 1], [1.0, float("nan")], 7, [2]) == [Reach(2)]
    assert cost_to_reach([0, 1], [1.0, None], 7, [2]) == [Reach(2)]
    assert cost_to_reach([], [], 7, [2]) == [Reach(2)]


def test_hyperfednet_needed_35_63_million_numbers_for_70_percent():
    # arXiv:2402.18445, Table III, last cell of the first row: round 63.
    accuracies = [0.0] * 63 + [70.0]
    (reach,) = cost_to_reach(range(64), accuracies, 565_536, [70])
    assert (reach.round, reach.cost, reach.full_cost) == (63, 35_628_768, 36_194_304)


@pytest.mark.parametrize("rounds", [[-1, 0], [1, 1], [2, 1]])
def test_rounds_that_do_not_increase(rounds):
    with pytest.raises(ValueError, match="must increase from 0"):
        cost_to_reach(rounds, [1.0, 2.0], 1, [1])


def test_lengths_that_differ():
    with pytest.raises(ValueError, match="2 rounds with 1 accuracies"):
        cost_to_reach([0, 1], [1.0], 1, [1])
