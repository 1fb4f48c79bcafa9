"""Trains one method on one federation; the same command continues a stopped run.

python -m experiments.train --config=configs/zero_shot.py --workdir=runs/x
"""

import contextlib
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import ml_collections
import numpy as np
from absl import flags, logging

from hyperjax import hosts
from hyperjax.data import federation as federations
from hyperjax.data import picture, shift
from hyperjax.data.federation import Federation
from hyperjax.engine import checkpoint, compiled, log, schedule
from hyperjax.engine.progress import Progress, Silent
from hyperjax.launch import (
    cli,
    data,
    embedding_maps,
    fits,
    origin,
    pages,
    report,
    saved,
    workdir,
)
from hyperjax.launch.report_sections import MANY_CLIENTS
from hyperjax.launch.resolve import Resolved, resolve
from hyperjax.protocols import common
from hyperjax.runs import loop, reach, results
from hyperjax.runs.experiment import Experiment
from hyperjax.types import PyTree

# What `steps` yields, is sent, and returns.
Steps: TypeAlias = Generator[
    tuple[Experiment, loop.State], loop.Call | None, dict[str, Any]
]


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint."""


def train(
    config: ml_collections.ConfigDict,
    path: str | os.PathLike,
    label: str | None = None,
    show: Callable[[str, int], Progress] = Progress,
    experiment: Experiment | None = None,
    profile: bool = False,
    stopping: Callable[[], AbstractContextManager[Callable[[], bool]]] | None = None,
    page: bool = True,
) -> dict[str, Any]:
    """Runs, or continues, one experiment in a folder.

    A finished run goes on if it is given more rounds, and is summed up anew if it is
    asked for other numbers at the end. May be called as often as one likes in a
    process; what calls share is `experiment` and JAX's cache of programs.

    Args:
      config: see `protocols.common.defaults`; its method under `config.method`.
      path: the run's folder; made if it is not there.
      label: of the run in progress lines; the method's name by default.
      show: what makes these lines of a label and a number of rounds; `Silent` none.
      experiment: what `build.build` made of this config, or of one that differs from
        it in nothing but `seed` (with a `data.seed` of its own) and `evaluation`; its
        compiled programs are used again. Default: it is made here.
      profile: whether the second call of the program of rounds, the first having
        compiled it, is traced into the folder "profile" of the run's.
      stopping: see `steps`.
      page: whether the run gets its page at the end, which `hyperjax report` draws at
        any time.

    Returns:
      The summary, also written to summary.json.

    Raises:
      ValueError and others, before any work: bad input, see `resolve`,
        `workdir.claim` and `origin.compare`.
      loop.Diverged: a loss or the state is not finite. The folder keeps what is good.
      Stopped: by SIGTERM or SIGINT.
    """
    run = steps(config, path, label, show, experiment, stopping, page)
    call: loop.Call | None = None
    number = 0
    while True:
        try:
            turn = run.send(call)
        except StopIteration as done:
            return done.value
        try:
            with _traced(path, profile and number == 1):
                call = loop.step(*turn, donate=True)
            number += 1
        except BaseException as error:
            run.throw(error)  # so that it leaves everything in order, and raises


def _traced(path: str | os.PathLike, wanted: bool) -> AbstractContextManager[None]:
    """Traces what is computed inside, for xprof and Perfetto."""
    if not (wanted and hosts.is_first()):
        return contextlib.nullcontext()
    folder = Path(path).expanduser() / workdir.PROFILE
    return jax.profiler.trace(folder, create_perfetto_trace=True)


def steps(
    config: ml_collections.ConfigDict,
    path: str | os.PathLike,
    label: str | None = None,
    show: Callable[[str, int], Progress] = Progress,
    experiment: Experiment | None = None,
    stopping: Callable[[], AbstractContextManager[Callable[[], bool]]] | None = None,
    page: bool = True,
) -> Steps:
    """`train`, but for the rounds: whoever drives it runs those.

    It yields an experiment and the state from which to go on, consuming that or not,
    and is sent the call that did so, or thrown what came instead.

    Args:
      config: this and the others as of `train`.
      path: likewise.
      label: likewise.
      show: likewise.
      experiment: likewise.
      stopping: a context with a function that says whether to stop; by default after
        SIGTERM or SIGINT.
      page: likewise.
    """
    compiled.check_jax()
    resolved = resolve(config)
    hosts.check_same(origin.circumstances(resolved.config))
    with workdir.claim(path) as folder:
        if (folder / workdir.CONFIG).exists():
            origin.compare(folder, resolved.config)
        summary = hosts.of_first(origin.result(folder, resolved.config))
        if summary is not None:
            logging.info("%s is finished; nothing to do.", folder)
            there = (folder / workdir.REPORT).exists()
            if page and hosts.is_first() and not there:
                report.run_report(str(folder))
            return summary
        show = show if hosts.is_first() else lambda label, rounds: Silent()
        with show(label or resolved.method, resolved.settings.rounds) as progress:
            stopping = stopping or stop_signals
            return (
                yield from _train(
                    resolved, experiment, folder, progress, stopping, page
                )
            )


def _train(
    resolved: Resolved,
    experiment: Experiment | None,
    folder: Path,
    progress: Progress,
    stopping: Callable[[], AbstractContextManager[Callable[[], bool]]],
    page: bool,
) -> Steps:
    """Runs, or continues, an experiment in a folder that is this process's."""
    if experiment is None:
        progress.stage(f"reading {resolved.dataset}, building {resolved.method}")
        experiment = resolved.make(str(folder / workdir.STORE))
        progress.say(data.brief(experiment.federation))
    settings, checkpoints = resolved.settings, folder / workdir.CHECKPOINTS
    experiment = experiment._replace(settings=settings)
    for part in (experiment.simulator, experiment.evaluator):
        part.program.watcher = progress.compiling
    shared = _compiling(experiment)  # for runs before this one
    restored = _newest(experiment, checkpoints)
    unseen = restored is None or not _records(folder)  # its first state, by anybody
    lent = resolved.lend(experiment) if unseen else {}
    began, before = time.perf_counter(), _summed_up(folder)
    digests = federations.digests(experiment.federation)
    hosts.check_same({f"data: {name}": x for name, x in digests.items()})
    done = 0 if restored is None else restored.round
    origin.describe(folder, resolved.config, experiment.plan, digests, done)
    if not _tables_are_there(folder):
        federations.save_tables(experiment.federation, folder / workdir.PARTITION)
    if restored is None:
        state = _first(experiment, lent)
    else:
        logging.info("Continuing %s after round %d.", folder, done)
        state = loop.State(done, experiment.simulator.load(restored.carry))
    kept = -1 if restored is None else done
    embedding_maps.begin(folder, kept)
    recorder = log.Recorder(
        folder,
        kept,
        resolved.tensorboard,
        resolved.tracker,
        common.flat(resolved.config),
    )
    shown = _Shown(progress)
    place = checkpoints if hosts.is_first() else None
    saver = checkpoint.Saver(place, resolved.keep, experiment.simulator.held)

    def score(state: loop.State, info: dict[str, Any]) -> _Evaluated:
        """Evaluates and records."""
        progress.stage("evaluating")
        evaluated = _evaluate(experiment, state)
        values = evaluated.values
        _warn(folder, state.round, values)
        totals = experiment.totals(settings.seed, state.round)
        metrics = results.record(values)
        record = dict(round=state.round, loss=info.get("loss"), **metrics, **totals)
        record |= {k: v for k, v in info.items() if k != "loss" and np.ndim(v) == 0}
        accuracy = {k: v["accuracy"] for k, v in values.items() if k != "gacc"}
        recorder.evaluation(record, time.perf_counter() - began, accuracy)
        num_clients = experiment.federation.num_clients
        embedding_maps.keep(folder, state.round, values, num_clients, experiment.whom)
        sent = totals["up_bytes_total"] + totals["down_bytes_total"]
        shown.update(state.round, info, log.jsonable(metrics), sent=log.size(sent))
        return evaluated

    with contextlib.closing(recorder), stopping() as stop:
        evaluated = None
        if restored is None:
            if resolved.tensorboard:
                _show_partition(recorder, experiment.federation)
            evaluated = score(state, {})
            _save(saver, state)
        else:  # the record was lost, or there is none of another's training
            if unseen:
                score(_first(experiment, lent), {})
            if loop.is_due(settings, done) and not _is_recorded(folder, done):
                evaluated = score(state, _trained(folder, done))
        while state.round < settings.rounds:
            if stop():
                raise Stopped(state.round)
            progress.stage("training")
            try:
                call: Any = yield experiment, state
            except loop.Diverged as error:
                error.args = (_advice(error, checkpoints),)
                raise
            rate = call.samples / call.seconds if call.seconds else None
            recorder.rounds(state.round, call.info | _flops(experiment, call), rate)
            rounds = state.round, call.state.round - state.round
            state = call.state
            shown.trained(call)
            shown.update(state.round, call.last, {})
            evaluated = None
            if loop.is_due(settings, state.round):
                evaluated = score(state, call.last)
            changed = functools.partial(
                experiment.simulator.participants, settings.seed, *rounds
            )
            _save(saver, state, changed)
        if evaluated is None:  # continued after the last evaluation
            progress.stage("evaluating")
            evaluated = _evaluate(experiment, state)
        fits.keep(folder, state.round, evaluated.fitted)
        summary = dict(method=resolved.method, dataset=resolved.dataset)
        summary |= _summary(folder, experiment, state, evaluated, progress)
        recorder.summary(summary)
    spent = dict(
        seconds=time.perf_counter() - began,
        samples_per_second=shown.rate,
        compile_seconds=_compiling(experiment) - shared,
        flops=_flops_of_all(folder),
    )
    if not shown.seconds:  # nothing was trained: how long that took is known
        spent |= {name: before[name] for name in spent if name in before}
    summary = log.jsonable(summary | spent)
    checkpoint.write_atomically(
        folder / workdir.SUMMARY, json.dumps(summary, indent=2) + "\n"
    )
    if page and hosts.is_first():
        progress.stage("writing the report")
        report.run_report(str(folder))
    return summary


class _Evaluated(NamedTuple):
    """What an evaluation gave."""

    values: dict[str, results.Values]  # per client, by metric
    fitted: dict[str, PyTree]  # by family, what participants found out for it


def _evaluate(experiment: Experiment, state: loop.State) -> _Evaluated:
    where = experiment.settings.seed, state.carry, state.round
    fitted = experiment.evaluator.fit(*where)
    return _Evaluated(experiment.evaluator.evaluate(*where, fitted), fitted)


def _first(experiment: Experiment, lent: dict[str, Any]) -> loop.State:
    """The state before the first round, with what another run lends."""
    state = loop.start(experiment)
    if not lent:
        return state
    server = saved.put(lent, state.carry.server)
    return state._replace(carry=state.carry._replace(server=server))


def _show_partition(recorder: log.Recorder, federation: Federation) -> None:
    """Who has how much of which class, beside the events; of few clients alone."""
    counts = federation.counts
    if max(counts.shape) <= MANY_CLIENTS:
        takes_part = np.arange(len(counts)) < federation.num_clients
        names = [name.replace("$", r"\$") for name in federation.label_names]
        changes = {} if federation.shift is None else shift.varying(federation.shift)
        figure = picture.partition_picture(counts, takes_part, names, None, changes)
        recorder.picture("partition", figure)


def _flops(experiment: Experiment, call: loop.Call) -> dict[str, np.ndarray]:
    """Arithmetic of each round of a call; {} if it was not counted."""
    work = experiment.simulator.program.work
    if work is None:
        return {}
    kinds = ("steps", "opening_steps")
    steps = sum(np.asarray(call.info[k], float) for k in kinds if k in call.info)
    return {"flops": np.rint(work.round + steps * work.step)}


def _flops_of_all(folder: Path) -> float | None:
    """Arithmetic of all rounds, before and after a stop; None if it is not known."""
    rows = log.read_lines(folder / log.TRAINING)
    known = all("flops" in row for row in rows)
    return sum(float(row["flops"]) for row in rows) if known else None


def _compiling(experiment: Experiment) -> float:
    """Seconds that compiling an experiment's programs has taken so far."""
    parts = experiment.simulator, experiment.evaluator
    return sum(part.program.seconds for part in parts)


def _advice(error: loop.Diverged, checkpoints: Path) -> str:
    return (
        f"{error} (local.learning_rate, local.clip_norm). The last good checkpoint is "
        f"that after round {error.last_good} in {checkpoints}"
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM or SIGINT has come, to any process.

    A second SIGINT interrupts at once.
    """
    if hosts.several():  # whose signals have been watched since they met
        yield hosts.stop_is_asked
        return
    asked: list[int] = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # theirs are signals
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def signals_kept_in(
    asked: list[bool],
) -> Callable[[], AbstractContextManager[Callable[[], bool]]]:
    """Returns `stop_signals` that also tells a list whether there was a signal.

    For whoever trains several runs: one that comes in the last call of a run, or while
    it is summed up, does not stop that run, and should stop what follows.
    """

    @contextlib.contextmanager
    def stopping() -> Iterator[Callable[[], bool]]:
        with stop_signals() as stop:
            try:
                yield stop
            finally:
                asked.append(stop())

    return stopping


class _Shown:
    """Progress lines, with the rate of training so far."""

    def __init__(self, progress: Progress):
        self.progress, self.seconds, self.samples = progress, 0.0, 0.0

    def trained(self, call: loop.Call) -> None:
        """Counts a call."""
        self.seconds += call.seconds
        self.samples += call.samples

    @property
    def rate(self) -> float | None:
        """Samples a second; None before anything was trained."""
        return self.samples / self.seconds if self.seconds else None

    def update(self, round: int, info, metrics, **more: str) -> None:
        """Shows where training is, and what there is of an evaluation."""
        shown = {"loss": f"{info['loss']:.4f}"} if "loss" in info else {}
        shown |= {
            label: pages.accuracy(metrics[m])
            for m, label in results.SHOWN.items()
            if m in metrics
        }
        if self.rate is not None:
            shown["samples/s"] = f"{self.rate:,.0f}"
        self.progress.update(round, shown | more)


def _newest(experiment: Experiment, checkpoints: Path) -> checkpoint.Restored | None:
    """The newest intact checkpoint, that of process 0."""
    template = schedule.abstract_carry(
        experiment.algorithm, experiment.members or experiment.federation.num_trainers
    )
    return checkpoint.restore(checkpoints, template, experiment.simulator.held)


def _save(
    saver: checkpoint.Saver, state: loop.State, changed: Callable | None = None
) -> None:
    """Writes a checkpoint, of a state that all processes have."""
    digest = saver.save(state.round, state.carry, changed)
    hosts.check_same({f"a state after round {state.round} of SHA-256": digest})


def _summed_up(folder: Path) -> dict[str, Any]:
    """The summary of the run as it was, or what another's training took that it has."""
    for name in (workdir.SUMMARY, workdir.TRAINED):
        with contextlib.suppress(OSError, ValueError):
            return checkpoint.read_json(folder / name, workdir.AGAIN)
    return {}


def _tables_are_there(folder: Path) -> bool:
    """Whether partition.npz can be read."""
    path = folder / workdir.PARTITION
    try:
        return checkpoint.is_whole_npz(path, "it is written anew")
    except FileNotFoundError:
        return False
    except ValueError as error:
        logging.warning("%s", error)
        return False


def _records(folder: Path) -> list[dict]:
    """What process 0 has recorded."""
    return hosts.of_first(log.read_lines(folder / log.METRICS))


def _trained(folder: Path, round: int) -> dict[str, Any]:
    """The quantities of a round, as process 0 has written them."""
    rows = hosts.of_first(log.read_lines(folder / log.TRAINING))
    own = [row for row in rows if row["round"] == round]
    return {k: v for k, v in (own or [{}])[-1].items() if k not in ("round", "flops")}


def _is_recorded(folder: Path, round: int) -> bool:
    records = _records(folder)
    return any(record["round"] == round for record in records)


def _warn(folder: Path, round: int, values, suffix: str = "") -> None:
    """Warns of accuracies that there are not."""
    without = results.not_finite(values, suffix)
    if without is not None:
        logging.warning("%s, round %d: %s", folder, round, without)


def _summary(
    folder: Path,
    experiment: Experiment,
    state: loop.State,
    evaluated: _Evaluated,
    progress: Progress,
) -> dict[str, Any]:
    """Sums a finished run up; writes what is known of each client."""
    values, fitted = evaluated
    rows = results.per_client(values, experiment.federation, experiment.whom)
    if experiment.members is not None:
        names, of = experiment.members.names, experiment.members.family
        for row in rows:
            if row["client"] < len(of):
                row["family"] = names[of[row["client"]]]
    checkpoint.write_atomically(
        folder / workdir.CLIENTS, json.dumps(log.jsonable(rows), indent=1) + "\n"
    )
    settings, cost = experiment.settings, experiment.cost
    summary = dict(
        rounds=settings.rounds,
        seed=settings.seed,
        unassigned=experiment.federation.unassigned,
        **log.jsonable(results.record(values)),
        **cost._asdict(),
        **experiment.totals(settings.seed, state.round),
        **experiment.fit_totals,
        plan=experiment.plan,
        state_sha256=checkpoint.state_digest(state.carry, experiment.simulator.held),
        finished=True,
    )
    if drawn := experiment.sampled:
        summary["sampled"] = {m: of for m, of in drawn.items() if m in values}
    if experiment.members is not None:
        summary["families"] = {
            name: dict(clients=experiment.members.size(name), **each._asdict())
            for name, each in experiment.costs.items()
        }
    where = settings.seed, state.carry, state.round
    if experiment.by_sample is not None:
        summary |= {
            f"{metric}_sample": results.scores(metric, clients)[metric]
            for metric, clients in experiment.by_sample.evaluate(*where, fitted).items()
        }
    for epochs in settings.finetune_epochs:
        progress.stage(f"fine-tuning every client, {epochs} epochs")
        tuned = experiment.evaluator.tune(*where, epochs, fitted)
        suffix = f"_ft{epochs}"
        summary |= results.fine_tuned(tuned, suffix)
        _warn(folder, state.round, tuned, suffix)
    records = _records(folder)
    numbers = cost.down_numbers + cost.up_numbers
    summary["reach"] = reach.of_records(records, numbers, settings.thresholds)
    if experiment.federation.validation is not None:
        summary["best_by_validation"] = results.best_by_validation(records)
    return summary


def main(config: ml_collections.ConfigDict, path: str, profile: bool = False) -> int:
    """Trains, prints the result; returns the exit code."""
    cli.use_cores(config.engine.devices)
    try:
        summary = train(config, path, profile=profile)
    except Stopped as stop:
        if hosts.is_first():
            print(f"Stopped after round {stop}; the same command continues.")
        return 0
    if not hosts.is_first():
        return 0
    print(f"{summary['method']} on {summary['dataset']}: {outcome(summary)}")
    print(f"report: {Path(path) / 'report.html'}")  # alone: a path to click or copy
    return 0


def outcome(summary: dict[str, Any]) -> str:
    """Returns the accuracies of a run in words: by samples, then means over clients."""

    def line(suffix: str, labels: Mapping[str, str]) -> str:
        return ", ".join(
            f"{label} {pages.accuracy(summary[name + suffix])}"
            for name, label in labels.items()
            if name + suffix in summary
        )

    several = {k: v for k, v in results.SHOWN.items() if k != "gacc"}  # one client
    said = [line("", results.SHOWN)]
    if means := line("_mean", several):
        said.append(f"means over clients: {means}")
    for metric, (num, of) in summary.get("sampled", {}).items():
        if metric in results.SHOWN:
            label = results.SHOWN[metric]
            said.append(f"{label} is of a sample: {num:,} of {of:,} clients")
    return "\n".join(said)


def launch() -> None:
    """Runs the command with what the command line says."""
    config = cli.define_config()
    workdir = cli.define_path("workdir", None, "Folder of the run.")
    profile = flags.DEFINE_enum(
        "profile", None, ["rounds"], "Trace a call of rounds, for xprof and Perfetto."
    )
    cli.run(
        lambda: main(config.value, str(workdir.value), profile.value is not None),
        needs=("config", "workdir"),
        together=True,
    )
