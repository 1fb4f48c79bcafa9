"""From a flax.linen module to a `Model`."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from hyperjax import compiling, tree
from hyperjax.errors import check_at_least, check_choice, first_line, shown
from hyperjax.models.passes import (
    TRIAL,
    LayerError,
    check_samples_apart,
    check_switches,
    passes,
)
from hyperjax.types import (
    Array,
    Batch,
    ClientData,
    Model,
    Outputs,
    Pool,
    PyTree,
    Trained,
)


def masked_mean(values: Array, mask: Array) -> Array:
    """Returns the mean of values [B] where mask [B] is 1, []; 0 if it is nowhere."""
    return jnp.sum(jnp.where(mask > 0, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1.0)


# Added to class shares before their logarithm is taken: a class that a client has none
# of costs its logit 9.2.
PRIOR_FLOOR = 1e-4


def cross_entropy(logits: Array, batch: Batch) -> Array:
    """Returns the mean cross-entropy of logits [B, K] over real samples, [].

    Where the batch has a prior it is balanced: the prior's logarithm is added to the
    logits, see `training.Local`.
    """
    if not isinstance(batch.prior, tuple):
        logits = logits + jnp.log(batch.prior + PRIOR_FLOOR)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
    return masked_mean(losses, batch.mask)


def distillation(
    logits: Array, teacher: Array, batch: Batch, temperature: float = 1.0
) -> Array:
    """Returns T^2 KL(softmax(teacher / T) || softmax(logits / T)), mean over a batch.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531); logits and teacher [B, K].
    """
    target = jax.nn.log_softmax(teacher / temperature)
    gap = target - jax.nn.log_softmax(logits / temperature)
    divergence = jnp.sum(jnp.exp(target) * gap, -1)
    return temperature**2 * masked_mean(divergence, batch.mask)


def sizes(model: Model) -> tuple[int, int]:
    """Returns the numbers of a model's classes, K, and features, L.

    Raises:
      ValueError: it has no features, outside training or in it.
    """

    def trial(key):
        variables = model.init(key)
        x = _blank(model.sample_shape).x
        return model.predict(variables, x), model.features(variables, x)

    logits, features = jax.eval_shape(trial, jax.random.key(0))
    check_gives(model, "features")
    return logits.shape[-1], features.shape[-1]


def num_classes(model: Model) -> int:
    """Returns K, of a model that is looked at by abstract evaluation."""

    def trial(key):
        return model.predict(model.init(key), _blank(model.sample_shape).x)

    return jax.eval_shape(trial, jax.random.key(0)).shape[-1]


def check_gives(model: Model, *outputs: str) -> None:
    """Refuses a model whose training pass leaves out what a method's loss will read.

    Args:
      model: looked at by abstract evaluation.
      *outputs: fields of `Trained`, "logits" or "features".

    Raises:
      ValueError: one of them is ().
    """

    def trial(key, data):
        variables = model.init(key)
        context = model.visit.context(variables, data)
        return model.loss(key, variables, _blank(model.sample_shape), context)[1]

    one = jnp.ones(model.sample_shape[-1:], jnp.float32)
    images = jnp.zeros((1, *model.sample_shape), jnp.uint8)
    pool = Pool(images, jnp.zeros(1, jnp.int32), one, one)
    data = ClientData(jnp.zeros(1, jnp.int32), jnp.int32(1), pool)
    trained = jax.eval_shape(trial, jax.random.key(0), data)
    for name in outputs:
        if isinstance(getattr(trained, name), tuple):
            raise ValueError(f"this model does not give its {name} in training")


def _blank(sample_shape: tuple[int, ...]) -> Batch:
    """A batch of one sample, for abstract evaluation."""
    x = jnp.zeros((1, *sample_shape), jnp.float32)
    return Batch(x, jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.float32))


def from_linen(
    module: nn.Module,
    input_shape: tuple[int, ...],
    num_classes: int,
    frozen: Iterable[str] = (),
    vocabulary: int = 0,
    precision: str = "",
) -> Model:
    """Returns a classification `Model` of a linen module.

    The module maps normalised images [B, H, W, c] or features [B, d] float32, or tokens
    [B, L] int32, to logits [B, num_classes]; those of the model are float32, as its
    variables are, whatever the module keeps and computes in. Collections other than
    "params" become `variables["stats"]`, floating-point or signed integers, nested as
    the module has them: `{"batch_stats": {layer: {"mean": [c], "var": [c]}}}`. How a
    module is told that it trains, what its layers are told of padding, and how it
    draws, is told in `passes`.

    The loss is the mean cross-entropy over the real samples of a batch, reported as
    "loss". `Outputs.features` and `Trained.features` [B, L] are the input of the
    module's layer "head" (path params/head), and () if it has none.

    Args:
      module: an instance.
      input_shape: (H, W, c), (d,) or (L,), as of the samples of a `Source`.
      num_classes: K, how many logits it returns.
      frozen: paths of layers, or patterns of them, whose statistics and dropout are
        meant to stay as outside training ("BatchNorm_0", "backbone", "*/norm"), with
        all that is in them. Their parameters are trained all the same.
      vocabulary: how many different tokens inputs are made of; 0: they are numbers.
      precision: one of `compiling.PRECISIONS`; "bfloat16": the module is given inputs
        and a copy of its parameters in bfloat16. The parameters themselves, their
        gradients, statistics, logits and losses are float32 all the same.

    Returns:
      A model that is not yet drawn: `model.init(key)` does that. `with_shape` takes a
      shape of any length, and does not ask anew whether samples are mixed.

    Raises:
      ValueError: an argument is of another form; or the module does not accept the
        shape, has no parameters or keeps what cannot be averaged, does not return
        logits of shape [B, num_classes], or cannot be trained: it needs an argument
        that is not known, draws random numbers or changes what it keeps outside
        training, has a switch by another name than those of `SWITCHES`, has a layer
        that nobody tells that it trains, does not keep what it keeps in one form, or
        mixes the samples of a batch. The message names the module and what it did.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"{shown(module)} is not an instance of a flax.linen module")
    shape = _shape(input_shape)
    if len(shape) not in (1, 3):
        hint = f"; of images without channels it is {(*shape, 1)}"
        raise ValueError(
            f"input_shape={input_shape!r} must be (H, W, c), three whole numbers, or "
            f"one, of features or tokens{hint if len(shape) == 2 else ''}"
        )
    check_at_least(1, num_classes=num_classes)
    check_at_least(0, vocabulary=vocabulary)
    check_choice("precision", precision, compiling.PRECISIONS)
    if vocabulary and len(shape) != 1:
        raise ValueError(
            f"vocabulary={vocabulary}: tokens have the shape (L,), not {shape}"
        )
    able = getattr(module, "vocabulary", vocabulary)
    if vocabulary > able:
        raise ValueError(
            f"model {type(module).__name__} knows vocabulary={able} different tokens; "
            f"the data have them up to {vocabulary - 1}"
        )
    if not vocabulary and able:
        raise ValueError(
            f"model {type(module).__name__} takes tokens, integers [n, L]; the data "
            "have none"
        )
    if isinstance(frozen, str):
        raise ValueError(f"frozen={frozen!r} must be a tuple: frozen=({frozen!r},)")
    apart, tokens = _is_ours(module), int(vocabulary)
    return _built(
        module, shape, int(num_classes), tuple(frozen), apart, tokens, precision
    )


def _built(
    module: nn.Module,
    shape: tuple[int, ...],
    num_classes: int,
    frozen: tuple[str, ...],
    apart: bool,
    vocabulary: int,
    precision: str,
) -> Model:
    """`from_linen`, of a shape of any length; `apart`: samples are known to be."""
    name = f"model {type(module).__name__}"
    halved = precision == compiling.BFLOAT16
    dtype = jnp.int32 if vocabulary else jnp.float32
    found = passes(module, shape, frozen, dtype, jnp.bfloat16 if halved else None)
    x = jax.ShapeDtypeStruct((*TRIAL.shape, *shape), jnp.float32)
    key = jax.random.key(0)
    with _named(name, f"does not accept inputs of shape {shape}"):
        variables = jax.eval_shape(found.init, key)
        predicted = jax.eval_shape(found.run, variables, x)
    _check_logits(name, predicted.logits, x, num_classes)
    _check_kinds(name, variables)
    with _named(name, "cannot be trained"):
        mask = jnp.asarray(TRIAL)
        trained = jax.eval_shape(found.train, key, variables, x, mask)
        _check_logits(name, trained.logits, x, num_classes)
        if frozen or not _is_ours(module):
            check_switches(found, variables, x, frozen)
        if not apart:
            check_samples_apart(found, variables, x, vocabulary)

    init, train, run = map(compiling.traced_once, (found.init, found.train, found.run))

    def loss(key, variables, batch, context):
        seen = train(key, variables, batch.x, batch.mask)
        value = cross_entropy(seen.logits, batch)
        return value, Trained(
            seen.stats, {"loss": value}, seen.logits, *seen.features[:1]
        )

    def apply(variables, x):
        seen = run(variables, x)
        return Outputs(seen.logits, *seen.features[:1])

    return Model(
        sample_shape=shape,
        init=init,
        loss=loss,
        apply=apply,
        with_shape=lambda other: _built(
            module, _shape(other), num_classes, frozen, True, vocabulary, precision
        ),
        vocabulary=vocabulary,
    )


def _is_ours(module: nn.Module) -> bool:
    """Whether a module is of this package, whose tests ask what is asked here."""
    return type(module).__module__.startswith("hyperjax.")


def _shape(given: Any) -> tuple[int, ...]:
    """Returns a shape as a tuple of Python's integers.

    Raises:
      ValueError: it is none.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"input_shape={given!r} must be (H, W, c)")
    sizes = tuple(given)
    for i, size in enumerate(sizes):
        check_at_least(1, **{f"input_shape[{i}]": size})
    return tuple(map(int, sizes))


def _check_kinds(name: str, variables: PyTree) -> None:
    """Raises ValueError if there is nothing to train, or something to average."""

    def others(kind, *accepted):
        leaves = zip(tree.paths(variables), jax.tree.leaves(variables), strict=True)
        return [
            f"{path} of {leaf.dtype}"
            for path, leaf in leaves
            if path.startswith(kind)
            and not any(jnp.issubdtype(leaf.dtype, a) for a in accepted)
        ]

    if not jax.tree.leaves(variables["params"]):
        raise ValueError(f"{name} has no parameters to train")
    wrong = others("params/", jnp.floating)
    wrong += others("stats/", jnp.floating, jnp.signedinteger)
    if wrong:
        raise ValueError(
            f"{name} keeps {', '.join(wrong[:3])}; parameters must be floating-point "
            "numbers, and all else those or integers, which can be averaged"
        )


def _check_logits(name: str, logits, x, num_classes: int) -> None:
    """Raises ValueError unless a module returns logits for a batch x."""
    expected = (x.shape[0], num_classes)
    if isinstance(logits, jax.ShapeDtypeStruct):
        if logits.shape == expected and logits.dtype == jnp.float32:
            return
        given = f"{logits.shape} of {logits.dtype}"
    else:
        given = f"a {type(logits).__name__}"
    raise ValueError(
        f"{name} returns {given} for a batch of {x.shape[0]} inputs of shape "
        f"{x.shape[1:]}; logits of shape {expected} are expected"
    )


@contextlib.contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    """Says what a module does not do, whatever it raises."""
    try:
        yield
    except LayerError as error:
        raise ValueError(f"{name} {error}") from error
    except flax.errors.InvalidRngError as error:
        why = f"draws random numbers outside training: {first_line(error)}"
        raise ValueError(f"{name} {why}") from error
    except flax.errors.ModifyScopeVariableError as error:
        why = f"changes what it keeps outside training: {first_line(error)}"
        raise ValueError(f"{name} {why}") from error
    except Exception as error:
        raise ValueError(f"{name} {what}: {first_line(error)}") from error
