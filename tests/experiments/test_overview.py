"""What --help prints has everything, on lines that fit a terminal."""

import re

import pytest

from hyperjax import models, protocols, registry
from hyperjax.data import partition, sources
from hyperjax.launch import overview
from hyperjax.protocols import arguments, common, methods, zero_shot

TEXT = overview.overview()


def listed(text):
    """First words of the lines that begin an entry."""
    return {
        word.rstrip(",")
        for line in re.findall(r"^  (\S.*)", text, re.M)
        for word in line.split("  ")[0].split(", ")
    }


@pytest.mark.parametrize(
    "names",
    [
        protocols.NAMES,
        registry.methods(),
        methods.ALIASES,
        models.ZOO,
        sources.EMBEDDED,
        partition.PARTITIONERS,
        set(arguments.WORDS),
    ],
)
def test_everything_there_is_to_choose_from_is_listed_with_words(names):
    assert set(names) <= listed(TEXT)
    for name in names:
        assert re.search(rf"^  .*\b{name}\b.*  +\S", TEXT, re.M), name


def test_every_field_has_its_default_and_words():
    for field, (default, words) in common.FIELDS.items():
        shown = "None" if isinstance(default, type) else repr(default)
        given = re.escape(f"{field}={shown.replace(' ', '')}")
        folded = r"\s+".join(map(re.escape, words.split()))
        assert re.search(rf"^  {given} +{folded}$", TEXT, re.M), field


def test_arguments_of_experiments_have_words():
    for name in protocols.NAMES:
        known = {*arguments.SHARED, *protocols.find(name).EXTRA} - {"method"}
        assert known <= set(arguments.WORDS)


def test_lines_fit_a_terminal():
    config = zero_shot.get_config("hyperfedzero")
    text = TEXT + overview.options(config, "method") + overview.options(config, "model")
    assert max(map(len, text.splitlines())) <= 80


def test_options_of_a_named_run_have_words():
    config = zero_shot.get_config("fedprox")
    config.method.mu = 0.5
    text = overview.options(config, "method")
    assert re.search(r"^  method\.mu=0\.5 +weight of the proximal term", text, re.M)
    assert set(re.findall(r"^  method\.(\w+)=", text, re.M)) == {
        *config.method.keys()
    } - {"name"}
    assert "model.hidden=(200,200)" in overview.options(config, "model")
