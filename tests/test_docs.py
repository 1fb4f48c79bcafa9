"""The documentation builds without a warning; a slow test runs its notebooks."""

import gc
import json
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
from launched import launch

import hyperjax
from hyperjax.data import sources

# Read and resolved, links and all, and not written.
BUILD = ("-q", "-b", "dummy", "-W", "--keep-going")
# What takes long and warns of little; `make docs` leaves nothing out.
QUICK = (
    *("-D", "nb_execution_mode=off", "-D", "smartquotes=0"),
    *("-D", "autodoc_preserve_defaults=0", "-D", "autodoc_typehints=none"),
)


@pytest.fixture
def places(repository, tmp_path):
    """Arguments that say where pages are, and where what is made of them goes."""
    for package in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(package, reason="needs the extra `docs`")
    places = tmp_path / "doctrees", repository / "docs", tmp_path / "pages"
    return ("-d", *map(str, places))


def quick() -> None:
    """A page has the sizes of data sets, which take seconds to read."""
    gc.disable()
    none = SimpleNamespace(y=(), x=SimpleNamespace(shape=(0, 8, 8)), num_classes=0)
    sources.load = lambda name: none


@pytest.mark.xdist_group("launcher")
def test_pages_build(places, repository, tmp_path):
    argv = [*BUILD, *QUICK, *places]
    done = launch(tmp_path / "said", "sphinx", argv, repository, quick).result()
    assert done.code == 0, done.err


@pytest.mark.slow
def test_pages_and_notebooks_build(places):
    command = [sys.executable, "-m", "sphinx", *BUILD, *places]
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
