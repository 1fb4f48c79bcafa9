"""Distribution embeddings: NoisyEmbed, the Balancing Penalty, and its limits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.hypernets import embedding
from hyperjax.models import layers

P = 16
SHAPE = (8, 8, 1)


def normal(*shape, scale=1.0):
    return np.float32(np.random.default_rng(0).normal(scale=scale, size=shape))


def simplex(rows=5):
    return jax.nn.softmax(normal(rows, P, scale=2.0))


def filled(e):
    """Parameters of the right shapes (compiling an `init` takes long)."""
    spec = jax.eval_shape(e.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(rng.normal(scale=0.2, size=x.shape)), spec)


def num_parameters(e):
    return tree.count(jax.eval_shape(e.init, jax.random.key(0)))


@functools.cache
def example():
    """Embeddings as a jitted function of (key, inputs), and six inputs."""
    e = embedding.distribution_embedding(SHAPE)
    params = filled(e)
    return jax.jit(lambda key, x: e.embed(key, params, x)), normal(6, *SHAPE)


# Sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"), [((28, 28, 1), 6_944), ((64, 64, 3), 7_088)]
)
def test_extractor_sizes(shape, expected):
    e = embedding.distribution_embedding(shape)
    assert e.size == P
    assert num_parameters(e) == expected
    # Without NoisyEmbed its head goes too: 32 * 16 + 16 numbers.
    without = embedding.distribution_embedding(shape, noise=False)
    assert num_parameters(without) == expected - 528
    # A network of its own adds a second trunk.
    separate = embedding.distribution_embedding(shape, noise_net="separate")
    assert num_parameters(separate) == 2 * expected - 2 * 528


def test_size_of_the_input_does_not_count():
    sizes = {
        num_parameters(embedding.distribution_embedding((n, n, 3))) for n in (4, 32, 64)
    }
    assert sizes == {7_088}


# NoisyEmbed ------------------------------------------------------------------------


def test_embeddings_are_points_of_the_simplex():
    embed, x = example()
    for key in (None, jax.random.key(2)):
        out, info = embed(key, x)
        out = np.asarray(out)
        assert out.shape == (6, P)
        assert out.min() > 0
        np.testing.assert_allclose(out.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose((P * out).mean(axis=1), 1, atol=1e-6)
        assert float(info["noise_scale"]) > 0


def test_no_noise_where_its_scale_vanishes():
    logits = normal(4, P)
    silent = embedding.noisy_embed(
        jax.random.key(1), logits, jnp.full((4, P), -jnp.inf)
    )
    np.testing.assert_array_equal(silent, jax.nn.softmax(logits))
    for key, noisy in ((None, jnp.ones((4, P))), (jax.random.key(1), None)):
        out = embedding.noisy_embed(key, logits, noisy)
        np.testing.assert_array_equal(out, jax.nn.softmax(logits))


def test_noise_is_normal_and_independent_per_entry():
    # softplus(ln(e^2 - 1)) = 2, so log-ratios to the mean are noise of deviation 2.
    n = 2000
    noisy = jnp.full((n, P), np.log(np.e**2 - 1), jnp.float32)
    e = embedding.noisy_embed(jax.random.key(0), jnp.zeros((n, P)), noisy)
    z = np.log(np.asarray(e)) - np.log(np.asarray(e)).mean(1, keepdims=True)
    # Centring over P entries leaves (1 - 1 / P) of the variance.
    np.testing.assert_allclose(z.var() / (1 - 1 / P), 4, rtol=0.05)
    correlation = np.corrcoef(z.T) + 1 / (P - 1)
    assert np.abs(correlation - np.diag(np.diag(correlation))).max() < 0.12
    assert abs(np.corrcoef(z[:-1, 0], z[1:, 0])[0, 1]) < 0.12


def test_noise_follows_the_key():
    embed, x = example()
    first, again, other = (
        np.asarray(embed(jax.random.key(seed), x)[0]) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_noise_network_learns():
    e = embedding.distribution_embedding(SHAPE)

    @jax.jit
    def gradient(params):
        def entropy(params):
            out, _ = e.embed(jax.random.key(3), params, normal(6, *SHAPE))
            return jnp.mean(embedding.entropy(out))

        return jax.grad(entropy)(params)

    grads = gradient(filled(e))
    for head in ("head", "noise_head"):
        assert np.linalg.norm(grads[head]["kernel"]) > 1e-4


def test_embedding_does_not_depend_on_the_batch():
    embed, x = example()
    together = embed(None, x)[0]
    apart = np.concatenate([embed(None, x[i : i + 1])[0] for i in range(6)])
    np.testing.assert_allclose(together, apart, atol=1e-6)


# Penalty ---------------------------------------------------------------------------


def test_limits_of_dispersion_and_entropy():
    uniform, one_hot = jnp.full(P, 1 / P), jnp.eye(P)[5]
    assert float(embedding.dispersion(uniform)) == 0
    assert float(embedding.dispersion(one_hot)) == pytest.approx(P - 1, rel=1e-6)
    assert float(embedding.entropy(uniform)) == pytest.approx(np.log(16), rel=1e-6)
    assert float(embedding.entropy(one_hot)) == pytest.approx(0, abs=1e-6)
    grads = jax.grad(embedding.entropy)(one_hot)
    assert bool(jnp.all(jnp.isfinite(grads)))


def test_dispersion_is_scaled_variance():
    # The mean of P e is 1, so var / mean = P^2 var(e).
    e = simplex()
    np.testing.assert_allclose(
        embedding.dispersion(e), P**2 * np.var(np.asarray(e), axis=1), rtol=1e-5
    )


def test_penalty_by_hand():
    # e = (1, 0) and (1/2, 1/2), P = 2. Mean (3/4, 1/4): P e = (3/2, 1/2), var 1/4.
    # Per sample var is 1 and 0. Entropies 0 and ln 2.
    e = jnp.array([[1.0, 0.0], [0.5, 0.5]])
    mask = jnp.ones(2)
    spread, uncertainty = embedding.balancing_penalty(e, mask)
    assert float(spread) == pytest.approx(0.25, rel=1e-6)
    assert float(uncertainty) == pytest.approx(np.log(2) / 2, rel=1e-6)
    spread, uncertainty = embedding.balancing_penalty(
        e, mask, cv_mode="per_sample", ent_reduction="mean"
    )
    assert float(spread) == pytest.approx(0.5, rel=1e-6)
    assert float(uncertainty) == pytest.approx(np.log(2) / 4, rel=1e-6)


def test_batch_mean_rewards_different_confident_embeddings():
    # Mean uniform and each embedding one-hot: the one point where both terms vanish.
    both = embedding.balancing_penalty(jnp.eye(P), jnp.ones(P))
    np.testing.assert_allclose(both, (0, 0), atol=1e-6)
    # All on one vertex, and all uniform: each is penalised by one term, fully.
    vertex = embedding.balancing_penalty(jnp.eye(P)[jnp.zeros(P, int)], jnp.ones(P))
    np.testing.assert_allclose(vertex, (P - 1, 0), atol=1e-5)
    flat = embedding.balancing_penalty(jnp.full((P, P), 1 / P), jnp.ones(P))
    np.testing.assert_allclose(flat, (0, np.log(P)), atol=1e-5)


@pytest.mark.parametrize("cv_mode", embedding.CV_MODES)
@pytest.mark.parametrize("ent_reduction", embedding.ENT_REDUCTIONS)
def test_penalty_ignores_padding(cv_mode, ent_reduction):
    options = dict(cv_mode=cv_mode, ent_reduction=ent_reduction)
    e = simplex(4)
    padded = jnp.concatenate([e, jnp.full((3, P), jnp.nan)])
    mask = jnp.array([1.0] * 4 + [0.0] * 3)
    np.testing.assert_allclose(
        embedding.balancing_penalty(padded, mask, **options),
        embedding.balancing_penalty(e, jnp.ones(4), **options),
        rtol=1e-6,
    )


def test_mean_embedding_of_nothing_is_zero():
    np.testing.assert_array_equal(
        embedding.mean_embedding(simplex(), jnp.zeros(5)), np.zeros(P)
    )


def test_weights_of_the_penalty():
    e, mask = simplex(), jnp.ones(5)
    spread, uncertainty = embedding.balancing_penalty(e, mask)
    make = functools.partial(embedding.distribution_embedding, SHAPE)
    value, info = make(alpha=0.5, beta=3.0).penalty(e, mask)
    assert float(value) == pytest.approx(float(0.5 * spread + 3 * uncertainty))
    assert float(info["dispersion"]) == float(spread)
    assert float(info["entropy"]) == float(uncertainty)
    assert float(make(alpha=0.0, beta=0.0).penalty(e, mask)[0]) == 0
    literal = make(alpha=1.0, beta=0.0, cv_mode="per_sample").penalty(e, mask)[0]
    assert float(literal) == pytest.approx(float(jnp.mean(embedding.dispersion(e))))


# Other embeddings ------------------------------------------------------------------


def test_constant_embedding_is_uniform_and_free():
    e = embedding.constant_embedding(embedding_size=8)
    params = e.init(jax.random.key(0))
    assert tree.count(params) == 0
    out, info = e.embed(jax.random.key(1), params, jnp.ones((3, *SHAPE)))
    np.testing.assert_array_equal(out, np.full((3, 8), 1 / 8))
    penalty, terms = e.penalty(out, jnp.ones(3))
    assert float(penalty) == 0 and info == terms == {}


def test_users_extractor():
    class Mean(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.Dense(4)(x.mean(axis=(1, 2))), None

    e = embedding.distribution_embedding(SHAPE, embedding_size=4, extractor=Mean())
    params = filled(e)
    assert tree.count(params) == 8
    out, info = e.embed(jax.random.key(1), params, jnp.ones((3, *SHAPE)))
    assert out.shape == (3, 4) and info == {}


# Errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cv_mode="batch_men"), r"cv_mode='batch_men'.*mean 'batch_mean'"),
        (dict(ent_reduction="summ"), r"ent_reduction='summ'.*mean 'sum'"),
        (dict(noise_net="share"), r"noise_net='share'.*mean 'shared'"),
        (dict(cv_mode="xyz"), r"accepted: 'batch_mean', 'per_sample'"),
        (dict(embedding_size=0), "embedding_size=0 must be at least 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        embedding.distribution_embedding(SHAPE, **options)


def test_constant_embedding_size_below_one():
    with pytest.raises(ValueError, match="embedding_size=0 must be at least 1"):
        embedding.constant_embedding(embedding_size=0)
