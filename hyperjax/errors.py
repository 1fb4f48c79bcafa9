"""Messages for bad input: what was given, what is accepted, what may be meant."""

import difflib
import functools
import math
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

_MOST, _FIRST = 100, 12  # names in a message, and how many of more than these
_NEAREST = 5  # names in a message that are like the one given


def check_choice(name: str, value: str, accepted: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `accepted`; suggests the nearest.

    All accepted ones are named if they are few, or if none is like what was given.
    """
    accepted = list(accepted)
    if value in accepted:
        return
    near = difflib.get_close_matches(str(value), accepted, n=_NEAREST)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = "accepted: " + some(map(repr, accepted))
    if near and len(accepted) > _FIRST:
        others = ", ".join(map(repr, near[1:]))
        known = f"{len(accepted)} are accepted" + (others and f", near it {others}")
    raise ValueError(f"{name}={shown(value)} is unknown{hint} ({known})")


def shown(value: Any) -> str:
    """Returns what a message calls a value: functions, classes and objects by name.

    Example:
      >>> shown("mlp"), shown(shown), shown(object())
      ("'mlp'", 'shown', '<object>')
    """
    while isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return value.__name__
    if type(value).__repr__ is object.__repr__:  # which tells where it is in memory
        return f"<{type(value).__name__}>"
    return repr(value)


def some(names: Iterable[str], most: int = _MOST) -> str:
    """Returns names for a message: all, or the first ones of more than `most`."""
    known = list(names)
    if len(known) > most:
        known[min(most, _FIRST) :] = [f"... ({len(known):,} in all)"]
    return ", ".join(known)


def check_number(
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    whole: bool = False,
    **values: Any,
) -> None:
    """Raises ValueError for the first named value that is not such a number.

    Python's, NumPy's and JAX's numbers are numbers; truth values, text and what is not
    finite are none. Arguments of a program that is being traced pass: what they stand
    for is checked where the same is built from numbers, before there is a program.

    Args:
      at_least: lower bound, or
      above: lower bound that is not reached itself.
      at_most: upper bound, or
      below: upper bound that is not reached itself.
      whole: integers only.
      **values: what is checked, by the name its user knows.

    Example:
      >>> check_number(above=0, at_most=1, fraction=0.3)
    """
    bounds: list[tuple[Any, Callable, str]] = [
        (at_least, operator.ge, f"at least {at_least}"),
        (above, operator.gt, "positive" if above == 0 else f"above {above}"),
        (at_most, operator.le, f"at most {at_most}"),
        (below, operator.lt, f"below {below}"),
    ]
    given = [bound for bound in bounds if bound[0] is not None]
    accepted = " and ".join(text for _, _, text in given)
    for name, value in values.items():
        if _is_traced(value):
            continue
        if not _is_number(value, whole):
            kind = "a whole number" if whole else "a finite number"
            accepted = f"{kind}, {accepted}" if accepted else kind
        elif all(holds(value, bound) for bound, holds, _ in given):
            continue
        raise ValueError(f"{name}={value!r} must be {accepted}")


def check_at_least(minimum: int, **values: Any) -> None:
    """Raises ValueError for the first named value that is no integer >= `minimum`."""
    check_number(at_least=minimum, whole=True, **values)


def check_made(name: str, value: Any, parts: Iterable[str], example: str) -> None:
    """Raises ValueError unless a value has these parts: a factory is to be called.

    Args:
      name: of the argument.
      value: what was given.
      parts: attributes that what is asked for has.
      example: how one is made.
    """
    if not all(hasattr(value, part) for part in parts):
        raise ValueError(f"{name}={shown(value)} must be made, such as {example}")


def surely(condition: Any) -> bool:
    """Returns whether a condition on numbers is met; not if they are traced."""
    return not _is_traced(condition) and bool(condition)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, or its name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_traced(value: Any) -> bool:
    import jax  # here, as who misspells a command needs none

    return isinstance(value, jax.core.Tracer)


def _is_number(value: Any, whole: bool) -> bool:
    """Whether a value is one finite number; with `whole` one of an integer type."""
    if isinstance(value, str | bytes | bool) or getattr(value, "dtype", "") == "bool":
        return False
    try:
        return math.isfinite(operator.index(value) if whole else float(value))
    except (TypeError, ValueError, OverflowError):
        return False
