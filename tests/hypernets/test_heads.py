"""pFedHN's hypernetwork: sizes, its formula, and how its outputs start."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.hypernets import heads
from hyperjax.models import HEAD, ZOO, from_linen

SPEC = {
    "w": jax.ShapeDtypeStruct((2, 3), jnp.float32),
    "b": jax.ShapeDtypeStruct((), jnp.float32),
}


def target(num_classes, keep=None):
    """The abstract leaves of pFedHN's network, by path."""
    model = from_linen(ZOO["pfedhn_cnn"](num_classes), (32, 32, 3), num_classes)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    return tree.splitter(variables, keep).split(variables)[1]


@pytest.mark.parametrize(
    ("num_clients", "num_classes", "keep", "expected"),
    [
        (50, 10, None, 12_271_732),
        (50, 100, None, 13_044_382),
        (50, 10, HEAD, 12_185_882),
        (50, 100, HEAD, 12_185_882),
        (10, 10, None, 101 * 121_182 + 4 * 100 + 3 * 101 * 100 + 10 * 3),
    ],
)
def test_published_sizes_with_embeddings(num_clients, num_classes, keep, expected):
    size = 1 + num_clients // 4
    net = heads.per_tensor(target(num_classes, keep), condition_size=size)
    phi = jax.eval_shape(net.init, jax.random.key(0))
    assert len(phi["heads"]) == (8 if keep else 10)
    assert tree.count(phi) + num_clients * size == expected


def built(**options):
    net = heads.per_tensor(SPEC, **{"condition_size": 2, "hidden_size": 4, **options})
    return net, jax.jit(net.init)(jax.random.key(0))


def test_outputs_are_the_formula():
    net, phi = built(num_hidden=2)
    v = np.float32([0.5, -2.0])
    trunk, a = jax.device_get(phi["trunk"]), v
    for i in range(3):
        # relu before each layer but the first, and none before the heads.
        a = np.maximum(a, 0) if i else a
        a = a @ trunk[f"Dense_{i}"]["kernel"] + trunk[f"Dense_{i}"]["bias"]
    assert a.min() < 0
    expected = {
        name: (a @ head["kernel"] + head["bias"]).reshape(SPEC[name].shape)
        for name, head in jax.device_get(phi["heads"]).items()
    }
    found = net.generate(phi, v)
    chex.assert_trees_all_equal_shapes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_hidden_layers_it_is_affine():
    net, phi = built(num_hidden=0)
    a, b = jnp.array([0.5, -2.0]), jnp.array([3.0, 1.0])
    ends = [net.generate(phi, v) for v in (a, b)]
    middle = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, *ends)
    found = net.generate(phi, 0.25 * a + 0.75 * b)
    chex.assert_trees_all_close(found, middle, rtol=1e-5, atol=1e-6)


def test_outputs_start_at_one_scale_and_clients_apart():
    # For 50 clients: entries of deviation 0.073 whatever their layer; clients are apart
    # by 27 to 37 % of their norm, over six draws.
    shapes = {"conv": (5, 5, 3, 16), "fc": (84, 10)}
    spec = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    net = heads.per_tensor(spec, condition_size=13)

    @jax.jit
    def outputs(key):
        v = jax.random.normal(key, (8, 13))
        return jax.vmap(net.generate, (None, 0))(net.init(key), v)

    found = jax.device_get(outputs(jax.random.key(0)))
    for x in found.values():
        assert x.std() == pytest.approx(0.073, rel=0.1)
        gap = np.linalg.norm(x[:-1] - x[1:]) / np.linalg.norm(x[:-1])
        assert gap == pytest.approx(0.32, rel=0.25)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(condition_size=0), "condition_size=0 must be at least 1"),
        (dict(hidden_size=0), "hidden_size=0 must be at least 1"),
        (dict(num_hidden=-1), "num_hidden=-1 must be at least 0"),
    ],
)
def test_bad_input(option, message):
    with pytest.raises(ValueError, match=message):
        built(**option)


# pFedLHN ------------------------------------------------------------------------------


def layered(**options):
    sizes = dict(num_bases=2, basis_size=3, hidden_size=4)
    net, size = heads.per_layer(SPEC, **{**sizes, **options})
    return net, size, jax.jit(net.init)(jax.random.key(0))


@pytest.mark.parametrize(("one_row", "num_rows"), [(False, 2), (True, 1)])
def test_a_tensor_is_linear_in_its_own_row(one_row, num_rows):
    net, size, phi = layered(one_row=one_row)
    assert size == 2 * num_rows
    v = np.float32([0.5, -2.0, 3.0, 1.0])[:size]
    rows = np.broadcast_to(v.reshape(num_rows, 2), (2, 2))
    shown = jax.device_get(phi)
    hidden = rows @ shown["bases"] @ shown["trunk"]["kernel"] + shown["trunk"]["bias"]
    expected = {}
    for name, a in zip(("b", "w"), hidden, strict=True):
        head = shown["heads"][name]
        numbers = a @ head["kernel"] + head["bias"]
        expected[name] = numbers.reshape(SPEC[name].shape)
    found = net.generate(phi, jnp.asarray(v))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["num_bases", "basis_size", "hidden_size"])
def test_layers_of_no_size_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        heads.per_layer(SPEC, **{name: 0})
