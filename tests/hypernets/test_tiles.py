"""Tiles of HyperFedNet: counts of the paper's networks, and the algebra of one tile."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import models, tree
from hyperjax.hypernets.tiles import tile_net

# A 2x4 grid, a 1x2 grid, and leaves that tiles do not fit.
TEMPLATE = {
    "a": {"kernel": jnp.zeros((3, 3, 4, 8))},
    "b": {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)},
    "odd": jnp.zeros((3, 3, 3, 4)),
    "small": jnp.zeros((1, 1, 4, 4)),
    "head": jnp.zeros((4, 4)),
}
A, B = "a/kernel", "b/kernel"
N, D = 3, 5
# Name, input, classes, parameters; tiles, generated numbers; all else that is private
# but embeddings (stem, shortcuts, normalisation, classifier).
NETWORKS = [
    ("resnet8", (28, 28, 1), 10, 77_562, 32, 73_728, 3_834),
    *(
        pytest.param("resnet38", *numbers, marks=pytest.mark.slow)
        for numbers in (
            ((28, 28, 1), 10, 563_642, 242, 557_568, 6_074),
            ((32, 32, 3), 10, 563_930, 242, 557_568, 6_362),
        )
    ),
    ("resnet38x2", (32, 32, 3), 100, 2_259_716, 968, 2_230_272, 29_444),
]


@functools.cache
def small(slices="input"):
    """Tiles 3x3x2x2 with embeddings of 3 numbers and a hidden layer of 5."""
    net = tile_net(TEMPLATE, embedding_size=N, hidden_size=D, tile=2, slices=slices)
    phi = jax.tree.map(noise, net.init(jax.random.key(0)))
    return net, phi, net.init_embeddings(jax.random.key(1))


def noise(x):
    """Biases start at zero; here they have values."""
    return x + np.random.default_rng(0).normal(size=x.shape).astype(np.float32)


@functools.cache
def generate(slices="input"):
    return jax.jit(small(slices)[0].generate)


def tiles_of(kernel, tile=2):
    """Cuts [k, k, C_in, C_out] into tiles [rows, columns, k, k, tile, tile]."""
    k, _, inputs, outputs = kernel.shape
    grid = np.asarray(kernel).reshape(k, k, inputs // tile, tile, outputs // tile, tile)
    return grid.transpose(2, 4, 0, 1, 3, 5)


def one_tile(phi, v, i):
    """F_i = W_out (W_i v + B_i) + B_out, as [3, 3, 2]."""
    hidden = phi["in"]["w"][i] @ v + phi["in"]["b"][i]
    return (phi["out"]["w"] @ hidden + phi["out"]["b"]).reshape(3, 3, 2)


# Counts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, shape, classes, total, tiles, generated, private", NETWORKS
)
def test_tiles_of_the_papers_networks(
    name, shape, classes, total, tiles, generated, private
):
    module = models.ZOO[name](num_classes=classes)
    model = models.from_linen(module, shape, classes)
    template = jax.eval_shape(model.init, jax.random.key(0))["params"]
    net = tile_net(template, embedding_size=128)
    assert tree.count(template) == total
    assert net.num_tiles == tiles and tiles * 2304 == generated
    kernels = jax.eval_shape(lambda k: net.generate(*both(net, k)), jax.random.key(0))
    leaves = dict(zip(tree.paths(template), jax.tree.leaves(template), strict=True))
    assert {p: x.shape for p, x in kernels.items()} == {
        p: leaves[p].shape for p in net.targets
    }
    assert tree.count(kernels) == generated
    assert total - generated == private
    embeddings = jax.eval_shape(net.init_embeddings, jax.random.key(0))
    assert tree.count(embeddings) == tiles * 128
    # Neither stem nor shortcuts: 2 convolutions a block, all of them in blocks.
    assert all("/conv" in path for path in net.targets)
    assert len(net.targets) == (6 if name == "resnet8" else 36)


def both(net, key):
    first, second = jax.random.split(key)
    return net.init(first), net.init_embeddings(second)


@pytest.mark.parametrize(
    "n, round_trip",
    [
        (1, 640),
        (2, 1_056),
        (4, 2_080),
        (8, 4_896),
        (16, 13_600),
        (32, 43_296),
        (64, 151_840),
        (128, 565_536),
        (256, 2_179_360),
    ],
)
def test_size_of_the_generator(n, round_trip):
    template = {"kernel": jnp.zeros((3, 3, 16, 16))}
    phi = jax.eval_shape(tile_net(template, embedding_size=n).init, jax.random.key(0))
    assert tree.count(phi) == 16 * n**2 + 160 * n + 144 == round_trip // 2
    wide = tile_net(template, embedding_size=n, hidden_size=7)
    count = tree.count(jax.eval_shape(wide.init, jax.random.key(0)))
    assert count == 16 * 7 * n + 16 * 7 + 144 * 7 + 144


def test_only_kernels_that_tiles_fit_are_generated():
    net, _, embeddings = small()
    assert net.targets == {A: (3, 3, 4, 8), B: (3, 3, 2, 4)}
    assert net.num_tiles == 8 + 2
    assert {p: x.shape for p, x in embeddings.items()} == {A: (2, 4, N), B: (1, 2, N)}


# Assembly --------------------------------------------------------------------------


def test_rows_of_tiles_are_inputs_and_columns_outputs():
    # The paper's example: 32x64 is a grid F1..F4 over F5..F8. Here tile j is all j.
    template = {"kernel": jnp.zeros((3, 3, 32, 64))}
    net = tile_net(template, embedding_size=1)
    ones = jax.tree.map(jnp.ones_like, net.init(jax.random.key(0)))
    phi = {layer: {k: x * (k == "w") for k, x in ones[layer].items()} for layer in ones}
    v = jnp.arange(1.0, 9).reshape(2, 4, 1)
    kernel = jax.jit(net.generate)(phi, {"kernel": v})["kernel"]
    expected = np.kron(np.arange(1.0, 9).reshape(2, 4), np.ones((16, 16)))
    np.testing.assert_array_equal(kernel, np.broadcast_to(expected, kernel.shape))


@pytest.mark.parametrize("slices", ["input", "output"])
def test_tiles_are_those_of_the_definition(slices):
    _, phi, embeddings = small(slices)
    kernels = generate(slices)(phi, embeddings)
    phi = jax.tree.map(np.asarray, phi)
    for path in (A, B):
        cut = tiles_of(kernels[path])
        for row, column in np.ndindex(*cut.shape[:2]):
            v = np.asarray(embeddings[path][row, column])
            for i in range(2):
                tile = cut[row, column]
                found = tile[:, :, i] if slices == "input" else tile[:, :, :, i]
                np.testing.assert_allclose(found, one_tile(phi, v, i), atol=1e-5)


def test_an_embedding_moves_its_own_tile_only():
    _, phi, embeddings = small()
    before = generate()(phi, embeddings)
    moved = {**embeddings, A: embeddings[A].at[1, 2].add(1.0)}
    after = generate()(phi, moved)
    np.testing.assert_array_equal(after[B], before[B])
    changed = np.any(tiles_of(after[A]) != tiles_of(before[A]), axis=(2, 3, 4, 5))
    assert np.argwhere(changed).tolist() == [[1, 2]]


# Algebra ---------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, -2.0])
def test_kernels_are_affine_in_embeddings(share):
    net, phi, first = small()
    second = net.init_embeddings(jax.random.key(2))
    between = jax.tree.map(lambda a, b: share * a + (1 - share) * b, first, second)
    kernels = [generate()(phi, v) for v in (first, second, between)]
    expected = jax.tree.map(lambda a, b: share * a + (1 - share) * b, *kernels[:2])
    for path in (A, B):
        np.testing.assert_allclose(kernels[2][path], expected[path], atol=2e-5)


def test_rank_of_all_tiles_is_at_most_the_embeddings_size():
    _, phi, embeddings = small()
    kernels = generate()(phi, embeddings)
    flat = np.concatenate([tiles_of(kernels[p]).reshape(-1, 36) for p in (A, B)])
    values = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
    # 10 tiles of 36 numbers would have rank 9; embeddings have 3 numbers.
    assert values[N - 1] > 0.1 and values[N] < 1e-5 * values[0]


def test_embedding_gradients_do_not_depend_on_other_tiles():
    _, phi, embeddings = small()

    @jax.jit
    def pull_back(cotangent):
        return jax.vjp(lambda v: generate()(phi, v), embeddings)[1](cotangent)[0]

    draw = np.random.default_rng(1)
    kernels = generate()(phi, embeddings)
    cotangent = {p: draw.normal(size=x.shape) for p, x in kernels.items()}
    cotangent = {p: jnp.float32(x) for p, x in cotangent.items()}
    whole = pull_back(cotangent)
    # Tile (1, 2) of A has inputs 2, 3 and outputs 4, 5.
    alone = jax.tree.map(jnp.zeros_like, cotangent)
    alone[A] = alone[A].at[:, :, 2:4, 4:6].set(cotangent[A][:, :, 2:4, 4:6])
    gradient = pull_back(alone)
    np.testing.assert_allclose(gradient[A][1, 2], whole[A][1, 2], rtol=1e-6)
    assert np.count_nonzero(gradient[A]) == N and not np.any(gradient[B])


# Initialisation --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("hidden_size", [None, 32])
def test_generated_kernels_have_hes_variance(hidden_size):
    template = {
        "first": jnp.zeros((3, 3, 16, 512)),
        "second": jnp.zeros((3, 3, 64, 512)),
    }
    net = tile_net(template, embedding_size=64, hidden_size=hidden_size)

    @jax.jit
    def mean_squares(key):
        kernels = net.generate(*both(net, key))
        return {p: jnp.mean(jnp.square(x)) for p, x in kernels.items()}

    found = jax.vmap(mean_squares)(jax.random.split(jax.random.key(0), 8))
    for path, inputs in (("first", 16), ("second", 64)):
        # One generator is off by 3 % (its 144 x 64 and 32 or more embeddings), and
        # the mean of 8 by 1 %.
        variance = float(jnp.mean(found[path]))
        assert variance == pytest.approx(2 / (9 * inputs), rel=0.04)
    biases = {k: x for k, x in net.init(jax.random.key(0)).items() if k[0] == "b"}
    assert not any(np.any(x) for x in biases.values())


def test_normal_initialisation_is_cut_off_and_far_too_large():
    template = {"kernel": jnp.zeros((3, 3, 16, 256))}
    net = tile_net(template, embedding_size=64, init="normal")
    phi, embeddings = both(net, jax.random.key(0))
    # N(0, 1) cut off at 2 has variance 1 - 4 pdf(2) / (2 cdf(2) - 1) = 0.774.
    for x in (*jax.tree.leaves(phi), *jax.tree.leaves(embeddings)):
        assert np.abs(x).max() <= 2 and np.std(x) == pytest.approx(0.88, abs=0.1)
    kernel = jax.jit(net.generate)(phi, embeddings)["kernel"]
    v = 0.774
    expected = math.sqrt(64 * v * (64 * v * v + v) + v)  # 44
    assert np.std(kernel) == pytest.approx(expected, rel=0.1)


# Mistakes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tile=5), "no kernel of the model is made of tiles 3x3x5x5"),
        (dict(size=5), "tiles 5x5x16x16, .*leaves are a/kernel"),
        (dict(init="he"), "init='he'"),
        (dict(slices="in"), "slices='in'"),
        (dict(embedding_size=0), "embedding_size=0 must be at least 1"),
        (dict(hidden_size=0), "hidden_size=0 must be at least 1"),
        (dict(tile=0), "tile=0 must be at least 1"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tile_net(TEMPLATE, **{"embedding_size": 2, **options})
