"""Rounds of an experiment, one compiled call after another."""

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from hyperjax import hosts, rng, tree
from hyperjax.engine import stores
from hyperjax.engine.schedule import Carry
from hyperjax.runs.experiment import Experiment, Settings
from hyperjax.types import PyTree


class State(NamedTuple):
    """Where a run is: how many rounds are finished, and all that changes in them."""

    round: int
    carry: Carry


class Call(NamedTuple):
    """What one call of the program did."""

    state: State
    info: dict[str, np.ndarray]  # quantities of its rounds, leaves [R, ...]
    seconds: float  # without compilation

    @property
    def samples(self) -> float:
        """How many training samples clients went through."""
        # Also of the exchange that opens a round, if there is one.
        visits = ("samples", "opening_samples")
        return sum(float(np.sum(self.info[k])) for k in visits if k in self.info)

    @property
    def last(self) -> dict[str, Any]:
        """The quantities of the last round."""
        return {name: values[-1] for name, values in self.info.items()}


class Diverged(FloatingPointError):
    """A loss or the state is not finite; `last_good` rounds were."""

    def __init__(self, round: int, what: str, last_good: int):
        are = "are" if ", " in what else "is"
        super().__init__(
            f"round {round}: {what} {are} not finite. A smaller local learning rate, "
            "or clip_norm=1.0, often helps"
        )
        self.last_good = last_good


def start(experiment: Experiment) -> State:
    """Returns the state before the first round."""
    return State(0, experiment.simulator.init(experiment.settings.seed))


def rounds(
    experiment: Experiment, state: State, *, donate: bool = False
) -> Iterator[Call]:
    """Runs what is left of an experiment, one call of the program after another.

    Calls end on a grid that depends on the settings alone, so that a continued run
    makes the same calls, and computes the same bits, as an uninterrupted one.

    Args:
      experiment: what is run.
      state: where it is.
      donate: whether states are consumed, the given one and those that are yielded, by
        the call that follows; otherwise each stays as it is, in memory of its own.

    Raises:
      Diverged: a logged quantity or the state is not finite.
    """
    while state.round < experiment.settings.rounds:
        call = step(experiment, state, donate=donate)
        state = call.state
        yield call


def step(experiment: Experiment, state: State, *, donate: bool = False) -> Call:
    """Runs one call of `rounds`; there must be rounds left."""
    simulator, settings = experiment.simulator, experiment.settings
    num = next_stop(settings, state.round) - state.round
    root = rng.root_key(settings.seed)
    began, compiled = time.perf_counter(), simulator.program.seconds
    carry, info = simulator.run(root, state.carry, state.round, num, donate=donate)
    info = jax.device_get(info)
    seconds = time.perf_counter() - began - (simulator.program.seconds - compiled)
    who = None
    if any(isinstance(seen, np.ndarray) for seen in carry.seen.values()):
        who = simulator.participants(root, state.round, num)
        held = simulator.held
        who = {k: x[stores.is_held(x, held.get(k))] for k, x in who.items()}
    return checked(state.round, carry, info, seconds, who)


def checked(
    start: int,
    carry: Carry,
    info: dict[str, Any],
    seconds: float,
    who: Mapping[str, np.ndarray] | None = None,
) -> Call:
    """Returns what a call did that began after round `start`.

    Args:
      start: that round.
      carry: the state after it.
      info: quantities of its rounds.
      seconds: that it took.
      who: clients, by family, whose rows may have changed; None: all.

    Raises:
      Diverged: as `rounds`.
    """
    _check_finite(carry, info, start, who)
    return Call(State(start + len(info["samples"]), carry), info, seconds)


def next_stop(settings: Settings, round: int) -> int:
    """Returns the round at which the call that begins after `round` ends."""
    every = settings.every
    per_call = settings.rounds_per_call or every
    last_evaluation = round // every * every
    within = (round - last_evaluation) // per_call + 1
    stop = min(last_evaluation + every, last_evaluation + within * per_call)
    return min(stop, settings.rounds)


def is_due(settings: Settings, round: int) -> bool:
    """Returns whether a round is evaluated."""
    return round % settings.every == 0 or round == settings.rounds


def _check_finite(
    carry: Carry,
    info: dict[str, np.ndarray],
    round: int,
    who: Mapping[str, np.ndarray] | None,
) -> None:
    for i in range(len(info["samples"])):
        bad = [name for name, values in info.items() if not np.isfinite(values[i])]
        if bad:
            raise Diverged(round + i + 1, ", ".join(bad), round)
    finite = all(map(tree.finite, _changed(carry, who)))
    if not all(hosts.gathered(finite)):  # each looks at the rows that it holds
        raise Diverged(round + len(info["samples"]), "the state", round)


def _changed(carry: Carry, who: Mapping[str, np.ndarray] | None) -> Iterator[PyTree]:
    """A state without host rows that did not change, nor all of those at once."""
    rows = dict(carry.rows)
    for name, seen in carry.seen.items():
        if isinstance(seen, np.ndarray):
            mine, ids = (
                rows.pop(name),
                np.flatnonzero(seen) if who is None else who[name],
            )
            for some in stores.pieces(mine, ids):
                yield jax.tree.map(lambda x, some=some: x[some], mine)
    yield carry._replace(rows=rows)
