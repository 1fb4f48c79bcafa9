"""What counts as a number, and what a refusal says."""

import re
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.errors import check_at_least, check_choice, check_number, shown

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("value", [3, 3.5, np.float32(3), np.int64(3), jnp.float32(3)])
def test_numbers_of_all_origins_pass(value):
    check_number(rate=value)
    check_number(above=0, below=4, at_least=3, at_most=3.5, rate=value)


@pytest.mark.parametrize("value", [3, np.int64(3), jnp.int32(3), 2**70])
def test_integers_of_all_origins_are_whole(value):
    check_number(whole=True, number=value)
    check_at_least(3, number=value)


@pytest.mark.parametrize(
    "value", [NAN, INF, -INF, np.float32("nan"), "3", True, np.True_, None, [3.0], 3j]
)
def test_what_is_not_one_finite_number_is_refused_by_name(value):
    message = re.escape(f"rate={value!r} must be a finite number, at least 0")
    with pytest.raises(ValueError, match=message):
        check_number(at_least=0, fine=1.0, rate=value)


@pytest.mark.parametrize("value", [2.5, 2.0, np.float32(2), NAN, True, "2", None])
def test_a_number_of_things_is_whole(value):
    message = re.escape(f"size={value!r} must be a whole number, at least 1")
    with pytest.raises(ValueError, match=message):
        check_at_least(1, size=value)


@pytest.mark.parametrize(
    ("bounds", "value", "message"),
    [
        (dict(at_least=1), 0.5, "x=0.5 must be at least 1"),
        (dict(above=0), 0, "x=0 must be positive"),
        (dict(above=1), 1, "x=1 must be above 1"),
        (dict(at_most=1), 1.5, "x=1.5 must be at most 1"),
        (dict(at_least=0, below=1), 1, "x=1 must be at least 0 and below 1"),
        (dict(whole=True), 1.0, "x=1.0 must be a whole number"),
    ],
)
def test_bounds_are_named(bounds, value, message):
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        check_number(**bounds, x=value)


def test_of_very_many_names_the_first_are_said():
    with pytest.raises(ValueError) as raised:
        check_choice("column", "pixel_7", [f"pixel{i}" for i in range(784)])
    said = str(raised.value)
    assert len(said) < 300 and "did you mean 'pixel7'" in said
    assert "784 are accepted, near it 'pixel" in said
    with pytest.raises(ValueError) as raised:
        check_choice("column", "zzz", [f"pixel{i}" for i in range(784)])
    assert str(raised.value).endswith("'pixel11', ... (784 in all))")


def test_no_message_says_where_in_memory_something_is():
    class Net:
        pass

    def rate(step):
        pass

    given = [rate, partial(rate), Net, Net(), len, lambda step: step, object()]
    names = ["rate", "rate", "Net", "<Net>", "len", "<lambda>", "<object>"]
    assert [shown(value) for value in given] == names
    assert [shown(value) for value in ("a", 3, None, (1, 2))] == [
        *("'a'", "3", "None", "(1, 2)")
    ]
    with pytest.raises(ValueError, match=r"^partition=rate is unknown"):
        check_choice("partition", rate, ["iid"])
