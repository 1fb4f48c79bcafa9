"""Convolutions of oneDNN where they are built, and nothing where they are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import native
from hyperjax.models import check_rule, convolutions, rule_in_plan
from hyperjax.native import build

built = pytest.mark.skipif(not native.version(), reason="oneDNN is not built")

# Kernel, stride, inputs, padding: the networks', one that leaves columns out, uneven.
SHAPES = [
    (3, 1, (9, 8, 16), ((1, 1), (1, 1))),
    (3, 2, (9, 8, 3), ((0, 1), (1, 0))),
    (5, 1, (8, 12, 6), ((0, 0), (0, 0))),
    (1, 2, (7, 8, 4), ((0, 0), (0, 0))),
]


def numbers(size, shape):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, *shape))
    kernel = draw.normal(size=(size, size, shape[-1], 5)) / size / shape[-1] ** 0.5
    return np.float32(x), np.float32(kernel)


@built
@pytest.mark.parametrize(("size", "stride", "shape", "pads"), SHAPES)
def test_derivatives_of_two_orders_are_autodiffs(size, stride, shape, pads):
    def outputs(convolve, x, kernel):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, stride, pads)))

        def of_gradients(x, kernel):
            to_x, to_kernel = jax.grad(loss, (0, 1))(x, kernel)
            return jnp.sum(jnp.square(to_x)) + jnp.sum(jnp.sin(to_kernel))

        y = convolve(x, kernel, stride, pads)
        firsts = jax.grad(loss, (0, 1))(x, kernel)
        return y, firsts, jax.grad(of_gradients, (0, 1))(x, kernel)

    x, kernel = numbers(size, shape)
    expected = jax.jit(functools.partial(outputs, convolutions._xla_conv))(x, kernel)
    found = jax.jit(functools.partial(outputs, native.convolve))(x, kernel)
    expected, found = (jax.tree.leaves(leaves) for leaves in (expected, found))
    for a, b, tolerance in zip(found, expected, [2e-6] * 3 + [1e-4] * 2, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@built
def test_clients_with_kernels_of_their_own():
    size, stride, shape, pads = SHAPES[0]
    x, kernel = numbers(size, shape)
    xs, kernels = np.stack([x, x + 1]), np.stack([kernel, -2 * kernel])

    def gradient(x, kernel):
        def loss(kernel):
            return jnp.sum(jnp.sin(native.convolve(x, kernel, stride, pads)))

        return jax.grad(loss)(kernel)

    alone = [jax.jit(gradient)(*of) for of in zip(xs, kernels, strict=True)]
    mapped = jax.jit(lambda *of: jax.lax.map(lambda x: gradient(*x), of))(xs, kernels)
    vmapped = jax.jit(jax.vmap(gradient))(xs, kernels)
    np.testing.assert_array_equal(mapped, alone)
    np.testing.assert_array_equal(vmapped, alone)
    mesh = jax.make_mesh((2,), ("clients",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("clients")
    sharded = jax.jit(
        jax.shard_map(
            jax.vmap(gradient),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
    )
    np.testing.assert_array_equal(sharded(xs, kernels), alone)


@built
def test_devices_that_compute_at_the_same_time_do_not_meet():
    draw = np.random.default_rng(0)
    x = np.float32(draw.normal(size=(2, 32, 16, 16, 16)))
    kernels = np.float32(draw.normal(size=(2, 3, 3, 16, 16)) / 12)

    def step(x, kernel):
        def loss(kernel):
            y = native.convolve(x, kernel, 1, ((1, 1), (1, 1)))
            y = native.convolve(jnp.tanh(y), kernel, 1, ((1, 1), (1, 1)))
            return jnp.mean(jnp.square(y))

        return kernel - jax.grad(loss)(kernel)

    def steps(x, kernel):
        return jax.lax.fori_loop(0, 10, lambda _, k: step(x, k), kernel)

    alone = [jax.jit(steps)(*of) for of in zip(x, kernels, strict=True)]
    mesh = jax.make_mesh((2,), ("clients",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("clients")
    own = jax.shard_map(
        jax.vmap(steps), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    np.testing.assert_array_equal(jax.jit(own)(x, kernels), alone)


@built
def test_the_rule_is_for_float32_of_known_sizes():
    name = native._target("Forward")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name)]

    def program(rule, *of):
        function = jax.jit(lambda *of: convolutions.convolve(*of, 1, "SAME", rule))
        return jax.export.export(function, disabled_checks=allowed)(*of).mlir_module()

    kernel = jax.ShapeDtypeStruct((3, 3, 32, 32), jnp.float32)
    for rule in ("auto", "onednn"):
        known = jax.ShapeDtypeStruct((2, 8, 8, 32), jnp.float32)
        assert name in program(rule, known, kernel)
        (batch,) = jax.export.symbolic_shape("batch")
        unknown = jax.ShapeDtypeStruct((batch, 8, 8, 32), jnp.float32)
        assert name not in program(rule, unknown, kernel)
        halves = [known.update(dtype=jnp.bfloat16), kernel.update(dtype=jnp.bfloat16)]
        assert name not in program(rule, *halves)


def test_auto_takes_it_where_it_is_faster():
    shapes = ((3, 3, 16, 32), (5, 5, 3, 16), (5, 5, 6, 16), (3, 3, 20, 10))
    found = [convolutions.cpu_rule(shape, True) for shape in shapes]
    assert found == ["onednn", "onednn", "stripes", "scan"]
    found = [convolutions.cpu_rule(shape) for shape in shapes]
    assert found == ["scan", "stripes", "stripes", "scan"]


def test_auto_on_a_gpu_is_a_product_of_patches_up_to_64_channels(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for channels, convolved in ((64, False), (65, True)):
        x, kernel = jnp.ones((2, 8, 8, channels)), jnp.ones((3, 3, channels, 4))

        def apply(x, kernel):
            return convolutions.convolve(x, kernel, 1, "SAME", "auto")

        assert ("conv_general" in str(jax.make_jaxpr(apply)(x, kernel))) == convolved


def test_a_plan_says_what_is_built_in(monkeypatch):
    monkeypatch.setattr(native, "version", lambda: "")
    assert [rule_in_plan(rule) for rule in ("auto", "scan")] == ["auto", "scan"]
    monkeypatch.setattr(native, "version", lambda: "3.2.0")
    assert rule_in_plan("auto") == "auto, oneDNN 3.2.0"
    assert rule_in_plan("onednn") == "onednn, oneDNN 3.2.0"
    assert rule_in_plan("scan") == "scan"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert rule_in_plan("auto") == "auto"
    with pytest.raises(ValueError, match="is for the CPU, not for gpu"):
        convolutions.convolve(*numbers(3, (4, 4, 1)), 1, "SAME", "onednn")


def test_what_is_not_built_is_refused(monkeypatch):
    monkeypatch.setattr(native, "version", lambda: "")
    check_rule("auto")
    for refuse in (
        lambda: check_rule("onednn"),
        lambda: convolutions.convolve(*numbers(3, (4, 4, 1)), 1, "SAME", "onednn"),
    ):
        with pytest.raises(ValueError, match=r"conv_rule='onednn' is.*native\.build"):
            refuse()


def test_building_says_what_is_missing(monkeypatch, tmp_path, capsys):
    library = tmp_path / "onednn.library"
    monkeypatch.setattr(native, "LIBRARY", library)
    monkeypatch.setattr(build, "HEADERS", ("no-such-package", "dnnl.hpp"))
    monkeypatch.setenv("CXX", "c++")
    assert build.main([]) == 2
    assert "pip install 'hyperjax[native]'" in capsys.readouterr().err
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert build.main([]) == 2 and "no C++ compiler" in capsys.readouterr().err
    assert build.main(["--clean"]) == 2 and "--remove" in capsys.readouterr().err
    assert build.main(["--remove"]) == 0 and not list(tmp_path.iterdir())
