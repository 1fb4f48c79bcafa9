"""From a flax.linen module to a `Model`."""

import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from hyperjax.errors import first_line
from hyperjax.types import Array, Batch, ClientData, Model, Pool, Trained


def masked_mean(values: Array, mask: Array) -> Array:
    """Returns the mean of values [B] where mask [B] is 1; 0 if it is nowhere."""
    return jnp.sum(jnp.where(mask > 0, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1.0)


def cross_entropy(logits: Array, batch: Batch) -> Array:
    """Returns the mean cross-entropy over the real samples of a batch, []."""
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
      ValueError: it has no features.
    """

    def trial(key):
        variables = model.init(key)
        batch = _blank(model.sample_shape)
        return model.predict(variables, batch.x), model.features(variables, batch)

    logits, features = jax.eval_shape(trial, jax.random.key(0))
    check_gives(model, "features")
    return logits.shape[-1], features.shape[-1]


def check_gives(model: Model, *outputs: str) -> None:
    """Raises ValueError unless these fields of `Trained` come out of a training pass.

    A method asks here, when it is built, for what its loss is going to read.
    """

    def trial(key, data):
        variables = model.init(key)
        context = model.context(variables, data)
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
    module: nn.Module, input_shape: tuple[int, ...], num_classes: int
) -> Model:
    """Returns a classification `Model` of a linen module.

    The module maps [B, *input_shape] float32 to logits [B, num_classes]. If its
    `__call__` has an argument `train`, it is set accordingly; an argument `mask` is the
    batch's [B] in training and None otherwise. Collections other than "params" become
    `variables["stats"]`; a "dropout" stream is supplied in training. `features` is the
    input of the module's layer "head" (path params/head).

    Raises:
      ValueError: the module does not accept the shape, or does not return logits of
        shape [B, num_classes].
    """
    accepted = inspect.signature(type(module).__call__).parameters
    name = type(module).__name__

    def options(train, mask=None):
        given = {"train": train, "mask": mask}
        return {k: v for k, v in given.items() if k in accepted}

    def apply(variables, x, train, mask=None, key=None):
        rngs = {} if key is None else {"dropout": key}
        collections = {"params": variables["params"], **variables["stats"]}
        flags = options(train, mask)
        if train and variables["stats"]:
            return module.apply(
                collections, x, rngs=rngs, mutable=list(variables["stats"]), **flags
            )
        return module.apply(collections, x, rngs=rngs, **flags), variables["stats"]

    def init(key):
        x = jnp.zeros((1, *input_shape))
        collections = dict(module.init(key, x, **options(train=False)))
        return {"params": collections.pop("params"), "stats": collections}

    def loss(key, variables, batch, context):
        found: list[Array] = []
        with nn.intercept_methods(_inputs_of_head(found)):
            logits, stats = apply(variables, batch.x, True, batch.mask, key)
        value = cross_entropy(logits, batch)
        return value, Trained(stats, {"loss": value}, logits, *found[:1])

    def features(variables, batch):
        found: list[Array] = []
        with nn.intercept_methods(_inputs_of_head(found)):
            predict(variables, batch.x)
        return found[0]

    def predict(variables, x):
        return apply(variables, x, False)[0]

    def trial(key):
        variables = init(key)
        return variables, predict(variables, jnp.zeros((2, *input_shape)))

    try:
        variables, logits = jax.eval_shape(trial, jax.random.key(0))
    except Exception as error:  # whatever a user's module raises on a wrong shape
        raise ValueError(
            f"model {name} does not accept inputs of shape {tuple(input_shape)}: "
            f"{first_line(error)}"
        ) from error
    if logits.shape != (2, num_classes):
        raise ValueError(
            f"model {name} returns {logits.shape} for a batch of 2 inputs of shape "
            f"{tuple(input_shape)}; logits of shape (2, {num_classes}) are expected"
        )
    model = Model(
        sample_shape=tuple(input_shape),
        init=init,
        loss=loss,
        predict=predict,
        with_shape=lambda shape: from_linen(module, shape, num_classes),
    )
    has_head = "head" in variables["params"]
    return model._replace(features=features) if has_head else model


def _inputs_of_head(found: list[Array]) -> Callable:
    """Returns an interceptor that puts what the layer "head" is given into a list."""

    def intercept(call, args, kwargs, context):
        if context.method_name == "__call__" and context.module.path == ("head",):
            found.append(args[0])
        return call(*args, **kwargs)

    return intercept
