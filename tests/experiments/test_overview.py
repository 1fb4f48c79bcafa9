"""What --help prints has everything, on lines that fit a terminal."""

import re

import pytest

from hyperjax import models, protocols, registry
from hyperjax.data import partition, shift, sources
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
        shift.KINDS,
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
    for width in (60, 80, 100):
        text = overview.overview(width) + overview.options(config, "method", width)
        assert width - 9 < max(map(len, text.splitlines())) <= width


def test_a_named_run_shows_its_own_values_alone():
    config = zero_shot.get_config("fedprox,data=digits")
    text = overview.named(config)
    assert re.search(r"^  rounds=40 +.* \[default:\s+100\]$", text, re.M | re.S)
    assert re.search(r"^  seed=0 +of everything that is drawn$", text, re.M)
    assert "method.mu=0.1" in text and "model.hidden=(32,)" in text
    assert zero_shot.__doc__.strip() in text
    assert "scaffold" not in text and "squeezenet" not in text
    assert max(map(len, text.splitlines())) <= 88


def test_options_of_a_named_run_have_words():
    config = zero_shot.get_config("fedprox")
    config.method.mu = 0.5
    text = overview.options(config, "method")
    assert re.search(r"^  method\.mu=0\.5 +weight of the proximal term", text, re.M)
    assert set(re.findall(r"^  method\.(\w+)=", text, re.M)) == {
        *config.method.keys()
    } - {"name"}
    assert "model.hidden=(200,200)" in overview.options(config, "model")
