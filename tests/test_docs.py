"""The documentation builds without a warning; a slow test runs its notebooks."""

import json
import runpy
import subprocess
import sys

import pytest

import hyperjax


@pytest.mark.parametrize(
    "execution", ["off", pytest.param("force", marks=pytest.mark.slow)]
)
def test_pages_build(execution, repository, tmp_path):
    for package in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(package, reason="needs the extra `docs`")
    # Read and resolved, links and all, and not written.
    command = [
        *(sys.executable, "-m", "sphinx", "-q", "-b", "dummy", "-W", "--keep-going"),
        *("-D", f"nb_execution_mode={execution}", "-d", tmp_path / "doctrees"),
        *(repository / "docs", tmp_path / "pages"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_every_public_name_has_its_place(repository):
    page = repository / "docs/reference/api/hyperjax.md"
    names = [
        line.rpartition("hyperjax.")[2]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith(".. auto")
    ]
    assert sorted(names) == sorted(hyperjax.__all__)


def test_the_picture_is_drawn_from_a_record(repository):
    made = runpy.run_path(str(repository / "docs/picture.py"))
    record = json.loads(made["RECORD"].read_text(encoding="utf-8"))
    assert made["picture"](record).startswith(b"\x89PNG")
    assert made["PICTURE"].stat().st_size < 150_000
    assert "docs/_static/rotation.png" in (repository / "README.md").read_text("utf-8")
