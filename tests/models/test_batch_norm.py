"""Batch normalisation: by hand, against Flax's, and blind to padding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.models.layers import BatchNorm

REAL = np.array([1, 0, 1, 1, 0, 1], np.float32)


def fresh(channels, scale=1.0, bias=0.0):
    full = jnp.full(channels, 1.0)
    return {
        "params": {"scale": scale * full, "bias": bias * full},
        "batch_stats": {"mean": 0 * full, "var": full},
    }


@jax.jit
def trained(variables, x, mask=None):
    return BatchNorm().apply(variables, x, True, mask, mutable=["batch_stats"])


@jax.jit
def gradients(params, x, mask):
    """Of a loss over the real samples."""

    def loss(params, x):
        variables = fresh(x.shape[-1]) | {"params": params}
        y, _ = BatchNorm().apply(variables, x, True, mask, mutable=["batch_stats"])
        real = mask.reshape(-1, *[1] * (x.ndim - 1)) > 0
        return jnp.sum(jnp.where(real, jnp.sin(y) * (1 + jnp.square(y)), 0.0))

    return jax.grad(loss, (0, 1))(params, x)


def inputs(n=4, channels=2):
    rng = np.random.default_rng(0)
    return rng.normal(1, 2, size=(n, 3, 5, channels)).astype(np.float32)


def test_by_hand():
    # Real samples 1 and 3: mean 2, variance 1, unbiased 2.
    x = jnp.array([[1.0], [jnp.nan], [3.0], [jnp.inf]])
    y, stats = trained(fresh(1, scale=4.0, bias=5.0), x, jnp.array([1.0, 0, 1, 0]))
    deviation = 4 / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(y[::2, 0], [5 - deviation, 5 + deviation], rtol=1e-6)
    stats = stats["batch_stats"]
    np.testing.assert_allclose(stats["mean"], [0.1 * 2], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9 + 0.1 * 2], rtol=1e-6)
    # Prediction normalises by the statistics, whatever the batch.
    variables = fresh(1, scale=4.0, bias=5.0) | {"batch_stats": stats}
    predicted = BatchNorm().apply(variables, jnp.array([[7.0]]), False)
    expected = 5 + 4 * (7 - 0.2) / np.sqrt(1.1 + 1e-5)
    np.testing.assert_allclose(predicted, [[expected]], rtol=1e-6)


def test_unmasked_is_flax_but_for_the_unbiased_variance():
    x = inputs()
    y, stats = trained(fresh(2, 1.5, 0.5), x)
    theirs = nn.BatchNorm(use_running_average=False, momentum=0.9)
    expected, moved = jax.jit(lambda v, x: theirs.apply(v, x, mutable=["batch_stats"]))(
        fresh(2, 1.5, 0.5), x
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    ours, moved = stats["batch_stats"], moved["batch_stats"]
    np.testing.assert_allclose(ours["mean"], moved["mean"], rtol=1e-5)
    n = x[..., 0].size
    expected = 0.9 + (moved["var"] - 0.9) * n / (n - 1)
    np.testing.assert_allclose(ours["var"], expected, rtol=1e-5)


def test_padding_reaches_nothing():
    x = inputs()
    padded = np.full((6, *x.shape[1:]), np.nan, np.float32)
    padded[REAL > 0] = x
    variables = fresh(2, 1.5, 0.5)
    y, stats = trained(variables, padded, REAL)
    expected, moved = trained(variables, x)
    close = dict(rtol=1e-5, atol=1e-6)  # sums in another order
    np.testing.assert_allclose(y[REAL > 0], expected, **close)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), stats, moved)
    of_params, of_x = gradients(variables["params"], padded, REAL)
    expected_of_params, expected_of_x = gradients(variables["params"], x, np.ones(4))
    np.testing.assert_allclose(of_x[REAL > 0], expected_of_x, rtol=1e-4, atol=1e-5)
    assert not np.any(of_x[REAL == 0])
    for name, gradient in expected_of_params.items():
        np.testing.assert_allclose(of_params[name], gradient, rtol=1e-5)


def test_a_batch_of_padding_changes_no_statistics():
    x = np.full((6, 3, 5, 2), np.nan, np.float32)
    variables = fresh(2)
    y, stats = trained(variables, x, 0 * REAL)
    assert np.all(np.isfinite(y))
    jax.tree.map(
        np.testing.assert_array_equal, stats["batch_stats"], variables["batch_stats"]
    )
    for gradient in jax.tree.leaves(gradients(variables["params"], x, 0 * REAL)):
        assert not np.any(gradient)


def test_one_value_has_no_unbiased_variance():
    y, stats = trained(fresh(1, bias=5.0), jnp.array([[7.0]]))
    assert float(y[0, 0]) == 5.0
    assert float(stats["batch_stats"]["var"][0]) == pytest.approx(0.9)


def test_variance_does_not_cancel_far_from_zero():
    x = 1e4 + inputs()
    _, stats = trained(fresh(2), x)
    # At 10,000 float32 is 0.001 apart; mean(x^2) - mean(x)^2 would be off by about 10.
    variance = (np.asarray(stats["batch_stats"]["var"]) - 0.9) / 0.1
    exact = x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(variance, exact, rtol=1e-3)
