"""Users' modules: what they are told and keep, and what padding may not reach."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.models import ZOO, from_linen, layers
from hyperjax.models.passes import SWITCHES, check_samples_apart, passes
from hyperjax.types import Batch

SHAPE, K = (2, 3, 2), 3
KEY = jax.random.key(0)
MASK = jnp.array([1.0, 1, 0, 1, 0])
X = jax.random.normal(KEY, (5, *SHAPE))
BATCH = Batch(X, jnp.arange(5) % K, MASK)
REAL = jax.tree.map(lambda leaf: leaf[MASK > 0], BATCH)


def flat(x):
    return x.reshape(len(x), -1)


def step(model, batch, variables=None):
    """Loss, what training gives, and gradients."""

    @jax.jit
    def run(variables, batch):
        def loss(params):
            new = {**variables, "params": params}
            return model.loss(KEY, new, batch, ())

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    variables = jax.jit(model.init)(KEY) if variables is None else variables
    (value, trained), grads = run(variables, batch)
    return value, trained, grads


def stats_of(trained):
    (moved,) = trained.stats["batch_stats"].values()
    return moved


# Precision --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("mlp_bn", "lenet", "resnet8"),
        pytest.param("squeezenet1_0", marks=pytest.mark.slow),  # of the same layers
    ],
)
def test_networks_compute_in_bfloat16_and_keep_float32(name):
    shape = (32, 32, 3)
    model = from_linen(ZOO[name](K), shape, K, precision="bfloat16")

    def loss(params, variables, batch):
        return model.loss(KEY, {**variables, "params": params}, batch, ())

    def trial(x):
        variables = model.init(KEY)
        batch = Batch(x, jnp.zeros(4, jnp.int32), jnp.ones(4))
        value, trained = loss(variables["params"], variables, batch)
        grads = jax.grad(loss, has_aux=True)(variables["params"], variables, batch)[0]
        outputs = model.apply(variables, x)
        return (value, trained, outputs), variables["params"], grads, trained.stats

    x = jax.ShapeDtypeStruct((4, *shape), jnp.float32)
    for leaf in jax.tree.leaves(jax.eval_shape(trial, x)):
        assert leaf.dtype == jnp.float32
    program = str(jax.make_jaxpr(model.apply)(jax.eval_shape(model.init, KEY), x))
    products = re.findall(
        r":(\w+)\[[^ ]* = (?:dot_general|conv_general_dilated)", program
    )
    assert products and {*products} == {"bf16"}


@pytest.mark.slow
def test_masters_move_by_less_than_bfloat16_can_tell():
    shape = (3,)
    models = [
        from_linen(nn.Dense(K, name="head"), shape, K, precision=precision)
        for precision in ("", "bfloat16")
    ]
    x = jnp.array([[1.0, 0.5, 0.25], [0.0, 1.0, 2.0]])  # exact in bfloat16
    batch = Batch(x, jnp.array([0, 2]), jnp.ones(2))
    start = jax.tree.map(lambda x: 0 * x + 1.0, models[0].init(KEY))

    def ten(model):
        variables = start
        for _ in range(10):
            grads = step(model, batch, variables)[2]
            params = jax.tree.map(lambda p, g: p - 1e-4 * g, variables["params"], grads)
            variables = {**variables, "params": params}
        return variables["params"]

    ours, theirs = map(ten, models)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # bfloat16's neighbours of 1 are 0.004 and 0.008 away; these moved by 0.0003.
        assert 0 < np.abs(b - 1).max() < 2e-3
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_moments_are_float32s_in_bfloat16_too():
    x = (100 + jax.random.normal(KEY, (64, 5))).astype(jnp.bfloat16)
    y, _, variance, _ = layers.batch_norm(x, jnp.ones(64) > 0, None, None, 1e-5)
    assert y.dtype == jnp.bfloat16 and variance.dtype == jnp.float32
    exact = np.float64(x).var(0)
    np.testing.assert_allclose(variance, exact, rtol=1e-4)


# Padding ----------------------------------------------------------------------------


class Flat(nn.Module):
    """Normalises [B, d]."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(flat(x)))
        return nn.Dense(K)(nn.relu(x))


class Images(nn.Module):
    """Normalises [B, H, W, c]."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (2, 2))(x))
        return nn.Dense(K)(flat(nn.relu(x)))


class Positions(nn.Module):
    """Normalises [B T, d], all positions of all samples in a row."""

    @nn.compact
    def __call__(self, x, train):
        rows = nn.Dense(4)(x.reshape(-1, x.shape[-1]))
        rows = nn.BatchNorm(use_running_average=not train)(rows)
        return nn.Dense(K)(nn.relu(rows).reshape(len(x), -1))


class Ours(nn.Module):
    """Our layer, without its mask."""

    @nn.compact
    def __call__(self, x, train):
        x = layers.BatchNorm()(nn.Dense(4)(flat(x)), train)
        return nn.Dense(K)(nn.relu(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


class Lifted(nn.Module):
    """Normalises under a transform of Flax's."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.remat(Block, static_argnums=(2,))(name="block")(flat(x), train)
        return nn.Dense(K)(nn.relu(x))


class Axes(nn.Module):
    """Statistics for every position and channel, of samples alone."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, axis=(1, 2, 3))(x)
        return nn.Dense(K)(flat(x))


@pytest.mark.parametrize("module", [Flat, Images, Positions, Ours, Lifted, Axes])
def test_normalisation_in_any_position_is_blind_to_padding(module):
    model = from_linen(module(), SHAPE, K)
    value, trained, grads = step(model, BATCH)
    expected_value, expected, expected_grads = step(model, REAL)
    close = dict(rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, expected_value, **close)
    np.testing.assert_allclose(trained.logits[MASK > 0], expected.logits, **close)
    chex.assert_trees_all_close(trained.stats, expected.stats, **close)
    chex.assert_trees_all_close(grads, expected_grads, **close)
    before = model.init(KEY)["stats"]
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda a, b: np.any(a != b), before, trained.stats)
        )
    )


def test_a_batch_of_padding_alone_moves_nothing():
    model = from_linen(Flat(), SHAPE, K)
    value, trained, grads = step(model, BATCH._replace(mask=0 * MASK))
    assert float(value) == 0
    chex.assert_trees_all_equal(trained.stats, model.init(KEY)["stats"])
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


class Masked(nn.Module):
    """Takes the mask and hands it on itself."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        real = None if mask is None else mask[:, None] > 0
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(flat(x)), mask=real)
        return nn.Dense(K)(nn.relu(x))


def test_a_mask_of_the_modules_own():
    theirs, ours = (from_linen(module(), SHAPE, K) for module in (Masked, Flat))
    variables = ours.init(KEY)
    found = []
    for model in (theirs, ours):
        value, trained, grads = step(model, BATCH, variables)
        logits = trained.logits[MASK > 0]  # what padding gives is nobody's
        found.append((value, trained._replace(logits=logits), grads))
    chex.assert_trees_all_close(*found, rtol=1e-6, atol=1e-6)


class Turned(nn.Module):
    """Normalises with positions in front: nobody can know where the batch went."""

    @nn.compact
    def __call__(self, x, train):
        rows = x.reshape(len(x), -1, x.shape[-1]).transpose(1, 0, 2)
        rows = nn.BatchNorm(use_running_average=not train)(rows)
        return nn.Dense(K)(flat(rows.transpose(1, 0, 2)))


class Interleaved(Turned):
    """Rows of a position stand together, not those of a sample."""

    @nn.compact
    def __call__(self, x, train):
        rows = x.reshape(len(x), -1, x.shape[-1]).swapaxes(0, 1)
        rows = rows.reshape(-1, x.shape[-1])
        rows = nn.BatchNorm(use_running_average=not train)(rows)
        return nn.Dense(K)(flat(rows.reshape(-1, *x.shape[::3]).swapaxes(0, 1)))


class Homemade(nn.Module):
    """Centres by the batch."""

    @nn.compact
    def __call__(self, x, train=False):
        x = flat(x)
        return nn.Dense(K)(x - x.mean(0) if train else x)


class Counting(nn.Module):
    """Keeps a mean that padding takes part in."""

    @nn.compact
    def __call__(self, x, train=False):
        centre = self.variable("ema", "centre", jnp.zeros, ())
        if train:
            centre.value = 0.9 * centre.value + 0.1 * x.mean()
        return nn.Dense(K)(flat(x))


class Always(nn.Module):
    """Centres by the batch, also when it predicts."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(flat(x - x.mean(0)))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Turned, "BatchNorm_0 normalises.* is not its batch of 7.*`mask`"),
        (Interleaved, "fills a batch up reaches its logits.*`mask`"),
        (Homemade, "fills a batch up reaches its logits in training; take an arg"),
        (Counting, "fills a batch up reaches its ema/centre in training"),
        (Always, "predictions for a sample depend on what else is in the batch"),
    ],
)
def test_what_mixes_samples_is_refused(module, message):
    with pytest.raises(ValueError, match=f"model {module.__name__} .*{message}"):
        from_linen(module(), SHAPE, K)


# Switches ---------------------------------------------------------------------------


def switched(name, as_field, heard):
    """A module that adds what its switch says, which has any name, to `heard`.

    Its batch-norm trains where the switch is turned from its default.
    """
    usual = not SWITCHES.get(name, True)

    def forward(self, x, value):
        heard.append(value)
        norm = nn.BatchNorm(use_running_average=value == usual)
        return nn.Dense(K)(norm(nn.Dense(4)(flat(x))))

    if as_field:

        @nn.compact
        def call(self, x):
            return forward(self, x, getattr(self, name))

        body = {"__annotations__": {name: bool}, name: usual, "__call__": call}
    else:
        made: dict = {}
        source = f"def call(self, x, {name}={usual}): return forward(self, x, {name})"
        exec(source, {"forward": forward}, made)
        body = {"__call__": nn.compact(made["call"])}
    return type("Net", (nn.Module,), body)()


@pytest.mark.parametrize("as_field", [False, True])
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_by_any_known_name(name, as_field):
    heard: list[bool] = []
    found = passes(switched(name, as_field, heard), SHAPE)
    variables = jax.eval_shape(found.init, KEY)
    jax.eval_shape(found.run, variables, X)
    assert set(heard) == {not SWITCHES[name]}
    heard.clear()
    jax.eval_shape(found.train, KEY, variables, X, MASK)
    assert heard == [SWITCHES[name]]


@pytest.mark.parametrize("as_field", [False, True])
def test_a_switch_by_another_name_is_refused(as_field):
    with pytest.raises(
        ValueError, match="'fit' makes it move statistics, but the name"
    ):
        from_linen(switched("fit", as_field, []), SHAPE, K)


class Shaky(nn.Module):
    """Its noise is its own, and so is the switch's name."""

    @nn.compact
    def __call__(self, x, mode="eval", bias=True):
        x = nn.Dense(K, use_bias=bias)(flat(x))
        if mode == "train":
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return x


def test_a_switch_that_is_no_truth_value_is_refused():
    with pytest.raises(ValueError, match="'mode' makes it draw random numbers"):
        from_linen(Shaky(), SHAPE, K)


class Choices(nn.Module):
    """Options that have nothing to do with training."""

    use_bias: bool = False
    kind: str = "relu"

    @nn.compact
    def __call__(self, x, *, train, scale=2.0, wide=False, extra=None):
        x = nn.Dropout(0.5, deterministic=not train)(flat(x))
        return nn.Dense(K, use_bias=self.use_bias)(scale * x)


def test_other_options_stay_as_they_are():
    model = from_linen(Choices(), SHAPE, K)
    variables = model.init(KEY)
    assert set(variables["params"]["Dense_0"]) == {"kernel"}
    dense = variables["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(
        model.predict(variables, X), 2 * flat(X) @ dense, rtol=1e-5
    )


class Needy(nn.Module):
    @nn.compact
    def __call__(self, x, train, temperature):
        return nn.Dense(K)(flat(x)) / temperature


def test_an_argument_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="Needy needs an argument 'temperature' of un"):
        from_linen(Needy(), SHAPE, K)


class Told(nn.Module):
    """A layer with a switch of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(x)


def test_layers_in_a_row_are_told():
    # Nothing can be handed through a Sequential.
    network = nn.Sequential(
        [
            flat,
            nn.Dense(4),
            nn.BatchNorm(),
            nn.relu,
            nn.Dropout(0.5),
            Told(),
            nn.Dense(K),
        ]
    )
    model = from_linen(network, SHAPE, K)
    variables = model.init(KEY)
    _, trained, _ = step(model, BATCH, variables)
    chex.assert_trees_all_equal_shapes(trained.stats, variables["stats"])
    assert all(np.all(x != 0) for x in jax.tree.leaves(trained.stats))
    _, other, _ = step(model, BATCH._replace(x=X[:, ::-1]), variables)
    assert np.any(trained.logits != other.logits)
    # As far as sums of another width can agree.
    np.testing.assert_allclose(
        model.predict(variables, X[:2]), model.predict(variables, X)[:2], rtol=1e-6
    )


# Layers that nobody told ------------------------------------------------------------


class Inner(nn.Module):
    """Normalises by its own switch."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


class InnerField(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=not self.train)(nn.Dense(4)(x))


class Unswitched(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(nn.relu(Inner()(flat(x))))


class Withholding(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(K)(nn.relu(Inner()(flat(x))))


class Merging(nn.Module):
    """A field that says nothing until it is told."""

    training: bool | None = None

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=not self.training)
        return nn.Dense(K)(nn.relu(norm(nn.Dense(4)(flat(x)))))


class Passing(nn.Module):
    """Hands on a switch that says nothing."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(nn.relu(nn.BatchNorm()(nn.Dense(4)(flat(x)), None)))


@pytest.mark.parametrize("module", [Unswitched, Withholding, Merging, Passing])
def test_what_nobody_told_is_told(module):
    model = from_linen(module(), SHAPE, K)
    _, trained, _ = step(model, BATCH)
    assert all(np.all(x != 0) for x in jax.tree.leaves(trained.stats))


class Fielded(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(K)(nn.relu(InnerField(name="block")(flat(x))))


class Phased(nn.Module):
    @nn.compact
    def __call__(self, x, phase: int = 0):
        x = nn.BatchNorm(use_running_average=phase == 0)(nn.Dense(4)(flat(x)))
        return nn.Dense(K)(nn.relu(x))


class Moded(nn.Module):
    mode: str = "eval"

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=self.mode != "fit")
        return nn.Dense(K)(nn.relu(norm(nn.Dense(4)(flat(x)))))


class Keywords(nn.Module):
    @nn.compact
    def __call__(self, x, **kw):
        norm = nn.BatchNorm(use_running_average=not kw.get("train", False))
        return nn.Dense(K)(nn.relu(norm(nn.Dense(4)(flat(x)))))


class Keeping(nn.Module):
    """Dropout that never drops."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(nn.Dropout(0.5, deterministic=True)(flat(x)))


class Lifting(nn.Module):
    """Normalises as outside training, under a transform of Flax's."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(Block, static_argnums=(2,))(name="block")(flat(x), False)
        return nn.Dense(K)(nn.relu(x))


class OwnAverage(nn.Module):
    """Statistics of its own making that nothing moves."""

    @nn.compact
    def __call__(self, x, **kw):
        centre = self.variable("batch_stats", "centre", jnp.zeros, ())
        if kw.get("train"):
            centre.value = jnp.ones(())
        return nn.Dense(K)(flat(x) - centre.value)


class Inside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(OwnAverage(name="own")(x))


@pytest.mark.parametrize(
    ("module", "layer", "pattern"),
    [
        (Fielded, "block/BatchNorm_0", "block"),
        (Phased, "BatchNorm_0", "BatchNorm_0"),
        (Moded, "BatchNorm_0", "Batch*"),
        (Keywords, "BatchNorm_0", "*"),
        (Keeping, "Dropout_0", "Dropout_[01]"),
        (Lifting, "block/BatchNorm_0", "*/BatchNorm_0"),
        (Inside, "own", "own"),
        (OwnAverage, "centre", "centre"),
    ],
)
def test_layers_that_stay_as_outside_training(module, layer, pattern):
    with pytest.raises(ValueError, match=f"{module.__name__} trains with {layer} as"):
        from_linen(module(), SHAPE, K)
    model = from_linen(module(), SHAPE, K, frozen=(pattern,))
    assert model.with_shape((2, 3, 4)).sample_shape == (2, 3, 4)
    variables = jax.jit(model.init)(KEY)
    _, trained = jax.jit(model.loss)(KEY, variables, BATCH, ())
    chex.assert_trees_all_equal(trained.stats, variables["stats"])


def test_frozen_layers_are_not_told():
    network = nn.Sequential(
        [flat, nn.Dense(4), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(K)]
    )
    model = from_linen(network, SHAPE, K, frozen=("layers_2",))
    variables = model.init(KEY)
    _, trained, _ = step(model, BATCH, variables)
    chex.assert_trees_all_equal(trained.stats, variables["stats"])


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("norm",), "no layer .* by the name 'norm' of `frozen`, but BatchNorm_0"),
        (("Batch*",), "Flat trains its layer BatchNorm_0, which .* do not hand"),
        ("BatchNorm_0", "must be a tuple"),
    ],
)
def test_frozen_layers_that_are_not(frozen, message):
    with pytest.raises(ValueError, match=message):
        from_linen(Flat(), SHAPE, K, frozen=frozen)


class AlwaysNormalising(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(nn.BatchNorm(use_running_average=False)(flat(x)))


class AlwaysDropping(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(nn.Dropout(0.5, deterministic=False)(flat(x)))


class Random(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(K)(flat(x))
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


class AlwaysMoving(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("seen", "batches", jnp.zeros, ())
        if not self.is_initializing():
            count.value += 1
        return nn.Dense(K)(flat(x))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (AlwaysNormalising, "has a layer BatchNorm_0 that trains also outside"),
        (AlwaysDropping, "has a layer Dropout_0 that trains also outside"),
        (AlwaysMoving, 'changes what it keeps outside training: .*"batches"'),
        (Random, 'draws random numbers outside training: .*needs PRNG for "noise"'),
    ],
)
def test_what_always_trains_is_refused(module, message):
    with pytest.raises(ValueError, match=f"model {module.__name__} {message}"):
        from_linen(module(), SHAPE, K)


# Arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        (64, K, r"input_shape=64 must be \(H, W, c\)"),
        ("881", K, "input_shape='881' must be"),
        ((8, 8), K, r"input_shape=\(8, 8\) must be .* it is \(8, 8, 1\)"),
        ((8, 0, 1), K, r"input_shape\[1\]=0 must be"),
        ((8, 8.0, 1), K, r"input_shape\[1\]=8.0 must be a whole number"),
        (SHAPE, 10.0, "num_classes=10.0 must be a whole number"),
        (SHAPE, "10", "num_classes='10' must be"),
        (SHAPE, 0, "num_classes=0 must be"),
    ],
)
def test_arguments_are_checked_first(shape, classes, message):
    with pytest.raises(ValueError, match=message):
        from_linen(Flat(), shape, classes)


def test_numbers_of_numpy_are_numbers():
    model = from_linen(Flat(), list(np.array(SHAPE)), np.int64(K))
    assert model.sample_shape == SHAPE
    assert all(type(size) is int for size in model.sample_shape)


# What a module draws, keeps and returns ---------------------------------------------


class Noisy(nn.Module):
    """Two streams of its own, and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = flat(x)
        if train:
            first, second = (self.make_rng(name) for name in ("noise", "shift"))
            draws = [jax.random.normal(key, x.shape) for key in (first, second)]
            self.sow("intermediates", "draws", jnp.stack(draws))
            x = x + draws[0] - draws[1]
        return nn.Dense(K)(nn.Dropout(0.5, deterministic=not train)(x))


def test_streams_of_any_name_are_supplied():
    model = from_linen(Noisy(), SHAPE, K)
    variables = model.init(KEY)
    assert variables["stats"] == {}
    loss = jax.jit(model.loss)
    values = [
        float(loss(jax.random.key(i), variables, BATCH, ())[0]) for i in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]
    assert np.all(np.isfinite(values))


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(K)(flat(x))
        self.sow("losses", "size", jnp.sum(x * x))
        return x


class Growing(nn.Module):
    """Keeps its last inputs, whose number is the batch's."""

    @nn.compact
    def __call__(self, x, train=False):
        last = self.variable("memory", "last", lambda: flat(x))
        if train:
            last.value = flat(x)
        return nn.Dense(K)(flat(x))


class Late(nn.Module):
    """Has parameters that only training asks for."""

    @nn.compact
    def __call__(self, x, train=False):
        x = flat(x)
        return nn.Dense(K)(x) + (nn.Dense(K, name="late")(x) if train else 0)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(K, name="head")(flat(x))
        return x, x


class Naming(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"logits": nn.Dense(K)(flat(x))}


class Rounding(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(flat(x)).astype(jnp.int32)


class Whole(nn.Module):
    """A parameter without a derivative."""

    @nn.compact
    def __call__(self, x):
        start = self.param("start", lambda key: jnp.zeros((), jnp.int32))
        return nn.Dense(K)(flat(x)) + start


class Secret(nn.Module):
    """Keeps random bits, which have no mean."""

    @nn.compact
    def __call__(self, x):
        self.variable("secret", "key", lambda: jnp.zeros(2, jnp.uint32))
        return nn.Dense(K)(flat(x))


class Empty(nn.Module):
    @nn.compact
    def __call__(self, x):
        return flat(x)[:, :K]


class OnlyInTraining(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(K)(flat(x))
        return (x, x) if train else x


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Random, 'needs PRNG for "noise"'),
        (
            Sowing,
            "losses/size/1 from nothing into float32.*'intermediates' may be sown",
        ),
        (Growing, r"memory/last from float32\[1, 12\] into float32\[7, 12\]"),
        (Late, "cannot be trained: .*late"),
        (Pair, "returns a tuple for a batch of 7"),
        (Naming, "returns a dict for a batch of 7"),
        (Rounding, r"returns \(7, 3\) of int32"),
        (Whole, "keeps params/start of int32; parameters must"),
        (Secret, "keeps stats/secret/key of uint32"),
        (Empty, "has no parameters to train"),
        (OnlyInTraining, "returns a tuple for a batch of 7"),
    ],
)
def test_what_has_no_clear_meaning_is_refused_by_name(module, message):
    with pytest.raises(ValueError, match=f"(?s)model {module.__name__} .*{message}"):
        from_linen(module(), SHAPE, K)


def test_a_class_is_not_an_instance():
    with pytest.raises(ValueError, match=r"Flat.*not an instance"):
        from_linen(Flat, SHAPE, K)


# Number formats ---------------------------------------------------------------------


class Precise(nn.Module):
    """Keeps parameters in one format, computes in another."""

    kept: str
    computed: str

    @nn.compact
    def __call__(self, x, train=False):
        form = dict(param_dtype=self.kept, dtype=self.computed)
        x = nn.Dense(4, **form)(flat(x))
        x = nn.BatchNorm(use_running_average=not train, **form)(x)
        return nn.Dense(K, name="head", **form)(x)


@pytest.mark.parametrize(
    ("kept", "computed"),
    [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")],
)
def test_everything_is_float32_outside(kept, computed):
    module = Precise(kept, computed)
    model = from_linen(module, SHAPE, K)

    @jax.jit
    def outputs(variables):
        plain = {**variables.pop("stats"), **variables}
        raw = module.apply(jax.tree.map(lambda x: x.astype(kept), plain), X)
        plain = {"params": plain.pop("params"), "stats": plain}
        (value, trained), grads = jax.value_and_grad(
            lambda params: model.loss(KEY, {**plain, "params": params}, BATCH, ()),
            has_aux=True,
        )(plain["params"])
        features = model.features(plain, X)
        return raw, model.predict(plain, X), (value, trained, grads, features, plain)

    raw, predicted, others = outputs(model.init(KEY))
    assert raw.dtype == computed
    np.testing.assert_allclose(predicted, raw.astype(jnp.float32), rtol=0.05, atol=0.02)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((predicted, others))}
    assert kinds == {jnp.dtype("float32")}
    assert all(np.any(g != 0) for g in jax.tree.leaves(others[2]["head"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_our_own_networks_keep_samples_apart(name):
    # `from_linen` takes their word for it.
    shape = (32, 32, 3)
    found = passes(ZOO[name](10), shape)
    variables = jax.eval_shape(found.init, KEY)
    check_samples_apart(found, variables, jax.ShapeDtypeStruct((7, *shape), X.dtype))


class Keywords(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = x.reshape(len(x), -1)
        x = nn.BatchNorm(momentum=0.0)(use_running_average=not train, x=x)
        return nn.Dense(K, name="head")(inputs=x)


def test_layers_may_be_called_by_keyword():
    model = from_linen(Keywords(), SHAPE, K)
    variables = model.init(jax.random.key(0))
    x = jnp.arange(4 * np.prod(SHAPE), dtype=jnp.float32).reshape(4, *SHAPE)
    batch = Batch(x, jnp.zeros(4, jnp.int32), jnp.array([1.0, 1.0, 0.0, 0.0]))
    trained = model.loss(jax.random.key(1), variables, batch, ())[1]
    mean = trained.stats["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, x[:2].reshape(2, -1).mean(0), rtol=1e-6)
    assert model.features(variables, x).shape == (4, np.prod(SHAPE))
