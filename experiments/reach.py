"""What a run sent before it reached an accuracy."""

from collections.abc import Sequence
from typing import NamedTuple


class Reach(NamedTuple):
    """When a threshold was first met, and numbers sent by and to one client until then.

    Attributes:
      threshold: the accuracy asked for.
      round: zero-based index of the round, None if it was never met.
      cost: round x numbers per round trip, as arXiv:2402.18445 counts in its Table III:
        what is reached in the first round is free.
      full_cost: (round + 1) x numbers per round trip, what was really sent.
    """

    threshold: float
    round: int | None
    cost: int | None
    full_cost: int | None


def cost_to_reach(
    rounds: Sequence[int],
    accuracies: Sequence[float],
    cpr: int,
    thresholds: Sequence[float],
) -> list[Reach]:
    """Returns the cost of reaching each threshold.

    Args:
      rounds: zero-based indices of evaluated rounds, in increasing order; a record
        taken after t rounds has index t - 1.
      accuracies: of the model after each of them, in the unit of `thresholds`.
      cpr: numbers per client and round trip, down and up.
      thresholds: an accuracy equal to one meets it.

    Raises:
      ValueError: lengths differ, or rounds are negative or do not increase.

    Example:
      >>> cost_to_reach([0, 1, 2], [10.0, 25.0, 20.0], 100, [20])
      [Reach(threshold=20, round=1, cost=100, full_cost=200)]
    """
    if len(rounds) != len(accuracies):
        raise ValueError(f"{len(rounds)} rounds with {len(accuracies)} accuracies")
    previous = -1
    for index in rounds:
        if index <= previous:
            raise ValueError(f"rounds={list(rounds)} must increase from 0 or more")
        previous = index
    found = []
    for threshold in thresholds:
        reached = zip(rounds, accuracies, strict=True)
        first = next((i for i, accuracy in reached if accuracy >= threshold), None)
        found.append(
            Reach(threshold, None, None, None)
            if first is None
            else Reach(threshold, first, first * cpr, (first + 1) * cpr)
        )
    return found
