"""Evaluation of methods with families: each family on its own, results put together."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hyperjax.data.clients import Table
from hyperjax.engine import evaluate, families, schedule
from hyperjax.engine.compiled import Compiled
from hyperjax.engine.evaluate import Evaluator, Population
from hyperjax.engine.families import Families
from hyperjax.types import Algorithm, Pool


def evaluator(
    alg: Algorithm,
    pool: Pool,
    populations: Mapping[str, Population],
    *,
    members: Families,
    family: np.ndarray,
    tuned: Mapping[str, Population] | None = None,
    **options: Any,
) -> Evaluator:
    """Builds the evaluation of a method with families.

    Args:
      alg: the method.
      pool: the samples.
      populations: see `evaluate.evaluator`; ids are those of the whole population.
      members: who has trained, by family.
      family: [ids] int, position in `members.names` of any client that may appear.
      tuned: see `evaluate.evaluator`.
      **options: of `evaluate.evaluator`.
    """
    num = len(members.family)

    def part(population: Population, i: int) -> tuple[np.ndarray, Population] | None:
        """Where a family's clients are in a population, and they alone."""
        where = np.flatnonzero(family[population.ids] == i)
        if not len(where):
            return None
        ids = population.ids[where]
        strangers = members.size(members.names[i])
        known = np.minimum(ids, num - 1)
        local = np.where(ids < num, members.place[known], strangers).astype(np.int32)
        tables = (
            Table(table.rows[where], table.size[where])
            for table in (population.train, population.inputs)
        )
        return where, Population(local, *tables)

    def parts(whom, i):
        found = {metric: part(population, i) for metric, population in whom.items()}
        return {metric: p for metric, p in found.items() if p is not None}

    places, evaluators = [], []
    for i, name in enumerate(members.names):
        mine, fine = parts(populations, i), parts(tuned or {}, i)
        places.append(
            [{metric: where for metric, (where, _) in p.items()} for p in (mine, fine)]
        )
        evaluators.append(
            evaluate.evaluator(
                families.view(alg, name),
                pool,
                {metric: population for metric, (_, population) in mine.items()},
                tuned={metric: population for metric, (_, population) in fine.items()},
                **options,
            )
        )

    def of(carry: schedule.Carry, name: str) -> schedule.Carry:
        return schedule.Carry(carry.server, carry.rows[name], carry.seen[name])

    def together(kind: int, scores: list[dict]) -> dict:
        """Per-client values in the order of the population."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for place, values in zip(places, scores, strict=True):
            for metric, columns in values.items():
                where = place[kind][metric]
                whom = (tuned or {}) if kind else populations
                for column, x in columns.items():
                    empty = np.full((len(whom[metric].ids), *x.shape[1:]), np.nan)
                    whole = found.setdefault(metric, {}).setdefault(column, empty)
                    whole[where] = x
        return found

    def run(root, carry, round: int):
        pairs = zip(members.names, evaluators, strict=True)
        scores = [e.evaluate(root, of(carry, n), round) for n, e in pairs]
        return together(0, scores)

    def tune(root, carry, round: int, epochs: int):
        pairs = zip(members.names, evaluators, strict=True)
        return together(
            1, [e.tune(root, of(carry, n), round, epochs) for n, e in pairs]
        )

    return Evaluator(run, tune, _Programs([e.program for e in evaluators]))


class _Programs(Compiled):
    """Several compilers: their compile time, and one watcher of all."""

    def __init__(self, programs: list[Compiled]):
        self._all = programs

    @property
    def seconds(self) -> float:
        return sum(program.seconds for program in self._all)

    @seconds.setter
    def seconds(self, value: float) -> None:
        del value

    @property
    def watcher(self) -> Callable[[str | None], object]:
        return self._all[0].watcher

    @watcher.setter
    def watcher(self, value: Callable[[str | None], object]) -> None:
        for program in self._all:
            program.watcher = value
