"""Functions named in text, "fedprox(mu=0.1)", and checks of what they are given."""

import ast
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

from hyperjax.errors import check_choice, check_number

# A number that sets shapes, branches or limits: programs have it built in, where others
# are arguments of theirs.
Fixed = Annotated[float, "fixed"]
LARGEST = 2**31 - 1  # of whole numbers: they are int32 on the device
FLOAT32 = 3.4e38


def parse(field: str, text: str) -> tuple[str, dict[str, Any]]:
    """Parses "name" or "name(option=literal, ...)".

    A name may be "package.module:name". Nothing is evaluated but literals.

    Args:
      field: what the text was given for, for messages.
      text: what was given.

    Raises:
      ValueError: of another form, or a number among the values is not finite.

    Example:
      >>> parse("base", "fedprox(mu=0.1)")
      ('fedprox', {'mu': 0.1})
    """
    module, colon, rest = text.strip().rpartition(":") if _is_path(text) else ("",) * 3
    options: dict[str, Any] = {}
    name = None
    try:
        node = ast.parse((rest if colon else text).strip(), mode="eval").body
        if isinstance(node, ast.Call) and not node.args:
            options = {k.arg or "": ast.literal_eval(k.value) for k in node.keywords}
            node = node.func
        if isinstance(node, ast.Name) and "" not in options:
            name = node.id
    except (SyntaxError, ValueError):
        pass
    if name is None:
        raise ValueError(
            f"{field}={text!r} is not of the form name or name(option=value, ...)"
        )
    for option, value in options.items():
        check_finite(f"{field}={text!r}: {option}", value)
    return f"{module}{colon}{name}", options


def _is_path(text: str) -> bool:
    """Whether what stands before a call's parenthesis names a module."""
    return ":" in text.partition("(")[0] and ":" not in text.partition("(")[2]


def call(field: str, factory: Callable, *args, **options):
    """Calls a factory with options from text; names those that it does not take.

    Args:
      field: where the options were given, for messages.
      factory: what is called; its signature says what it takes.
      *args: what it is given beside options, by position.
      **options: by name.

    Raises:
      ValueError, TypeError: an unknown option, or a value that it cannot have.
    """
    parameters = inspect.signature(factory).parameters
    for option, value in options.items():
        check_choice(f"option of {field}", option, parameters)
        check_option(f"{field}.{option}", value, parameters[option].annotation)
    try:
        return factory(*args, **options)
    except TypeError as error:
        raise TypeError(f"{field}: {error}") from error
    except ValueError as error:
        option = str(error).partition("=")[0]
        if option in options:  # the factory's own words, and where that was given
            raise ValueError(f"{field}.{error}") from error
        raise


def plain_type(annotation: Any) -> Any:
    """Returns a parameter's annotation without what else is declared of it."""
    declared = typing.get_origin(annotation) is Annotated
    return annotation.__origin__ if declared else annotation


_WORDS = {bool: "True or False", str: "text", type(None): "None"}


def check_option(field: str, value: Any, annotation: Any) -> None:
    """Checks a value against a parameter's annotation, if that is a plain type.

    Raises:
      ValueError: it is of another type, or not finite.
    """
    annotation = plain_type(annotation)
    union = isinstance(annotation, types.UnionType)
    kinds = set(typing.get_args(annotation) if union else (annotation,))
    if not kinds <= {bool, int, float, str, type(None)}:
        return
    plain = {bool: bool, str: str, type(None): type(None)}
    if any(isinstance(value, plain[kind]) for kind in kinds if kind in plain):
        return
    if kinds & {int, float}:
        whole = float not in kinds
        check_number(whole=whole, at_most=LARGEST if whole else None, **{field: value})
    else:
        names = " or ".join(sorted(_WORDS[kind] for kind in kinds))
        raise ValueError(f"{field}={value!r} must be {names}")


def check_finite(field: str, value: Any) -> None:
    """Checks that numbers, also in tuples, are finite and that nothing else is there.

    Raises:
      ValueError: it holds what is neither a finite number, text, True, False or None.
    """
    if isinstance(value, tuple):
        for item in value:
            check_finite(field, item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        check_representable(field, value)
    elif not isinstance(value, bool | str | None):
        raise ValueError(
            f"{field} is {type(value).__name__}; a config holds numbers, text, True, "
            "False, None, and tuples of these"
        )


def check_representable(field: str, value: float) -> None:
    """Raises ValueError for a number that is not finite, also in float32."""
    if not abs(value) <= FLOAT32:
        named: dict[str, Any] = {field: value}
        check_number(at_least=-FLOAT32, at_most=FLOAT32, **named)
