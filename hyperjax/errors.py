"""Messages for bad input: what was given, what is accepted, what may be meant."""

import difflib
from collections.abc import Iterable


def check_choice(name: str, value: str, accepted: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `accepted`; suggests the nearest."""
    accepted = list(accepted)
    if value in accepted:
        return
    near = difflib.get_close_matches(str(value), accepted, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(map(repr, accepted))
    raise ValueError(f"{name}={value!r} is unknown{hint} (accepted: {known})")


def check_at_least(minimum: float, **values: float) -> None:
    """Raises ValueError for the first named value below `minimum`."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, or its name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
