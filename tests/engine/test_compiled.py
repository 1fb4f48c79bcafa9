"""Programs run under the settings of JAX that people debug with, or say which not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import compiling
from hyperjax.engine import compiled, sharding


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_transfer_guard_host_to_device", "disallow"),
        ("jax_no_tracing", True),
    ],
)
def test_settings_under_which_nothing_runs_are_named(setting, value):
    now = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        with pytest.raises(ValueError, match=f"{setting.upper()}={value}.*Unset it"):
            compiled.Compiled()
    finally:
        jax.config.update(setting, now)
    compiled.Compiled()


@pytest.mark.parametrize("error", [RuntimeError("no such thing"), AssertionError()])
def test_a_backend_that_is_not_there_is_named(error, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    with pytest.raises(ValueError, match=r"finds no device: (no such|Ass).*JAX_PLATF"):
        compiled.check_jax()


@pytest.mark.parametrize("devices", [1, 2])
def test_without_jit_functions_run_operation_by_operation(devices):
    mesh = sharding.client_mesh(devices, devices)
    traced = []

    def run(x):
        traced.append(not isinstance(x, jax.core.Tracer))
        return jax.lax.scan(lambda c, y: (c + y, c), jnp.float32(0), x)

    x = jnp.arange(4.0)
    program = compiled.Compiled(mesh)
    expected = program("run", run, (x,))
    with jax.disable_jit():
        found = program("run", run, (x,))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding
    assert traced == [False, True] and program.seconds > 0


def test_programs_are_traced_and_compiled_as_their_numerics_say(monkeypatch):
    def run(x):
        traced.append(jax.config.jax_default_matmul_precision)
        return x @ x

    traced: list[str | None] = []
    x, before = jnp.ones((2, 2)), jax.config.jax_default_matmul_precision
    numerics = compiling.Numerics(precision="highest", deterministic=True)
    assert numerics.options() == {}  # on a CPU
    # XLA knows the option wherever it runs, and refuses those that it does not know.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert numerics.options() == {"xla_gpu_deterministic_ops": True}
    compiled.Compiled(numerics=numerics)("run", run, (x,))
    compiled.Compiled()("run", run, (x,))
    assert traced == ["highest", before]
    assert jax.config.jax_default_matmul_precision == before


def test_families_have_programs_of_their_own_under_one_name():
    program, heard, x = compiled.Compiled(), [], jnp.ones(3)
    program.watcher = heard.append
    for family, step in (("a", 1), ("b", 2), ("a", 3)):
        found = program("add", lambda x, s=step: x + s, (x,), family=family)
        assert found[0] == {"a": 2, "b": 3}[family]
    assert heard == ["add", None] * 2
