"""Any flax.linen module in training and outside it, blind to padding.

A module may be told in many ways which of the two it is in, and its layers know nothing
of padding. `passes` says what each means; what is left shows when the model is built.
"""

import fnmatch
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import compiling, rng, tree
from hyperjax.models import layers
from hyperjax.types import Array, PyTree

# What modules call their switch, and its value in training.
SWITCHES = {
    **dict.fromkeys(("train", "training", "is_training", "is_train"), True),
    **dict.fromkeys(("deterministic", "use_running_average"), False),
    **dict.fromkeys(("inference", "is_inference", "eval", "is_eval"), False),
}
KNOWN = ("mask", *SWITCHES)
# Collections that are looked at from outside, and are no state.
OBSERVED = ("intermediates", "perturbations")
# The trial batch: a length that axes seldom have, and padding not only at its end.
TRIAL = np.array([1, 0, 1, 1, 1, 0, 0], np.float32)


class LayerError(ValueError):
    """A layer is not told what the module is told, or will not hear it."""


class Call(NamedTuple):
    """What a layer that works otherwise in training was told in a pass."""

    path: tuple[str, ...]
    trains: bool


class Seen(NamedTuple):
    """What a pass gives: logits [B, K], statistics, and what the layer "head" got."""

    logits: Any
    stats: PyTree
    features: tuple[Array, ...]  # [B, L], one for each call of it


class Passes(NamedTuple):
    """A module as pure functions of `{"params": tree, "stats": tree}`, all float32.

    Attributes:
      init: `(key) -> variables`.
      run: `(variables, x [B, ...], rngs) -> Seen` in training, with a `mask` [B], or
        without one outside training. Statistics of training are as the module left
        them. `fields` and `flags` of the module take the place of its own. `calls`
        gets a `Call` for each one of batch normalisation and dropout.
      train: `(key, variables, x [B, ...], mask [B]) -> Seen`.
      unknown: name -> options of `run` that turn round what might be a switch by a name
        that is not among `SWITCHES`.
    """

    init: Callable
    run: Callable
    train: Callable
    unknown: Mapping[str, dict]


def passes(
    module: nn.Module,
    input_shape: tuple[int, ...],
    frozen: Iterable[str] = (),
    dtype: Any = jnp.float32,
    computing: Any = None,
) -> Passes:
    """Returns both passes of a module.

    An argument of `__call__` or a field of the module whose name is one of `SWITCHES`
    is set accordingly, and so is such an argument of a layer that nobody told
    (`nn.Dropout(0.5)(x)`, or `Block()(x)` of `__call__(self, x, train=False)`): in
    layers of `frozen` as outside training, see `from_linen`. A layer's own field that
    is set stays. An argument `mask` is the batch's in training and None otherwise.
    Batch normalisation, Flax's own and ours, is given the batch's mask where the module
    gives none. Random streams of any name are supplied in training. A batch of padding
    alone moves no statistics. Whatever number formats a module keeps and computes in,
    its variables, logits and features are float32 outside. Its inputs are of `dtype`.
    With `computing`, another dtype, what it is given are copies in that one, of inputs
    that are no integers and of its parameters.

    Raises:
      ValueError: `__call__` needs an argument that is not known.
    """
    arguments = _arguments(type(module))
    _, *others = arguments.values()
    for argument in others:
        several = argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
        optional = several or argument.default is not argument.empty
        if not optional and argument.name not in KNOWN:
            raise ValueError(
                f"model {type(module).__name__} needs an argument {argument.name!r} of "
                f"unknown meaning; known are its inputs and "
                f"{', '.join(map(repr, KNOWN))}"
            )
    own = {
        name: getattr(module, name)
        for name in type(module).__dataclass_fields__
        if name not in ("parent", "name")
    }
    taken = set(_switches(type(module)))
    inner = {
        name
        for name, value in own.items()
        if name in SWITCHES
        if isinstance(value, bool) or (value is None and name not in taken)
    }
    outer = taken - inner

    def told(train, mask, fields, flags):
        """The module and the arguments of its `__call__`."""
        fields = {**{name: SWITCHES[name] == train for name in inner}, **fields}
        flags = {**{name: SWITCHES[name] == train for name in outer}, **flags}
        if "mask" in arguments:
            flags["mask"] = mask
        return module.clone(**fields) if fields else module, flags

    def initial(key):
        one, flags = told(False, None, {}, {})
        x = jnp.zeros((1, *input_shape), dtype)
        with nn.intercept_methods(_informing(None, frozen, [], [])):
            collections = one.init(key, x, **flags)
        # Plain dicts of arrays, without boxes of axis names.
        collections = dict(flax.core.unfreeze(nn.meta.unbox(collections)))
        for name in OBSERVED:
            collections.pop(name, None)
        return {"params": collections.pop("params", {}), "stats": collections}

    formats = functools.cache(lambda: jax.eval_shape(initial, jax.random.key(0)))

    def run(variables, x, rngs=None, *, mask=None, fields=None, flags=None, calls=None):
        train = mask is not None
        one, flags = told(train, mask, fields or {}, flags or {})
        held = {name: variables[name] for name in ("params", "stats")}
        held = jax.tree.map(_as, held, formats())
        stats, x = held["stats"], x.astype(dtype)
        if computing is not None:
            held["params"], x = _floating_as(computing, (held["params"], x))
        found: list[Array] = []
        calls = [] if calls is None else calls
        with nn.intercept_methods(_informing(mask, frozen, found, calls)):
            out = one.apply(
                {"params": held["params"], **stats},
                x,
                rngs=rngs,
                mutable=list(stats) if train else False,
                **flags,
            )
        logits, moved = out if train else (out, {})
        return Seen(*_float32((logits, {**stats, **moved}, tuple(found))))

    def train(key, variables, x, mask):
        # A stream that has no key of its own draws from "params".
        rngs = {"dropout": key, "params": rng.stream(key, "other_draws")}
        seen = run(variables, x, rngs, mask=mask)
        some, stats = jnp.any(mask > 0), variables["stats"]
        _check_alike(stats, seen.stats)
        kept = jax.tree.map(lambda x, y: jnp.where(some, x, y), seen.stats, stats)
        return seen._replace(stats=kept)

    unknown = {
        name: {"fields": {name: other}}
        for name, value in own.items()
        if name not in KNOWN
        for other in _others(value)
    }
    unknown |= {
        argument.name: {"flags": {argument.name: other}}
        for argument in others
        if argument.name not in KNOWN
        for other in _others(argument.default)
    }
    return Passes(lambda key: _float32(initial(key)), run, train, unknown)


# What must hold -----------------------------------------------------------------------


def check_switches(
    found: Passes,
    variables: PyTree,
    x: jax.ShapeDtypeStruct,
    frozen: Iterable[str] = (),
) -> None:
    """Raises ValueError if a module, or a layer of it, does not hear that it trains.

    That is, if turning round a field or an argument of unknown meaning makes it draw
    random numbers or move statistics, which it leaves alone otherwise; or if in
    training statistics stay as they are, or dropout keeps all, and it is not `frozen`;
    or if a pattern of `frozen` stands for no such layer.
    """
    paths = tree.paths(variables["stats"])

    def does(options) -> tuple[set[str], set[str], set[str]]:
        """What it does, and which layers train and stay as outside training."""
        done: set[str] = set()
        still: set[str] = set()
        calls: list[Call] = []

        def trial(variables, x):
            mask = jnp.ones(len(x), jnp.float32)
            options_ = {**options, "mask": mask, "calls": calls}
            try:
                seen = found.run(variables, x, **options_)
            except flax.errors.InvalidRngError:
                done.add("draw random numbers")
                key = jax.random.key(0)
                rngs = {"dropout": key, "params": key}
                calls.clear()
                seen = found.run(variables, x, rngs, **options_)
            before = jax.tree.leaves(variables["stats"])
            after = jax.tree.leaves(seen.stats)
            for path, a, b in zip(paths, before, after, strict=True):
                collection, *layer, variable = path.split("/")
                layer = layer or [variable]  # the model's own
                if a is not b:
                    if not _is_frozen(layer, frozen):
                        done.add("move statistics")
                elif collection == "batch_stats":
                    still.add("/".join(layer))

        jax.eval_shape(trial, variables, x)
        # Transforms of Flax's hand statistics on anew that nothing moved.
        still.update("/".join(call.path) for call in calls)
        moved = {"/".join(call.path) for call in calls if call.trains}
        return done, moved, still - moved

    usual, moved, still = does({})
    for name, options in found.unknown.items():
        try:
            more = does(options)[0] - usual
        except Exception:  # turned round it cannot run, so it is no switch
            continue
        if more:
            raise ValueError(
                f"{name!r} makes it {' and '.join(sorted(more))}, but the name does "
                "not say whether that is for training; known are "
                f"{', '.join(map(repr, SWITCHES))}"
            )
    for pattern in frozen:
        of_it = {x for x in moved | still if _is_frozen(x.split("/"), [pattern])}
        if not of_it:
            raise LayerError(
                f"has no layer with statistics or dropout by the name {pattern!r} of "
                f"`frozen`, but {', '.join(sorted(moved | still)) or 'none at all'}"
            )
        if of_it & moved:
            raise LayerError(
                f"trains its layer {min(of_it & moved)}, which {pattern!r} of `frozen` "
                "is to leave as outside training: do not hand the switch on to it"
            )
    still = {layer for layer in still if not _is_frozen(layer.split("/"), frozen)}
    if still:
        layers_ = sorted(still)
        raise LayerError(
            f"trains with {', '.join(layers_[:3])} as outside training: nothing tells "
            f"{'it' if len(still) == 1 else 'them'} that the model trains. Take an "
            "argument `train` of `__call__` and hand it on, as in "
            "nn.BatchNorm(use_running_average=not train); known names are "
            f"{', '.join(map(repr, SWITCHES))}. If it is meant so, say "
            f"from_linen(..., frozen={tuple(layers_)})"
        )


def check_samples_apart(
    found: Passes, variables: PyTree, x: jax.ShapeDtypeStruct, vocabulary: int = 0
):
    """Runs both passes on a small batch, twice, with other padding the second time.

    Variables are any numbers of these shapes: what depends on what does so for all, and
    to compile the module's own `init` would take longer than all the rest.

    Raises:
      ValueError: what a pass makes of a sample depends on what is beside it.
    """
    draw = np.random.default_rng(0)

    def some(like):
        # Positive where it is one a channel, as variances are; else units would die.
        if len(like.shape) < 2:
            return draw.uniform(0.5, 1.5, like.shape).astype(like.dtype)
        fan_in = np.prod(like.shape[:-1])
        return (draw.normal(size=like.shape) / np.sqrt(fan_in)).astype(like.dtype)

    variables = jax.tree.map(some, variables)
    real = TRIAL > 0
    pair = (2, *x.shape)
    drawn = (
        draw.integers(vocabulary, size=pair) if vocabulary else draw.normal(size=pair)
    )
    first, second = drawn.astype(np.float32)
    second[real] = first[real]

    def outputs(variables, x):
        seen = found.train(jax.random.key(0), variables, x, jnp.asarray(TRIAL))
        return found.run(variables, x).logits[real], seen.logits[real], seen.stats

    # Ahead of time, as models are also built while something else is traced.
    trial = jax.jit(outputs, **compiling.options(compiling.ONCE))
    compiled = trial.lower(variables, first).compile()
    once, again = (jax.device_get(compiled(variables, x)) for x in (first, second))
    names = ("predictions", "logits", *tree.paths(once[2]))
    changed = [
        name
        for name, a, b in zip(names, *map(jax.tree.leaves, (once, again)), strict=True)
        if not np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    ]
    if "predictions" in changed:
        raise ValueError(
            "its predictions for a sample depend on what else is in the batch, as if "
            "it normalised by the batch outside training"
        )
    if changed:
        raise ValueError(
            f"what fills a batch up reaches its {', '.join(changed[:3])} in training; "
            "take an argument `mask` [B], 1 for real samples, and leave out the others"
        )


def _check_alike(before: PyTree, after: PyTree) -> None:
    """Raises ValueError if statistics are not what they were, but for their values."""

    def described(stats):
        leaves = jax.tree.leaves(stats)
        return {
            path: f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in zip(tree.paths(stats), leaves, strict=True)
        }

    old, new = described(before), described(after)
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            raise ValueError(
                f"a step of training turns its {path} from {old.get(path, 'nothing')} "
                f"into {new.get(path, 'nothing')}; what a module keeps must stay "
                "alike, and only 'intermediates' may be sown"
            )


# Pieces -------------------------------------------------------------------------------


def _as(x: Array, like) -> Array:
    return x if x.dtype == like.dtype else x.astype(like.dtype)


def _floating_as(dtype: Any, values: PyTree) -> PyTree:
    """Turns every floating-point leaf into one of a dtype."""

    def one(x):
        other = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != dtype
        return x.astype(dtype) if other else x

    return jax.tree.map(one, values)


_float32 = functools.partial(_floating_as, jnp.float32)


def _others(value: Any) -> tuple:
    """What a switch would be in training that is `value` otherwise."""
    if isinstance(value, bool):
        return (not value,)
    return (True,) if value is None else ("train",) if isinstance(value, str) else ()


def _informing(
    mask: Array | None,
    frozen: Iterable[str],
    found: list[Array],
    calls: list[Call],
) -> Callable:
    """Returns an interceptor that tells layers what the module did not tell them.

    It also adds what the layer "head" is given to `found`, and what layers were told to
    `calls`. `mask` is None outside training.
    """
    train = mask is not None

    def intercept(call, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__" or not layer.path:
            return call(*args, **kwargs)
        # By name, as far as arguments have one.
        names = _arguments(type(layer))
        first = dict(zip(names, args, strict=False))
        given = first | kwargs
        shown = args[0] if args else given.get(next(iter(names), ""))
        if layer.path == ("head",):
            found.append(shown)
        trains = train and not _is_frozen(layer.path, frozen)
        more = {
            switch: SWITCHES[switch] == trains
            for switch in _switches(type(layer))
            if given.get(switch) is None and getattr(layer, switch, None) is None
        }
        told = _trains(layer, {**given, **more})
        if told is not None:
            if told and not train:
                raise LayerError(
                    f"has a layer {'/'.join(layer.path)} that trains also outside "
                    "training; give it no switch of its own, or the model's, as in "
                    "nn.BatchNorm(use_running_average=not train) and "
                    "nn.Dropout(rate, deterministic=not train)"
                )
            calls.append(Call(layer.path, told))
        normalises = isinstance(layer, nn.BatchNorm | layers.BatchNorm)
        if mask is not None and normalises and given.get("mask") is None:
            entries = _entries(layer, shown, mask)
            if told and _is_plain(layer, nn.BatchNorm, shown):
                return _batch_norm(layer, shown, entries)
            if isinstance(layer, nn.BatchNorm):
                entries = entries.reshape(-1, *[1] * (shown.ndim - 1))
            kwargs = {**kwargs, "mask": entries}
        args = (*(more.pop(k, v) for k, v in first.items()), *args[len(first) :])
        if given.get("mask") is None and _is_plain(layer, nn.GroupNorm, shown):
            return _group_norm(layer, shown)
        return call(*args, **{**kwargs, **more})

    return intercept


def _is_plain(layer: nn.Module, kind: type, x: Any) -> bool:
    """Whether a layer is this one of Flax's, in float32, over all of x but channels."""
    if type(layer) is not kind or layer.is_initializing():
        return False  # Flax checks the groups, and makes parameters
    axes_are_usual = (
        layer.reduction_axes is None if kind is nn.GroupNorm else layer.axis == -1
    )
    return (
        axes_are_usual
        and layer.axis_name is None
        and layer.dtype in (None, jnp.float32)
        and layer.param_dtype == jnp.float32
        and getattr(x, "dtype", None) == jnp.float32
        and x.ndim > 1
    )


def _affine(layer: nn.Module) -> tuple[Array | None, Array | None]:
    scale = layer.get_variable("params", "scale") if layer.use_scale else None
    bias = layer.get_variable("params", "bias") if layer.use_bias else None
    return scale, bias


def _batch_norm(layer: nn.BatchNorm, x: Array, real: Array) -> Array:
    """What Flax's layer computes in training, without the loss of digits far from 0."""
    y, mean, var, _ = layers.batch_norm(x, real, *_affine(layer), layer.epsilon)
    for name, new in (("mean", mean), ("var", var)):
        old: Any = layer.get_variable("batch_stats", name)
        kept = layer.momentum * old + (1 - layer.momentum) * new
        layer.put_variable("batch_stats", name, kept)
    return y


def _group_norm(layer: nn.GroupNorm, x: Array) -> Array:
    """What Flax's layer computes, two to four times faster inside loops on the CPU."""
    groups = layer.num_groups or x.shape[-1] // (layer.group_size or 1)
    return layers.group_norm(x, groups, *_affine(layer), layer.epsilon)


def _trains(layer: nn.Module, given: Mapping[str, Any]) -> bool | None:
    """Whether a layer was told to train; None where that makes no difference."""
    if isinstance(layer, layers.BatchNorm):
        return bool(given.get("train"))
    if isinstance(layer, nn.BatchNorm):
        switch, idle = "use_running_average", False
    elif isinstance(layer, nn.Dropout):
        switch = "deterministic"
        idle = layer.rate == 0 or given.get("rng") is not None
    elif isinstance(layer, nn.MultiHeadDotProductAttention):
        switch = "deterministic"
        idle = layer.dropout_rate == 0 or given.get("dropout_rng") is not None
    else:
        return None
    value = given.get(switch)
    return None if idle else not (getattr(layer, switch) if value is None else value)


def _is_frozen(path: Iterable[str], frozen: Iterable[str]) -> bool:
    """Whether a layer, or one that it is part of, matches a pattern of `frozen`."""
    parts = list(path)
    heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(h, pattern) for h in heads for pattern in frozen)


def _entries(layer: nn.Module, x: Array, mask: Array) -> Array:
    """Which entries of a layer's input are of real samples.

    The first axis is the batch, or has so many entries for each sample, in order; in
    what order they are shows in `check_samples_apart`.
    """
    times, rest = divmod(x.shape[0], mask.shape[0])
    if rest or not times:
        raise ValueError(
            f"the first axis of what {'/'.join(layer.path)} normalises, {x.shape}, is "
            f"not its batch of {mask.shape[0]}: give that layer a `mask`"
        )
    # Of a batch without real samples padding is normalised, rather than nothing.
    return jnp.repeat((mask > 0) | ~jnp.any(mask > 0), times)


def _arguments(kind: type) -> Mapping[str, inspect.Parameter]:
    """The arguments of a module's `__call__`, but for itself."""
    _, *arguments = inspect.signature(kind.__call__).parameters.values()
    return {argument.name: argument for argument in arguments}


def _switches(kind: type) -> tuple[str, ...]:
    """The arguments of a module's `__call__` that say whether it trains."""
    return tuple(
        argument.name
        for argument in _arguments(kind).values()
        if argument.name in SWITCHES
        if argument.default in (True, False, None, argument.empty)
    )
