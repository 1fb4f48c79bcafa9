"""From a config's words to functions: methods, networks, optimizers, training loops."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from hyperjax import (
    calls,
    corrections,
    models,
    server_optimizers,
    training,
)
from hyperjax.errors import check_choice, surely
from hyperjax.protocols import common
from hyperjax.types import Model


def make_network(
    config: ml_collections.ConfigDict,
    name: str,
    options: Mapping[str, Any],
    input_shape: tuple[int, ...],
    num_classes: int,
    vocabulary: int = 0,
) -> Model:
    """Builds one network; "package.module:Class" is yours."""
    cls = common.find_network(name)
    chosen = {k: v for k, v in options.items() if v is not None}
    if "conv_rule" in inspect.signature(cls).parameters:
        chosen["conv_rule"] = config.engine.conv_rule
    module = calls.call("model", cls, num_classes=num_classes, **chosen)
    return models.from_linen(
        module,
        input_shape,
        num_classes,
        vocabulary=vocabulary,
        precision=config.engine.precision,
    )


def make_correction(texts: str | Sequence[str]) -> corrections.Correction | None:
    """Builds a correction from "prox(mu=0.1)", a chain of several, or none from ""."""
    found = []
    for text in filter(None, (texts,) if isinstance(texts, str) else texts):
        name, options = calls.parse("method.correction", text)
        check_choice("method.correction", name, corrections.CORRECTIONS)
        made = calls.call("method.correction", corrections.CORRECTIONS[name], **options)
        found.append(made)
    return corrections.chain(*found) if len(found) > 1 else (*found, None)[0]


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
        return max(1, training.round_at(mark, rounds))

    return [resolved(mark) for mark in config.milestones]


def make_local(
    config: ml_collections.ConfigDict, rounds: int | None = None
) -> training.Local:
    """Returns how clients train.

    Args:
      config: `config.local`.
      rounds: of the run, see `milestones`.
    """
    neither = config.epochs is None and config.steps is None
    phase = training.Phase(epochs=1 if neither else config.epochs, steps=config.steps)
    falls = jnp.asarray(milestones(config, rounds) or (0,), jnp.int32)

    def schedule_fn(round):
        factor = config.learning_rate_decay ** round.astype(jnp.float32)
        if config.milestones:
            passed = jnp.sum(round >= falls).astype(jnp.float32)
            factor = factor * config.milestone_factor**passed
        return factor

    return training.Local(
        optimizer=local_optimizer(config),
        batch_size=config.batch_size,
        batches=config.batches,
        phases=(phase,),
        clip_norm=config.clip_norm,
        schedule=schedule_fn,
        balanced=config.balanced,
    )


def local_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns the clients' optimizer; weight decay joins the gradient first."""
    optimizer = make_optimizer(
        "local.optimizer", config.optimizer, config.learning_rate, {}
    )
    if surely(config.weight_decay == 0):
        return optimizer
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optimizer)


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
    name, options = calls.parse(field, text)
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
