"""The sweep command: what it runs, what it goes on with, and what it refuses."""

import csv
import functools
import itertools
import json
import signal
from pathlib import Path

import pytest
from made_runs import undrawn

from hyperjax.launch import finished, origin, report, sweep, train, workdir
from hyperjax.sweeps import (
    figures,
    live,
    long,
    points,
    record,
    results,
    reuse,
    runner,
    tune,
)
from hyperjax.sweeps.points import Point

FEDAVG = "zero_shot:fedavg,data=digits"
GRID = ("seed=0..1", "local.learning_rate=0.05,0.1,0.2")


SMALL = (
    *("--config.tensorboard=False", "--config.data.num_clients=3"),
    *("--config.data.num_novel=1", "--config.data.shrink=2"),
    *("--config.model.hidden=(4,)", "--config.local.steps=1"),
)


class Trainer:
    """Stands for `train.train`: writes what a run's folder holds."""

    def __init__(self):
        self.ran: list[str] = []
        self.stop_at: int | None = None

    def __call__(self, config, path, name, experiment, show, page, stopping=None):
        folder = Path(path)
        if not (folder / workdir.SUMMARY).exists():
            if len(self.ran) == self.stop_at:
                raise train.Stopped(3)
            rate = config.local.learning_rate
            if rate == 0.2:
                raise FloatingPointError("round 1: loss is not finite. Often helps")
            if rate == 0.3:
                raise OSError("no room")
            self.ran.append(folder.name)
            folder.mkdir(parents=True)
            found = dict(pacc=100 * rate, vacc=50 - rate, zacc=99.0, gacc=1.0)
            (folder / workdir.SUMMARY).write_text(json.dumps(found))
        return json.loads((folder / workdir.SUMMARY).read_text())


@pytest.fixture
def trainer(monkeypatch):
    found = Trainer()
    monkeypatch.setattr(runner, "check", lambda *args: None)
    monkeypatch.setattr(runner.group, "experiments", lambda configs, *_: configs)
    monkeypatch.setattr(sweep.cli, "use_cores", lambda devices: None)
    run_by(monkeypatch, found)
    return found


def run_by(monkeypatch, run_one) -> None:
    """Points are run by this function."""
    monkeypatch.setattr(runner, "run", functools.partial(runner.run, run_one=run_one))


def asked(folder, *flags: str, **more) -> sweep.Asked:
    return sweep.Asked(FEDAVG, str(folder), flags or GRID, **more)


def statuses(folder) -> dict[str, str]:
    content = json.loads((folder / record.FILE).read_text())
    return {entry["name"]: entry["status"] for entry in content["points"]}


# Runs -------------------------------------------------------------------------------


def test_what_diverges_or_fails_is_marked_and_the_rest_goes_on(
    trainer, tmp_path, capsys
):
    folder = tmp_path / "abl"
    flags = ("seed=0..1", "local.learning_rate=0.1,0.2,0.3")
    assert sweep.main(asked(folder, *flags)) == 1
    assert trainer.ran == ["learning_rate=0.1,seed=0", "learning_rate=0.1,seed=1"]
    found = list(statuses(folder).values())
    assert [found.count(s) for s in record.ENDED] == [2, 2, 2]
    content = json.loads((folder / record.FILE).read_text())
    messages = {entry["status"]: entry["message"] for entry in content["points"]}
    assert messages["failed"] == "OSError: no room"
    assert messages["diverged"].startswith("round 1: loss is not finite")
    out = capsys.readouterr().out
    assert "6/6" in out and "2 finished, 2 diverged, 2 failed" in out
    assert "no room" in (folder / "report.html").read_text()


def test_a_stopped_sweep_goes_on_where_it_was(trainer, tmp_path, capsys):
    trainer.stop_at = 2
    flags = ("seed=0..1", "local.learning_rate=0.05,0.1")
    assert sweep.main(asked(tmp_path, *flags)) == 130
    stopped = "2 of 4 points have ended; the same command continues"
    assert stopped in capsys.readouterr().out
    assert sorted(statuses(tmp_path).values()) == [
        *["finished"] * 2,
        "running",
        "waiting",
    ]
    trainer.stop_at = None
    first = list(trainer.ran)
    assert sweep.main(asked(tmp_path, *flags)) == 0
    assert trainer.ran[:2] == first and len(set(trainer.ran)) == 4
    assert sweep.main(asked(tmp_path, *flags)) == 0  # all are read
    assert len(trainer.ran) == 4


def test_another_grid_adds_points_and_another_base_is_refused(trainer, tmp_path):
    assert sweep.main(asked(tmp_path, "seed=0..1")) == 0
    assert sweep.main(asked(tmp_path, "seed=1..2", "data.alpha=1,2")) == 0
    assert set(statuses(tmp_path)) == {"seed=0", "seed=1"} | {
        f"alpha={alpha},seed={seed}" for alpha in (1, 2) for seed in (1, 2)
    }
    other = ("--config.data.num_clients=4",)
    with pytest.raises(ValueError, match=r"data.num_clients: 10 there, 4 given"):
        sweep.main(asked(tmp_path, "seed=5", arguments=other))
    longer = ("--config.rounds=50", "--config.evaluation.every=10")
    assert sweep.main(asked(tmp_path, "seed=5", arguments=longer)) == 0


def test_points_in_use_elsewhere_are_left_alone(trainer, tmp_path, monkeypatch):
    def busy(config, path, *args, **kwargs):
        if "seed=1" in path:
            raise workdir.InUse("in use")
        return trainer(config, path, *args, **kwargs)

    run_by(monkeypatch, busy)
    assert sweep.main(asked(tmp_path, "seed=0..2")) == 1
    assert statuses(tmp_path) == {
        "seed=0": "finished",
        "seed=1": "running",
        "seed=2": "finished",
    }


def test_a_signal_in_a_points_last_call_stops_the_sweep(trainer, tmp_path, monkeypatch):
    def ending(config, path, *args, stopping, **kwargs):
        with stopping() as stop:
            if "seed=1" in path:
                signal.raise_signal(signal.SIGTERM)
                assert stop()
        return trainer(config, path, *args, **kwargs)

    run_by(monkeypatch, ending)
    assert sweep.main(asked(tmp_path, "seed=0..2")) == 130
    assert statuses(tmp_path) == {
        "seed=0": "finished",
        "seed=1": "finished",
        "seed=2": "waiting",
    }


@pytest.mark.parametrize("n", [2, 5])
def test_slices_part_the_points(trainer, tmp_path, n):
    # Of more slices than points, one has none.
    for i in range(n):
        given = asked(tmp_path, "seed=0..1", "local.learning_rate=0.1,0.2")
        assert sweep.main(given._replace(part=f"{i}/{n}")) in (0, 1)
    assert len(trainer.ran) == len(set(trainer.ran)) == 2  # two diverge
    assert "waiting" not in statuses(tmp_path).values()


def test_slices_are_refused_by_name():
    for index in ("3/3", "1", "a/b", "-1/3", "1/0"):
        with pytest.raises(ValueError, match=r"must be i/n"):
            runner.part([1, 2], index)
    assert runner.part("abcde", "1/2") == ["c", "d", "e"]


def test_a_list_runs_and_writes_nothing(trainer, tmp_path, capsys):
    folder = tmp_path / "abl"
    assert sweep.main(asked(folder, list_only=True)) == 0
    out = capsys.readouterr().out
    assert "6 points" in out and "learning_rate=0.05,seed=1" in out
    assert "one program for 6, one after another:" in out
    assert not folder.exists() and not trainer.ran


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(sweep=()), "--sweep is required"),
        (dict(sweep=("rounds=2,x",)), "rounds=x"),
        (dict(baseline="data.alpha=1"), r"baseline='data.alpha=1' is none"),
        (dict(baseline="local.learning_rate=3"), r"there are: .*0.05, 0.1, 0.2"),
        (dict(by="vacc"), "go with --tune"),
        (dict(tune=("local.learning_rate=1,2",)), "is swept twice"),
        (dict(tune=("local.epochs=1,2",), by="zacc"), "--by=zacc: it is measured on"),
        (dict(tune=("local.epochs=1,2",), by="gacc_mean"), "it is measured on"),
        (dict(tune=("local.epochs=1,2",), by="pacc"), "with --tune_seed=N it is"),
        (dict(tune=("local.epochs=1,2",), by="loss"), "'loss' is unknown"),
        (dict(tune=("local.epochs=1,2",)), "validation_fraction is 0"),
        (dict(tune=("local.epochs=1,2",), tune_seed=1), "the seed of the point"),
        (dict(tune=("local.epochs=1,2",), by="pacc_ft4"), "with --tune_seed=N it is"),
        (dict(tune=("local.epochs=1,2",), tune_seed=7, by="pacc_ft"), "is unknown"),
        (dict(tune=("local.epochs=1,2",), tune_seed=7, by="zacc_ft4"), "measured on"),
        (
            dict(tune=("local.epochs=1,2",), tune_seed=7, by="pacc_ft3"),
            r"--by=pacc_ft3: .*evaluation.finetune_epochs=\(",
        ),
        (dict(arguments=("--config.seed=3",)), "'seed' is swept, and given"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(trainer, tmp_path, more, message):
    folder = tmp_path / "abl"
    with pytest.raises(ValueError, match=message):
        sweep.main(asked(folder)._replace(**more))
    assert not folder.exists()


def test_a_folder_of_something_else_is_refused(trainer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no sweep"):
        sweep.main(asked(tmp_path))


# Tuning -----------------------------------------------------------------------------

VALIDATED = ("--config.data.validation_fraction=0.2",)


def test_values_are_chosen_by_validation_data_alone(trainer, tmp_path, monkeypatch):
    looked_at = set()

    class Summary(dict):
        def get(self, key):
            looked_at.add(key)
            return super().get(key)

    read = tune.read_json
    monkeypatch.setattr(tune, "read_json", lambda *args: Summary(read(*args)))
    flags = ("method.name=fedavg,fedprox", "seed=3..4")
    more = dict(tune=("local.learning_rate=0.1,0.05,0.2",), arguments=VALIDATED)
    assert sweep.main(asked(tmp_path, *flags, **more)) == 0
    assert looked_at == {"vacc"}
    content = json.loads((tmp_path / record.FILE).read_text())
    trials = content["trials"]
    assert len(trials) == 6 and len(statuses(tmp_path)) == 4
    assert {entry["fields"]["seed"] for entry in trials} == {3}
    chosen = [entry for entry in trials if entry["chosen"]]
    assert [e["fields"]["local.learning_rate"] for e in chosen] == [0.05, 0.05]
    for entry in content["points"]:
        assert entry["tuned"] == {"local.learning_rate": 0.05}
    rows = list(csv.DictReader((tmp_path / tune.TABLE).open()))
    assert [row["vacc"] for row in rows[:3]] == ["49.9", "49.95", ""]
    assert [row["status"] for row in rows[:3]] == ["finished", "finished", "diverged"]
    assert [row["chosen"] for row in rows[:3]] == ["False", "True", "False"]
    before = list(trainer.ran)
    assert sweep.main(asked(tmp_path, *flags, **more)) == 0
    assert trainer.ran == before


def test_values_may_be_chosen_on_a_federation_of_another_seed(trainer, tmp_path):
    more = dict(tune=("local.learning_rate=0.05,0.1",), tune_seed=7)
    assert sweep.main(asked(tmp_path, "seed=0..2", **more)) == 0
    content = json.loads((tmp_path / record.FILE).read_text())
    assert {entry["fields"]["seed"] for entry in content["trials"]} == {7}
    assert content["tune"] == dict(fields=["local.learning_rate"], by="pacc", seed=7)
    for entry in content["points"]:
        assert entry["tuned"] == {"local.learning_rate": 0.1}


def test_a_wider_grid_keeps_what_was_made_with_other_values(
    trainer, tmp_path, monkeypatch, capsys
):
    def go(rates: str, code=0):
        more = dict(tune=(f"local.learning_rate={rates}",), tune_seed=7)
        assert sweep.main(asked(tmp_path, "seed=0..1", **more)) == code
        return capsys.readouterr().out, len(trainer.ran)

    run_by(monkeypatch, with_configs(trainer))
    monkeypatch.setattr(results, "write", lambda *args: [])
    narrow, before = go("0.01,0.05"), tree_of(tmp_path / "seed=0")
    assert "learning_rate=0.05, the largest tried, is chosen for 1 of 1" in narrow[0]
    assert narrow[1] == 4
    trainer.stop_at = 6
    wide = go("0.01,0.05,0.1,0.02", code=130)
    assert set(statuses(tmp_path).values()) == {"running", "waiting"}
    trainer.stop_at = None
    assert go("0.01,0.05,0.1,0.02")[1] == 8  # two trials more, and both points
    assert "seed=1: its run with other values is in tune/earlier/seed=1" in wide[0]
    aside = tmp_path / "tune" / "earlier" / "seed=0" / "learning_rate=0.05"
    assert tree_of(aside) == before and tree_of(tmp_path / "seed=0") != before
    # Where the values before are chosen once more, these runs are taken up again.
    assert go("0.01,0.05")[1] == 8
    assert tree_of(tmp_path / "seed=0") == before and not aside.exists()
    chosen = [
        trial["fields"]["local.learning_rate"]
        for trial in json.loads((tmp_path / record.FILE).read_text())["trials"]
        if trial.get("chosen")
    ]
    assert chosen == [0.05]
    # Not among what is compared.
    assert len(finished.find([tmp_path])) == 2
    inner = go("0.05,0.01,0.1,0.09")[0]
    assert "rate=0.1, the largest tried, is chosen for 1 of 1 settings." in inner


def test_a_value_that_stands_for_several_puts_nothing_aside(
    trainer, tmp_path, monkeypatch
):
    run_by(monkeypatch, with_configs(trainer))
    monkeypatch.setattr(results, "write", lambda *args: [])
    more = dict(tune=("method.name=pfedhn_pc,pfedhn",), tune_seed=7)
    for _ in range(2):
        assert sweep.main(asked(tmp_path, "seed=0", **more)) == 0
    assert len(trainer.ran) == 3
    assert not (tmp_path / tune.EARLIER).exists()


def test_only_numbers_have_a_smallest_and_a_largest():
    def said(*values):
        trials = [dict(fields=dict(size=v, seed=7), chosen=True) for v in values]
        return tune.at_the_edge(dict(tune=dict(fields=["size"]), trials=trials))

    assert said(1, 2)[0].startswith("size=1, the smallest tried")
    assert said([8], [4]) == said("a", "b") == said(True, False) == said(1, 1) == []
    # Fields that were not tuned yet when this was tried.
    old = [dict(fields=dict(seed=7), chosen=True)]
    assert tune.at_the_edge(dict(tune=dict(fields=["size"]), trials=old)) == []
    assert tune.at_the_edge({}) == []


def with_configs(trainer):
    """The trainer, in whose folders there is the config as well."""

    def run_one(config, path, *args, **kwargs):
        found = trainer(config, path, *args, **kwargs)
        about = dict(config=origin.as_json(config))
        (Path(path) / workdir.CONFIG).write_text(json.dumps(about))
        return found

    return run_one


def tree_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but its lock."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p.name: p.read_bytes() for p in files if p.name != workdir.LOCK}


def test_values_may_be_chosen_after_fine_tuning():
    assert tune.check_metric("pacc_ft4", 7) == "pacc_ft4"
    assert tune.check_metric("pacc_ft0_mean", 7) == "pacc_ft0_mean"


@pytest.mark.parametrize(
    ("tried", "message"), [("0.2", "no value of"), ("0.1,0.3", "0.3,seed=0 failed")]
)
def test_without_a_choice_a_setting_fails(trainer, tmp_path, tried, message, capsys):
    more = dict(tune=(f"local.learning_rate={tried}",), arguments=VALIDATED)
    assert sweep.main(asked(tmp_path, "seed=0..1", **more)) == 1
    assert set(statuses(tmp_path).values()) == {"failed"}
    assert message in capsys.readouterr().out


# What is shown ----------------------------------------------------------------------


def test_time_left_is_by_points_of_the_same_program(capsys):
    now = [0.0]
    programs = {"a0": "a", "a1": "a", "a2": "a", "b0": "b", "b1": "b"}
    show = live.Shown(programs, clock=lambda: now[0])

    def run(name: str, seconds: float):
        show.begin(name)
        now[0] += seconds
        show.ended(name, "gACC 1.00")

    assert show.left() is None and show.line() == ("points", 0.0, "0/5, ? left")
    run("a0", 60.0)  # and compiles
    assert capsys.readouterr().out == "1/5 a0: gACC 1.00 (1m00s)\n"
    run("a1", 10.0)
    assert show.left() == "1m20s"  # 10 of this program, 60 and 10 of the other
    run("a2", 12.0)
    show.begin("b0")
    now[0] += 40.0
    assert show.line() == ("points", 0.6, "3/5, 31s left")  # 20, and 11
    now[0] += 1000.0
    assert show.left() == "11s"  # nobody knows how much of this one
    show.ended("b0", "gACC 1.00")
    assert show.left() == "17m20s"  # as the only one of its program


def test_points_side_by_side_share_their_time(capsys):
    now = [0.0]
    show = live.Shown(dict.fromkeys("abcd", 0), clock=lambda: now[0])
    show.begin("a", "b")
    now[0] = 60.0
    for name in "ab":
        show.ended(name, "gACC 1.00")
    show.begin("c", "d")
    assert show.left() == "1m00s"
    show.ended("c", "failed", ran=False)
    assert show.left() == "30s"
    assert "(1m00s)" in capsys.readouterr().out


def test_neighbours_share_a_program():
    grid = points.product([[{"seed": str(s)} for s in (0, 1)], [{"data.alpha": "1"}]])
    seeds = points.resolve(FEDAVG, [], grid)
    rates = [{"local.batch_size": "8"}, {"local.batch_size": "4"}]
    mixed = points.resolve(FEDAVG, [], points.product([grid, rates]))
    assert [len(g) for g in runner.grouped(seeds)] == [2]
    assert [p.config.local.batch_size for p in runner.ordered(mixed)] == [8, 8, 4, 4]
    assert isinstance(seeds[0], Point)


# Results ----------------------------------------------------------------------------


def test_trials_are_no_results(tmp_path):
    for name in ("seed=0", "tune/seed=0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / workdir.CONFIG).write_text("{}")
    assert len(finished.find([tmp_path])) == 2
    (tmp_path / record.FILE).write_text("{}")
    assert [run.name for run in finished.find([tmp_path])] == ["seed=0"]
    assert len(finished.find([tmp_path / "tune"])) == 1


def test_variants_of_one_method_are_told_apart_by_their_names(trainer, tmp_path):
    given = asked(tmp_path, "method.name=pfedhn,pfedhn_pc", "seed=0..1")
    given = given._replace(baseline="pfedhn_pc")
    assert sweep.main(given) == 0
    configs = {p.name: p.config for p in sweep.make_plan(given).points}
    for name, config in configs.items():
        assert config.method.name == "pfedhn"
        about = dict(config=origin.as_json(config), format=origin.FORMAT)
        (tmp_path / name / workdir.CONFIG).write_text(json.dumps(about))
    for fields in (["method.name"], []):
        heads = [head for head, _ in long.points(tmp_path, fields)]
        found = [(head["method"], head["seed"]) for head in heads]
        assert found == [(m, s) for m in ("pfedhn", "pfedhn_pc") for s in (0, 1)]
        assert all(set(head) == {*long.POINT} for head in heads)


def test_a_sweep_of_runs_ends_in_tables_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.cli, "use_cores", lambda devices: None)
    # Of all figures, which the tests of these and of outputs draw, one.
    every = figures.all_of
    monkeypatch.setattr(
        figures, "all_of", lambda *args: itertools.islice(every(*args), 1)
    )
    folder = tmp_path / "abl"
    given = asked(folder, "seed=0..1", "data.alpha=0.5,1")
    arguments = ("--config.rounds=1", *SMALL)
    given = given._replace(arguments=arguments, baseline="data.alpha=1", pages=False)
    with undrawn():
        assert sweep.main(given) == 0
    assert "4 points: 4 finished" in capsys.readouterr().out
    assert not list(folder.glob("*/report.html"))
    for name in ("table.tex", "table.md", "table.csv", "points.csv", "report.html"):
        assert (folder / name).exists(), name
    for form in ("pdf", "svg", "png"):
        assert list((folder / "figures").glob(f"*.{form}"))
    point = sweep.make_plan(given).points[3]
    assert point.name == "alpha=1,seed=1"
    summary = json.loads((folder / point.name / workdir.SUMMARY).read_text())
    assert train.train(point.config, folder / point.name, page=False) == summary
    assert summary["seed"] == 1 and summary["finished"]
    assert summary["compile_seconds"] == 0  # it was compiled for the first
    table = (folder / "table.md").read_text()
    (folder / "table.md").unlink()
    monkeypatch.setattr(figures, "all_of", lambda *_: iter(()))
    with undrawn():  # with the sweep's fields and baseline, and pages that are missing
        assert report.main([str(folder)], None) == 0
    assert (folder / "table.md").read_text() == table
    assert len(list(folder.glob("*/report.html"))) == 4


def test_points_that_are_evaluated_in_other_ways_are_trained_once(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sweep.cli, "use_cores", lambda devices: None)
    monkeypatch.setattr(sweep.results, "write", lambda *args, **options: True)
    trained: list[int] = []
    step = train.loop.step

    def counting(experiment, state, donate):
        trained.append(state.round)
        return step(experiment, state, donate=donate)

    monkeypatch.setattr(train.loop, "step", counting)
    arguments = ("--config.rounds=2", *SMALL, "--config.data.validation_fraction=0.2")

    def given(name, *flags):
        adapt = "evaluation.adapt='',em"
        return asked(tmp_path / name, adapt, arguments=(*arguments, *flags))

    assert sweep.main(given("once")._replace(list_only=True)) == 0
    listed = capsys.readouterr().out
    told = "adapt=em: has the training of adapt=\n"
    assert "trained once for 2: adapt=\n" in listed and told not in listed
    with undrawn():
        assert sweep.main(given("once")) == 0
    assert trained == [0] and told in capsys.readouterr().out
    first, adapted = sweep.make_plan(given("once")).points
    # Whoever reads a folder that is not evaluated yet finds no results of another's.
    later = adapted._replace(name="later")
    alike = reuse.by_training([first, later])
    assert reuse.begin(tmp_path / "once", later, alike) == first.name
    left = {path.name for path in (tmp_path / "once" / "later").iterdir()}
    assert workdir.TRAINED in left and not left & {workdir.SUMMARY, workdir.CLIENTS}
    place, alone = tmp_path / "once" / adapted.name, tmp_path / "alone"
    assert not list((tmp_path / "once").glob(".*.part"))
    with undrawn():
        summary = train.train(adapted.config, str(alone))
    found = json.loads((place / workdir.SUMMARY).read_text())
    assert found["seconds"] > 0
    spent = {"seconds", "samples_per_second", "compile_seconds"}
    for name in found.keys() | summary.keys() - spent:
        assert name in spent or found[name] == summary[name], name
    for name in ("metrics.jsonl", "training.jsonl", "clients.json"):
        assert (place / name).read_text() == (alone / name).read_text(), name
    del trained[:]
    assert train.train(adapted.config, str(place)) == found and not trained
    # Trials too, and points that have the same values after them.
    tuned = dict(tune=("local.learning_rate=0.05,0.1",), by="pacc", tune_seed=7)
    with undrawn():
        assert sweep.main(given("tuned")._replace(**tuned)) == 0
    content = json.loads((tmp_path / "tuned" / record.FILE).read_text())
    chosen = {entry["tuned"]["local.learning_rate"] for entry in content["points"]}
    assert len(trained) == 2 + len(chosen)
    # With evaluations in between, of states that are gone, all are trained.
    own = sweep.make_plan(given("own", "--config.evaluation.every=1")).points
    assert own[0].name == first.name and not reuse.once(own)
    later = own[1]._replace(name="own")
    alike = reuse.by_training([own[0], later])
    assert len(alike) == 1 and reuse.begin(tmp_path / "once", later, alike) is None
