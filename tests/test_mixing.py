"""Tables of models, by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q

from hyperjax import mixing
from hyperjax.algorithms.fedfomo import fedfomo
from hyperjax.algorithms.pfedla import pfedla

TWO = {"params/a": jnp.arange(3.0), "params/b": jnp.float32(7)}
TABLE = {
    "params/a": jnp.array([[0.0, 1.0], [2.0, 3.0], [7.0, 5.0]]),
    "params/b": jnp.array([1.0, 2.0, 6.0]),
}


def test_a_table_of_too_many_is_refused_by_its_sizes():
    # 4 numbers of 4 bytes: 10^9 clients are 16 GB.
    with pytest.raises(
        ValueError,
        match=r"1000000000 clients x 4 numbers \(0\.0 MB\) = 16\.0 GB, more than "
        r"max_table_gb=8",
    ):
        mixing.check_table(jax.eval_shape(lambda: TWO), 10**9, 8.0)
    mixing.check_table(TWO, 10**9, 16.0)


@pytest.mark.parametrize("factory", [fedfomo, pfedla])
def test_methods_refuse_before_they_allocate(factory):
    # 10^12 quadratics of 2 numbers: 8,000 GB, which nobody would get.
    with pytest.raises(ValueError, match=r"10{12} clients x .* more than max_table_gb"):
        factory(q.model(), local=q.training(), num_clients=10**12)
    with pytest.raises(ValueError, match=r"num_clients=0 must be at least 1"):
        factory(q.model(), local=q.training(), num_clients=0)


def test_a_table_holds_copies():
    made = mixing.table(TWO, 2)
    np.testing.assert_array_equal(made["params/a"], [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(made["params/b"], [7, 7])


def test_strangers_get_the_mean_of_all():
    found = mixing.rows(TABLE, jnp.array([2, 3, 0, 9]))
    np.testing.assert_allclose(
        found["params/a"], [[7, 5], [3, 3], [0, 1], [3, 3]], rtol=1e-6
    )
    np.testing.assert_allclose(found["params/b"], [6, 3, 1, 3], rtol=1e-6)


def test_only_active_rows_are_written():
    ids, active = jnp.array([2, 0, 3]), jnp.array([1.0, 0.0, 1.0])
    new = {"params/a": jnp.full((3, 2), 9.0), "params/b": jnp.full(3, 9.0)}
    found = mixing.put(TABLE, ids, new, active)
    np.testing.assert_array_equal(found["params/a"], [[0, 1], [2, 3], [9, 9]])
    np.testing.assert_array_equal(found["params/b"], [1, 2, 9])
    chex.assert_trees_all_equal(
        mixing.take(found, jnp.array([1, 5])), {k: x[1:] for k, x in found.items()}
    )


def test_sums_are_weighted():
    share = jnp.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(
        mixing.combine(share, TABLE["params/a"]), [[2.25, 2.5], [2, 3]]
    )
    np.testing.assert_array_equal(mixing.combine(share[1], TABLE["params/b"]), 2)


def test_a_layer_is_its_weights_and_its_biases():
    theta = dict.fromkeys(
        [
            "params/conv/kernel",
            "params/norm/bias",
            "params/conv/bias",
            "params/norm/scale",
            "stats/batch_stats/norm/mean",
        ]
    )
    assert mixing.layers(theta) == [
        ["params/conv/kernel", "params/conv/bias"],
        ["params/norm/bias", "params/norm/scale", "stats/batch_stats/norm/mean"],
    ]
