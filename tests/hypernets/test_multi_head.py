"""MH-pFedHN's hypernetwork: published sizes, and its formula."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.hypernets.multi_head import multi_head

KEY = jax.random.key(0)
# CNN, VGG8, ResNet10, ResNet12, ResNet18 of the paper.
CIFAR10 = (234_006, 268_814, 347_178, 523_242, 565_386)
CIFAR100 = (239_856, 274_664, 353_028, 529_092, 571_236)
# MLP, SqueezeNet 1.1, SqueezeNet 1.0: of clients that come later.
LATER = (408_100, 773_796, 786_724)


@functools.cache
def small(*sizes, output_size=8):
    return multi_head(
        sizes, output_size=output_size, embedding_size=3, hidden_size=5, num_layers=2
    )


@functools.cache
def drawn(*sizes):
    net = small(*sizes)
    return net.init(KEY), {
        size: net.init_embeddings(KEY, 2, size) * 500 for size in sizes
    }


def by_hand(phi, head, embeddings, size):
    """The formula, in float64."""
    a = np.float64(embeddings)
    for i in range(2):
        layer = phi["extractor"][f"Dense_{i}"]
        a = np.maximum(a @ np.float64(layer["kernel"]) + layer["bias"], 0)
    parts = [a[r] @ np.float64(head["w"][r]) + head["b"][r] for r in range(len(a))]
    return np.concatenate(parts)[:size]


# Sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "positions"),
    [
        (CIFAR10, (77, 88, 114, 171, 185)),
        (CIFAR100, (79, 90, 115, 173, 186)),
        (LATER, (133, 252, 257)),
        ((1, 3071, 3072, 3073), (1, 1, 1, 2)),
    ],
)
def test_published_positions(sizes, positions):
    assert multi_head(sizes).positions == dict(zip(sizes, positions, strict=True))


@pytest.mark.parametrize(
    ("sizes", "num_clients", "numbers"),
    [
        (CIFAR100[:1], 50, 31_600_896),
        (CIFAR100, 50, 255_266_048),
        (CIFAR100, 100, 255_677_568),
    ],
)
def test_published_numbers(sizes, num_clients, numbers):
    net = multi_head(sizes)
    phi = jax.eval_shape(net.init, KEY)
    assert tree.count(phi["extractor"]) == 41_344
    for m, head in phi["heads"].items():
        assert tree.count(head) == int(m) * 396_288
        assert head["w"].shape == (int(m), 128, 3072)
    each = num_clients // len(sizes)
    tables = [
        jax.eval_shape(lambda size=size: net.init_embeddings(KEY, each, size))
        for size in sizes
    ]
    assert tree.count((phi, tables)) == numbers


def test_heads_belong_to_numbers_of_positions():
    assert small(20, 17, 24, 9).positions == {20: 3, 17: 3, 24: 3, 9: 2}
    several = small(20, 17, 24, 9).init(KEY)
    assert several["heads"].keys() == {"3", "2"}
    # In whatever order sizes come, and whatever others there are.
    chex.assert_trees_all_equal(several, small(9, 24, 17, 20).init(KEY))
    alone = small(17).init(KEY)
    chex.assert_trees_all_equal(alone["heads"]["3"], several["heads"]["3"])
    chex.assert_trees_all_equal(alone["extractor"], several["extractor"])


# The formula -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [17, 20, 24, 9])
def test_generated_numbers_equal_the_formula(size):
    phi, embeddings = drawn(20, 17, 24, 9)
    net = small(20, 17, 24, 9)
    head = phi["heads"][str(net.positions[size])]
    for v in embeddings[size]:
        found = net.generate(phi["extractor"], head, v, size)
        assert found.shape == (size,)
        expected = by_hand(phi, head, v, size)
        assert np.std(expected) > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [7, 8])
def test_one_position_is_one_linear_layer(size):
    phi, embeddings = drawn(size)
    net = small(size)
    assert net.positions == {size: 1}
    assert phi["heads"]["1"]["w"].shape == (1, 5, 8)
    found = net.generate(phi["extractor"], phi["heads"]["1"], embeddings[size][0], size)
    np.testing.assert_allclose(
        found, by_hand(phi, phi["heads"]["1"], embeddings[size][0], size), rtol=1e-5
    )


def test_positions_share_the_extractor_only():
    phi, embeddings = drawn(20)
    net, head, v = small(20), phi["heads"]["3"], embeddings[20][0]
    before = np.asarray(net.generate(phi["extractor"], head, v, 20))
    for r in range(3):
        here = np.zeros(20, bool)
        here[8 * r : 8 * r + 8] = True
        for name in ("w", "b"):
            other = {**head, name: head[name].at[r].add(1.0)}
            after = np.asarray(net.generate(phi["extractor"], other, v, 20))
            np.testing.assert_array_equal(after != before, here)
        after = np.asarray(net.generate(phi["extractor"], head, v.at[r].add(1.0), 20))
        np.testing.assert_array_equal(after != before, here)
    # Equal embeddings do not make equal parts.
    same = net.generate(phi["extractor"], head, jnp.tile(v[:1], (3, 1)), 20)
    assert np.all(same[:8] != same[8:16])


def test_what_is_cut_off_gets_no_gradient():
    phi, embeddings = drawn(20)
    weight = jnp.arange(1.0, 21.0)

    def value(head):
        return weight @ small(20).generate(
            phi["extractor"], head, embeddings[20][0], 20
        )

    grads = jax.grad(value)(phi["heads"]["3"])
    # The last position's last 4 of 8.
    assert np.all(grads["b"][2, 4:] == 0) and np.all(grads["w"][2, :, 4:] == 0)
    np.testing.assert_array_equal(grads["b"].reshape(-1)[:20], weight)
    assert np.all(np.any(np.asarray(grads["w"]) != 0, axis=1).reshape(-1)[:20])


def test_networks_start_alike():
    # Numerically: a deviation of 0.057, and 0.2 % between clients of a group.
    net = multi_head([4000], output_size=1024)
    phi, v = net.init(KEY), net.init_embeddings(jax.random.key(1), 2, 4000)
    assert np.std(v) == pytest.approx(0.002, rel=0.1)
    theta = [
        net.generate(phi["extractor"], phi["heads"]["4"], each, 4000) for each in v
    ]
    assert float(jnp.std(theta[0])) == pytest.approx(0.057, rel=0.05)
    distance = float(tree.norm(theta[0] - theta[1]) / tree.norm(theta[0]))
    assert 0.001 < distance < 0.004


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sizes=[3, 0]), "size=0 must be at least 1"),
        (dict(output_size=0), "output_size=0 must be at least 1"),
        (dict(embedding_size=0), "embedding_size=0 must be at least 1"),
        (dict(hidden_size=0), "hidden_size=0 must be at least 1"),
        (dict(num_layers=0), "num_layers=0 must be at least 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        multi_head(**{"sizes": [3], **options})
