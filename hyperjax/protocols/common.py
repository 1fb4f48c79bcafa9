"""The fields of every config: defaults, words, and the options that names bring.

A config is flat but for its groups. `config.model` and `config.method` hold a name and
the options of what it names, read off the module's fields and the method's signature.
"""

import contextlib
import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from hyperjax import models, registry
from hyperjax.data import own
from hyperjax.errors import check_choice

# Field -> default and what it is. A type is the default of a field that may be None.
FIELDS: dict[str, tuple[Any, str]] = {
    "experiment": ("", "which of the package's experiments this is; for the record"),
    "seed": (0, "of everything that is drawn"),
    "rounds": (100, "of training; a finished run goes on with more"),
    "data.name": (
        "mnist5k",
        "mnist5k, digits, ...; mine.npz, table.csv, folder/, package.module:load; TFDS",
    ),
    "data.image_key": ("", "array, feature or column of images; '': the usual one"),
    "data.label_key": ("", "array or feature with the labels"),
    "data.kind": (
        "",
        "of samples [n, d]: features, tokens, images; '': floats, features",
    ),
    "data.client_key": ("", "by_client_id: array or feature of whose a sample is"),
    "data.data_dir": (str, "folder of prepared TFDS sets; None: TFDS's own"),
    "data.split": ("train", "of a TFDS set: train, train+test, train[:5000], ..."),
    "data.test_split": ("", "of a TFDS set: the global test set, its own; '': a share"),
    "data.shrink": (1, "images are averaged over squares of so many pixels"),
    "data.resize": (0, "they are then scaled to so many pixels each way; 0: not"),
    "data.download": (False, "let TFDS download and prepare a missing set"),
    "data.seed": (-1, "of splits and partition; -1: `seed`"),
    "data.num_clients": (10, "N, take part in training"),
    "data.num_novel": (5, "M, never seen in training; 0: none"),
    "data.newcomers": (False, "these M take part instead of the others"),
    "data.pooled": (False, "centralised: one client has all participants' samples"),
    "data.partition": (
        "dirichlet",
        "who has which samples: iid, dirichlet, ..., by_client_id; see Partitions",
    ),
    "data.alpha": (1.0, "dirichlet, mixtures, bootstrap: small is skewed"),
    "data.samples_per_client": (
        0,
        "iid, mixtures, majors, bootstrap: of each; 0: all there are, bootstrap apart",
    ),
    "data.min_size": (10, "dirichlet, by_client_id: samples of the smallest client"),
    "data.capped": (False, "dirichlet: who has a fair share gets no further class"),
    "data.classes_per_client": (2, "pathological, class_shares, ..., majors, groups"),
    "data.ratio": (16.0, "majors: how often a frequent class is, beside another"),
    "data.num_groups": (5, "groups: how many, of clients with the same classes"),
    "data.client_ids": (str, "by_client_id: ids.npy, file.npz:key; None: the set's"),
    "data.test_fraction": (0.2, "of all samples, global test set (gACC); 0: none"),
    "data.eval_fraction": (0.2, "of its samples, held out by each client"),
    "data.validation_fraction": (0.0, "of the rest, to choose a round by; 0: none"),
    "data.stratified": (False, "held-out parts have a client's classes in proportion"),
    "data.shift": (
        "none",
        "of clients' images: rotation, contrast, blur, ...; see Shifts",
    ),
    "data.shift_strength": (1.0, "share of the shift's range that clients are in"),
    "data.shift_classes": (
        0.0,
        "class_rotation, label_swap: share of the classes; 0: each client's is drawn",
    ),
    "data.shift_novel": ("inside", "where unseen clients are: inside, edge, outside"),
    "data.standardise": ("pool", "inputs by moments: pool, client, signed, none"),
    "model.name": ("mlp", "a network of the zoo, or package.module:Class"),
    "families": (
        (),
        "networks of clients in equal blocks, instead of `model`; (): one",
    ),
    "local.epochs": (int, "of local training; None: one, or `steps`"),
    "local.steps": (int, "batches of local training, instead of epochs"),
    "local.batch_size": (128, "samples; more than a client has: all of them"),
    "local.batches": ("passes", "passes, or fresh: a step draws from all samples"),
    "local.optimizer": ("sgd", 'any of optax, with options: "sgd(momentum=0.9)"'),
    "local.learning_rate": (0.01, "of the clients"),
    "local.learning_rate_decay": (0.99, "factor on it, each round"),
    "local.milestones": ((), "where it falls: rounds, or fractions of all rounds"),
    "local.milestone_factor": (0.1, "by what it is multiplied there"),
    "local.weight_decay": (0.0, "added to the gradient"),
    "local.balanced": (False, "the loss accounts for each client's class shares"),
    "local.augment": ("", 'each visit shifts images once more: "rotation360"'),
    "local.clip_norm": (float, "bound on the gradient's norm; None: none"),
    "server.optimizer": ("sgd", "of optax, or fedavgm, fedadagrad, fedadam, fedyogi"),
    "server.learning_rate": (1.0, "of the server"),
    "server.weights": ("size", "of clients in the mean: size (samples) or uniform"),
    "server.sampler": ("full", "full: all clients each round; or uniform"),
    "server.cohort_size": (10, "clients of a round, for the sampler uniform"),
    "server.sequential": (False, "the server steps after every client of a round"),
    "start.run": ("", "folder of a run whose server state this one starts from"),
    "start.take": ((".*",), "patterns of the paths that are taken from it"),
    "uplink": ("", 'what clients send goes through: "topk(fraction=0.3)"'),
    "engine.mapper": ("auto", "over the clients of a round: map, vmap, block"),
    "engine.block_size": (5, "clients at a time, for block"),
    "engine.streaming": (False, "sum uplinks up as clients finish, keep none of them"),
    "engine.devices": (0, "0: all; on the CPU one per core, at most 8"),
    "engine.store": ("device", "where clients' state is kept: device or host"),
    "engine.memory_map": (False, "host store: files in the workdir, not memory"),
    "engine.pool": ("device", "where samples are kept; host: a cohort's travel"),
    "engine.pool_mb": (0, "most that samples may take on a device; 0: no limit"),
    "engine.rounds_per_call": (0, "compiled together; 0: all between evaluations"),
    "engine.conv_rule": ("auto", "convolutions by xla, scan, patches, stripes, onednn"),
    "engine.precision": ("", "default, high, highest, bfloat16; empty: JAX's own"),
    "engine.deterministic": (False, "on a GPU: equal bits every time, and slower"),
    "evaluation.every": (5, "rounds"),
    "evaluation.batch_size": (256, "samples"),
    "evaluation.clients": (0, "a fixed sample of each kind; 0: all"),
    "evaluation.clients_per_call": (64, "clients at a time"),
    "evaluation.finetune_epochs": ((), "at the end, also after so many local epochs"),
    "evaluation.adapt": ("", 'of deployed clients to their inputs: "bn(prior=16)"'),
    "evaluation.context": (0, "inputs, drawn, that clients are deployed by; 0: all"),
    "evaluation.thresholds": (
        (50, 60, 70, 80, 90, 95),
        "percent pACC whose cost is summed up",
    ),
    "evaluation.sample_level": (False, "at the end, also one classifier per input"),
    "checkpoint.keep": (2, "newest checkpoints that stay"),
    "tensorboard": (True, "write TensorBoard events"),
    "tracker": ("", "also tell wandb or trackio, or a package with their interface"),
}
# Options that are functions in Python and text in a config.
TEXTS = {"correction": ""}
# Fields of a network that are not its options: given by the data set and the engine.
GIVEN = ("parent", "name", "num_classes", "conv_rule")


def defaults() -> "Config":
    """Returns every field that does not depend on the method, with its default.

    The schedule is HyperFedZero's: SGD without momentum, learning rate 0.01 times
    0.99 each round, batches of 128, one local epoch, all clients every round.
    """
    config = Config()
    for field, (default, _) in FIELDS.items():
        group, _, name = field.rpartition(".")
        if group and group not in config:
            config[group] = {}
        unset = isinstance(default, type)
        value = config_dict.placeholder(default) if unset else default
        (config[group] if group else config)[name] = value
    return config


def change(config: ml_collections.ConfigDict, fields: Mapping[str, Any]) -> None:
    """Sets fields by path, names first: these bring their own options.

    Args:
      config: changed in place.
      fields: {"group.field": value}; a function's value is that of the config.

    Raises:
      ValueError: an unknown method or network.
      KeyError: an unknown field.
    """
    with config.unlocked():
        for group in _NAMED:
            if f"{group}.name" in fields:
                if group not in config:
                    config[group] = {}
                config[group].name = fields[f"{group}.name"]
        fill(config)
    config.update_from_flattened_dict(
        {k: v(config) if callable(v) else v for k, v in fields.items()}
    )


def fill(config: ml_collections.ConfigDict) -> None:
    """Adds to `method` and `model` the options that they lack, at their defaults.

    Raises:
      ValueError: an unknown method or network.
    """
    for group, kind in _NAMED.items():
        given = config.get(group)
        is_group = isinstance(given, ml_collections.ConfigDict)
        if is_group and isinstance(given.get("name"), str):
            _fill(given, kind.known(given.name))  # else `fields.check` says so


def filled(config: ml_collections.ConfigDict) -> "Config":
    """Returns a copy of a config with all options, see `fill`; no field follows.

    Data sets of one's own are named by whole paths.
    """
    # References are resolved: copies would share them.
    found = Config(config.copy_and_resolve_references())
    fill(found)
    if isinstance(found.get("data", {}).get("name"), str):
        found.data.name = own.absolute(found.data.name)
    return found


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"group.field": value} of a config, as such or as JSON has it."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            found |= {f"{name}.{k}": v for k, v in flat(value).items()}
        else:
            found[name] = value
    return found


# Names and what they bring -----------------------------------------------------------


class Config(ml_collections.ConfigDict):
    """A config where another method or network brings its own options.

    Also where it is only assigned: `config.model.name = "lenet"`.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        kind = _NAMED.get(key)
        is_group = isinstance(value, dict | ml_collections.ConfigDict)
        if kind and is_group and not isinstance(value, kind):
            value = kind(value)
            value.try_fill()
        super().__setitem__(key, value)


class _Named(ml_collections.ConfigDict):
    """A name and the options of what it names."""

    def __setitem__(self, key: str, value: Any) -> None:
        is_other = key == "name" and key in self and self[key] != value
        super().__setitem__(key, value)
        if is_other:
            with self.unlocked():
                for option in set(self) - {"name"}:
                    del self[option]
            self.try_fill()

    def try_fill(self) -> None:
        """Adds the options; of an unknown name, which `fields.check` refuses, none."""
        if isinstance(self.get("name"), str):
            with contextlib.suppress(ValueError):
                _fill(self, self.known(self.name))

    @staticmethod
    def known(name: str) -> dict[str, tuple[Any, Any]]:
        """Returns {option: (default, type)} as far as text can give them."""
        raise NotImplementedError


class Method(_Named):
    """`config.method`."""

    @staticmethod
    def known(name: str) -> dict[str, tuple[Any, Any]]:
        options = registry.options(registry.find(name, "method.name"))
        return {
            name: (TEXTS[name], Any)
            if name in TEXTS
            else (_simple(option.default), option.type)
            for name, option in options.items()
            if name in TEXTS or _is_plain(option.default)
        }


class Model(_Named):
    """`config.model`."""

    @staticmethod
    def known(name: str) -> dict[str, tuple[Any, Any]]:
        return {
            field.name: (_simple(field.default), field.type)
            for field in dataclasses.fields(find_network(name))
            if field.name not in GIVEN and _is_plain(field.default)
        }


_NAMED: dict[str, type[_Named]] = {"method": Method, "model": Model}


def _fill(
    group: ml_collections.ConfigDict, known: Mapping[str, tuple[Any, Any]]
) -> None:
    """Adds what is missing; every option gets the type that its annotation says."""
    with group.unlocked():
        for option, (default, kind) in known.items():
            value = _typed(group.get(option, default), kind)
            if option in group:
                if group.get_type(option) is _type(value):
                    continue
                del group[option]  # and with it the type that a literal gave it
            group[option] = value


def find_network(name: str) -> Any:
    """Returns the linen module of a name in the zoo, or of "package.module:Class".

    Raises:
      ValueError: there is none, or it does not take `num_classes`.
    """
    if ":" not in name:
        check_choice("model.name", name, models.ZOO)
        return models.ZOO[name]
    found = registry.find_object(name, "model.name", "Class of a linen module")
    if not dataclasses.is_dataclass(found):
        raise ValueError(
            f"model.name={name!r} is no class of a linen module: package.module:Class"
        )
    if "num_classes" not in (field.name for field in dataclasses.fields(found)):
        raise ValueError(
            f"model.name={name!r} has no field `num_classes`: a network that a config "
            "names must take the number of classes of the data set, "
            "`num_classes: int`, and end in so many outputs"
        )
    return found


def _is_plain(value: Any) -> bool:
    """Whether a default can stand in a config."""
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return _is_absent(value) or isinstance(value, bool | int | float | str | None)


def _is_absent(default: Any) -> bool:
    """Whether there is no default: the option must be given."""
    return default is inspect.Parameter.empty or default is dataclasses.MISSING


def _simple(default: Any) -> Any:
    """A default as a config has it: tuples for lists, None for what must be given."""
    if _is_absent(default):
        return None
    return tuple(default) if isinstance(default, list) else default


def _type(value: Any) -> type:
    is_typed = isinstance(value, config_dict.FieldReference)
    return value.get_type() if is_typed else type(value)


def _typed(value: Any, kind: Any) -> Any:
    """A value as a field that flags can set to whatever its annotation allows."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    kinds = set(typing.get_args(kind) if union else (kind,)) - {type(None)}
    (only, *others) = kinds
    plain = not others and only in (bool, int, float, str)
    if only is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not union and isinstance(value, only if plain else tuple):
        return value
    if plain and (value is None or isinstance(value, only)):
        return config_dict.FieldReference(value, field_type=only)
    return config_dict.FieldReference(value, field_type=object)  # any literal
