"""Launchers: what they define at a launch, and the files that they write."""

import ast
import os
import sys
from pathlib import Path

import pytest
from launched import launch

from hyperjax.launch import outputs

ROOT = Path(__file__).parents[2]
LAUNCHERS = [
    p
    for folder in ("experiments", "experiments/studies", "benchmarks")
    for p in ROOT.glob(f"{folder}/*.py")
]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_functions_take_arguments_not_flags_of_a_launch(path):
    """What is defined where a module is launched is not there when it is imported."""
    parts = ast.parse(path.read_text()).body
    launch = [
        p for p in parts if isinstance(p, ast.If) and "__main__" in ast.dump(p.test)
    ]
    assert len(launch) <= 1

    def names(trees, context):
        nodes = (node for tree in trees for node in ast.walk(tree))
        return {
            node.id
            for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, context)
        }

    rest = [part for part in parts if part not in launch]
    only_there = names(launch, ast.Store) - names(rest, ast.Store)
    assert not only_there & names(rest, ast.Load)


def test_outputs_are_judged_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("")
    found = outputs.files(json="~/new/x.json", picture=str(tmp_path / "file"), no=None)
    assert found == {"json": tmp_path / "home/new/x.json", "picture": tmp_path / "file"}
    assert found["json"].parent.is_dir()
    for given in ("", str(tmp_path), f"{tmp_path}/file/x.json", f"{tmp_path}/file/a/x"):
        with pytest.raises(ValueError, match=r"--json=.* is not a f"):
            outputs.files(picture=f"{tmp_path}/other/x.svg", json=given)
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(outputs.os, "access", lambda *_: False)  # root may write all
    with pytest.raises(ValueError, match=r"--json='.*x': '.*' cannot be written to"):
        outputs.files(json=str(tmp_path / "other/x"))
    with pytest.raises(ValueError, match=r"--workdir='.*other' *: '.*' cannot be wri"):
        outputs.folder("workdir", tmp_path / "other")


def unread() -> None:
    """Makes standard output a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.dup2(writes, 1)
    os.close(reads)
    sys.stdout = os.fdopen(1, "w")  # the one there is for a file


@pytest.mark.xdist_group("launcher")
def test_ends_quietly_where_nobody_reads_on(tmp_path):
    done = launch(tmp_path, "experiments.train", ["--help"], ROOT, unread).result()
    assert (done.code, done.err) == (141, "")
