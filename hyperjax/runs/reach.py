"""What a run sent before it reached an accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Reach(NamedTuple):
    """When a threshold was first met, and numbers sent by and to one client until then.

    What happens between two evaluations is not seen. So there are two rounds: `round`,
    which is charged, was the first found at the threshold, and the first to reach it
    may be any after `missed`. They are neighbours, and nothing is open, if every round
    is evaluated. (An accuracy that was reached and lost again before `missed` stays
    unseen.)

    Attributes:
      threshold: the accuracy asked for.
      round: zero-based index of the first evaluated round that meets it, None if none.
      missed: index of the last evaluated round before that; -1 is the start.
      cost: round x numbers per round trip, as arXiv:2402.18445 counts in its Table III:
        what is reached in the first round is free. An upper bound.
      least_cost: the same for the round after `missed`, a lower bound unless the
        accuracy was reached and lost before.
      full_cost: (round + 1) x numbers per round trip, what was really sent.
    """

    threshold: float
    round: int | None = None
    missed: int | None = None
    cost: int | None = None
    least_cost: int | None = None
    full_cost: int | None = None


def cost_to_reach(
    rounds: Sequence[int],
    accuracies: Sequence[float | None],
    cpr: int,
    thresholds: Sequence[float],
) -> list[Reach]:
    """Returns the cost of reaching each threshold.

    Args:
      rounds: zero-based indices of evaluated rounds, in increasing order; a record
        taken after t rounds has index t - 1.
      accuracies: of the model after each of them, in the unit of `thresholds`; None
        or NaN where there is none, as if that round had not been evaluated.
      cpr: numbers per client and round trip, down and up.
      thresholds: an accuracy equal to one meets it.

    Raises:
      ValueError: lengths differ, or rounds are negative or do not increase.

    Example:
      >>> cost_to_reach([0, 1, 2], [10.0, 25.0, 20.0], 100, [20])[0].cost
      100
    """
    if len(rounds) != len(accuracies):
        raise ValueError(f"{len(rounds)} rounds with {len(accuracies)} accuracies")
    previous = -1
    for index in rounds:
        if index <= previous:
            raise ValueError(f"rounds={list(rounds)} must increase from 0 or more")
        previous = index
    curve = [
        (index, accuracy)
        for index, accuracy in zip(rounds, accuracies, strict=True)
        if accuracy is not None and accuracy == accuracy
    ]
    found = []
    for threshold in thresholds:
        missed, reach = -1, Reach(threshold)
        for index, accuracy in curve:
            if accuracy >= threshold:
                costs = (index * cpr, (missed + 1) * cpr, (index + 1) * cpr)
                reach = Reach(threshold, index, missed, *costs)
                break
            missed = index
        found.append(reach)
    return found


def of_curve(
    curve: Mapping[int, float | None], cpr: int, thresholds: Sequence[float]
) -> list[Reach]:
    """Returns `cost_to_reach` of {rounds trained: accuracy}, in increasing order."""
    after = {t - 1: accuracy for t, accuracy in curve.items() if t > 0}
    return cost_to_reach(list(after), list(after.values()), cpr, thresholds)


def of_records(
    records: Sequence[Mapping[str, Any]], cpr: int, thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns what a client had sent and received when pACC first met each threshold.

    Args:
      records: those of metrics.jsonl.
      cpr: numbers per client and round trip.
      thresholds: % pACC; those that were not reached are left out.
    """
    curve = {record["round"]: record["pacc"] for record in records}
    found = of_curve(curve, cpr, thresholds)
    return [each._asdict() for each in found if each.round is not None]
