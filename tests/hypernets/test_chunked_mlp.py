"""The chunked MLP: the published parameter budget, its structure, its scales."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.hypernets import layout, mlp
from hyperjax.models import ZOO, from_linen

# The residual network of the published budget, and what is left for extractor + noise.
RESNET, EXTRACTOR = 282_760, 7_843


def spec(size):
    return {"w": jax.ShapeDtypeStruct((size,), jnp.float32)}


def size(template, *, condition_size=16, **options):
    net = mlp.chunked_mlp(template, condition_size=condition_size, **options)
    return mlp.num_parameters(net)


def percent(hypernet, target=RESNET, extractor=EXTRACTOR):
    return 100 * ((hypernet + extractor) / target - 1)


# Budget ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "expected", "published"),
    [(100, 79_432, -69.13), (300, 281_432, 2.30), (500, 563_432, 102.04)],
)
def test_published_overheads(width, expected, published):
    assert layout.flat(spec(RESNET), 576).num_chunks == 491
    total = size(spec(RESNET), hidden=(width, width))
    assert total == expected
    # Published to two decimals of a percent.
    assert round(percent(total), 2) == published


@pytest.mark.parametrize(
    ("chunk_size", "num_chunks", "expected", "overhead"),
    [(144, 1_964, 174_968, -35.3), (2304, 123, 795_672, 184.2)],
)
def test_chunk_size_sweep(chunk_size, num_chunks, expected, overhead):
    assert layout.flat(spec(RESNET), chunk_size).num_chunks == num_chunks
    total = size(spec(RESNET), chunk_size=chunk_size)
    assert total == expected
    assert round(percent(total), 1) == overhead


@pytest.mark.parametrize(
    ("condition_size", "expected", "overhead"),
    [
        (2, 277_232, 0.8),
        (8, 279_032, 1.5),
        (16, 281_432, 2.3),
        (32, 286_232, 4.0),
        (64, 295_832, 7.4),
    ],
)
def test_embedding_size_sweep(condition_size, expected, overhead):
    total = size(spec(RESNET), condition_size=condition_size)
    assert total == expected
    assert round(percent(total), 1) == overhead


@pytest.mark.parametrize(
    ("name", "chunk_size", "width", "expected"),
    [
        ("lenet", 1024, 300, 415_160),
        ("mlp", 576, 200, 168_112),
        ("mlp", 576, 220, 188_712),
        ("lenet_s", 144, 52, 14_536),
    ],
)
def test_budgets_of_the_other_targets(name, chunk_size, width, expected):
    model = from_linen(ZOO[name](10), (28, 28, 1), 10)
    template = jax.eval_shape(model.init, jax.random.key(0))["params"]
    total = size(template, chunk_size=chunk_size, hidden=(width, width))
    assert total == expected
    if width != 200:  # with the extractor's 6,944: within 5 % of the target
        assert abs(percent(total, tree.count(template), 6_944)) < 5


def test_count_formula_for_any_depth():
    # 3 chunks of 4 for 10 numbers; d_c 2, P 3.
    common = dict(condition_size=3, chunk_size=4, chunk_embedding_size=2)
    assert size(spec(10), hidden=(), **common) == 3 * 2 + 5 * 4 + 4
    assert size(spec(10), hidden=(7,), **common) == 6 + 5 * 7 + 7 + 7 * 4 + 4
    assert size(spec(10), hidden=(7, 6, 5), **common) == (
        6 + (5 * 7 + 7) + (7 * 6 + 6) + (6 * 5 + 5) + (5 * 4 + 4)
    )


# Structure -------------------------------------------------------------------------

TEMPLATE = {
    "conv": {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)},
    "norm": {"bias": jnp.zeros(3), "scale": jnp.ones(3)},
    "dense": {"kernel": jnp.zeros((3, 5))},
}  # 33 numbers
CONDITION = jnp.array([0.7, 0.2, 0.1])


def filled(net):
    """Parameters of the right shapes (compiling a small `init` takes long)."""
    rng = np.random.default_rng(0)
    spec = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), spec)


def small(template=TEMPLATE, **options):
    options = dict(chunk_size=6, chunk_embedding_size=2, hidden=(8,)) | options
    return mlp.chunked_mlp(template, condition_size=3, **options)


@functools.cache
def small_phi():
    return filled(small())


@functools.cache
def small_generate():
    return jax.jit(small().generate)


def test_generates_the_template():
    target = small_generate()(small_phi(), CONDITION)
    chex.assert_trees_all_equal_shapes_and_dtypes(target, TEMPLATE)


def test_is_its_formula():
    target = small_generate()(small_phi(), CONDITION)
    phi = small_phi()
    assert phi["chunks"].shape == (6, 2)  # 33 numbers in chunks of 6
    first, last = (phi["mlp"][f"Dense_{i}"] for i in range(2))
    rows = []
    for embedding in phi["chunks"]:
        u = np.concatenate([CONDITION, embedding])
        hidden = np.maximum(u @ first["kernel"] + first["bias"], 0)
        rows.append(hidden @ last["kernel"] + last["bias"])
    flat = np.concatenate([x.reshape(-1) for x in jax.tree.leaves(target)])
    np.testing.assert_allclose(flat, np.concatenate(rows)[:33], rtol=1e-5, atol=1e-5)


def test_permuting_chunk_embeddings_permutes_blocks():
    phi = small_phi()
    chunks = layout.flat(TEMPLATE, 6)
    order = np.array([2, 0, 4, 1, 3, 5])
    permuted = {**phi, "chunks": phi["chunks"][order]}
    blocks, moved = (
        np.asarray(chunks.cut(small_generate()(p, CONDITION))) for p in (phi, permuted)
    )
    np.testing.assert_allclose(moved, blocks[order], rtol=1e-6, atol=1e-6)
    assert len(np.unique(blocks[:, 0].round(5))) == 6


def test_condition_reaches_every_tensor():
    a, b = (
        small_generate()(small_phi(), e)
        for e in (CONDITION, jnp.array([0.0, 0.0, 1.0]))
    )
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() > 1e-2


def test_surplus_outputs_have_no_gradient():
    # One chunk of 6 holds all of a target of 4 numbers: outputs 4 and 5 feed nothing.
    net = small({"w": jnp.zeros(4)})

    phi = filled(net)

    @jax.jit
    def gradient(phi):
        return jax.grad(lambda p: jnp.sum(net.generate(p, CONDITION)["w"] ** 2))(phi)

    grads = jax.tree.map(np.asarray, gradient(phi))
    last = grads["mlp"]["Dense_1"]
    np.testing.assert_array_equal(last["kernel"][:, 4:], 0)
    np.testing.assert_array_equal(last["bias"][4:], 0)
    assert np.abs(last["bias"][:4]).min() > 0


@pytest.mark.parametrize("chunk_batch_size", [1, 4, 50])
def test_generation_in_groups_agrees(chunk_batch_size):
    phi = small_phi()

    def outputs(net):
        def total(phi, e):
            target = net.generate(phi, e)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(target)), target

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(phi, CONDITION)

    groups = small(chunk_batch_size=chunk_batch_size)
    assert mlp.num_parameters(groups) == mlp.num_parameters(small())
    chex.assert_trees_all_close(outputs(groups), outputs(small()), rtol=1e-5, atol=1e-5)


# Scales ----------------------------------------------------------------------------


def test_deviation_at_initialisation_is_published_one():
    # PyTorch's initialisation, P = d_c = 16, hidden 300, 300, S = 576: about 0.078
    # whatever the layer, for diffuse and for one-hot conditions.
    net = mlp.chunked_mlp({"w": jnp.zeros(57_600)}, condition_size=16)
    init, generate = jax.jit(net.init), jax.jit(net.generate)
    for seed in range(3):
        phi = init(jax.random.key(seed))
        assert float(np.std(phi["chunks"])) == pytest.approx(1, abs=0.1)
        diffuse = np.asarray(generate(phi, np.full(16, 1 / 16, np.float32))["w"])
        one_hot = np.asarray(generate(phi, np.eye(16, dtype=np.float32)[3])["w"])
        assert 0.07 < np.std(diffuse) < 0.09
        change = np.linalg.norm(one_hot - diffuse) / np.linalg.norm(diffuse)
        assert 0.1 < float(change) < 0.35


@pytest.mark.slow
def test_fan_in_gives_each_tensor_its_own_deviation():
    rng = np.random.default_rng(0)
    template = {
        "wide": np.float32(rng.normal(scale=0.01, size=(100, 60))),
        "narrow": np.float32(rng.normal(scale=0.5, size=(90, 60))),
        "zeros": np.zeros(60, np.float32),
    }
    options = dict(chunk_size=300, hidden=(50,), chunk_embedding_size=8)
    plain = small(template, **options)
    scaled = small(template, out_scale="fan_in", **options)
    assert mlp.num_parameters(plain) == mlp.num_parameters(scaled)

    @jax.jit
    def both(key):
        phi = plain.init(key)
        return plain.generate(phi, CONDITION), scaled.generate(phi, CONDITION)

    before, after = jax.tree.map(np.asarray, both(jax.random.key(5)))
    for name in ("wide", "narrow"):
        # One constant per tensor ...
        ratio = after[name] / before[name]
        # Numbers near zero are differences of larger ones.
        np.testing.assert_allclose(ratio, np.median(ratio), rtol=2e-3)
        # ... which is fixed, so another draw of phi matches up to sampling.
        np.testing.assert_allclose(
            np.std(after[name]), np.std(template[name]), rtol=0.15
        )
    # A constant tensor has no deviation to match.
    np.testing.assert_array_equal(after["zeros"], before["zeros"])


def test_norm_scale_offset_moves_scales_only():
    phi = small_phi()
    plain = small_generate()(phi, CONDITION)
    moved = jax.jit(small(norm_scale_offset=1.0).generate)(phi, CONDITION)
    expected = {
        **plain,
        "norm": {**plain["norm"], "scale": plain["norm"]["scale"] + 1.0},
    }
    chex.assert_trees_all_equal(moved, expected)


# Errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chunk_size=0), "chunk_size=0"),
        (dict(chunk_embedding_size=0), "chunk_embedding_size=0"),
        (dict(hidden=(8, 0)), "hidden=0"),
        (dict(chunk_batch_size=-1), "chunk_batch_size=-1"),
        (dict(out_scale="fanin"), r"out_scale='fanin'.*did you mean 'fan_in'"),
        (dict(out_scale="xyz"), r"accepted: 'none', 'fan_in'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_condition_size_below_one():
    with pytest.raises(ValueError, match="condition_size=0"):
        mlp.chunked_mlp(TEMPLATE, condition_size=0)
