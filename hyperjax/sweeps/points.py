"""From --sweep flags to points: what each changes, its name, and its config.

A flag is a field with the values it takes, `seed=0..2` or `data.alpha=0.1,1.0`, or the
name of a function `sweep_NAME(add)` that adds points one by one. The points of a sweep
are the product of its flags.
"""

import hashlib
import importlib.util
import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_collections

from hyperjax import protocols
from hyperjax.errors import check_choice, first_line
from hyperjax.launch import build, cli, origin
from hyperjax.protocols import common

Texts = Mapping[str, str]  # {"data.alpha": "0.1"}: what a point changes, as typed

SEEDS = ("seed", "data.seed")  # by which runs of one setting differ
_LONGEST = 120  # characters of a name; file systems take 255 bytes
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_MOST = 100_000  # points of a range or a product; more is a slip of the finger


class Point(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    fields: dict[str, Any]  # what it changes, as the config has it
    config: ml_collections.ConfigDict


# Flags ------------------------------------------------------------------------------


def values(text: str) -> list[str]:
    """Returns the values of a list: ranges a..b and a..b..step, and commas.

    Whole numbers, both ends included. Brackets, parentheses and quotes hold commas
    together; quotes around a whole value are taken off.

    Raises:
      ValueError: a value is empty, a range has no end, or brackets do not match.

    Example:
      >>> values("0..2,8..4..-2,(32,32)")
      ['0', '1', '2', '8', '6', '4', '(32,32)']
    """
    found: list[str] = []
    for item in _split(text):
        if not item:
            raise ValueError(f"{text!r} has an empty value")
        match = _RANGE.fullmatch(item)
        found += _whole_numbers(item, match) if match else [_unquoted(item)]
    return found


def _split(text: str) -> list[str]:
    """Cuts at commas outside brackets and quotes."""
    items, inside, quote = [""], "", ""
    closing = {"(": ")", "[": "]", "{": "}"}
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in closing:
            inside += closing[character]
        elif inside and character == inside[-1]:
            inside = inside[:-1]
        elif character == "," and not inside:
            items.append("")
            continue
        items[-1] += character
    if inside or quote:
        raise ValueError(f"{text!r} has no closing {(quote or inside)[-1]!r}")
    return [item.strip() for item in items]


def _whole_numbers(item: str, match: re.Match) -> list[str]:
    first, last, step = (None if n is None else int(n) for n in match.groups())
    step = 1 if step is None else step
    if step == 0 or (last - first) * step < 0:  # type: ignore[operator]
        raise ValueError(
            f"the range {item!r} never ends or never begins; give first..last, or "
            "first..last..step"
        )
    numbers = range(first, last + (1 if step > 0 else -1), step)  # type: ignore
    if len(numbers) > _MOST:
        raise ValueError(f"the range {item!r} has {len(numbers):,} numbers")
    return [str(number) for number in numbers]


def _unquoted(item: str) -> str:
    whole = len(item) > 1 and item[0] == item[-1] and item[0] in "'\""
    return item[1:-1] if whole and item[0] not in item[1:-1] else item


def axis(flag: str, text: str, named: Mapping[str, Callable]) -> list[Texts]:
    """Returns what one flag says, point by point.

    Args:
      flag: its name, for messages.
      text: "field=values", or the name of a function of `named`, "name:argument" with
        an argument for it.
      named: see `find_named`.

    Raises:
      ValueError: it is neither, or has no points.
    """
    field, equals, listed = text.partition("=")
    if equals and ":" not in field:
        try:
            return [{field.strip(): value} for value in values(listed)]
        except ValueError as error:
            raise ValueError(f"--{flag}={text}: {error}") from None
    name, colon, argument = text.partition(":")
    if not named:
        raise ValueError(
            f"--{flag}={text!r} is neither field=values nor the name of a sweep: "
            "neither the config's file nor its experiment has a function sweep_NAME"
        )
    check_choice(flag, name, named)
    found: list[Texts] = []

    def add(point: Mapping[str, Any] | None = None, **more: Any) -> None:
        given = {**(point or {}), **more}
        found.append(as_texts(given))

    function = named[name]
    taken = list(inspect.signature(function).parameters.values())[1:]
    if colon and not taken:
        raise ValueError(f"--{flag}={text!r}: sweep_{name}(add) takes no argument")
    for parameter in taken:
        if not colon and parameter.default is parameter.empty:
            said = (inspect.getdoc(function) or name).partition("\n")[0]
            raise ValueError(
                f"--{flag}={text!r} takes an argument, "
                f"--{flag}={name}:{parameter.name.upper()} ({said})"
            )
    function(add, argument) if colon else function(add)
    if not found:
        raise ValueError(f"--{flag}={text!r} adds no point")
    return found


def as_text(value: Any) -> str:
    """Returns a value as it is typed on a command line."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, str) else repr(value)


def as_texts(changed: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a point changes as it is typed on a command line."""
    return {field: as_text(value) for field, value in changed.items()}


def product(axes: Sequence[Sequence[Texts]]) -> list[Texts]:
    """Returns all combinations, the last axis fastest.

    Raises:
      ValueError: two axes change one field, or there are too many.
    """
    changed = [{field for point in points for field in point} for points in axes]
    for one, other in itertools.combinations(changed, 2):
        if both := sorted(one & other):
            raise ValueError(f"{both[0]!r} is swept twice; give all its values once")
    count = 1
    for points in axes:
        count *= len(points)
    if count > _MOST:
        raise ValueError(f"these are {count:,} points")
    return [
        {field: text for part in parts for field, text in part.items()}
        for parts in itertools.product(*axes)
    ]


def find_named(path: str) -> dict[str, Callable]:
    """Returns the functions sweep_NAME of a config's file and its experiment, by name.

    Args:
      path: as after --config. The file's own go before those of the experiment.
    """
    file = path.partition(":")[0]
    modules: list[ModuleType] = []
    name = Path(file).stem if file.endswith(".py") else file
    if name in protocols.NAMES:
        modules.append(protocols.find(name))
    if Path(file).is_file():
        modules.append(_load(file))
    return {
        name.removeprefix("sweep_"): function
        for module in modules
        for name, function in vars(module).items()
        if name.startswith("sweep_") and callable(function)
    }


def _load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_with_sweeps", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Points -----------------------------------------------------------------------------


def check_once(arguments: Sequence[str], grid: Sequence[Texts]) -> None:
    """Raises ValueError for a field that is swept, and given by --config.field, too."""
    fixed = {argument.lstrip("-").partition("=")[0] for argument in arguments}
    for field in dict.fromkeys(field for texts in grid for field in texts):
        if {f"config.{field}", f"noconfig.{field}"} & fixed:
            raise ValueError(f"{field!r} is swept, and given by --config.{field}, too")


def resolve(
    path: str,
    arguments: Sequence[str],
    grid: Sequence[Texts],
    names: Mapping[str, str] | None = None,
    more: Texts | None = None,
) -> list[Point]:
    """Returns the points of a grid, each with the config that `train` would be given.

    Args:
      path: as after --config.
      arguments: --config.field=value of the command line.
      grid: what the points change.
      names: {`key` of a point: name} of those that have one already.
      more: what all points change beside, for now.

    Raises:
      ValueError: a point cannot be, or two are the same run; it says which.
    """
    changes, configs = [], []
    seen: dict[str, Texts] = {}
    for texts in grid:
        config = read(path, arguments, {**texts, **(more or {})})
        content = json.dumps(origin.as_json(config), sort_keys=True)
        if content in seen:
            raise ValueError(
                f"two points are one run: {shown(seen[content])}; and {shown(texts)}"
            )
        seen[content] = texts
        flat = common.flat(config)
        # A variant is no method's name: what was asked for is the variant.
        changes.append(
            {k: text if k.endswith(".name") else flat[k] for k, text in texts.items()}
        )
        configs.append(config)
    found = name_all(changes, names)
    return [Point(*parts) for parts in zip(found, changes, configs, strict=True)]


def read(
    path: str, arguments: Sequence[str], texts: Texts
) -> ml_collections.ConfigDict:
    """Returns the config of a point.

    Raises:
      ValueError: it says which point cannot be, and why.
    """
    own = [f"--config.{field}={text}" for field, text in texts.items()]
    try:
        config = cli.read_config(path, [*arguments, *own])
        build.check(config)
    except Exception as error:
        raise ValueError(f"the point {shown(texts)}: {first_line(error)}") from error
    return config


def shown(texts: Mapping[str, Any]) -> str:
    """Returns a point as text for messages."""
    return ", ".join(f"{field}={text}" for field, text in texts.items())


def alike(given: Sequence[Point]) -> dict[str, Any]:
    """Returns what all of some points change in the same way."""
    first, *others = (point.fields for point in given)
    absent = object()
    return {
        field: value
        for field, value in first.items()
        if all(other.get(field, absent) == value for other in others)
    }


# Names ------------------------------------------------------------------------------


def key(changed: Mapping[str, Any]) -> str:
    """Returns what tells a point from all others, whatever the order of its fields."""
    return json.dumps(changed, sort_keys=True)


def name_all(
    points: Sequence[Mapping[str, Any]], names: Mapping[str, str] | None = None
) -> list[str]:
    """Returns a folder's name for every point: no two alike, in any letter case.

    Args:
      points: what each changes.
      names: {`key` of a point: name} of those that have one already.
    """
    names = names or {}
    words = labels([field for point in points for field in point])
    plain = [_name(point, words) for point in points]
    folded = [name.casefold() for name in plain]
    taken = {name.casefold() for name in names.values()}
    found = []
    for point, name in zip(points, plain, strict=True):
        if key(point) in names:
            name = names[key(point)]
        elif folded.count(name.casefold()) > 1 or name.casefold() in taken:
            name = _with_digest(name, point)
        found.append(name)
    return found


def labels(swept: Sequence[str]) -> dict[str, str]:
    """Returns a short word for every field: its last, or all of it if two share that.

    Example:
      >>> labels(["data.alpha", "method.name", "local.optimizer", "server.optimizer"])
      ... # doctest: +NORMALIZE_WHITESPACE
      {'data.alpha': 'alpha', 'method.name': 'method',
       'local.optimizer': 'local.optimizer', 'server.optimizer': 'server.optimizer'}
    """
    swept = list(dict.fromkeys(swept))
    short = {f: f.removesuffix(".name").rpartition(".")[2] for f in swept}
    shared = list(short.values())
    return {f: s if shared.count(s) == 1 else f for f, s in short.items()}


def _name(point: Mapping[str, Any], words: Mapping[str, str]) -> str:
    ordered = sorted(point, key=lambda field: field in SEEDS)  # stable; seeds last
    parts = []
    for field in ordered:
        value = point[field]
        exact = isinstance(value, float) and float(f"{value:g}") == value
        text = f"{value:g}" if exact else as_text(value)
        safe = re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")
        parts.append(f"{words[field]}={safe}")
    name = ",".join(parts) or "all"
    return name if len(name) <= _LONGEST else _with_digest(name, point)


def _with_digest(name: str, point: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(key(point).encode()).hexdigest()[:8]
    return f"{name[: _LONGEST - 9]}-{digest}"
