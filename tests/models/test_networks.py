"""Networks with normalisation or dropout: published sizes, paths, and one step each."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.models import HEAD, NORM, ZOO, AttackLeNet, ResNet, ZenkeNet, from_linen
from hyperjax.models.resnet import Block
from hyperjax.types import Batch

MNIST, CIFAR, TINY_IMAGENET = (28, 28, 1), (32, 32, 3), (64, 64, 3)


def shapes(name, input_shape, num_classes):
    """Returns path -> shape of all variables."""
    model = from_linen(ZOO[name](num_classes), input_shape, num_classes)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    leaves = jax.tree.leaves(variables)
    return dict(zip(tree.paths(variables), [x.shape for x in leaves], strict=True))


def count(found, pattern):
    sizes = [np.prod(s) for path, s in found.items() if re.fullmatch(pattern, path)]
    return int(sum(sizes))


# Sizes and paths -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "input_shape", "num_classes", "expected"),
    [
        ("resnet38", MNIST, 10, 563_642),
        ("resnet38", CIFAR, 10, 563_930),
        ("resnet20", CIFAR, 10, 270_410),
        ("resnet20", CIFAR, 100, 276_260),
        ("resnet20", TINY_IMAGENET, 200, 282_760),
        ("zenkenet", CIFAR, 10, 1_250_858),
        ("zenkenet", CIFAR, 100, 1_297_028),
        ("attack_lenet", MNIST, 10, 13_426),
        ("attack_lenet", CIFAR, 10, 15_826),
        ("attack_lenet", CIFAR, 100, 85_036),
    ],
)
def test_published_counts(name, input_shape, num_classes, expected):
    assert count(shapes(name, input_shape, num_classes), "params/.*") == expected


@pytest.mark.parametrize(
    ("name", "input_shape", "num_classes", "expected"),
    [
        ("resnet8", MNIST, 10, (144, 4_608, 13_824, 55_296, 480, 2_560, 650, 77_562)),
        (
            "resnet38x2",
            CIFAR,
            100,
            (864, 110_592, 423_936, 1_695_744, 5_440, 10_240, 12_900, 2_259_716),
        ),
    ],
)
def test_hyperfednets_table_of_counts(name, input_shape, num_classes, expected):
    found = shapes(name, input_shape, num_classes)
    parts = (
        "params/stem_conv/kernel",
        "params/group1_block./conv./kernel",
        "params/group2_block./conv./kernel",
        "params/group3_block./conv./kernel",
        f"(?=params/){NORM}",
        "params/.*/shortcut/kernel",
        HEAD,
        "params/.*",
    )
    assert tuple(count(found, part) for part in parts) == expected
    # A mean and a variance for every scale and bias, and nothing else.
    assert count(found, f"(?=stats/){NORM}") == count(found, "stats/.*") == expected[4]


@pytest.mark.parametrize("name", ZOO)
def test_the_last_layer_is_the_head(name):
    shape = CIFAR if name == "zenkenet" else MNIST
    found = shapes(name, shape, 10)
    assert found["params/head/kernel"][1:] == found["params/head/bias"] == (10,)


def test_norm_pattern_finds_flaxs_modules_too():
    found = ("params/BatchNorm_0/scale", "stats/batch_stats/a/GroupNorm_1/mean")
    assert all(re.fullmatch(NORM, path) for path in found)
    assert not re.fullmatch(NORM, "params/normal/conv/kernel")


# Steps -----------------------------------------------------------------------------


def batch_of(shape, n=3):
    x = np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)
    return Batch(jnp.asarray(x), jnp.arange(n) % 3, jnp.ones(n))


def padded(batch):
    """With two samples of padding in front, of another size."""
    x = jnp.concatenate([100 + batch.x[:2], batch.x])
    y = jnp.concatenate([batch.y[:2], batch.y])
    return Batch(x, y, jnp.concatenate([jnp.zeros(2), batch.mask]))


def stepper(model):
    """Returns (variables, batch) -> loss, statistics, gradients; not jitted."""

    def step(variables, batch):
        def loss(params):
            key = jax.random.key(1)
            return model.loss(key, variables | {"params": params}, batch, ())

        (value, (stats, _)), grads = jax.value_and_grad(loss, has_aux=True)(
            variables["params"]
        )
        return value, stats, grads

    return step


@pytest.mark.parametrize(("shortcut", "conv_bias"), [("conv", False), ("pad", True)])
def test_resnet_trains_on_real_samples_only(shortcut, conv_bias):
    # 9 rows become 5 and 3; the rules of convolution take one side each.
    networks = [
        ResNet(3, 2, 1, shortcut, conv_bias, rule) for rule in ("scan", "patches")
    ]
    models = [from_linen(network, (9, 8, 1), 3) for network in networks]
    batch = batch_of((9, 8, 1))

    @jax.jit
    def both(key):
        variables = models[0].init(key)
        plain = stepper(models[0])(variables, batch)
        return variables, plain, stepper(models[1])(variables, padded(batch))

    variables, plain, with_padding = both(jax.random.key(0))
    chex.assert_trees_all_close(plain, with_padding, rtol=1e-3, atol=1e-5)
    _, stats, grads = plain
    chex.assert_trees_all_equal_shapes(grads, variables["params"])
    assert all(np.any(g != 0) for g in jax.tree.leaves(grads["group1_block0"]["norm1"]))
    moved = jax.tree.map(lambda a, b: np.all(a != b), stats, variables["stats"])
    assert all(jax.tree.leaves(moved))


def test_padded_shortcut_is_the_input():
    # norm2 silenced: the block is relu of every second pixel, new channels around.
    x = batch_of((5, 4, 2)).x
    block = Block(4, 2, "pad", conv_bias=False, conv_rule="xla")
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, False), x)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    y = jax.jit(lambda x: block.apply(zeros, x, False))(x)
    expected = np.zeros((3, 3, 2, 4), np.float32)
    expected[..., 1:3] = np.maximum(x[:, ::2, ::2], 0)
    np.testing.assert_array_equal(y, expected)


def test_unknown_shortcut():
    with pytest.raises(ValueError, match="shortcut='cnov' is unknown"):
        from_linen(ResNet(3, shortcut="cnov"), (8, 8, 1), 3)


def test_zenkenet_drops_in_training_only():
    # 14 rows are the least that leave one.
    model = from_linen(ZenkeNet(3), (14, 14, 1), 3)
    without = from_linen(ZenkeNet(3, dropout=0.0), (14, 14, 1), 3)
    batch = batch_of((14, 14, 1))

    @jax.jit
    def outputs(key):
        variables = model.init(key)
        losses = [
            m.loss(key, variables, batch, ())[0] for m in (model, without, without)
        ]
        head = variables["params"]["head"]
        features = model.features(variables, batch, True)
        logits = features @ head["kernel"] + head["bias"]
        return losses, logits, model.predict(variables, batch.x)

    (dropped, full, again), logits, predicted = outputs(jax.random.key(0))
    assert float(full) == float(again) != float(dropped)
    # Features are taken without dropout, also in training.
    np.testing.assert_allclose(logits, predicted, rtol=1e-5, atol=1e-6)


def test_attack_lenet_starts_uniform_and_has_second_derivatives():
    networks = [AttackLeNet(3, 2, conv_rule=rule) for rule in ("scan", "patches")]
    models = [from_linen(network, (8, 8, 1), 3) for network in networks]
    batch, other = batch_of((8, 8, 1), 1), batch_of((8, 8, 1), 2)

    @jax.jit
    def both(key):
        variables = models[0].init(key)

        def mismatch(x, model):  # what gradient inversion descends on
            _, _, ours = stepper(model)(variables, batch._replace(x=x))
            _, _, theirs = stepper(model)(variables, batch)
            return tree.norm(tree.sub(ours, theirs))

        start = other.x[1:]
        return variables, [jax.grad(mismatch)(start, model) for model in models]

    variables, (scan, patches) = both(jax.random.key(0))
    np.testing.assert_allclose(scan, patches, rtol=1e-4, atol=1e-6)
    assert np.any(np.abs(scan) > 1e-5)
    values = np.concatenate([x.ravel() for x in jax.tree.leaves(variables)])
    # 347 uniform draws: standard error of the deviation 0.447 / sqrt(n) of itself.
    assert np.abs(values).max() <= 0.5 and np.abs(values).max() > 0.48
    np.testing.assert_allclose(values.std(), 1 / np.sqrt(12), rtol=0.1)
