"""Keys of a run: what stands for one, and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import rng


def bits(key):
    return jax.random.key_data(key).tolist()


@pytest.mark.parametrize(
    "root",
    [
        7,
        np.int64(7),
        np.uint8(7),
        jnp.int32(7),
        jax.random.key(7),
        jax.random.PRNGKey(7),
        np.asarray(jax.random.PRNGKey(7)),
    ],
    ids=lambda root: f"{type(root).__name__}",
)
def test_seeds_and_raw_keys_stand_for_the_typed_key(root):
    found = rng.root_key(root)
    assert jnp.issubdtype(found.dtype, jax.dtypes.prng_key) and found.shape == ()
    assert bits(found) == bits(jax.random.key(7))


def test_a_key_of_another_generator_stays_itself():
    key = jax.random.key(7, impl="rbg")
    assert rng.root_key(key) is key


def test_roots_may_be_traced():
    keys = jax.random.split(jax.random.key(0), 3)
    found = jax.vmap(lambda key: jax.random.bits(rng.root_key(key)))(keys)
    np.testing.assert_array_equal(found, jax.vmap(jax.random.bits)(keys))


@pytest.mark.parametrize(
    "root",
    [
        -1,
        2**32,
        True,
        jnp.array(True),
        0.0,
        "0",
        None,
        jax.random.split(jax.random.key(0), 2),
        jnp.zeros(3, jnp.uint32),
        jnp.zeros(2, jnp.int32),
        jnp.zeros((2, 2), jnp.uint32),
    ],
    ids=repr,
)
def test_what_is_no_key_is_refused_in_our_words(root):
    with pytest.raises(ValueError, match=r"(?s)root.*accepted: jax.random.key\(seed\)"):
        rng.root_key(root)
