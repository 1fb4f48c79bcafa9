"""Label shift by what participants know of a classifier, by hand and by identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.adaptation import label_shift
from hyperjax.priors import prior_em

K = 3


def drawn(num=4000, seed=0):
    """Logits, and labels whose log-odds are 0.5 z + (0.4, 0, -0.4)."""
    draw = np.random.default_rng(seed)
    z = jnp.asarray(draw.normal(0, 3, (num, K)), jnp.float32)
    right = 0.5 * z + jnp.array([0.4, 0.0, -0.4])
    return z, jax.random.categorical(jax.random.key(seed), right)


def fitted(calibration, z, labels, rounds=20):
    """The rounds of three clients and one without samples."""
    whose = np.searchsorted([1000, 1500], np.arange(len(z)), side="right")
    masks = jnp.asarray(whose == np.arange(4)[:, None], jnp.float32)

    def one_round(i, state):
        sent = jax.vmap(label_shift.told_of, (None, None, None, 0))(
            state.trial, z, labels, masks
        )
        return label_shift.improved(state, sent)

    start = label_shift.untouched(calibration, K)
    return jax.jit(lambda: jax.lax.fori_loop(0, rounds, one_round, start))()


@pytest.mark.parametrize(
    "calibration", ["bcts", pytest.param("vs", marks=pytest.mark.slow)]
)
def test_a_calibration_is_where_the_loss_has_no_slope(calibration):
    z, labels = drawn()
    found = fitted(calibration, z, labels)
    told = jax.jit(label_shift.told_of)(found.at, z, labels, jnp.ones(len(z)))
    np.testing.assert_allclose(told.gradient / len(z), 0, atol=3e-4)
    # At temperature 2; of a bias the differences count.
    np.testing.assert_allclose(found.at[0], 0.5, atol=0.05)
    if calibration == "bcts":
        bias = found.at[1:]
        np.testing.assert_allclose(bias - bias[1], [0.4, 0, -0.4], atol=0.15)
        # Biases make the mean of predictions the shares of labels.
        shares = np.bincount(labels, minlength=K) / len(z)
        np.testing.assert_allclose(found.prior, shares, atol=1e-3)


def test_a_step_that_goes_too_far_is_halved():
    at, trial = jnp.array([1.0]), jnp.array([3.0])
    state = label_shift.Calibration(at, jnp.float32(0.5), jnp.full(K, 1 / K), trial)
    # One sample, whose loss is 2 and has the slope 3 and the curvature 6.
    sent = label_shift.Told(
        *map(jnp.array, ([2.0], [[3.0]], [[[6.0]]], [[0.2, 0.3, 0.5]], [1.0]))
    )
    worse = label_shift.improved(state, sent)
    np.testing.assert_allclose((worse.at, worse.trial), ([1.0], [2.0]))
    np.testing.assert_allclose(worse.prior, state.prior)
    better = label_shift.improved(state._replace(loss=jnp.float32(3)), sent)
    np.testing.assert_allclose((better.at, better.trial), ([3.0], [2.5]), rtol=1e-4)
    np.testing.assert_allclose(better.prior, [0.2, 0.3, 0.5], atol=1e-5)


def test_no_calibration_only_knows_what_is_predicted():
    z, labels = drawn(100)
    found = fitted("none", z, labels, 1)
    np.testing.assert_allclose(found.prior, jax.nn.softmax(z).mean(0), atol=1e-5)
    np.testing.assert_array_equal(label_shift.calibrated(found.at, z), z)
    # So EM finds no shift among the same inputs.
    prior = prior_em(jax.nn.softmax(z), jnp.ones(len(z)), found.prior)
    np.testing.assert_allclose(prior, found.prior, atol=1e-4)


@pytest.mark.parametrize("held", [0, 1, 255, 256, 257, 700])
def test_em_goes_through_what_a_client_holds_whatever_its_table_is(held):
    probs = np.asarray(jax.nn.softmax(drawn(1024)[0]), np.float64)
    source = np.array([0.5, 0.3, 0.2])
    prior = source
    for _ in range(1000 if held else 0):
        joint = probs[:held] * prior / source
        prior = np.mean(joint / joint.sum(-1, keepdims=True), 0)
    for width in {max(held, 1), 701, 1024}:
        mask = jnp.arange(width) < held
        found = jnp.where(mask[:, None], probs[:width], jnp.nan)  # of padding: nothing
        found = prior_em(found, mask.astype(jnp.float32), jnp.asarray(source))
        np.testing.assert_allclose(found, prior, atol=2e-5)


def test_bbse_by_hand():
    # Columns are true classes: of class 0 three quarters are found.
    confusion = jnp.array([[30.0, 4, 0], [10, 16, 0], [0, 0, 20]])
    given = np.array([[0.75, 0.2, 0], [0.25, 0.8, 0], [0, 0, 1]])
    for prior in ([0.5, 0.25, 0.25], [0.1, 0.9, 0.0], [1.0, 0.0, 0.0]):
        found, source = label_shift.priors_of(confusion, jnp.asarray(given @ prior))
        np.testing.assert_allclose(found, prior, atol=1e-5)
        np.testing.assert_allclose(source, [0.5, 0.25, 0.25], atol=1e-6)


def test_bbse_stays_on_the_simplex_and_out_of_classes_that_nobody_has():
    confusion = jnp.array([[8.0, 2, 0], [2, 8, 0], [0, 0, 0]])
    found, source = label_shift.priors_of(confusion, jnp.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(found, [1, 0, 0], atol=1e-6)
    assert float(source[2]) == 0
