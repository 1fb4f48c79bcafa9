"""Flags, paths, cores, and compiled programs that are kept."""

import os
from pathlib import Path

import jax
import pytest
from absl import flags

from hyperjax.launch import cli

HOME = os.path.expanduser("~")
SWITCHES = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--config=~/a.py:x=~", f"--config={HOME}/a.py:x=~"),
        ("-config=~/a.py", f"-config={HOME}/a.py"),
        ("--config=configs/a~b.py", "--config=configs/a~b.py"),
        ("--config.data.name=~/x", "--config.data.name=~/x"),
        ("--config=~", f"--config={HOME}"),
    ],
)
def test_the_home_folder_of_a_config_is_found(given, expected):
    assert cli._expand_config(given) == expected


@pytest.mark.parametrize(
    ("given", "kept", "removed"),
    [
        (["--config.a.b=None"], [], ["a.b"]),
        (["--config.a.b", "None", "--x"], ["--x"], ["a.b"]),
        (["-config.a=None", "--config.a=1"], ["--config.a=1"], []),
        (["--config.a=1", "--config.a=None"], ["--config.a=1"], ["a"]),
        (["--config.a", "1", "None"], ["--config.a", "1", "None"], []),
        (["--workdir", "None"], ["--workdir", "None"], []),
    ],
)
def test_none_may_be_said_in_either_form(given, kept, removed):
    assert cli._split_none(["x", *given]) == (["x", *kept], removed)


def test_a_switched_off_field_is_given(monkeypatch):
    argv = ["x", "--noconfig.engine.memory_map", "--config.rounds", "3", "--config=a"]
    monkeypatch.setattr(cli.sys, "argv", argv)
    assert cli._given_fields() == ["engine.memory_map", "rounds"]


def test_a_list_for_one_value_points_to_sweeps():
    said = cli.explain(ValueError("flag --config.seed=0,1,2: invalid literal"))
    assert said == (
        "--config.seed=0,1,2: seed takes one value; for several see "
        "`hyperjax sweep --help`"
    )
    for text in (
        "flag --config.seed=one: invalid literal for int()",
        "flag --config.evaluation.thresholds=1,(: malformed",
    ):
        assert cli.explain(ValueError(text)) == text


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "flag --config.rounds=2.5: invalid literal for int() with base 10: '2.5'",
            "--config.rounds=2.5 must be a whole number",
        ),
        (
            "the point a=: flag --config.a=: could not convert string to float: ''",
            "the point a=: --config.a= must be a number",
        ),
        (
            "flag --all=x: ('Non-boolean argument to boolean flag', 'x')",
            "--all=x must be True or False",
        ),
        ("flag --format=x: value should be", "flag --format=x: value should be"),
    ],
)
def test_what_parsers_say_is_put_in_words(said, shown, capsys):
    assert cli.complain(said) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"error: {shown}"


def test_path_flags_take_what_people_type(monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    monkeypatch.setattr(
        cli.flags,
        "DEFINE",
        lambda *args, real=flags.DEFINE, **kw: real(*args, flag_values=values, **kw),
    )
    cli.define_path("place", None, "A place.")
    values(["x"])
    assert values.place is None
    for given, expected in (
        ("~/a b/ü/", f"{HOME}/a b/ü/"),
        ("./x", "./x"),
        ("~nobody-of-that-name/x", "~nobody-of-that-name/x"),
    ):
        values(["x", f"--place={given}"])
        assert values.place == expected
    with pytest.raises(flags.IllegalFlagValueError, match="it is empty; give a path"):
        values(["x", "--place="])


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch):
    assert 1 <= cli.num_cores() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cli.num_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cli.num_cores() == 1


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """A home without programs, and JAX as a user finds it."""
    before = {name: getattr(jax.config, name) for name in SWITCHES}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache(no_cache, monkeypatch):
    cli.keep_programs()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.parent == no_cache / ".cache" / "hyperjax" and folder.is_dir()
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_cache / "other"))
    cli.keep_programs()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.parent == no_cache / "other" / "hyperjax"


def test_a_folder_of_the_users_choice_stays_and_none_can_be_had(no_cache):
    jax.config.update("jax_compilation_cache_dir", "/mine")
    cli.keep_programs()
    assert jax.config.jax_compilation_cache_dir == "/mine"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    cli.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    assert list(no_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_costs_nothing_else(no_cache, monkeypatch):
    (no_cache / ".cache").write_text("a file")
    cli.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    (no_cache / ".cache").unlink()
    monkeypatch.setattr(os, "access", lambda *args: False)
    cli.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate(("new", "old", "oldest")):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    cli._drop_oldest(tmp_path, most=250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


def test_an_unknown_flag_points_to_what_may_be_meant(monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    flags.DEFINE_string("workdir", None, "A folder.", flag_values=values)

    def said(flag):
        return cli.explain(flags.UnrecognizedFlagError(flag))

    assert said("data").endswith("'data'; see --help")
    assert said("workdr").endswith("'workdr'; did you mean --workdir?")
    flags.DEFINE_string("config", None, "A file.", flag_values=values)
    assert "data of your own are --config.data.name=mine.npz" in said("data")
    assert said("rounds").endswith("did you mean --config.rounds?")
    assert said("alpha").endswith("did you mean --config.data.alpha?")
