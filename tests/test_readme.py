"""Every command and example of the README runs, shortened where it would take long."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launched import launch

from hyperjax import registry

# Command in the README -> what is run instead; None: it has run by other means.
SHORT = ["--config.rounds=2", "--config.evaluation.every=2"]
ONE = [
    *("--config.rounds=1", "--config.tensorboard=False"),
    "--config.evaluation.finetune_epochs=()",
]
SMALL = [
    *("--config.rounds=1", "--config.local.epochs=1", "--config.data.name=synthetic"),
    *("--config.data.num_clients=12", "--config.data.num_novel=1"),
    *("--config.data.min_size=2", "--config.evaluation.clients_per_call=4"),
    *("--config.server.cohort_size=2", "--config.local.batch_size=8"),
    *("--config.evaluation.batch_size=16", "--config.tensorboard=False"),
]
RESIDUAL = (  # train residual networks: built by test_build, run by a slow test
    "python -m experiments.train --config=configs/personalised.py --",
    "python -m experiments.train --config=configs/personalised.py:ditto",
)
TRAIN = "python -m experiments.train --config=configs/"
SHORTENED = {
    "make demo": ["python", "-m", "experiments.demo", "--smoke", "--workdir=runs/demo"],
    "make test": None,  # it is running
    "pip install -e .": None,  # `make test` has done it
    TRAIN + "zero_shot.py": [*SHORT, "--config.tensorboard=False"],
    TRAIN + "zero_shot.py:alpha": [*ONE, "--config.data.name=digits"],
    TRAIN + "zero_shot.py:fedyogi": [*ONE, "--config.data.name=digits"],
    TRAIN + "zero_shot.py:data=digits --workdir=runs/try": SHORT,
    "python -m experiments.evaluate": [],
    **dict.fromkeys(RESIDUAL),
    # Without the convolutions, which take longest to compile.
    TRAIN + "families.py:data=digits": [*ONE, "--config.families=('mlp','mh_mlp')"],
    TRAIN + "families.py:data=digits,clients": [
        *(*ONE, "--config.families=('mlp','mlp')"),
    ],
    "python -m experiments.sweep --config=configs/zero_shot.py:hyperfedzero": [
        "--list"
    ],
    "python -m experiments.sweep --config=configs/zero_shot.py:data": [
        *("python", "-m", "experiments.sweep"),
        *("--config=configs/zero_shot.py:fedavg,data=digits", "--workdir=runs/tuned"),
        *("--config.rounds=1", "--sweep=seed=0", "--config.local.epochs=1"),
        *("--tune=local.learning_rate=0.1", "--config.data.validation_fraction=0.2"),
    ],
    "python -m experiments.join": ["--rounds=1"],
    "python -m benchmarks.comm_table": ["--networks=mnist"],
    "python -m benchmarks.family_table": ["--methods=local_only"],
    # Studies: see tests/studies.
    "python -m experiments.sweep --config=experiments/studies/": None,
    "python -m experiments.sweep --config=experiments/studies/hyperfedzero": ["--list"],
    "python -m experiments.train --config=configs/zero_shot.py:fedavg --w": [
        "--config.rounds=1"
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


def shortened(command: str) -> list[str] | None:
    found = [start for start in SHORTENED if command.startswith(start)]
    assert found, f"no test knows the README's command {command!r}"
    instead = SHORTENED[max(found, key=len)]
    if instead is None or instead[:1] == ["python"]:
        return instead
    return shlex.split(command) + instead


def test_the_two_commands_are_in_the_makefile(repository):
    makefile = (repository / "Makefile").read_text()
    for command in ("make demo", "make test"):
        assert command in commands(README)
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("section", [s for s, t in SECTIONS.items() if commands(t)])
def test_every_command_runs(section, repository, tmp_path):
    # In order and in one folder, since some go on from what others wrote.
    for name in ("configs", "experiments", "benchmarks", "hyperjax"):
        (tmp_path / name).symlink_to(repository / name)
    images = np.random.default_rng(0).integers(0, 256, (600, 8, 8), np.uint8)
    np.savez(tmp_path / "mine.npz", image=images, label=np.arange(600) % 5)
    for command in commands(SECTIONS[section]):
        arguments = shortened(command)
        if arguments is None:
            continue
        python, m, module, *argv = arguments
        assert (python, m) == ("python", "-m")
        done = launch(tmp_path / "said", module, argv, tmp_path).result()
        assert done.code == 0, f"{command}\n{done.err}"
    written = {"": "runs/demo/report.html", "Try it": "runs/try/report.html"}
    assert section not in written or (tmp_path / written[section]).exists()


@pytest.mark.slow
def test_commands_with_residual_networks_run(repository, tmp_path):
    for name in ("configs", "experiments", "hyperjax"):
        (tmp_path / name).symlink_to(repository / name)
    found = [c for c in commands(README) if c.startswith(RESIDUAL)]
    assert len(found) == 3
    for command in found:
        arguments = [sys.executable, *shlex.split(command)[1:], *SMALL]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


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
