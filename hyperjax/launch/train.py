"""Trains one method on one federation; the same command continues a stopped run.

python -m experiments.train --config=configs/zero_shot.py --workdir=runs/x
"""

import json
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from hyperjax import registry, tree
from hyperjax.data import federation as federations
from hyperjax.engine import checkpoint, comm, compiled, families, log, schedule
from hyperjax.engine.progress import Progress
from hyperjax.launch import build, cli, pages, report, saved, workdir
from hyperjax.protocols import common
from hyperjax.runs import reach, results

SHOWN = {"gacc": "gACC", "pacc": "pACC", "zacc": "zACC"}  # in progress lines


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint."""


def train(
    config: ml_collections.ConfigDict, path: str, name: str | None = None
) -> dict[str, Any]:
    """Runs, or continues, one experiment in a folder.

    A finished run goes on if it is given more rounds, and is summed up anew if it is
    asked for other numbers at the end.

    Args:
      config: see `protocols.common.defaults`; its method under `config.method`.
      path: the run's folder; made if it is not there.
      name: shown in progress lines; the method's name by default.

    Returns:
      The summary, also written to summary.json.

    Raises:
      ValueError and others, before any work: bad input, see `build.build` and
        `workdir.claim`.
      FloatingPointError: a loss or the state is not finite.
      Stopped: by SIGTERM or SIGINT.
    """
    compiled.check_jax()
    config = common.filled(config)
    build.check(config)
    with workdir.claim(path, config) as folder:
        summary = workdir.result(folder, config)
        if summary is not None:
            logging.info("%s is finished; nothing to do.", folder)
            if not (folder / workdir.REPORT).exists():
                report.run_report(str(folder))
            return summary
        with Progress(name or config.method.name, config.rounds) as progress:
            return _Run(config, folder, progress).go()


class _Run:
    """One process's part of a run."""

    def __init__(
        self, config: ml_collections.ConfigDict, folder: Path, progress: Progress
    ):
        self.config, self.folder, self.progress = config, folder, progress
        progress.stage(f"reading {config.data.name}, building {config.method.name}")
        self.experiment = build.build(config, str(folder / workdir.STORE))
        for part in (self.experiment.simulator, self.experiment.evaluator):
            part.program.watcher = progress.compiling
        self.root = jax.random.key(config.seed)
        self.costs = {
            name: self.cost_of(name)
            for name in families.clients(self.experiment.algorithm)
        }
        self.cost = self.mean_cost()
        self.restored = self.newest()
        self.given = self.parts_to_start_from()
        self.seconds = 0.0  # of training calls
        self.samples = 0.0
        self.began = time.perf_counter()
        self.before = self.summed_up()
        self.stop_signal: int | None = None

    def go(self) -> dict[str, Any]:
        config, folder, experiment = self.config, self.folder, self.experiment
        digests = federations.digests(experiment.federation)
        done = 0 if self.restored is None else self.restored.round
        workdir.describe(folder, config, experiment.plan, digests, done)
        if not self.tables_are_there():
            federations.save_tables(experiment.federation, folder / workdir.PARTITION)
        round, carry = self.start()
        recorder = log.Recorder(folder, round, config.tensorboard)
        handlers = {s: signal.signal(s, self.ask_to_stop) for s in _signals()}
        try:
            if round < 0:
                round = 0
                self.evaluate(round, carry, {}, recorder)
                checkpoint.save(self.checkpoints, 0, carry, config.checkpoint.keep)
            elif self.is_due(round) and not self.is_recorded(round):
                self.evaluate(round, carry, {}, recorder)  # the record was lost
            while round < config.rounds:
                if self.stop_signal is not None:
                    raise Stopped(round)
                num_rounds = self.next_stop(round) - round
                carry, info = self.train_rounds(carry, round, num_rounds)
                recorder.rounds(round, info)
                round += num_rounds
                last = {k: v[-1] for k, v in info.items()}
                self.show(round, last, {}, {})
                if self.is_due(round):
                    self.evaluate(round, carry, last, recorder)
                checkpoint.save(self.checkpoints, round, carry, config.checkpoint.keep)
            return self.finish(round, carry)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            recorder.close()

    @property
    def checkpoints(self) -> Path:
        return self.folder / workdir.CHECKPOINTS

    def summed_up(self) -> dict[str, Any]:
        """The summary of the run as it was, if that is finished."""
        try:
            return checkpoint.read_json(self.folder / workdir.SUMMARY, workdir.AGAIN)
        except (OSError, ValueError):
            return {}

    def tables_are_there(self) -> bool:
        """Whether partition.npz can be read."""
        path = self.folder / workdir.PARTITION
        try:
            return bool(checkpoint.read_npz(path, "it is written anew"))
        except FileNotFoundError:
            return False
        except ValueError as error:
            logging.warning("%s", error)
            return False

    def ask_to_stop(self, number, frame) -> None:
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_signal = number

    def newest(self) -> checkpoint.Restored | None:
        """The newest intact checkpoint."""
        template = schedule.abstract_carry(
            self.experiment.algorithm,
            self.experiment.members or self.experiment.federation.num_trainers,
        )
        return checkpoint.restore(self.checkpoints, template)

    def parts_to_start_from(self) -> dict[str, Any]:
        """What another run's server lends to a fresh run, by path."""
        start = self.config.start
        if not start.run or self.restored is not None:
            return {}
        other = saved.load(start.run, "start.run")
        if self.config.data.newcomers:
            saved.check_newcomers(other, self.experiment.federation)
        init = self.experiment.algorithm.server.init
        server = jax.eval_shape(init, jax.random.key(0))
        return saved.parts_to_take(other, start.take, server)

    def start(self):
        """Returns (finished rounds, carry); rounds is -1 for a fresh run."""
        simulator = self.experiment.simulator
        if self.restored is None:
            carry = simulator.init(self.root)
            if self.given:
                carry = carry._replace(server=saved.put(self.given, carry.server))
            return -1, carry
        logging.info("Continuing %s after round %d.", self.folder, self.restored.round)
        return self.restored.round, simulator.load(self.restored.carry)

    def next_stop(self, round: int) -> int:
        """The next round to stop the program at: on a grid, so that a continued run
        makes the same calls as an uninterrupted one."""
        every = self.config.evaluation.every
        per_call = self.config.engine.rounds_per_call or every
        last_evaluation = round // every * every
        within = (round - last_evaluation) // per_call + 1
        stop = min(last_evaluation + every, last_evaluation + within * per_call)
        return min(stop, self.config.rounds)

    def train_rounds(self, carry, round: int, num_rounds: int):
        program = self.experiment.simulator.program
        self.progress.stage("training")
        began, compiled = time.perf_counter(), program.seconds
        carry, info = self.experiment.simulator.run(
            self.root, carry, round, num_rounds, donate=True
        )
        info = jax.device_get(info)
        compiling = program.seconds - compiled
        self.seconds += time.perf_counter() - began - compiling
        visits = ("samples", "opening_samples")  # of the exchange before, if there is
        self.samples += sum(float(np.sum(info[k])) for k in visits if k in info)
        self.check_finite(carry, info, round)
        return carry, info

    def check_finite(self, carry, info: dict[str, np.ndarray], round: int) -> None:
        for i in range(len(info["samples"])):
            bad = [name for name, values in info.items() if not np.isfinite(values[i])]
            if bad:
                self.fail(round + i + 1, ", ".join(bad), round)
        if not bool(tree.finite(carry)):
            self.fail(round + len(info["samples"]), "the state", round)

    def fail(self, round: int, what: str, last_good: int) -> None:
        raise FloatingPointError(
            f"round {round}: {what} is not finite. The last good checkpoint is that "
            f"after round {last_good} in {self.checkpoints}. A smaller "
            "local.learning_rate or local.clip_norm=1.0 often helps"
        )

    def is_due(self, round: int) -> bool:
        """Whether a round is evaluated."""
        return round % self.config.evaluation.every == 0 or round == self.config.rounds

    def is_recorded(self, round: int) -> bool:
        records = log.read_lines(self.folder / log.METRICS)
        return any(record["round"] == round for record in records)

    def evaluate(self, round: int, carry, info, recorder) -> None:
        self.progress.stage("evaluating")
        self.values = self.experiment.evaluator.evaluate(self.root, carry, round)
        metrics = results.record(self.values)
        self.warn(round, self.values)
        totals = self.totals(round)
        record = dict(round=round, loss=info.get("loss"), **metrics, **totals)
        record |= {k: v for k, v in info.items() if k != "loss" and np.ndim(v) == 0}
        self.metrics = log.plain(metrics)
        recorder.evaluation(record, time.perf_counter() - self.began)
        sent = totals["up_bytes_total"] + totals["down_bytes_total"]
        self.show(round, info, self.metrics, {"sent": log.size(sent)})

    def show(self, round: int, info, metrics, more) -> None:
        """Shows where training is, and what there is of an evaluation."""
        shown = {"loss": f"{info['loss']:.4f}"} if "loss" in info else {}
        shown |= {
            label: pages.accuracy(metrics[m])
            for m, label in SHOWN.items()
            if m in metrics
        }
        if self.seconds:
            shown["samples/s"] = f"{self.samples / self.seconds:,.0f}"
        self.progress.update(round, shown | more)

    def warn(self, round: int, values, suffix: str = "") -> None:
        """Warns of accuracies that there are not."""
        without = results.not_finite(values, suffix)
        if without is not None:
            logging.warning("%s, round %d: %s", self.folder, round, without)

    def totals(self, round: int) -> dict[str, int]:
        """Bytes of all clients in all rounds so far, in Python integers."""
        visits = self.experiment.simulator.visits(self.root, round)
        return dict(
            up_bytes_total=sum(c.up_bytes * visits[n] for n, c in self.costs.items()),
            down_bytes_total=sum(
                c.down_bytes * visits[n] for n, c in self.costs.items()
            ),
        )

    def cost_of(self, family: str) -> comm.Cost:
        """Of one exchange with a client; in one place nothing is sent."""
        if self.config.data.pooled:
            return comm.Cost(0, 0, 0, 0)
        alg = families.view(self.experiment.algorithm, family)
        return comm.cost(comm.describe(alg))

    def mean_cost(self) -> comm.Cost:
        """Of one exchange, over all clients; whole numbers for one family."""
        members = self.experiment.members
        if members is None:
            return next(iter(self.costs.values()))
        weight = [members.size(name) for name in self.costs]
        columns = np.average(list(self.costs.values()), axis=0, weights=weight)
        return comm.Cost(*columns.tolist())

    def finish(self, round: int, carry) -> dict[str, Any]:
        if not hasattr(self, "values"):  # continued after the last evaluation
            self.progress.stage("evaluating")
            self.values = self.experiment.evaluator.evaluate(self.root, carry, round)
            self.metrics = log.plain(results.record(self.values))
        config, experiment = self.config, self.experiment
        rows = results.per_client(self.values, experiment.federation)
        checkpoint.write_atomically(
            self.folder / workdir.CLIENTS, json.dumps(log.plain(rows), indent=1) + "\n"
        )
        programs = (experiment.simulator.program, experiment.evaluator.program)
        rate = self.samples / self.seconds if self.seconds else None
        summary = dict(
            method=config.method.name,
            dataset=config.data.name,
            rounds=config.rounds,
            seed=config.seed,
            unassigned=experiment.federation.unassigned,
            **self.metrics,
            **self.cost._asdict(),
            **self.totals(round),
            seconds=time.perf_counter() - self.began,
            samples_per_second=rate,
            compile_seconds=sum(p.seconds for p in programs),
            plan=experiment.plan,
            state_sha256=tree.sha256(jax.device_get(carry)),
            finished=True,
        )
        if experiment.members is not None:
            summary["families"] = {
                name: dict(clients=experiment.members.size(name), **cost._asdict())
                for name, cost in self.costs.items()
            }
        if config.evaluation.sample_level:
            summary |= self.sample_level(round, carry)
        summary |= self.fine_tuned(round, carry)
        summary["reach"] = self.reached()
        if experiment.federation.validation is not None:
            summary["best_by_validation"] = self.best()
        if not self.seconds:  # nothing was trained: how long that took is known
            spent = ("seconds", "samples_per_second", "compile_seconds")
            summary |= {k: self.before[k] for k in spent if k in self.before}
        summary = log.plain(summary)
        checkpoint.write_atomically(
            self.folder / workdir.SUMMARY, json.dumps(summary, indent=2) + "\n"
        )
        self.progress.stage("writing the report")
        report.run_report(str(self.folder))
        return summary

    def fine_tuned(self, round: int, carry) -> dict[str, float]:
        """Accuracies of copies after epochs of local fine-tuning."""
        found: dict[str, float] = {}
        for epochs in self.config.evaluation.finetune_epochs:
            self.progress.stage(f"fine-tuning every client, {epochs} epochs")
            tuned = self.experiment.evaluator.tune(self.root, carry, round, epochs)
            suffix = f"_ft{epochs}"
            for metric, values in tuned.items():
                scores = results.scores(metric + suffix, values)
                kept = (metric + suffix + k for k in ("", "_mean", results.NOT_FINITE))
                found |= {name: scores[name] for name in kept if name in scores}
            self.warn(round, tuned, suffix)
        return found

    def reached(self) -> list[dict[str, Any]]:
        """What a client had sent and received when pACC first met each threshold."""
        records = log.read_lines(self.folder / log.METRICS)
        curve = {r["round"]: r["pacc"] for r in records}
        cpr = self.cost.down_numbers + self.cost.up_numbers
        found = reach.of_curve(curve, cpr, self.config.evaluation.thresholds)
        return [r._asdict() for r in found if r.round is not None]

    def best(self) -> dict[str, Any] | None:
        """Accuracies of the round whose validation accuracy was highest, the first.

        None if no round has one.
        """
        records = log.read_lines(self.folder / log.METRICS)
        records = [r for r in records if r["vacc"] is not None]
        if not records:
            return None
        best = max(records, key=lambda r: r["vacc"])
        found = {
            k: v for k, v in best.items() if k.partition("_")[0] in results.PREFIXES
        }
        return dict(round=best["round"], **found)

    def sample_level(self, round: int, carry) -> dict[str, float]:
        """Accuracies with one classifier per input, for methods that can."""
        config = ml_collections.ConfigDict(self.config.to_dict())
        if not registry.traits(config.method.name).per_sample:
            return {}
        config.method.deploy_granularity = "sample"
        source = build.load_source(config.data)
        shape = source.x.shape[1:]
        model = build.make_model(config, shape, source.num_classes)
        algorithm = build.make_algorithm(config, model)
        evaluator = build.make_evaluator(config, self.experiment.federation, algorithm)
        values = evaluator.evaluate(self.root, carry, round)
        return {
            f"{metric}_sample": results.summarise(v["accuracy"], v["size"])[""]
            for metric, v in values.items()
        }


def _signals() -> tuple[signal.Signals, ...]:
    import threading

    if threading.current_thread() is not threading.main_thread():
        return ()  # signals belong to the main thread
    return (signal.SIGTERM, signal.SIGINT)


def main(config: ml_collections.ConfigDict, path: str) -> int:
    """Trains, prints the result; returns the exit code."""
    cli.use_cores(config.engine.devices)
    try:
        summary = train(config, path)
    except Stopped as stop:
        print(f"Stopped after round {stop}; the same command continues.")
        return 0
    print(f"{summary['method']} on {summary['dataset']}: {outcome(summary)}")
    print(f"report: {Path(path) / 'report.html'}")  # alone: a path to click or copy
    return 0


def outcome(summary: dict[str, Any]) -> str:
    """Returns the accuracies of a run in words: by samples, then means over clients."""

    def line(suffix: str, names: Iterable[str]) -> str:
        there = [name for name in names if name + suffix in summary]
        return ", ".join(
            f"{SHOWN[name]} {pages.accuracy(summary[name + suffix])}" for name in there
        )

    means = line("_mean", [name for name in SHOWN if name != "gacc"])  # one client
    return line("", SHOWN) + (f"\nmeans over clients: {means}" if means else "")


def launch() -> None:
    """Runs the command with what the command line says."""
    config = cli.define_config()
    workdir = cli.define_path("workdir", None, "Folder of the run.")
    cli.run(lambda: main(config.value, str(workdir.value)), needs=("config", "workdir"))
