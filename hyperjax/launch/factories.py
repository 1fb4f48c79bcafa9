"""From a config's words to functions: methods, networks, optimizers, training loops."""

import ast
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from hyperjax import algorithms, corrections, local, models, server_optimizers
from hyperjax.errors import check_choice
from hyperjax.launch import fields
from hyperjax.types import Algorithm, Model


def method_names() -> list[str]:
    """Names of all methods: the modules of `hyperjax.algorithms`."""
    return sorted(m.name for m in pkgutil.iter_modules(algorithms.__path__))


def find_method(name: str) -> Callable[..., Algorithm]:
    """Returns a method's factory."""
    return getattr(importlib.import_module(f"hyperjax.algorithms.{name}"), name)


def takes_families(method: str) -> bool:
    """Whether a method is for clients with different networks."""
    return "family_sizes" in inspect.signature(find_method(method)).parameters


def needs_families(method: str) -> bool:
    """Whether a method takes a mapping of networks only."""
    factory = find_method(method)
    found = inspect.signature(factory).parameters.get("family_sizes")
    return found is not None and found.default is inspect.Parameter.empty


def has_own_phases(method: str) -> bool:
    """Whether a method's options say how long clients train, not `config.local`."""
    return "body_epochs" in inspect.signature(find_method(method)).parameters


def embeds_newcomers(method: str) -> bool:
    """Whether clients can join a finished run: what it learned can be held still."""
    return "freeze" in inspect.signature(find_method(method)).parameters


def make_network(
    config: ml_collections.ConfigDict,
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int,
) -> Model:
    """Builds one network; "package.module:Class" is yours."""
    cls = _import_module_class(name) if ":" in name else models.ZOO[name]
    fields = inspect.signature(cls).parameters
    options = {k: v for k, v in config.model.items() if k != "name" and v != ()}
    if "conv_rule" in fields:
        options["conv_rule"] = config.engine.conv_rule
    module = call("model", cls, num_classes=num_classes, **options)
    return models.from_linen(module, input_shape, num_classes)


def _import_module_class(name: str):
    module_name, _, class_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"model.name={name!r}: expected package.module:Class of a linen module "
            f"({error})"
        ) from error


def make_correction(texts: str | Sequence[str]) -> corrections.Correction:
    """Builds a correction from "prox(mu=0.1)", or a chain of several."""
    found = []
    for text in (texts,) if isinstance(texts, str) else texts:
        name, options = parse_call("method.correction", text)
        check_choice("method.correction", name, corrections.CORRECTIONS)
        made = call("method.correction", corrections.CORRECTIONS[name], **options)
        found.append(made)
    return found[0] if len(found) == 1 else corrections.chain(*found)


def options_of(factory: Callable) -> dict[str, inspect.Parameter]:
    """Returns what a factory takes or hands on: `**x_options` are those of x.

    Its own defaults count, not those of what it hands the same option on to.
    """
    found = dict(inspect.signature(factory).parameters)
    for name in [k for k, p in found.items() if p.kind is p.VAR_KEYWORD]:
        del found[name]
        found = options_of(find_method(name.removesuffix("_options"))) | found
    return found


def options_given(config: ml_collections.ConfigDict) -> dict[str, dict[str, Any]]:
    """Returns the options in `config.method`, by method: it, and its `base`."""
    given = {config.name: {k: v for k, v in config.items() if k != "name"}}
    if "base" in config:
        name, options = parse_call("method.base", config.base)
        if name in method_names():
            given[name] = options
    return given


def own_options(method: str) -> set[str]:
    """Returns what a method takes beyond FedAvg: its hyper-parameters."""
    theirs = inspect.signature(find_method("fedavg")).parameters
    ours = inspect.signature(find_method(method)).parameters
    hidden = {*theirs, "num_clients", "num_rounds"}
    return {n for n, p in ours.items() if n not in hidden and p.kind != p.VAR_KEYWORD}


def call(field: str, factory, *args, **options):
    """Calls a factory with a config's options; names those that it does not take.

    Raises:
      ValueError, TypeError: an unknown option, or a value that it cannot have.
    """
    parameters = options_of(factory)
    for option, value in options.items():
        check_choice(f"option of {field}", option, parameters)
        fields.check_option(f"{field}.{option}", value, parameters[option].annotation)
    try:
        return factory(*args, **options)
    except TypeError as error:
        raise TypeError(f"{field}: {error}") from error
    except ValueError as error:
        option = str(error).partition("=")[0]
        if option in options:  # the factory's own words, and where that was given
            raise ValueError(f"{field}.{error}") from error
        raise


def milestones(
    config: ml_collections.ConfigDict, rounds: int | None = None
) -> list[int]:
    """Returns the rounds at which the learning rate falls.

    Args:
      config: `config.local`. A whole number among its milestones is a round, another
        one a fraction of all rounds.
      rounds: of the run; what fractions are of.
    """

    def resolved(mark):
        if isinstance(mark, int):
            return mark
        if rounds is None:
            raise ValueError(f"local.milestones has {mark}: a fraction of what?")
        # Of a few rounds the first trains at the full rate all the same.
        return max(1, local.round_at(mark, rounds))

    return [resolved(mark) for mark in config.milestones]


def make_local(config: ml_collections.ConfigDict, rounds: int | None = None):
    """Returns the builder of the local training loop: model -> train function.

    Args:
      config: `config.local`.
      rounds: of the run, see `milestones`.
    """
    neither = config.epochs is None and config.steps is None
    phase = local.Phase(epochs=1 if neither else config.epochs, steps=config.steps)
    falls = jnp.asarray(milestones(config, rounds) or (0,), jnp.int32)

    def schedule_fn(round):
        factor = config.learning_rate_decay ** round.astype(jnp.float32)
        if config.milestones:
            passed = jnp.sum(round >= falls).astype(jnp.float32)
            factor = factor * config.milestone_factor**passed
        return factor

    return functools.partial(
        local.trainer,
        optimizer=local_optimizer(config),
        batch_size=config.batch_size,
        batches=config.batches,
        phases=(phase,),
        clip_norm=config.clip_norm,
        schedule=schedule_fn,
    )


def local_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns the clients' optimizer; weight decay joins the gradient first."""
    optimizer = make_optimizer(
        "local.optimizer", config.optimizer, config.learning_rate, {}
    )
    if config.weight_decay:
        decay = optax.add_decayed_weights(config.weight_decay)
        return optax.chain(decay, optimizer)
    return optimizer


def server_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns the server's optimizer."""
    return make_optimizer(
        "server.optimizer",
        config.optimizer,
        config.learning_rate,
        server_optimizers.FEDOPT,
    )


def watched(
    optimizer: optax.GradientTransformation,
) -> tuple[optax.GradientTransformation, list[bool]]:
    """Returns an optimizer, and a list that grows when its update is called."""
    uses: list[bool] = []

    def update(updates, state, params=None):
        uses.append(True)
        return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update), uses


def make_optimizer(
    field: str, text: str, learning_rate: float, extra: dict[str, Any]
) -> optax.GradientTransformation:
    """Builds an optimizer from "name" or "name(option=value, ...)".

    Raises:
      ValueError: unknown name or option, or values the optimizer does not accept.
    """
    name, options = parse_call(field, text)
    known = {**_optax_optimizers(), **extra}
    check_choice(field, name, known)
    parameters = inspect.signature(known[name]).parameters
    for option in options:
        check_choice(f"option of {field}={name}", option, parameters)
    try:
        optimizer = known[name](learning_rate=learning_rate, **options)
        trial = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
        jax.eval_shape(lambda w: optimizer.update(w, optimizer.init(w), w), trial)
    except RuntimeError:  # no device: no fault of the optimizer's
        raise
    except Exception as error:
        raise ValueError(f"{field}={text!r}: {error}") from error
    return optimizer


def parse_call(field: str, text: str) -> tuple[str, dict[str, Any]]:
    """Parses "name" or "name(option=literal, ...)".

    Raises:
      ValueError: of another form, or a number among the values is not finite.
    """
    options: dict[str, Any] = {}
    name = None
    try:
        node = ast.parse(text.strip(), mode="eval").body
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
        fields.check_finite(f"{field}={text!r}: {option}", value)
    return name, options


@functools.cache
def _optax_optimizers() -> dict[str, Any]:
    """Optax's optimizers: public functions with a `learning_rate`."""
    found = {}
    for name, value in vars(optax).items():
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        parameters = inspect.signature(value).parameters
        if "learning_rate" in parameters and "optimizer" not in parameters:
            found[name] = value
    return found
