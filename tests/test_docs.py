"""The documentation builds without a warning; `make docs` also runs its notebooks."""

import subprocess
import sys

import pytest

import hyperjax


def test_pages_build(repository, tmp_path):
    for package in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(package, reason="needs the extra `docs`")
    command = [
        *(sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"),
        *("-D", "nb_execution_mode=off", "-d", tmp_path / "doctrees"),
        *(repository / "docs", tmp_path / "html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    methods = (tmp_path / "html/reference/methods.html").read_text(encoding="utf-8")
    for name in hyperjax.methods():
        assert f'id="method-{name.replace("_", "-")}"' in methods
    # A field's default and words, as the code has them.
    fields = (tmp_path / "html/reference/fields.html").read_text(encoding="utf-8")
    assert "data.validation_fraction" in fields


def test_every_public_name_has_its_place(repository):
    page = repository / "docs/reference/api/hyperjax.md"
    names = [
        line.rpartition("hyperjax.")[2]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith(".. auto")
    ]
    assert sorted(names) == sorted(hyperjax.__all__)
