"""What the fields of a config may hold: names, types, bounds, and what goes unused."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from hyperjax import calls, registry
from hyperjax.data import partition
from hyperjax.errors import check_number, some
from hyperjax.protocols import common


class Number(NamedTuple):
    """A numeric field: type and bounds, see `check_number`."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    whole: bool = False
    optional: bool = False  # None is a value
    several: bool = False  # a tuple of such numbers

    def check(self, field: str, value: Any) -> None:
        """Raises ValueError, by the field's name, for a value that is none."""
        if self.several and not isinstance(value, tuple):
            raise ValueError(f"{field}={value!r} must be a tuple of numbers")
        bounds = self._asdict()
        del bounds["optional"], bounds["several"]
        for number in value if self.several else (value,):
            if number is None and self.optional:
                continue
            check_number(**bounds, **{field: number})
            calls.check_representable(field, number)


def _count(at_least: int, **more) -> Number:
    return Number(at_least=at_least, at_most=calls.LARGEST, whole=True, **more)


RATE, FRACTION = Number(at_least=0), Number(at_least=0, below=1)
SEEDS = 2**32  # of JAX's keys

NUMBERS: dict[str, Number] = {
    "seed": Number(at_least=0, below=SEEDS, whole=True),
    "rounds": _count(0),
    "data.shrink": _count(1),
    "data.resize": _count(0),
    "data.seed": Number(at_least=-1, below=SEEDS, whole=True),
    "data.num_clients": _count(1),
    "data.num_novel": _count(0),
    "data.alpha": Number(above=0),
    "data.min_size": _count(1),
    "data.samples_per_client": _count(0),
    "data.shift_strength": RATE,
    "data.shift_classes": Number(at_least=0, at_most=1),
    "data.classes_per_client": _count(0),
    "data.ratio": Number(at_least=1),
    "data.num_groups": _count(1),
    "data.test_fraction": FRACTION,
    "data.eval_fraction": FRACTION,
    "data.validation_fraction": FRACTION,
    "local.epochs": _count(0, optional=True),
    "local.steps": _count(0, optional=True),
    # More than any client's samples: as many as there are.
    "local.batch_size": Number(at_least=1, at_most=2**30, whole=True),
    "local.learning_rate": RATE,
    "local.learning_rate_decay": RATE,
    "local.milestones": Number(at_least=0, at_most=calls.LARGEST, several=True),
    "local.milestone_factor": RATE,
    "local.weight_decay": RATE,
    "local.clip_norm": Number(above=0, optional=True),
    "server.learning_rate": RATE,
    "server.cohort_size": _count(0),
    "engine.block_size": _count(1),
    "engine.devices": _count(0),
    "engine.pool_mb": _count(0),
    "engine.rounds_per_call": _count(0),
    "evaluation.every": _count(1),
    "evaluation.batch_size": _count(1),
    "evaluation.clients": _count(0),
    "evaluation.context": _count(0),
    "evaluation.clients_per_call": _count(1),
    "evaluation.finetune_epochs": _count(0, several=True),
    "evaluation.thresholds": Number(at_least=0, at_most=100, several=True),
    "checkpoint.keep": _count(1),
}
# Of the options of networks and methods, which have types of their own.
OPTIONS: dict[str, Number] = {"model.hidden": _count(1, several=True)}


def _options(partitioner: Callable) -> tuple[str, ...]:
    """The options of a partition that are fields of `data`."""
    parameters = inspect.signature(partitioner).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return tuple(name for name in keywords if f"data.{name}" in common.FIELDS)


# Partition -> the fields of `data` that it takes.
PARTITIONS = {name: _options(p) for name, p in partition.PARTITIONERS.items()}
# Groups with fields of their own beside the common ones.
OPEN = ("model", "method")


def check(config: Any) -> None:
    """Checks names, types and bounds of a config's fields; nothing else is looked at.

    NumPy's and JAX's numbers in it become Python's.

    Raises:
      ValueError: a field is unknown, missing, or holds what it cannot.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"a config is {type(config).__name__}; get_config() must return a "
            "ConfigDict, such as hyperjax.protocols.common.defaults() makes"
        )
    expected = common.defaults()
    expected.method = ml_collections.ConfigDict({"name": ""})
    _check_names(expected, config, "")
    with config.unlocked(), config.ignore_type():
        _simplify(config, "")
    known = common.flat(expected)
    for field, value in common.flat(config).items():
        number = NUMBERS.get(field) or OPTIONS.get(field)
        if number:
            number.check(field, value)
        elif field in known:
            _check_type(field, value, known[field])
        else:
            calls.check_finite(field, value)
    for mark in config.local.milestones:
        if not isinstance(mark, int) and not 0 < mark < 1:
            raise ValueError(
                f"local.milestones has {mark!r}: a milestone must be a whole number of "
                "rounds, or a fraction of all rounds between 0 and 1"
            )
    if config.local.epochs is not None and config.local.steps is not None:
        raise ValueError(
            f"local.epochs={config.local.epochs} and local.steps={config.local.steps} "
            "are two lengths of local training: give one, and None for the other"
        )


_WORDS = {bool: "True or False", str: "text", tuple: "a tuple"}


def idle(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the fields that a run would not look at, and what makes them idle."""
    server, engine = config.server, config.engine
    taken = PARTITIONS.get(config.data.partition, ())
    found: dict[str, str] = {}

    def note(reason: str, *names: str) -> None:
        found.update(dict.fromkeys(names, reason))

    for name in {name for names in PARTITIONS.values() for name in names}:
        if name not in taken:
            note(f"data.partition={config.data.partition!r}", f"data.{name}")
    if config.data.shift == "none":
        own = ("strength", "novel", "classes")
        note("data.shift='none'", *(f"data.shift_{name}" for name in own))
    # A table's column of ids is no feature, whoever has its rows.
    table = config.data.name.endswith(".csv")
    if config.data.partition != "by_client_id" and not table:
        note(f"data.partition={config.data.partition!r}", "data.client_key")
    if not config.local.milestones:
        note("local.milestones=()", "local.milestone_factor")
    if server.sampler == "full":
        note("server.sampler='full'", "server.cohort_size")
    if server.sequential:
        note("server.sequential=True", "engine.mapper", "engine.block_size")
    elif engine.mapper in ("map", "vmap"):
        note(f"engine.mapper={engine.mapper!r}", "engine.block_size")
    if engine.store != "host":
        note(f"engine.store={engine.store!r}", "engine.memory_map")
    if not config.start.run:
        note("start.run=''", "start.take")
    note("a run", "experiment")
    if config.families:
        options = (f"model.{option}" for option in config.model)
        note(f"families={tuple(config.families)}", *options)
    if not registry.traits(config.method.name).per_sample:
        note(f"method.name={config.method.name!r}", "evaluation.sample_level")
    return found


# Fields that programs take as arguments, as they do the method's own numbers, and the
# values that leave a step of the program out.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "local.learning_rate": (None,),
    "local.learning_rate_decay": (None,),
    "local.milestone_factor": (None,),
    "local.weight_decay": (None, 0),
    "local.clip_norm": (None,),
    "server.learning_rate": (None,),
}


def arguments(config: ml_collections.ConfigDict) -> dict[str, float]:
    """Returns the numbers of a config that its programs do not have built in, by field.

    They are those of `ARGUMENTS` and the method's numbers that are not `calls.Fixed`. A
    method of one's own has them all built in, since its code may branch on them.
    """
    if ":" in config.method.name:
        return {}
    found = {}
    for field, absent in ARGUMENTS.items():
        group, name = field.split(".")
        if config[group][name] not in absent:
            found[field] = float(config[group][name])
    for name, option in registry.options(config.method.name).items():
        value = config.method.get(name)
        if option.type is float and not option.fixed and value is not None:
            found[f"method.{name}"] = float(value)
    return found


def check_used(config: ml_collections.ConfigDict, given: list[str]) -> None:
    """Raises ValueError for the first of the given fields that would change nothing."""
    unused = idle(config)
    for field in given:
        if field in unused:
            name = field.removeprefix("data.")
            able = [p for p, names in PARTITIONS.items() if name in names]
            able += ["by_client_id"] if name == "client_key" else []
            hint = f"; data.partition={' or '.join(able)} does" if able else ""
            raise ValueError(
                f"{field} was given and would change nothing: {unused[field]} does not "
                f"look at it{hint}"
            )


def unknown(field: str, known: list[str]) -> ValueError:
    """Returns the error for a field that is not among the known ones."""

    def likeness(other: str) -> float:
        pairs = [(field, other), (field.split(".")[-1], other.split(".")[-1])]
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    near = [k for k in sorted(known, key=likeness, reverse=True) if likeness(k) > 0.6]
    group, _, option = field.rpartition(".")
    hint = f"; did you mean {near[0]!r}?" if near else ""
    others = near[1:5] or [k for k in known if k.rpartition(".")[0] == group][:5]
    more = f" (near it: {', '.join(others)})" if others else ""
    if group == "data" and option in _PLACES:
        hint, more = "; data of your own are data.name=mine.npz, folder/, ...", ""
    if group == "method" and (having := _having(option)):
        hint, more = " to this method; it is an option of " + some(having, 5), ""
    return ValueError(f"config field={field!r} is unknown{hint}{more}")


def _having(option: str) -> list[str]:
    """The methods with an option."""
    return [m for m in registry.methods() if option in registry.options(m)]


# What people call the field that says where their data are.
_PLACES = ("dataset", "dir", "file", "folder", "path", "root", "source")


def _check_names(expected: Any, given: Any, prefix: str) -> None:
    """Refuses unknown and missing fields; groups must be groups."""
    for name in given:
        if name not in expected and prefix.rstrip(".") not in OPEN:
            raise unknown(
                f"{prefix}{name}", [*common.flat(common.defaults()), "method.name"]
            )
    for name, value in expected.items():
        field = f"{prefix}{name}"
        is_group = isinstance(value, ml_collections.ConfigDict)
        if name not in given:
            names = f"{field}.{next(iter(value))}, ..." if is_group else field
            raise ValueError(
                f"the config has no {names}: add it, or change what "
                "hyperjax.protocols.common.defaults() returns instead of replacing it"
            )
        if is_group and not isinstance(given[name], ml_collections.ConfigDict):
            fields = ", ".join(f"{field}.{k}" for k in list(value)[:3])
            raise ValueError(
                f"{field}={given[name]!r} must be a group of fields: {fields}, ..."
            )
        if is_group:
            _check_names(value, given[name], f"{field}.")


def _simplify(group: ml_collections.ConfigDict, prefix: str) -> None:
    """Turns other libraries' numbers, and lists, into Python's numbers and tuples."""
    for name in list(group):
        value = group[name]
        if isinstance(value, ml_collections.ConfigDict):
            _simplify(value, f"{prefix}{name}.")
            continue
        plain = _as_python(value)
        if plain is not value:
            del group[name]  # and with it the type that the field had
            group[name] = plain


def _as_python(value: Any) -> Any:
    """The same object if there is nothing to change."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return _as_python(value.tolist())
    if isinstance(value, list | tuple):
        items = tuple(_as_python(item) for item in value)
        same = isinstance(value, tuple) and all(map(lambda a, b: a is b, items, value))
        return value if same else items
    return value


def _check_type(field: str, value: Any, default: Any) -> None:
    """A field that is no number is of its default's type; None: text or None."""
    kind = str if default is None else type(default)
    if value is None and default is None:
        return
    if not isinstance(value, kind):
        raise ValueError(f"{field}={value!r} must be {_WORDS[kind]}")
    if kind is tuple and not all(isinstance(item, str) for item in value):
        raise ValueError(f"{field}={value!r} must be a tuple of text")
