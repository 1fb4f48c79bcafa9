"""The networks in plain JAX, as who builds on a library of primitives writes them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _conv(x, kernel, stride=1, padding=0):
    numbers = ("NHWC", "HWIO", "NHWC")
    pads = ((padding, padding),) * 2
    strides = (stride, stride)
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=numbers)


def _pool(x):
    window = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def _norm(x, name, p):
    groups = x.reshape(*x.shape[:3], 8, -1)
    mean = groups.mean((1, 2, 4), keepdims=True)
    centred = groups - mean
    scaled = centred * lax.rsqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-5)
    return scaled.reshape(x.shape) * p[f"{name}_scale"] + p[f"{name}_bias"]


def _blocks():
    channels = 16
    for group, features in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if group and not block else 1
            yield f"{group}{block}", channels, features, stride
            channels = features


def init(name):
    """Returns the parameters of a network, by name."""
    random = np.random.default_rng(0)
    p = {}

    def add(layer, *shape, bias=True):
        limit = np.prod(shape[:-1]) ** -0.5
        p[layer] = jnp.asarray(random.uniform(-limit, limit, shape), jnp.float32)
        if bias:
            p[f"{layer}_bias"] = jnp.zeros(shape[-1])

    def norm(layer, features):
        p[f"{layer}_scale"], p[f"{layer}_bias"] = (
            jnp.ones(features),
            jnp.zeros(features),
        )

    if name == "mlp":
        sizes = (784, 200, 200, 10)
    elif name == "lenet":
        add("conv0", 5, 5, 1, 6)
        add("conv1", 5, 5, 6, 16)
        sizes = (256, 120, 84, 10)
    elif name == "cnn":
        add("conv0", 5, 5, 3, 32)
        add("conv1", 5, 5, 32, 64)
        sizes = (4096, 512, 10)
    else:
        add("stem", 3, 3, 3, 16, bias=False)
        norm("stem_norm", 16)
        for block, channels, features, stride in _blocks():
            add(f"one{block}", 3, 3, channels, features, bias=False)
            add(f"two{block}", 3, 3, features, features, bias=False)
            norm(f"norm_one{block}", features)
            norm(f"norm_two{block}", features)
            if stride == 2:
                add(f"shortcut{block}", 1, 1, channels, features, bias=False)
        sizes = (64, 10)
    for i, shape in enumerate(itertools.pairwise(sizes)):
        add(f"dense{i}", *shape)
    return p


def _apply(name, p, x):
    if name in ("lenet", "cnn"):
        padding = 2 if name == "cnn" else 0
        for i in range(2):
            x = _conv(x, p[f"conv{i}"], padding=padding) + p[f"conv{i}_bias"]
            x = _pool(jax.nn.relu(x))
    if name == "resnet":
        x = jax.nn.relu(_norm(_conv(x, p["stem"], 1, 1), "stem_norm", p))
        for block, _, _, stride in _blocks():
            y = _norm(_conv(x, p[f"one{block}"], stride, 1), f"norm_one{block}", p)
            y = _conv(jax.nn.relu(y), p[f"two{block}"], 1, 1)
            y = _norm(y, f"norm_two{block}", p)
            short = _conv(x, p[f"shortcut{block}"], 2) if stride == 2 else x
            x = jax.nn.relu(y + short)
        x = x.mean((1, 2))
    x = x.reshape(len(x), -1)
    last = sum(layer.startswith("dense") for layer in p) // 2 - 1
    for i in range(last + 1):
        x = x @ p[f"dense{i}"] + p[f"dense{i}_bias"]
        x = x if i == last else jax.nn.relu(x)
    return x


def loss(name, p, x, y):
    """Returns the mean cross-entropy of a network."""
    logits = jax.nn.log_softmax(_apply(name, p, x))
    return -jnp.take_along_axis(logits, y[:, None], 1).mean()
