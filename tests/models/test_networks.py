"""Networks with normalisation or dropout: published sizes, paths, and one step each."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.models import (
    HEAD,
    NORM,
    VGG8,
    ZOO,
    AttackLeNet,
    ResNet,
    ZenkeNet,
    from_linen,
    squeezenet,
)
from hyperjax.models.resnet import Block
from hyperjax.types import Batch

MNIST, CIFAR, TINY_IMAGENET = (28, 28, 1), (32, 32, 3), (64, 64, 3)
# MH-pFedHN's images are all of 32x32: CIFAR-10, CIFAR-100, Tiny-ImageNet, EMNIST.
MH_IMAGES = ((CIFAR, 10), (CIFAR, 100), (CIFAR, 200), ((32, 32, 1), 62))


@functools.cache
def drawn(name, input_shape, num_classes):
    """The forms of the variables of a network's own `init`, which is traced once."""
    module = ZOO[name](num_classes)
    told = hasattr(module, "dropout") or re.search("resnet|_bn", name)
    options = {"train": False} if told else {}
    x = jnp.zeros((1, *input_shape), jnp.int32 if name == "gru" else jnp.float32)
    return jax.eval_shape(lambda key: module.init(key, x, **options), jax.random.key(0))


def size_of(name, input_shape, num_classes):
    """Counts the parameters of a network."""
    return tree.count(drawn(name, input_shape, num_classes)["params"])


@functools.cache
def shapes(name, input_shape, num_classes):
    """Returns path -> shape of all variables."""
    stats = dict(drawn(name, input_shape, num_classes))
    variables = {"params": stats.pop("params"), "stats": stats}
    leaves = jax.tree.leaves(variables)
    return dict(zip(tree.paths(variables), [x.shape for x in leaves], strict=True))


def count(found, pattern):
    sizes = [np.prod(s) for path, s in found.items() if re.fullmatch(pattern, path)]
    return int(sum(sizes))


# Sizes and paths -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "input_shape", "num_classes", "expected"),
    [
        pytest.param("resnet38", MNIST, 10, 563_642, marks=pytest.mark.slow),
        ("resnet38", CIFAR, 10, 563_930),
        ("resnet20", CIFAR, 10, 270_410),
        pytest.param("resnet20", CIFAR, 100, 276_260, marks=pytest.mark.slow),
        pytest.param("resnet20", TINY_IMAGENET, 200, 282_760, marks=pytest.mark.slow),
        ("zenkenet", CIFAR, 10, 1_250_858),
        ("zenkenet", CIFAR, 100, 1_297_028),
        ("attack_lenet", MNIST, 10, 13_426),
        ("attack_lenet", CIFAR, 10, 15_826),
        ("cnn_bn", CIFAR, 10, 122_858),
        ("attack_lenet", CIFAR, 100, 85_036),
    ],
)
def test_published_counts(name, input_shape, num_classes, expected):
    assert size_of(name, input_shape, num_classes) == expected


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mh_cnn", (234_006, 239_856, 246_356, 237_098)),
        ("vgg8", (268_814, 274_664, 281_164, 271_906)),
        # Of more classes these have a larger head, as those have: the others are slow.
        ("mh_resnet10", (347_178, None, None, 350_270)),
        ("mh_resnet12", (523_242, None, None, None)),
        ("mh_resnet18", (565_386, None, None, None)),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("mh_resnet10", (None, 353_028, 359_528, None)),
                ("mh_resnet12", (None, 529_092, 535_592, 526_334)),
                ("mh_resnet18", (None, 571_236, 577_736, 568_478)),
            )
        ),
    ],
)
def test_mh_pfedhns_table_of_counts(name, expected):
    for images, count in zip(MH_IMAGES, expected, strict=True):
        assert count is None or size_of(name, *images) == count


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        ("pfedhn_cnn", 10, 121_182),
        ("pfedhn_cnn", 100, 128_832),
        ("mh_mlp", 100, 408_100),
        ("squeezenet1_0", 100, 786_724),
        ("squeezenet1_1", 100, 773_796),
    ],
)
def test_counts_of_pfedhns_network_and_of_those_that_come_later(
    name, num_classes, expected
):
    assert size_of(name, CIFAR, num_classes) == expected


def test_the_rest_of_pfedhns_network_is_its_body():
    found = shapes("pfedhn_cnn", CIFAR, 10)
    assert len(found) == 10 and count(found, f"(?!{HEAD})params/.*") == 120_332


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("mh_resnet10", (3, 3, 4)),
        ("mh_resnet12", (1, 5, 6)),
        ("mh_resnet18", (6, 6, 6)),
    ],
)
def test_mh_pfedhns_resnets_are_called_by_their_blocks(name, blocks):
    found = shapes(name, CIFAR, 10)
    kernels = {p: s for p, s in found.items() if p.endswith("conv1/kernel")}
    assert len(kernels) == sum(blocks) == int(name[-2:])
    for group, length in enumerate(blocks, start=1):
        for i in range(length):
            shape = kernels[f"params/group{group}_block{i}/conv1/kernel"]
            assert shape[-1] == 8 * 2**group
    # Each convolution has a bias, shortcuts too; those are where the shape changes.
    for kernel in (p for p in found if re.fullmatch(".*(conv.?|shortcut)/kernel", p)):
        assert found[kernel.replace("kernel", "bias")] == found[kernel][-1:]
    shortcuts = {p.split("/")[1] for p in found if "shortcut" in p}
    assert shortcuts == {"group2_block0", "group3_block0"}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (ZOO["vgg8"](10), CIFAR),
        (ResNet(10, 2, 1), (9, 8, 1)),
        (squeezenet.SqueezeNet11(10, channels=2), CIFAR),
    ],
    ids=["vgg8", "resnet", "squeezenet"],
)
def test_features_are_rows_of_the_heads_inputs(module, shape):
    model = from_linen(module, shape, 10)

    def inputs(key):
        variables = model.init(key)
        head = variables["params"]["head"]["kernel"]
        return head, model.features(variables, jnp.zeros((2, *shape)))

    head, features = jax.eval_shape(inputs, jax.random.key(0))
    assert features.shape == (2, head.shape[-2])


WIDTHS = {"vgg8": 64, "mh_resnet10": 64, "mh_resnet18": 64, "squeezenet1_1": 512}


@pytest.mark.parametrize("name", ZOO)
def test_the_last_layer_is_the_head(name):
    # Of the forms that are counted above, which are traced by then.
    num_classes = 100 if re.match("squeezenet|mh_mlp|resnet38x2", name) else 10
    head = drawn(name, (8,) if name == "gru" else CIFAR, num_classes)["params"]["head"]
    assert head["kernel"].shape[-1:] == head["bias"].shape == (num_classes,)
    assert head["kernel"].shape[-2] == WIDTHS.get(name, head["kernel"].shape[-2])


def test_norm_pattern_finds_flaxs_modules_too():
    found = ("params/BatchNorm_0/scale", "stats/batch_stats/a/GroupNorm_1/mean")
    assert all(re.fullmatch(NORM, path) for path in found)
    assert not re.fullmatch(NORM, "params/normal/conv/kernel")


# Steps -----------------------------------------------------------------------------


def filled(model):
    """Variables that NumPy draws: `init` of many tensors takes long to compile."""
    draw, like = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))

    def normal(leaf):
        scale = np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return jnp.float32(scale * draw.normal(size=leaf.shape))

    stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), like["stats"])
    return {"params": jax.tree.map(normal, like["params"]), "stats": stats}


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

        (value, trained), grads = jax.value_and_grad(loss, has_aux=True)(
            variables["params"]
        )
        return value, trained.stats, grads

    return step


@pytest.mark.parametrize(
    ("shortcut", "conv_bias"),
    [("conv", False), pytest.param("pad", True, marks=pytest.mark.slow)],
)
def test_resnet_trains_on_real_samples_only(shortcut, conv_bias):
    # 9 rows become 5 and 3; the rules of convolution take one side each.
    networks = [
        ResNet(3, 2, 1, shortcut, conv_bias, rule) for rule in ("scan", "patches")
    ]
    models = [from_linen(network, (9, 8, 1), 3) for network in networks]
    batch = batch_of((9, 8, 1))

    @jax.jit
    def both(variables):
        plain = stepper(models[0])(variables, batch)
        return plain, stepper(models[1])(variables, padded(batch))

    variables = filled(models[0])
    plain, with_padding = both(variables)
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


@pytest.mark.parametrize(
    ("network", "options"),
    # 14 rows are the least that leave ZenkeNet one.
    [(ZenkeNet, {}), (VGG8, dict(channels=(2, 3), hidden=(16, 4)))],
)
def test_dropout_in_training_only(network, options):
    model = from_linen(network(3, **options), (14, 14, 1), 3)
    without = from_linen(network(3, dropout=0.0, **options), (14, 14, 1), 3)
    batch = batch_of((14, 14, 1))

    @jax.jit
    def outputs(key, variables):
        losses, trained = zip(
            *(m.loss(key, variables, batch, ()) for m in (model, without)),
            strict=True,
        )
        features = [t.features for t in trained]
        return losses, features, model.apply(variables, batch.x)

    variables = filled(model)
    losses, features, outside = outputs(jax.random.key(0), variables)
    assert float(losses[0]) != float(losses[1])
    head = variables["params"]["head"]
    logits = outside.features @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, outside.logits, rtol=1e-5, atol=1e-6)
    # Features of training are those of its loss, dropout and all.
    np.testing.assert_array_equal(features[1], outside.features)
    assert np.any(features[0] != outside.features)


def test_squeezenets_pool_cuts_windows_off_at_the_far_edges():
    # As PyTorch's ceil_mode: 13, 6, 3, 2 rows become 6, 3, 1, 1.
    values = np.float32(np.random.default_rng(0).normal(size=(2, 13, 6, 3)))
    for height, width in ((13, 6), (6, 3), (3, 2)):
        x = values[:, :height, :width]
        rows, columns = height // 2, max(width // 2, 1)
        expected = np.empty((2, rows, columns, 3), np.float32)
        for i, j in np.ndindex(rows, columns):
            window = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected[:, i, j] = window.max((1, 2))
        found = jax.jit(squeezenet.max_pool)(x)
        np.testing.assert_array_equal(found, expected)


def test_squeezenets_classifier_is_a_mean_over_positions():
    # 63 rows leave 3 positions: the classifier's relu comes before their mean.
    model = from_linen(squeezenet.SqueezeNet11(3, channels=2), (63, 31, 1), 3)
    x = batch_of((63, 31, 1), 1).x

    variables = filled(model)
    logits, features = jax.jit(model.apply)(variables, x)
    head = variables["params"]["head"]
    assert features.shape == (1, 3, 1, 512)
    expected = np.maximum(features @ head["kernel"] + head["bias"], 0).mean((1, 2))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-7)
    assert np.any(logits > 0)


def test_attack_lenet_starts_uniform_and_has_second_derivatives():
    networks = [AttackLeNet(3, 2, conv_rule=rule) for rule in ("scan", "patches")]
    models = [from_linen(network, (8, 8, 1), 3) for network in networks]
    batch, other = batch_of((8, 8, 1), 1), batch_of((8, 8, 1), 2)

    @jax.jit
    def both(key):
        variables = models[0].init(key)

        _, _, theirs = stepper(models[0])(variables, batch)

        def mismatch(x, model):  # what gradient inversion descends on
            _, _, ours = stepper(model)(variables, batch._replace(x=x))
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
