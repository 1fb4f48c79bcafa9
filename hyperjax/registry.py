"""Methods by name, what each takes, and how one hands on the options of another.

A method is a function `method(model, *, local, **options) -> Algorithm`, in a file of
its name under `hyperjax.algorithms` or anywhere else: "package.module:function". Its
signature is the one list of its options. Where it passes some on, to FedAvg or to a
generator, `hands_on` puts theirs into the signature behind its own.
"""

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hyperjax import calls
from hyperjax.errors import check_choice
from hyperjax.types import Algorithm

# What the caller of a method knows and an experiment does not write down: the networks,
# the clients' training, the server's optimizer, and numbers of clients and rounds.
SUPPLIED = (
    "model",
    "models",
    "local",
    "server_opt",
    "num_clients",
    "num_rounds",
    "family_sizes",
)
# Functions that only Python can give.
FUNCTIONS = ("aggregator", "common_expert")


class Option(NamedTuple):
    """One option of a method."""

    default: Any
    type: Any  # the annotation
    doc: str
    of: str  # the name of the function whose option it is
    fixed: bool = False  # a number that is built into programs, `calls.Fixed`


class Traits(NamedTuple):
    """What is asked about a method and cannot be read off what it takes."""

    joins: bool = False  # unseen clients can be embedded in a run that is finished
    per_sample: bool = False  # can deploy one classifier per input
    own_length: bool = False  # says itself how long clients train
    base: bool = False  # leaves open what stays home, so HyperFedNet can be under it
    weights: str = "size"  # of clients in its mean: "size" or "uniform"
    base_option: str = ""  # which names the method that has the say in its mean


def hands_on(*targets: Callable, without: tuple[str, ...] = ()) -> Callable:
    """Decorates a function that passes its `**options` on to others.

    Their keyword parameters stand in its signature behind its own, and `inspect` and
    `help()` show them. A parameter of its own hides theirs of the same name, so that a
    default can be another one.

    Args:
      *targets: functions, of which the first that has an option owns it.
      without: options of theirs that the function sets itself.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        kinds = inspect.Parameter
        found = {
            name: parameter
            for name, parameter in signature.parameters.items()
            if parameter.kind is not kinds.VAR_KEYWORD
        }
        for target in targets:
            for name, parameter in inspect.signature(target).parameters.items():
                if parameter.kind is kinds.KEYWORD_ONLY and name not in without:
                    found.setdefault(name, parameter)
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=list(found.values())
        )
        function.targets = targets  # type: ignore[attr-defined]
        return function

    return decorate


def routed(
    options: Mapping[str, Any], *targets: Callable
) -> tuple[dict[str, Any], ...]:
    """Divides options among the functions that take them, one mapping for each.

    What nobody takes goes to the last, whose refusal then names it.
    """
    parts: tuple[dict[str, Any], ...] = tuple({} for _ in targets)
    for name, value in options.items():
        takers = (name in inspect.signature(t).parameters for t in targets)
        number = next((i for i, takes in enumerate(takers) if takes), -1)
        parts[number][name] = value
    return parts


def has_traits(**traits: Any) -> Callable:
    """Decorates a method with its `Traits`."""

    def decorate(method: Callable) -> Callable:
        method.traits = Traits(**traits)  # type: ignore[attr-defined]
        return method

    return decorate


# By name ----------------------------------------------------------------------------


def methods() -> list[str]:
    """Returns the names of all methods of the package."""
    return list(_methods())


@functools.cache  # a sweep asks once for every point
def _methods() -> tuple[str, ...]:
    package = importlib.import_module("hyperjax.algorithms")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(names))


def find(name: str, field: str = "method") -> Callable[..., Algorithm]:
    """Returns the method of a name, or of "package.module:function".

    Args:
      name: what was given.
      field: for what, for messages.

    Raises:
      ValueError: there is none of this name; the nearest one is named.
    """
    if ":" in name:
        found = find_object(name, field, "function(model, *, local, ...)")
        if not callable(found) or "local" not in inspect.signature(found).parameters:
            raise ValueError(
                f"{field}={name!r} is no method: function(model, *, local, ...)"
            )
        return found
    check_choice(field, name, methods())
    return getattr(importlib.import_module(f"hyperjax.algorithms.{name}"), name)


def find_object(name: str, field: str, what: str) -> Any:
    """Imports "package.module:name".

    Raises:
      ValueError: it cannot be imported; `what` says what was expected.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{field}={name!r}: expected package.module:{what} ({error})"
        ) from error


def traits(name: str) -> Traits:
    """Returns what a method has declared."""
    return getattr(find(name), "traits", Traits())


def weights(method: Any, options: Mapping[str, Any], field: str = "method") -> str:
    """Returns the weights of clients in a method's mean, "size" or "uniform".

    Args:
      method: its name, the function, or something else, which has declared nothing.
      options: that it is given; where they name a base, its weights count.
      field: for what, for messages.

    Raises:
      ValueError: there is no such method or base.
    """
    function = find(method, field) if isinstance(method, str) else method
    declared = getattr(function, "traits", Traits())
    if declared.base_option not in options:
        return declared.weights
    option = declared.base_option
    return weights(calls.parse(option, options[option])[0], {}, option)


def families(method: str | Callable) -> str:
    """Returns whether a method takes several networks: "one", "several" or "either"."""
    function = find(method) if isinstance(method, str) else method
    taken = inspect.signature(function).parameters.get("family_sizes")
    if taken is None:
        return "one"
    return "several" if taken.default is taken.empty else "either"


def options(method: str | Callable) -> dict[str, Option]:
    """Returns what can be chosen about a method, by option, its own first.

    Args:
      method: its name, or the function.
    """
    return dict(_options(find(method) if isinstance(method, str) else method))


@functools.cache  # likewise
def _options(function: Callable) -> dict[str, Option]:
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in SUPPLIED or name in FUNCTIONS or parameter.kind in _VARIADIC:
            continue
        owner = _owner(function, name)
        found[name] = Option(
            parameter.default,
            calls.plain_type(parameter.annotation),
            _doc(owner, name),
            owner.__name__,
            fixed=parameter.annotation is calls.Fixed,
        )
    return found


_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def own_options(name: str) -> dict[str, Option]:
    """Returns what a method takes beyond FedAvg: its hyper-parameters."""
    return {k: o for k, o in options(name).items() if k not in options("fedavg")}


def _owner(function: Callable, option: str) -> Callable:
    """The function in whose own list an option stands."""
    if option in inspect.signature(function, follow_wrapped=False).parameters:
        code = function.__code__
        named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if option in named:
            return function
    for target in getattr(function, "targets", ()):
        if option in inspect.signature(target).parameters:
            return _owner(target, option)
    return function


def _doc(function: Callable, option: str) -> str:
    """The words on one argument in a docstring of the house's form."""
    text = inspect.getdoc(function) or ""
    names = r"\*{0,2}\w+(?:, \w+)*: "  # of arguments, at the beginning of a line
    this = rf"(?:\w+, )*{option}(?:, \w+)*: "
    match = re.search(rf"^  {this}(.*?)(?=^  {names}|^\S|\Z)", text, re.M | re.S)
    return " ".join(match[1].split()) if match else ""
