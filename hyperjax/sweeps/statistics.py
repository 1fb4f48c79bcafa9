"""What seeds tell: means with deviations, paired differences, intervals.

The unit that is repeated is the seed of the whole run: partition, initialisation and
sampling follow from it. Clients of one seed share all of these, so a test over clients
would take one run for many; statements about clients are resampled in two levels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

CONFIDENCE = 0.95
# Of the bootstrap.
RESAMPLES = 10_000
# By seeds of too few runs a correlation is always 1 or -1.
_FEWEST_TO_CORRELATE = 3


class Spread(NamedTuple):
    """A mean over seeds; `std` is the sample deviation (n - 1), None for one seed."""

    mean: float
    std: float | None
    n: int


class Paired(NamedTuple):
    """A difference of two groups over the seeds that both have.

    Attributes:
      difference: mean of (one - other); None without a common seed.
      low, high: its 95 % t interval; None for fewer than two pairs.
      p: of the paired t test, two-sided; None for fewer than two pairs.
      correlation: of the pairs, None for fewer than three or where one is constant.
      pairs: how many.
    """

    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    correlation: float | None
    pairs: int


def spread(values: Sequence[float]) -> Spread:
    """Returns mean, deviation and number of values, one per seed.

    Example:
      >>> spread([1.0, 3.0])
      Spread(mean=2.0, std=1.4142135623730951, n=2)
      >>> spread([1.0])
      Spread(mean=1.0, std=None, n=1)
    """
    n = len(values)
    std = float(np.std(values, ddof=1)) if n > 1 else None
    return Spread(float(np.mean(values)), std, n)


def paired(one: Mapping[Any, float], other: Mapping[Any, float]) -> Paired:
    """Returns the difference of two groups, paired by seed.

    Args:
      one: value by seed.
      other: value by seed; seeds that only one has are left out.
    """
    from scipy import stats

    seeds = [seed for seed in one if seed in other]
    a = np.array([one[seed] for seed in seeds], float)
    b = np.array([other[seed] for seed in seeds], float)
    if not seeds:
        return Paired(None, None, None, None, None, 0)
    mean = float(np.mean(a - b))
    if len(seeds) < 2:
        return Paired(mean, None, None, None, None, 1)
    if np.ptp(a - b) == 0:  # t is 0/0 or infinite
        return Paired(mean, mean, mean, float(mean == 0), _correlation(a, b), len(a))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences nearly alike
        test = stats.ttest_rel(a, b)
    low, high = map(float, test.confidence_interval(CONFIDENCE))
    return Paired(mean, low, high, float(test.pvalue), _correlation(a, b), len(a))


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < _FEWEST_TO_CORRELATE or not (np.ptp(a) and np.ptp(b)):
        return None
    return float(np.corrcoef(a, b)[0, 1])


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Returns p values corrected for their number by Holm's method; None stays None."""
    from statsmodels.stats.multitest import multipletests

    there = [value for value in p if value is not None]
    corrected = iter(multipletests(there, method="holm")[1] if there else ())
    return [None if value is None else float(next(corrected)) for value in p]


def verdict(difference: float | None, corrected: float | None) -> str | None:
    """Returns better, worse or level; None where nothing was tested.

    Level says that the interval, after the correction, holds 0: not that there is no
    difference.
    """
    if difference is None or corrected is None:
        return None
    if corrected > 1 - CONFIDENCE:
        return "level"
    return "better" if difference > 0 else "worse"


def bootstrap(
    values: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Returns the 95 % interval of a mean over clients of several seeds.

    Two levels: seeds are drawn with replacement, then clients of each. The mean is
    that of the seeds' means.

    Args:
      values: by seed, a value per client.
      resamples: how often both are drawn.
      seed: of the drawing; equal arguments give equal intervals.

    Returns:
      Its 2.5 % and 97.5 % quantiles; None for a single seed, which says nothing about
      others.
    """
    rows = [np.asarray(row, float) for row in values]
    if len(rows) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(rows), size=(resamples, len(rows)))
    means = np.empty(drawn.shape)
    for i, row in enumerate(rows):
        where = drawn == i
        num = int(where.sum())
        # In pieces, since a thousand clients times all draws are many.
        pieces = np.array_split(np.arange(num), max(1, num * len(row) // 10**6))
        means[where] = np.concatenate(
            [
                row[rng.integers(len(row), size=(len(p), len(row)))].mean(1)
                for p in pieces
            ]
        )
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means.mean(1), [tail, 100 - tail])
    return float(low), float(high)


# Groups of points -------------------------------------------------------------------


class Baseline(NamedTuple):
    """What others are compared with: values of some columns."""

    values: dict[str, str]

    def of(self, group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]):
        """Returns the group that has these values and is else as the given one.

        Options of a method are its own, so with another method they are left aside.
        None if there is no such group, or more than one.
        """
        ignored = set(self.values)
        if "method" in ignored:
            ignored |= {name for name in group if name.startswith("method.")}
        found = [
            other
            for other in groups
            if self._is(other)
            and all(other[k] == group[k] for k in other if k not in ignored)
        ]
        return found[0] if len(found) == 1 else None

    def _is(self, group: Mapping[str, Any]) -> bool:
        return all(_equal(group[k], value) for k, value in self.values.items())


def parse_baseline(text: str, groups: Sequence[Mapping[str, Any]]) -> Baseline:
    """Returns the baseline that a text names: METHOD or FIELD=VALUE, several by commas.

    Raises:
      ValueError: a field is none of the groups' columns, or no group has the values.
    """
    values = {}
    for part in text.split(","):
        name, is_pair, value = part.strip().partition("=")
        values[name if is_pair else "method"] = value if is_pair else name
    known = list(groups[0]) if groups else []
    chosen = Baseline({_column(k, known): v for k, v in values.items()})
    unknown = [k for k in chosen.values if k not in known]
    if unknown or not any(chosen._is(g) for g in groups):
        there = "; ".join(
            f"{k}: {', '.join(dict.fromkeys(_text(g[k]) for g in groups))}"
            for k in known
        )
        raise ValueError(
            f"baseline={text!r} is none of the groups; give a method or field=value, "
            f"several with commas between (there are: {there})"
        )
    return chosen


def groups_of(wide: pd.DataFrame, by: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the settings of every group of points, in order of appearance."""
    rows = wide[list(by)].drop_duplicates()
    rows = rows.astype(object).where(rows.notna(), None)
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows.itertuples(index=False):
        found.setdefault(tuple(row), dict(zip(by, row, strict=True)))
    return list(found.values())


def split(
    rows: pd.DataFrame, by: Sequence[str]
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yields the settings and the rows of every group, in order of appearance.

    In one pass over the rows, where `members` has one for each group.
    """
    each = rows.groupby(list(by), sort=False, dropna=False)
    for group, (_, own) in zip(groups_of(rows, by), each, strict=True):
        yield group, own


def members(wide: pd.DataFrame, group: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the rows of a group's points."""
    kept = pd.Series(True, index=wide.index)
    for name, value in group.items():
        kept &= wide[name].isna() if value is None else wide[name] == value
    return wide[kept]


def by_seed(wide: pd.DataFrame, metric: str) -> dict[Any, float]:
    """Returns the values of a metric by seed, without those that are not there.

    Points of one seed in one group, such as a run made twice, count once, as their
    mean: they repeat nothing.
    """
    if metric not in wide:
        return {}
    return wide.groupby("seed")[metric].mean().dropna().to_dict()


def compare(
    wide: pd.DataFrame,
    by: Sequence[str],
    metrics: Sequence[str],
    baseline: Baseline | None = None,
) -> list[dict[str, Any]]:
    """Returns a record per group: means over seeds, and differences to its baseline.

    Args:
      wide: a row per point, as from `long.last`; unfinished points are left out.
      by: columns that make a group, the seed not among them.
      metrics: columns where more is better. Holm's correction is over all their
        comparisons together.
      baseline: which group each is compared with; None compares nothing.

    Returns:
      Records of "group", "points" (how many there are), "finished", "baseline" (a
      group or None), "spread" and "paired" by metric, "holm" and "verdict" by metric.
    """
    groups = groups_of(wide, by)
    done = wide[wide["finished"].astype(bool)]
    found: list[dict[str, Any]] = []
    for group in groups:
        own, other = members(done, group), None
        if baseline is not None:
            other = baseline.of(group, groups)
        record: dict[str, Any] = dict(
            group=group,
            points=len(members(wide, group)),
            finished=len(own),
            baseline=other,
            spread={},
            paired={},
        )
        for metric in metrics:
            values = by_seed(own, metric)
            if values:
                record["spread"][metric] = spread(list(values.values()))
            if other is not None and other != group:
                pair = paired(values, by_seed(members(done, other), metric))
                record["paired"][metric] = pair
        found.append(record)
    tests = [(r, m) for r in found for m in r["paired"]]
    corrected = holm([r["paired"][m].p for r, m in tests])
    for record in found:
        record |= {"holm": {}, "verdict": {}}
    for (record, metric), value in zip(tests, corrected, strict=True):
        record["holm"][metric] = value
        difference = record["paired"][metric].difference
        record["verdict"][metric] = verdict(difference, value)
    return found


def best(records: Sequence[Mapping[str, Any]], metric: str) -> list[bool]:
    """Returns which groups are best of those with one baseline, and proven to be.

    A group is so if its mean is the highest and it is better than the baseline; the
    baseline is, if all others are worse.
    """
    found = []
    for record in records:
        base = record["baseline"]
        block = [r for r in records if base is not None and r["baseline"] == base]
        means = [r["spread"][metric].mean for r in block if metric in r["spread"]]
        highest = bool(means) and metric in record["spread"]
        highest = highest and record["spread"][metric].mean == max(means)
        if record["group"] == base:
            others = [r for r in block if r is not record]
            proven = bool(others) and all(
                r["verdict"].get(metric) == "worse" for r in others
            )
        else:
            proven = record["verdict"].get(metric) == "better"
        found.append(highest and proven)
    return found


def helped(
    clients: pd.DataFrame, group: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[bool, tuple[float, tuple[float, float] | None, int]]:
    """Returns which share of clients one group serves better than another, in percent.

    Args:
      clients: as from `long.clients`, their accuracies alone.
      group: settings of one.
      other: settings of the other; pairs are the same client of the same seed, where
        both had one partition. Clients that are served alike count half.

    Returns:
      By whether clients take part: share, its interval by `bootstrap`, number of seeds.
    """
    keys = ["seed", "partition", "client", "participating"]
    sides = []
    for which in (group, other):
        rows = members(clients, which)
        sides.append(rows.drop_duplicates(keys).set_index(keys)["value"])
    both = pd.concat(sides, axis=1, join="inner", keys=["one", "other"]).reset_index()
    sign = np.sign(both["one"] - both["other"])
    both["better"] = 50.0 * (1 + sign)
    found = {}
    for participating, rows in both.groupby("participating"):
        seeds = [part["better"].to_numpy() for _, part in rows.groupby("seed")]
        share = float(np.mean([seed.mean() for seed in seeds]))
        found[bool(participating)] = (share, bootstrap(seeds), len(seeds))
    return found


def _column(name: str, known: Sequence[str]) -> str:
    """The column that a field's name, or its last part, says."""
    if name == "method.name":
        return "method"
    ends = [k for k in known if k.endswith(f".{name}")]
    return ends[0] if name not in known and len(ends) == 1 else name


def _equal(value: Any, given: str) -> bool:
    if _text(value) == given:
        return True
    try:
        return not isinstance(value, str) and float(value) == float(given)
    except (TypeError, ValueError):
        return False


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
