"""Gradient inversion: the measures by hand, and attacks that are known to work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import attacks, models, tree
from hyperjax.models import from_linen
from hyperjax.models.zoo import MLP, AttackLeNet
from hyperjax.types import Batch

SHAPE, CLASSES = (8, 8, 1), 4


@pytest.fixture(scope="module")
def model():
    return from_linen(AttackLeNet(CLASSES, conv_rule="xla"), SHAPE, CLASSES)


def test_psnr_by_hand():
    x = jnp.full((4, 4, 3), 0.5)
    # One grey level everywhere: 20 log10(255).
    np.testing.assert_allclose(attacks.psnr(x, x + 1 / 255), 48.13, atol=0.005)
    # Half the pixels ten levels off: a root mean square of 10 / sqrt 2.
    y = x.at[:2].add(10 / 255)
    expected = 20 * np.log10(255 / (10 / np.sqrt(2)))
    np.testing.assert_allclose(attacks.psnr(x, y), expected, rtol=1e-4)
    assert attacks.psnr(x, x) == attacks.MOST_DB


def test_psnr_cuts_guesses_off():
    black, white = jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))
    assert attacks.psnr(black, -5.0 * white) == attacks.MOST_DB
    np.testing.assert_allclose(attacks.psnr(black, 7.0 * white), 0.0, atol=1e-4)


@pytest.mark.parametrize("shared", [r".*", r"conv2/.*"])
def test_gradients_are_those_of_training(model, shared):
    """Against the loss that clients train with, for one image and a hard label."""
    victim = attacks.victim(model, shared)
    variables = model.init(jax.random.key(0))
    parts = victim.split(variables["params"])
    x = jax.random.uniform(jax.random.key(1), SHAPE)
    batch = Batch(x[None], jnp.array([2]), jnp.ones(1))

    def loss(params):
        return model.loss(
            jax.random.key(2), {**variables, "params": params}, batch, None
        )[0]

    theirs = tree.by_path(jax.jit(jax.grad(loss))(variables["params"]))
    target = jax.nn.one_hot(2, CLASSES)
    ours = jax.jit(victim.gradient)(*parts, x, target)
    assert set(ours) == {k for k in theirs if shared == ".*" or k.startswith("conv2")}
    for path, grad in ours.items():
        np.testing.assert_allclose(grad, theirs[path], rtol=1e-4, atol=1e-6)
    moved, kept = jax.jit(victim.step)(*parts, x, target, 0.5)
    after = {**moved, **kept}
    for path, leaf in tree.by_path(variables["params"]).items():
        expected = leaf - 0.5 * theirs[path]
        np.testing.assert_allclose(after[path], expected, rtol=1e-4, atol=1e-6)


def test_labels_are_read_off(model):
    victim = attacks.victim(model)

    def read(key, y):
        parts = victim.split(model.init(key)["params"])
        x = jax.random.uniform(key, SHAPE)
        target = jax.nn.one_hot(y, CLASSES)
        return attacks.label_of(victim.gradient(*parts, x, target)["head/kernel"])

    labels = jnp.arange(8) % CLASSES
    found = jax.jit(jax.vmap(read))(jax.random.split(jax.random.key(3), 8), labels)
    np.testing.assert_array_equal(found, labels)


def test_the_least_mismatch_is_kept():
    """A bowl; and a function that is not a number beyond its start."""
    center = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    start = tree.zeros_like(center)
    found = attacks.invert(lambda g: attacks.distance(g, center), start, steps=5)
    for name, value in center.items():
        np.testing.assert_allclose(found.guess[name], value, atol=1e-5)
    assert found.mismatch < 1e-9 and found.history.shape == (5,)
    assert np.all(np.diff(found.history) <= 0)
    cliff = attacks.invert(
        lambda x: jnp.where(x == 0, 1.0 + x, jnp.nan), jnp.float32(0), steps=3
    )
    assert cliff.guess == 0 and cliff.mismatch == 1


@pytest.mark.parametrize("soft", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_image_is_recovered_from_a_whole_networks_gradient(model, soft):
    victim = attacks.victim(model)

    @jax.jit
    def attack(key):
        parts = victim.split(model.init(key)["params"])
        x = jax.random.uniform(jax.random.fold_in(key, 1), SHAPE)
        target = jax.nn.one_hot(1, CLASSES)
        observed = victim.gradient(*parts, x, target)

        def mismatch(guess):
            theirs = jax.nn.softmax(guess.label) if soft else target
            ours = victim.gradient(*parts, guess.x, theirs)
            return attacks.distance(ours, observed)

        like = attacks.Guess(x, jnp.zeros(CLASSES) if soft else None)
        start = attacks.first_guess(jax.random.fold_in(key, 2), like)
        found = attacks.invert(mismatch, start, steps=150)
        return attacks.psnr(x, start.x), attacks.psnr(x, found.guess.x)

    tried = [attack(key) for key in jax.random.split(jax.random.key(0), 4)]
    before, after = np.array(tried).T
    assert before.max() < 10 and np.sum(after > 25) >= 3, after


def test_networks_with_running_statistics_are_refused():
    model = from_linen(models.ZOO["resnet8"](num_classes=3), (8, 8, 1), 3)
    with pytest.raises(ValueError, match="without running statistics, not one with"):
        attacks.victim(model)


def test_patterns_that_match_nothing_are_named():
    model = from_linen(MLP(3, (4,)), (2, 2, 1), 3)
    with pytest.raises(ValueError, match=r"'hyper/\.\*' matches no variable"):
        attacks.victim(model, r"hyper/.*")
