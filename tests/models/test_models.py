"""Networks: published sizes, layers against XLA's own, and the way from linen."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax import native, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.models import MLP, ZOO, LeNet, convolutions, from_linen, layers
from hyperjax.models.linen import cross_entropy, masked_mean
from hyperjax.models.passes import passes
from hyperjax.training import Local
from hyperjax.types import Batch

MNIST = (28, 28, 1)


def num_parameters(model):
    variables = jax.eval_shape(model.init, jax.random.key(0))
    assert variables["stats"] == {}
    return tree.count(variables["params"])


def numbers(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


# Sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        # 784 * 200 + 200 + 200 * 200 + 200 + 200 C + C
        ("mlp", 10, 199_210),
        ("mlp", 47, 206_647),
        ("mlp", 62, 209_662),
        # 26 * 10 + (25 * 10 + 1) * 20 + 321 * 50 + 51 C
        ("lenet_s", 10, 21_840),
        ("lenet_s", 62, 24_492),
        # 26 * 20 + (25 * 20 + 1) * 50 + 801 * 500 + 501 C
        ("lenet", 10, 431_080),
    ],
)
def test_parameter_counts(name, num_classes, expected):
    model = from_linen(ZOO[name](num_classes), MNIST, num_classes)
    assert num_parameters(model) == expected
    logits = jax.eval_shape(
        lambda key, x: model.predict(model.init(key), x),
        jax.random.key(0),
        jnp.zeros((3, *MNIST)),
    )
    assert logits.shape == (3, num_classes) and logits.dtype == jnp.float32


def test_mlp_is_its_formula():
    model = from_linen(MLP(3, hidden=(4,)), (2, 3, 1), 3)
    variables = jax.jit(model.init)(jax.random.key(0))
    (x,) = numbers((5, 2, 3, 1))
    first, second = (
        jax.tree.map(np.asarray, variables["params"][k]) for k in ("Dense_0", "head")
    )
    hidden = np.maximum(x.reshape(5, 6) @ first["kernel"] + first["bias"], 0)
    expected = hidden @ second["kernel"] + second["bias"]
    logits = jax.jit(model.predict)(variables, x)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


# Layers ----------------------------------------------------------------------------


CONVOLUTIONS = list(itertools.product((1, 3, 5), (1, 2), ("SAME", "VALID")))
# In bfloat16 the same products are rounded: two of them stand for the others.
ROUNDED = [(3, 2, "SAME"), (5, 1, "VALID")]


@pytest.mark.parametrize(
    ("size", "stride", "padding", "dtype"),
    [
        *((*case, jnp.float32) for case in CONVOLUTIONS),
        *(
            pytest.param(
                *(*case, jnp.bfloat16),
                marks=() if case in ROUNDED else pytest.mark.slow,
            )
            for case in CONVOLUTIONS
        ),
    ],
)
def test_convolution_rules_equal_xla(size, stride, padding, dtype):
    x, kernel, bias = numbers((2, 7, 8, 3), (size, size, 3, 4), (4,))
    kernel /= size * np.sqrt(3)  # outputs of size 1
    x, kernel, bias = (jnp.asarray(a, dtype) for a in (x, kernel, bias))

    @jax.jit
    def outputs(kernel, x):
        def one(rule):
            def apply(kernel, x):
                params = {"kernel": kernel, "bias": bias}
                return layers.Conv(4, size, stride, padding, rule).apply(
                    {"params": params}, x
                )

            y, pullback = jax.vjp(apply, kernel, x)
            return y, pullback(jnp.sin(y))

        return {rule: one(rule) for rule in ("xla", "patches", "scan")}

    found = outputs(kernel, x)
    # Up to 75 products per output, 112 per gradient entry, in another order; bfloat16
    # has 8 bits, and rounds each.
    close = dict(atol=2e-5, rtol=1e-5) if dtype == jnp.float32 else dict(atol=0.1)
    for rule in ("patches", "scan"):
        chex.assert_trees_all_equal_shapes_and_dtypes(found[rule], found["xla"])
        ours, theirs = (
            jax.tree.map(lambda a: a.astype(jnp.float32), found[r])
            for r in (rule, "xla")
        )
        chex.assert_trees_all_close(ours, theirs, **close)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (3, 8)])
def test_max_pool_equals_reduce_window(shape, size):
    # No two entries are equal, so the gradient is unique.
    values = np.random.default_rng(0).permutation(2 * shape[0] * shape[1] * 3)
    x = jnp.asarray(values.reshape(2, *shape, 3), jnp.float32)

    def reference(x):
        window = (1, size, size, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")

    @jax.jit
    def both(x):
        def outputs(pool):
            y, pullback = jax.vjp(pool, x)
            return y, pullback(y + 1)

        return outputs(lambda x: layers.max_pool(x, size)), outputs(reference)

    chex.assert_trees_all_equal(*both(x))


@pytest.mark.parametrize(
    ("module", "shape", "fan_in"),
    [
        (layers.Dense(2000), (1, 25), 25),
        (layers.Conv(500, 3), (1, 4, 4, 2), 18),
    ],
)
def test_initialisation_is_pytorchs(module, shape, fan_in):
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros(shape))["params"]
    limit = 1 / np.sqrt(fan_in)
    for leaf in (params["kernel"], params["bias"]):
        leaf = np.asarray(leaf)
        largest = np.abs(leaf).max()
        # Uniform on +-limit: n draws come within 10 / n of the limit.
        assert limit * (1 - 10 / leaf.size) < largest <= limit * (1 + 1e-6)
        # Standard error of the deviation of a uniform: 0.447 / sqrt(n) of itself.
        np.testing.assert_allclose(
            leaf.std(), limit / np.sqrt(3), rtol=4 * 0.447 / leaf.size**0.5
        )
    assert abs(float(params["kernel"].mean())) < 0.02 * limit


def test_rules_of_a_whole_network_agree():
    (x,) = numbers((2, *MNIST))
    ours, theirs = (
        from_linen(LeNet(3, channels=(2, 3), hidden=(4,), conv_rule=rule), MNIST, 3)
        for rule in ("stripes", "xla")
    )

    @jax.jit
    def both(key):
        variables = ours.init(key)
        return ours.predict(variables, x), theirs.predict(variables, x)

    a, b = both(jax.random.key(0))
    np.testing.assert_allclose(a, b, atol=1e-6)


# Pads as PyTorch's: 1 on every side of 3x3, 2 of 5x5, also with stride 2. With many
# features the kernel's gradient is another product.
@pytest.mark.parametrize(
    ("size", "stride", "pads", "features"),
    [
        (1, 2, ((0, 0), (0, 0)), 4),
        (3, 1, ((1, 1), (1, 1)), 4),
        (3, 1, ((0, 1), (2, 0)), convolutions.WIDE),
        (5, 1, ((2, 2), (2, 2)), convolutions.WIDE),
        (3, 2, ((1, 1), (1, 1)), 4),
        (5, 2, ((2, 2), (2, 2)), 4),
        (3, 2, ((0, 2), (1, 0)), 4),
    ],
)
def test_explicit_padding_under_all_rules(size, stride, pads, features):
    x, kernel = numbers((2, 7, 8, 3), (size, size, 3, features))
    kernel /= size * np.sqrt(3)  # outputs of size 1

    @jax.jit
    def outputs(x, kernel):
        def one(rule):
            y, pullback = jax.vjp(
                lambda x, kernel: convolutions.convolve(x, kernel, stride, pads, rule),
                x,
                kernel,
            )
            return y, pullback(jnp.sin(y))

        rules = [r for r in convolutions.RULES[1:] if r != "onednn" or native.version()]
        return [one(rule) for rule in rules]

    expected, *others = outputs(x, kernel)
    for found in others:
        chex.assert_trees_all_close(found, expected, atol=2e-5, rtol=1e-5)


# Blocks that divide the outputs and not, of one and of more than there are; stripes
# that need one neighbour, two, or less than their own columns; columns that none needs.
@pytest.mark.parametrize(
    ("size", "stride", "shape", "padding", "block"),
    [
        (1, 3, (7, 8), "VALID", 2),
        (3, 1, (9, 8), "SAME", 1),
        (3, 2, (9, 8), ((1, 1), (1, 1)), 3),
        (3, 3, (9, 11), "VALID", 20),
        (5, 1, (12, 13), "VALID", 1),
        (5, 1, (8, 12), "VALID", 4),
        (5, 2, (9, 10), ((2, 1), (0, 3)), 2),
    ],
)
def test_stripes_of_any_width(size, stride, shape, padding, block):
    x, kernel = numbers((2, *shape, 3), (size, size, 3, 4))
    kernel /= size * np.sqrt(3)

    def both(convolve, x, kernel):
        y, pullback = jax.vjp(convolve, x, kernel)
        return y, pullback(jnp.sin(y))

    @jax.jit
    def outputs(x, kernel):
        return (
            both(lambda *of: convolutions._xla_conv(*of, stride, padding), x, kernel),
            both(
                lambda *of: convolutions.stripes(*of, stride, padding, block),
                x,
                kernel,
            ),
        )

    expected, found = outputs(x, kernel)
    chex.assert_trees_all_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 4, 8), (8,)])
@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"use_bias": False}])
def test_group_norm_of_a_users_network(shape, options):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.GroupNorm(4, epsilon=1e-3, **options)(x).reshape(len(x), -1)

    (x,) = numbers((3, *shape))
    x = 3 * x + 100.0  # far from the origin, where a careless variance cancels
    x[0] = 7.0  # no spread at all
    found = passes(Net(), shape)
    variables = jax.tree.map(lambda x: x + 0.5, found.init(jax.random.key(0)))
    ours = jax.jit(lambda x: found.run(variables, x).logits)(x)
    given = variables["params"].get("GroupNorm_0", {})
    values = np.float64(x).reshape(3, -1, 4, 2)
    centred = values - values.mean((1, 3), keepdims=True)
    y = centred / np.sqrt(centred.var((1, 3), keepdims=True) + 1e-3)
    y = y.reshape(3, -1, 8) * np.asarray(given.get("scale", 1.0))
    y = y + np.asarray(given.get("bias", 0.0))
    np.testing.assert_allclose(ours, y.reshape(3, -1), atol=1e-4)


def test_group_norm_is_what_a_layer_is_given(monkeypatch):
    norms = []
    monkeypatch.setattr(
        layers, "group_norm", lambda x, *how: norms.append(how) or jnp.zeros_like(x)
    )
    for layer in (nn.GroupNorm(2), nn.GroupNorm(None, 3, dtype=jnp.bfloat16)):
        found = passes(nn.Sequential([layer, lambda x: x]), (6,))
        variables = found.init(jax.random.key(0))
        found.run(variables, jnp.ones((1, 6)))
    assert [how[0] for how in norms] == [2]  # what computes in bfloat16 stays Flax's


@pytest.mark.parametrize("shape", [(5, 4, 6), (6,)])
@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"use_bias": False}])
def test_batch_norm_of_a_users_network(shape, options):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = nn.BatchNorm(not train, momentum=0.75, epsilon=1e-3, **options)
            return norm(x).reshape(len(x), -1)

    (x,) = numbers((5, *shape))
    x = 3 * x + 100.0
    x[1] = np.nan  # padding
    mask = np.array([1, 0, 1, 1, 1], np.float32)
    found = passes(Net(), shape)
    variables = jax.tree.map(lambda x: x + 0.5, found.init(jax.random.key(0)))
    seen = jax.jit(lambda x: found.run(variables, x, mask=mask))(x)
    given = variables["params"].get("BatchNorm_0", {})
    real = np.float64(x[mask > 0]).reshape(-1, 6)
    mean, var = real.mean(0), real.var(0)
    y = (real - mean) / np.sqrt(var + 1e-3) * np.asarray(given.get("scale", 1.0))
    y = y + np.asarray(given.get("bias", 0.0))
    np.testing.assert_allclose(
        seen.logits[mask > 0], y.reshape(4, -1), rtol=1e-5, atol=1e-4
    )
    stats = seen.stats["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.75 * 0.5 + 0.25 * mean, rtol=1e-5)
    # Flax's running variance is of the biased estimate.
    np.testing.assert_allclose(stats["var"], 0.75 * 1.5 + 0.25 * var, rtol=1e-5)


def test_batch_norm_is_what_a_layer_is_given(monkeypatch):
    norms, normalise = [], layers.batch_norm
    monkeypatch.setattr(
        layers, "batch_norm", lambda x, *how: norms.append(how) or normalise(x, *how)
    )
    mask = jnp.ones(2)
    for layer in (nn.BatchNorm(), nn.BatchNorm(dtype=jnp.bfloat16), nn.BatchNorm(True)):
        found = passes(nn.Sequential([layer, lambda x: x]), (6,))
        variables = found.init(jax.random.key(0))
        found.run(variables, jnp.ones((2, 6)))
        found.run(variables, jnp.ones((2, 6)), mask=mask)
    # What computes in bfloat16, or is as outside training, stays Flax's.
    assert len(norms) == 1


def test_explicit_padding_is_pytorchs():
    # A kernel that copies the corner of its window: row 0 starts one pixel outside.
    x = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)
    y = convolutions.convolve(x, kernel, 2, ((1, 1), (1, 1)), "xla")
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 0], [0, 6]])


def test_given_initialisers():
    conv = layers.Conv(
        500, 3, use_bias=False, kernel_init=layers.he_normal, bias_init=None
    )
    params = jax.jit(conv.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))["params"]
    kernel = np.asarray(params.pop("kernel"))
    assert params == {}
    # Variance 2 / (9 c); its standard error is sqrt(2 / n) of itself.
    np.testing.assert_allclose(kernel.var(), 2 / 18, rtol=4 * np.sqrt(2 / kernel.size))
    assert np.abs(kernel).max() > 3 * kernel.std()  # no uniform


# Losses ----------------------------------------------------------------------------


def test_masked_mean():
    values = jnp.array([1.0, jnp.nan, 5.0, jnp.inf])
    assert float(masked_mean(values, jnp.array([1.0, 0, 1, 0]))) == 3.0
    assert float(masked_mean(values, jnp.zeros(4))) == 0.0


def test_cross_entropy_by_hand():
    # Uniform logits: ln 3. Logits (ln 2, 0, 0), label 0: -ln(2 / 4) = ln 2.
    logits = jnp.array([[0.0, 0, 0], [np.log(2), 0, 0]])
    batch = Batch(None, jnp.array([2, 0]), jnp.ones(2))
    expected = (np.log(3) + np.log(2)) / 2
    assert float(cross_entropy(logits, batch)) == pytest.approx(expected, rel=1e-6)


def test_a_balanced_cross_entropy_by_hand():
    logits, y = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([0])
    batch = Batch(None, y, jnp.ones(1), jnp.array([0.5, 0.25, 0.25]))
    scores = np.exp([1.0, 2.0, 0.5]) * (np.array([0.5, 0.25, 0.25]) + 1e-4)
    expected = -np.log(scores[0] / scores.sum())
    assert float(cross_entropy(logits, batch)) == pytest.approx(expected, rel=1e-6)
    uniform = batch._replace(prior=jnp.full(3, 1 / 3))
    plain = cross_entropy(logits, batch._replace(prior=()))
    assert float(cross_entropy(logits, uniform)) == pytest.approx(float(plain))


def test_cross_entropy_ignores_padding():
    (logits,) = numbers((3, 4))
    y = jnp.array([1, 0, 3])
    padding = jnp.array([[1e30, -1e30, 0, 0], [1e4, 1e4, 1e4, -1e4]])

    def padded(logits):
        batch = Batch(None, jnp.array([1, 0, 3, 1, -1]), jnp.array([1.0, 1, 1, 0, 0]))
        return cross_entropy(jnp.concatenate([logits, padding]), batch)

    def plain(logits):
        return cross_entropy(logits, Batch(None, y, jnp.ones(3)))

    (a, grad_a), (b, grad_b) = (
        jax.jit(jax.value_and_grad(f))(logits) for f in (padded, plain)
    )
    assert float(a) == pytest.approx(float(b), rel=1e-7)
    np.testing.assert_allclose(grad_a, grad_b, rtol=1e-6)


# From linen ------------------------------------------------------------------------


class Normalised(nn.Module):
    """A user's network with batch statistics and dropout, by Flax's conventions."""

    num_classes: int
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Dense(4)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


def batch_of(n=6):
    (x,) = numbers((n, 2, 2, 1))
    return Batch(3 + 2 * x, np.arange(n) % 3, np.ones(n, np.float32))


def test_batch_statistics_are_moved_in_training_only():
    model = from_linen(Normalised(3), (2, 2, 1), 3)
    variables = jax.jit(model.init)(jax.random.key(0))
    assert set(variables) == {"params", "stats"}
    assert tree.paths(variables["stats"]) == [
        "batch_stats/BatchNorm_0/mean",
        "batch_stats/BatchNorm_0/var",
    ]
    batch = batch_of()
    predict = jax.jit(model.predict)
    value, trained = jax.jit(model.loss)(jax.random.key(1), variables, batch, ())
    stats, info = trained.stats, trained.info
    assert jax.tree.structure(stats) == jax.tree.structure(variables["stats"])
    # Running mean: 0.9 * 0 + 0.1 * (batch mean of the first layer's output).
    first, last = (
        jax.tree.map(np.asarray, variables["params"][f"Dense_{i}"]) for i in range(2)
    )
    hidden = np.asarray(batch.x).reshape(6, 4) @ first["kernel"] + first["bias"]
    np.testing.assert_allclose(
        stats["batch_stats"]["BatchNorm_0"]["mean"], 0.1 * hidden.mean(0), rtol=1e-5
    )
    # Training normalises by the batch, prediction by the running statistics.
    normalised = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    logits = normalised @ last["kernel"] + last["bias"]
    assert float(value) == pytest.approx(float(cross_entropy(logits, batch)), rel=1e-4)
    assert float(info["loss"]) == float(value)
    expected = hidden / np.sqrt(1 + 1e-5) @ last["kernel"] + last["bias"]
    predicted = predict(variables, batch.x)
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(
        predict({**variables, "stats": stats}, batch.x), predicted, atol=1e-3
    )


def test_dropout_follows_the_key_in_training_only():
    model = from_linen(Normalised(3, rate=0.5), (2, 2, 1), 3)
    variables = jax.jit(model.init)(jax.random.key(0))
    batch = batch_of()
    loss, predict = jax.jit(model.loss), jax.jit(model.predict)
    first, again, other = (
        float(loss(jax.random.key(seed), variables, batch, ())[0]) for seed in (1, 1, 2)
    )
    assert first == again != other
    # Predictions have no key at all, and drop nothing: another rate is no change.
    other_rate = from_linen(Normalised(3, rate=0.9), (2, 2, 1), 3)
    np.testing.assert_array_equal(
        predict(variables, batch.x), jax.jit(other_rate.predict)(variables, batch.x)
    )


def test_users_module_trains():
    model = from_linen(Normalised(3, rate=0.1), (2, 2, 1), 3)
    variables = jax.jit(model.init)(jax.random.key(0))
    batch = batch_of()
    optimizer = optax.adam(0.1)

    @jax.jit
    def train(variables):
        def step(i, carry):
            params, stats, opt = carry

            def loss(params):
                every = {"params": params, "stats": stats}
                return model.loss(jax.random.key(i), every, batch, ())

            (_, trained), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, opt = optimizer.update(grads, opt)
            return optax.apply_updates(params, updates), trained.stats, opt

        params, stats = variables["params"], variables["stats"]
        carry = (params, stats, optimizer.init(params))
        params, stats, _ = jax.lax.fori_loop(0, 60, step, carry)
        return {"params": params, "stats": stats}

    before, after = (
        float(cross_entropy(model.predict(v, batch.x), batch))
        for v in (variables, train(variables))
    )
    assert after < 0.7 * before


class Headed(Normalised):
    """The same with a named last layer, and batch statistics that heed the mask."""

    @nn.compact
    def __call__(self, x, *, train, mask):
        x = nn.Dense(4)(x.reshape(x.shape[0], -1))
        x = layers.BatchNorm()(x, train, mask)
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="head")(x)


def test_features_are_what_the_head_gets():
    model = from_linen(Headed(3), (2, 2, 1), 3)
    batch = batch_of()._replace(mask=jnp.array([1.0, 1, 0, 1, 1, 0]))

    @jax.jit
    def outputs(key):
        variables = model.init(key)
        head = variables["params"]["head"]

        value, trained = model.loss(key, variables, batch, ())
        outside = model.features(variables, batch.x)
        assert trained.features.shape == outside.shape == (6, 4)
        found = [f @ head["kernel"] + head["bias"] for f in (trained.features, outside)]
        expected = trained.logits, model.predict(variables, batch.x)
        return found, expected, (value, cross_entropy(trained.logits, batch))

    found, expected, values = outputs(jax.random.key(0))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # In training statistics are the batch's.
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    assert values[0] == values[1]


def test_features_need_a_head():
    model = from_linen(Normalised(3), (2, 2, 1), 3)
    with pytest.raises(ValueError, match="no layer named 'head'"):
        model.features(model.init(jax.random.key(0)), batch_of().x)


def test_with_shape_rebuilds():
    model = from_linen(MLP(3, hidden=(4,)), (2, 2, 1), 3)
    wide = model.with_shape((7,))
    assert wide.sample_shape == (7,)
    variables = jax.eval_shape(wide.init, jax.random.key(0))
    assert variables["params"]["Dense_0"]["kernel"].shape == (7, 4)


@pytest.mark.parametrize("shape", [(2, 2, 1), (800,), (28, 28)])
def test_wrong_input_shape_names_model_and_shape(shape):
    model = from_linen(LeNet(10), MNIST, 10)
    with pytest.raises(ValueError, match="LeNet does not accept inputs") as error:
        model.with_shape(shape)
    assert str(shape) in str(error.value)


def test_wrong_logits_shape_names_model_and_shapes():
    with pytest.raises(ValueError, match="MLP returns") as error:
        from_linen(MLP(7), MNIST, 10)
    for text in ("(7, 7)", "(7, 10)", str(MNIST)):
        assert text in str(error.value)


def test_a_model_is_shown_in_a_line():
    model = from_linen(ZOO["mlp"](10), (28, 28, 1), 10)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    num = tree.count(variables["params"])
    assert repr(model) == f"Model({num:,} parameters, of inputs 28x28x1)"
    assert repr(model._replace(init=None)) == "Model(of inputs 28x28x1)"


def test_a_method_goes_through_its_network_once_for_each_shape():
    gone_through = []

    class Counting(MLP):
        @nn.compact
        def __call__(self, x):
            gone_through.append(x.shape)
            return super().__call__(x)

    model = from_linen(Counting(3, hidden=(4,)), (2, 3, 1), 3)
    method = fedavg(model=model, local=Local(optimizer=optax.sgd(0.1), batch_size=8))
    method.messages()
    seen = len(gone_through)
    for _ in range(3):
        method.messages()
    assert len(gone_through) == seen
