"""From `--config=zero_shot:METHOD,data=digits,smoke` to a config."""

import ast
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from hyperjax import registry
from hyperjax.data import own
from hyperjax.protocols import common, methods
from hyperjax.protocols.methods import Tuned
from hyperjax.registry import Traits

# What every experiment takes; a type stands for "as the data set's preset has it".
SHARED: dict[str, Any] = dict(
    method=str, data=str, clients=int, novel=int, iid=False, alpha=float, smoke=False
)
WORDS = {
    "data": "a preset, or any data set, with the settings of the nearest preset",
    "clients": "who take part",
    "novel": "clients never seen in training",
    "iid": "deal samples out evenly",
    "alpha": "deal them out by Dirichlet(alpha)",
    "smoke": "two rounds",
    "shift": "how clients' images differ, and their labels: rotation, hybrid, ...",
    "tuned": "the learning rate chosen for FedAvg itself (RESULTS.md)",
    "averaged": "the server steps once a round for all clients",
}


class Arguments(NamedTuple):
    """What was given after the colon."""

    name: str  # of the method or variant, as given
    method: str
    variant: dict[str, Any]  # fields that make the method the variant
    like: str  # the preset to follow
    data: str
    clients: int | None
    novel: int | None
    iid: bool
    alpha: float | None
    smoke: bool
    more: dict[str, Any]  # arguments of one experiment alone


def parse(
    arg: str | None,
    presets: Mapping[str, Any],
    *,
    method: str,
    data: str,
    other: str,
    **more,
) -> Arguments:
    """Parses the part after the colon of `--config=file.py:fedprox,data=digits,iid`.

    The first bare name that is no argument is the method, and so is method=NAME, which
    wins. Another bare name means True.

    Args:
      arg: what was given; "" or None: nothing.
      presets: the experiment's data sets.
      method, data: what it has if nothing is said.
      other: the preset for data sets whose names are like none.
      **more: arguments of this experiment alone, with their defaults.

    Raises:
      ValueError: an unknown, empty or repeated argument, a value of another type, or
        an unknown method (the nearest is named).
    """
    known: dict[str, Any] = {**SHARED, **more}
    given: dict[str, Any] = {
        k: None if isinstance(v, type) else v for k, v in known.items()
    }
    first, seen = None, set()
    for item in arg.split(",") if arg else ():
        name, equals, text = item.strip().partition("=")
        if not equals and name and name not in known and first is None:
            first = name
            continue
        if name not in known:
            raise ValueError(
                f"unknown config argument {name!r}; accepted: {', '.join(known)}"
            )
        if name in seen and name != "method":  # a flag may name another one
            raise ValueError(f"config argument {name!r} is given twice in {arg!r}")
        if equals and not text:
            raise ValueError(f"config argument {item!r} has no value")
        seen.add(name)
        given[name] = _value(item, name, text, known[name])
    if given["iid"] and given["alpha"] is not None:
        raise ValueError(f"config arguments iid and alpha in {arg!r}: give one of them")
    name = given["method"] or first or method
    switches = [k for k, v in known.items() if v is False]
    given["method"], variant = methods.resolve(name, switches)
    given["data"] = given["data"] or data
    return Arguments(
        name=name,
        variant=variant,
        like=nearest(given["data"], presets, other),
        more={k: given.pop(k) for k in more},
        **given,
    )


def begin(
    experiment: str, arg: str | None, presets: Mapping[str, Any], **accepted
) -> tuple[Arguments, common.Config]:
    """Parses an experiment's argument; returns it with a config at all defaults.

    Args:
      experiment: its name.
      arg, presets, **accepted: see `parse`.
    """
    args, config = parse(arg, presets, **accepted), common.defaults()
    config.experiment = experiment
    return args, config


def _value(item: str, name: str, text: str, default: Any) -> Any:
    try:
        value = ast.literal_eval(text) if text else True
    except (ValueError, SyntaxError):
        value = text
    kind = default if isinstance(default, type) else type(default)
    value = text if kind is str and text else value
    truth = isinstance(value, bool)
    if kind is float and isinstance(value, int) and not truth:
        value = float(value)
    if not isinstance(value, kind) or truth != (kind is bool):
        raise ValueError(f"config argument {item!r}: {name} must be {kind.__name__}")
    return value


def nearest(data: str, presets: Mapping[str, Any], other: str) -> str:
    """Returns the preset that a data set is run like: the longest within its name.

    A set of one's own is run like the small one, mnist5k.

    Example:
      >>> nearest("emnist/digits:3.1.0", ("mnist", "digits", "cifar10"), "cifar10")
      'mnist'
    """
    if any(map(own.is_own, own.expand(data))):
        return "mnist5k"
    base = data.partition("/")[0]
    if base.partition("(")[0] == "synthetic":  # of the digits' size
        return "digits"
    return max((name for name in presets if name in base), key=len, default=other)


def apply(
    config: ml_collections.ConfigDict,
    args: Arguments,
    presets: Mapping[str, Mapping[str, Any]],
    tuned: Mapping[str, Tuned],
) -> ml_collections.ConfigDict:
    """Returns an experiment's config with what the arguments name.

    In this order: the data set's preset, arguments, what belongs to the method, what
    belongs to it on this data set, and to the variant that was named.
    """
    common.change(config, presets[args.like])
    named = {"clients": "data.num_clients", "novel": "data.num_novel"}
    given = args._asdict()
    asked = {field: given[k] for k, field in named.items() if given[k] is not None}
    # A preset may be a way of using another one's images.
    own = presets[args.like].get("data.name", args.data)
    asked["data.name"] = own if args.data == args.like else args.data
    if args.iid:
        asked["data.partition"] = "iid"
    if args.alpha is not None:
        asked |= {"data.partition": "dirichlet", "data.alpha": args.alpha}
    common.change(config, asked)
    traits, own = registry.traits(args.method), tuned.get(args.method, Tuned({}, ""))
    fields: dict[str, Any] = {"server.weights": traits.weights}
    if traits.base_option:
        fields["server.weights"] = functools.partial(_weights, traits.base_option)
    if traits.own_length:
        fields |= {"local.epochs": None, "local.steps": None}
    fields |= {**own.fields, **own.on.get(args.like, {}), **args.variant}
    common.change(config, {"method.name": args.method, **fields})
    if args.smoke:
        config.rounds = 2
        for length in ("epochs", "steps"):
            if config.local[length] is not None:
                config.local[length] = 1
    return config


class _Operation(NamedTuple):
    """What a field of a config does with the value of the one that it follows."""

    fn: Callable
    args: tuple = ()


def _weights(option: str, config: ml_collections.ConfigDict) -> Any:
    """The weights that a method's base has, whichever a later flag names."""

    def of(base):
        try:
            return registry.weights(config.method.name, {option: base})
        except ValueError:  # the method says what is wrong with it
            return Traits().weights

    named = config.method.get_ref(option)
    return config_dict.FieldReference(named, field_type=str, op=_Operation(of))
