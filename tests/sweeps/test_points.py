"""Flags of a sweep, the points they make, and the names of their folders."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperjax.launch import cli
from hyperjax.sweeps import points

DIGITS = "zero_shot:hyperfedzero,data=digits"
FEW = settings(max_examples=30)
WORDS = st.text("abcxyz019.+-", min_size=1).filter(lambda w: ".." not in w)


def grid(*flags: str, named=None) -> list:
    return points.product([points.axis("sweep", f, named or {}) for f in flags])


# Values -----------------------------------------------------------------------------


@FEW
@given(st.lists(WORDS, min_size=1))
def test_commas_part_values(words):
    assert points.values(",".join(words)) == words
    assert points.values(" , ".join(words)) == words


@FEW
@given(
    st.lists(st.lists(WORDS, min_size=1), min_size=1),
    st.sampled_from(["()", "[]", "{}"]),
)
def test_commas_within_brackets_do_not(parts, brackets):
    values = [f"f{brackets[0]}{','.join(words)}{brackets[1]}" for words in parts]
    assert points.values(",".join(values)) == values


@FEW
@given(st.lists(st.text("ab,( '", min_size=0), min_size=1))
def test_commas_within_quotes_do_not(texts):
    assert points.values(",".join(f'"{text}"' for text in texts)) == texts


@given(st.integers(-99, 99), st.integers(0, 30), st.integers(1, 9))
def test_ranges_have_both_ends(first, count, step):
    last = first + step * count
    expected = [str(n) for n in range(first, last + 1, step)]
    assert points.values(f"{first}..{last}..{step}") == expected
    assert points.values(f"{last}..{first}..-{step}") == expected[::-1]
    assert points.values(f"{first}..{first + count}") == [
        str(n) for n in range(first, first + count + 1)
    ]


@pytest.mark.parametrize("text", ["", "1,,2", "1,", "2..0", "0..4..0", "0..4..-1"])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(ValueError, match=r"empty value|never"):
        points.values(text)


@pytest.mark.parametrize(
    ("text", "end"), [("(1,2", ")"), ("'a,b", "'"), ("f([1)", "]")]
)
def test_what_does_not_close_is_refused(text, end):
    with pytest.raises(ValueError, match=re.escape(f"no closing {end!r}")):
        points.values(text)


# Grids ------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_grid_is_the_product_of_its_flags(sizes):
    axes = [[{f"f{i}": str(v)} for v in range(n)] for i, n in enumerate(sizes)]
    found = points.product(axes)
    expected = 1
    for n in sizes:
        expected *= n
    assert len(found) == len({points.key(p) for p in found}) == expected
    assert all(len(point) == len(sizes) for point in found)


def test_a_field_may_be_swept_once():
    with pytest.raises(ValueError, match="'seed' is swept twice"):
        grid("seed=0..1", "seed=4")


def test_a_named_sweep_adds_points_and_multiplies():
    def both(add, scale="1"):
        add({"method.name": "fedavg"})
        add(**{"method.name": "fedprox", "method.mu": 0.1 * float(scale)})

    named = {"both": both}
    assert grid("both", "seed=0..1", named=named) == [
        {"method.name": "fedavg", "seed": "0"},
        {"method.name": "fedavg", "seed": "1"},
        {"method.name": "fedprox", "method.mu": "0.1", "seed": "0"},
        {"method.name": "fedprox", "method.mu": "0.1", "seed": "1"},
    ]
    assert grid("both:2", named=named)[1]["method.mu"] == "0.2"


def test_named_sweeps_are_refused_by_name():
    def one(add):
        pass

    with pytest.raises(ValueError, match="did you mean 'one'"):
        grid("onne", named={"one": one})
    with pytest.raises(ValueError, match="takes no argument"):
        grid("one:2", named={"one": one})
    with pytest.raises(ValueError, match="adds no point"):
        grid("one", named={"one": one})

    def of(add, runs):
        """Those of a folder."""

    with pytest.raises(ValueError, match=r"--sweep=of:RUNS \(Those of a folder\.\)$"):
        grid("of", named={"of": of})
    with pytest.raises(ValueError, match="neither field=values nor the name"):
        grid("one")


def test_named_sweeps_stand_in_the_file_or_the_experiment(tmp_path):
    assert "embedding_size" in points.find_named(DIGITS)
    assert "embedding_size" in points.find_named("configs/zero_shot.py:fedavg")
    file = tmp_path / "zero_shot.py"  # its own go before
    file.write_text("def sweep_embedding_size(add):\n    add(seed=1)\n")
    assert grid("embedding_size", named=points.find_named(str(file))) == [{"seed": "1"}]


# Points -----------------------------------------------------------------------------


def test_a_point_is_the_run_that_train_would_make():
    arguments = ["--config.rounds", "3", "--config.local.clip_norm=None"]
    flags = ("method.name=fedprox,ditto", "data.alpha=1", "model.hidden=(8,),(8,8)")
    found = points.resolve(DIGITS, arguments, grid(*flags))
    assert [point.fields["model.hidden"] for point in found] == [(8,), (8, 8)] * 2
    for point, method in zip(
        found, ["fedprox", "fedprox", "ditto", "ditto"], strict=True
    ):
        expected = cli.read_config(
            DIGITS,
            [*arguments, f"--config.method.name={method}", "--config.data.alpha=1"],
        )
        expected.model.hidden = point.fields["model.hidden"]
        assert point.config.to_dict() == expected.to_dict()
        assert point.config.data.alpha == 1.0 and point.config.local.clip_norm is None


def test_none_is_a_value():
    found = points.resolve(DIGITS, [], grid("local.clip_norm=None,1"))
    assert [point.config.local.clip_norm for point in found] == [None, 1.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["data.alpha=x"], "data.alpha=x"),
        (["data.alpha=1,-1"], "the point data.alpha=-1: data.alpha=-1.0 must be pos"),
        (["data.alpah=1"], "did you mean 'data.alpha'"),
        (["method.name=fedavg,fedprx"], "did you mean 'fedprox'"),
        (["method.name=fedavg", "method.embedding_size=2"], "embedding_size.* unknown"),
        (
            ["data.alpha=1,1.0"],
            "two points are one run: data.alpha=1; and data.alpha=1",
        ),
        (["data.classes_per_client=2,3"], "would change nothing"),
    ],
)
def test_points_that_cannot_be_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        points.resolve(DIGITS, ["--config.rounds=3"], grid(*flags))


@pytest.mark.parametrize(
    "given", ["--config.rounds=3", "--config.rounds", "-config.rounds=3"]
)
def test_a_field_that_is_swept_is_not_given_beside(given):
    points.check_once(["--config.rounds_per_call=3"], grid("rounds=2,3"))
    with pytest.raises(ValueError, match="'rounds' is swept, and given by --config"):
        points.check_once([given], grid("rounds=2,3"))


# Names ------------------------------------------------------------------------------

VALUES = st.one_of(
    st.integers(0, 3),
    st.floats(0, 1),
    st.none(),
    st.booleans(),
    st.text(max_size=20),
    st.text(max_size=8).map(lambda text: 30 * text),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
FIELDS = st.sampled_from(
    ("seed", "data.alpha", "method.alpha", "method.name", "uplink")
)
POINTS = st.lists(
    st.dictionaries(FIELDS, VALUES, min_size=1), min_size=1, unique_by=points.key
)


@FEW
@given(POINTS)
def test_names_are_unique_and_every_file_system_takes_them(changed):
    names = points.name_all(changed)
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9.,=+_-]{1,120}", name)
        assert not name.startswith((".", "-"))


@FEW
@given(POINTS, POINTS)
def test_names_stay_when_points_are_added(before, more):
    known = dict(zip(map(points.key, before), points.name_all(before), strict=True))
    new = [point for point in more if points.key(point) not in known]
    names = points.name_all([*new, *before], known)
    assert names[len(new) :] == list(known.values())
    assert len({name.casefold() for name in names}) == len(names)


def test_names_read_well():
    found = points.resolve(
        DIGITS, [], grid("seed=0", "data.alpha=0.1", "method.name=ditto")
    )
    assert found[0].name == "alpha=0.1,method=ditto,seed=0"
    shared = points.name_all([{"data.alpha": 0.1, "method.alpha": 1.0}])
    assert shared == ["data.alpha=0.1,method.alpha=1"]
