"""Every command and example of the README runs, shortened where it would take long."""

import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from launched import launch

from hyperjax import registry
from hyperjax.launch import build, cli
from hyperjax.sweeps import points

# One worker starts the processes of all files.
pytestmark = pytest.mark.xdist_group("launcher")

# Command in the README -> what is added, or run instead; None: other tests have it.
SHORT = [
    *("--config.rounds=1", "--config.evaluation.every=1"),
    *("--config.method.hidden=(8,)", "--config.evaluation.finetune_epochs=()"),
]
ONE = [
    *("--config.rounds=1", "--config.tensorboard=False"),
    *("--config.evaluation.finetune_epochs=()", "--config.data.name=digits"),
]
SMALL = [
    *("--config.rounds=1", "--config.local.epochs=1", "--config.data.name=synthetic"),
    *("--config.data.num_clients=12", "--config.data.num_novel=1"),
    *("--config.server.cohort_size=2", "--config.local.batch_size=8"),
    *("--config.evaluation.clients_per_call=4", "--config.evaluation.batch_size=16"),
    "--config.tensorboard=False",
]
TRAIN = "python -m experiments.train --config=configs/"
JOIN = "python -m experiments.join"
SWEEP = "python -m experiments.sweep --config="
# Tests of their own train, sweep and count like these, so that here runs are only
# built and points of sweeps resolved; a slow test runs them.
AT_LENGTH = {
    "make demo": ["python", "-m", "experiments.demo", "--smoke", "--workdir=runs/demo"],
    SWEEP + "configs/zero_shot.py:hyperfedzero": ["--list"],
    SWEEP + "configs/zero_shot.py:data": [
        *("python", "-m", "experiments.sweep"),
        *("--config=configs/zero_shot.py:fedavg,data=digits", "--workdir=runs/tuned"),
        *("--config.rounds=1", "--sweep=seed=0", "--config.local.epochs=1"),
        *("--tune=local.learning_rate=0.1", "--config.data.validation_fraction=0.2"),
    ],
    SWEEP + "experiments/studies/hyperfedzero": ["--list"],
    "python -m benchmarks.comm_table": ["--networks=mnist"],
    TRAIN + "personalised.py": [*SMALL, "--config.data.min_size=2"],
    TRAIN + "personalised.py:ditto,iid": SMALL,
    # Without the convolutions, which take longest to compile.
    TRAIN + "families.py:data=digits": [*ONE, "--config.families=('mlp','mh_mlp')"],
    TRAIN + "families.py:data=digits,clients": [
        *(*ONE, "--config.families=('mlp','mlp')"),
    ],
    TRAIN + "zero_shot.py:hyperfedshift": ONE,
    TRAIN + "zero_shot.py:fedprox": ONE,
    TRAIN + "zero_shot.py:alpha": ONE,
    TRAIN + "zero_shot.py:fedyogi": ONE,
    TRAIN + "zero_shot.py:data=digits --workdir=runs/deeper": ONE,
    JOIN: ["--rounds=1"],
}
SHORTENED = {
    **AT_LENGTH,
    "make test": None,  # it is running
    "pip install -e .": None,  # `make test` has done it
    TRAIN + "zero_shot.py:data=digits --workdir=runs/try": SHORT,
    "python -m experiments.evaluate": [],
    "python -m benchmarks.family_table": None,
    # Studies: see tests/studies.
    SWEEP + "experiments/studies/": None,
    "python -m experiments.train --config=configs/zero_shot.py:fedavg --w": [
        *("--config.rounds=1", "--config.model.hidden=(8,)")
    ],
    "python -m experiments.export": [],
    "python -m experiments.data": [],
    "python -m experiments.studies.record": None,
    "python -m experiments.studies.gradient_inversion": None,
    "python -m benchmarks.round_time": ["--clients=2", "--cohort=2", "--rounds=1"],
}


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(
    zip(
        re.findall(r"^## (.*)", "## \n" + README, re.MULTILINE),
        re.split(r"^## .*", README, flags=re.MULTILINE),
        strict=True,
    )
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def start_of(command: str) -> str:
    """Returns the longest start of a command that a test knows."""
    found = [start for start in SHORTENED if command.startswith(start)]
    assert found, f"no test knows the README's command {command!r}"
    return max(found, key=len)


def run(command: str, cwd: Path) -> None:
    """Runs a command, shortened, in `cwd`."""
    instead = SHORTENED[start_of(command)]
    if instead is None:
        return
    if instead[:1] != ["python"]:
        instead = shlex.split(command) + instead
    python, m, module, *argv = instead
    assert (python, m) == ("python", "-m")
    done = launch(cwd / "said", module, argv, cwd).result()
    assert done.code == 0, f"{command}\n{done.err}"


def check(command: str) -> None:
    """Reads the flags of a command for training and builds what it would train."""
    config, *given = shlex.split(command)[3:]
    given = [flag for flag in given if flag.startswith("--config.")]
    added = [flag for flag in SHORTENED[start_of(command)] if "families" not in flag]
    build.build(cli.read_config(config.removeprefix("--config="), [*given, *added]))


def check_sweep(command: str) -> None:
    """Reads the flags of a sweep and resolves its first and its last point."""
    config, *given = shlex.split(command)[3:]
    path = config.removeprefix("--config=")
    named = points.find_named(path)
    flags = [flag.removeprefix("--").partition("=") for flag in given]
    axes = [
        points.axis(name, text, named if name == "sweep" else {})
        for name, _, text in flags
        if name in ("sweep", "tune")
    ]
    fields = [flag for flag in given if flag.startswith("--config.")]
    first, *_, last = points.product(axes)
    assert len(points.resolve(path, fields, [first, last])) == 2


@pytest.fixture
def folder(repository, tmp_path):
    """A folder with all that the commands name."""
    for name in ("configs", "experiments", "benchmarks", "hyperjax"):
        (tmp_path / name).symlink_to(repository / name)
    images = np.random.default_rng(0).integers(0, 256, (600, 8, 8), np.uint8)
    np.savez(tmp_path / "mine.npz", image=images, label=np.arange(600) % 5)
    return tmp_path


def test_the_two_commands_are_in_the_makefile(repository):
    makefile = (repository / "Makefile").read_text()
    for command in ("make demo", "make test"):
        assert command in commands(README)
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("section", [s for s, t in SECTIONS.items() if commands(t)])
def test_every_command_runs(section, folder, monkeypatch):
    # In order and in one folder, since some go on from what others wrote.
    monkeypatch.chdir(folder)
    for command in commands(SECTIONS[section]):
        if start_of(command) not in AT_LENGTH:
            run(command, folder)
        elif command.startswith(TRAIN):
            check(command)
        elif command.startswith(SWEEP):
            check_sweep(command)
    assert section != "Try it" or (folder / "runs/try/report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("start", AT_LENGTH)
def test_commands_that_are_built_run(start, folder):
    found = [c for c in commands(README) if start_of(c) == start]
    assert found, f"the README has no command {start!r} any more"
    if start == JOIN:
        found = [c for c in commands(README) if "--workdir=runs/first" in c] + found
    for command in found:
        run(command, folder)
    assert start != "make demo" or (folder / "runs/demo/report.html").exists()


def test_the_example_of_an_own_network_runs(capsys):
    (example, *_) = [b for b in blocks(README, "python") if "class Net" in b]
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    out = capsys.readouterr().out
    assert "down_numbers=12384" in out
    assert "loss by round" in out


def test_the_example_of_a_named_sweep_adds_points():
    (example,) = blocks(SECTIONS["Ablations"], "python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    points: list = []
    names["sweep_proximal"](points.append)
    assert len(points) == 4 and callable(names["get_config"])


def test_the_number_of_methods_is_current():
    assert f"{len(registry.methods())} methods under four" in README


def test_the_first_lines_run():
    (lines,) = blocks(SECTIONS[""], "python")
    names: dict = {}
    exec(compile(lines, "README.md", "exec"), names)
    assert names["run"].state.round == 4


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cells,) = blocks(SECTIONS["In a notebook"], "python")
    names: dict = {}
    exec(compile(cells, "README.md", "exec"), names)
    assert names["run"].state.round == 6
    assert (tmp_path / "runs/digits/run.json").exists()


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(repository, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, repository],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("hyperjax-*.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True
    ).stdout
    assert "hyperjax/engine/exchange.py" in listing
    assert "hyperjax/py.typed" in listing
    assert "experiments/" not in listing and "tests/" not in listing


@pytest.mark.slow
def test_an_sdist_holds_all_files_but_those_of_the_hosting(repository, tmp_path):
    if not (repository / ".git").exists():
        pytest.skip("no clone: this may be an sdist itself")
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, repository],
        check=True,
        capture_output=True,
    )
    (sdist,) = tmp_path.glob("hyperjax-*.tar.gz")
    with tarfile.open(sdist) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name for name in tracked if not name.startswith(".")} <= held
