"""What the compiler is asked to do, and what goes before."""

import jax
import jax.numpy as jnp
import pytest

from hyperjax import compiling

DISABLED = "jax_disable_most_optimizations"


@pytest.fixture
def free(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    before = jax.config.read(DISABLED)
    jax.config.update(DISABLED, False)
    yield
    jax.config.update(DISABLED, before)


def test_programs_by_how_often_they_run(free):
    assert (compiling.level(), compiling.level(compiling.ONCE)) == (1, 0)
    found = compiling.once(lambda x: 2 * x + 1)(jnp.arange(3.0))
    assert found.tolist() == [1.0, 3.0, 5.0]


def test_what_a_user_says_goes_before(free, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert compiling.level() is None and compiling.options() == {}
    monkeypatch.delenv("XLA_FLAGS")
    jax.config.update(DISABLED, True)
    assert compiling.options(compiling.ONCE) == {}


def test_accelerators_are_left_alone(free, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiling.options() == {}
