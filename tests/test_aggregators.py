"""The weighted mean, by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import make_local, tiny

from hyperjax import aggregators
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.engine import schedule

STACKED = {
    "a": jnp.array([[1.0, 2.0], [3.0, 6.0], [5.0, -2.0]]),
    "b": {"c": jnp.array([4.0, 0.0, 8.0])},
}


def combine(stacked, weight):
    aggregator = aggregators.weighted_mean()
    state = aggregator.init(stacked)
    out, after = aggregator.combine(jax.random.key(0), stacked, weight, state)
    chex.assert_trees_all_equal(after, state)
    return out


def test_hand_numbers():
    # Shares 1/4, 1/4, 1/2: (1 + 3 + 10) / 4, (2 + 6 - 4) / 4, (4 + 0 + 16) / 4.
    out = combine(STACKED, jnp.array([1.0, 1.0, 2.0]))
    chex.assert_trees_all_equal(out, {"a": jnp.array([3.5, 1.0]), "b": {"c": 5.0}})


def test_scale_of_weights_does_not_matter():
    weight = jnp.array([1.0, 1.0, 2.0])
    chex.assert_trees_all_equal(
        combine(STACKED, weight), combine(STACKED, 1024 * weight)
    )


def test_one_client_is_returned_bitwise():
    stacked = {"a": np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)}
    weight = jnp.array([0.0, 0.3, 0.0])
    out = combine(stacked, weight)
    chex.assert_trees_all_equal(out, {"a": stacked["a"][1]})


def test_zero_total_weight_gives_zeros():
    out = combine(STACKED, jnp.zeros(3))
    chex.assert_trees_all_equal(out, {"a": jnp.zeros(2), "b": {"c": jnp.float32(0)}})


def test_dtypes_are_kept_and_sums_run_in_float32():
    # In bfloat16, 256 + 1 = 256: a running sum of ones would stop there.
    stacked = {"half": jnp.ones((512, 2), jnp.bfloat16)}
    out = combine(stacked, jnp.ones(512))
    assert out["half"].dtype == jnp.bfloat16
    assert out["half"].tolist() == [1.0, 1.0]


def test_order_of_clients_does_not_matter():
    rng = np.random.default_rng(1)
    stacked = {
        "a": rng.normal(size=(7, 5, 2)).astype(np.float32),
        "b": rng.normal(size=7).astype(np.float32),
    }
    weight = rng.uniform(size=7).astype(np.float32)
    order = np.array([3, 0, 6, 1, 5, 2, 4])
    shuffled = jax.tree.map(lambda x: x[order], stacked)
    # Sums of 7 terms of size about 1, in another order: a few roundings of 6e-8.
    chex.assert_trees_all_close(
        combine(stacked, weight), combine(shuffled, weight[order]), atol=5e-7, rtol=0
    )


@pytest.mark.parametrize("shape", [(2, 4), ()])
def test_wrong_leading_axis_names_the_leaf(shape):
    stacked = {"good": jnp.zeros((3, 4)), "deep": {"bad": jnp.zeros(shape)}}
    with pytest.raises(ValueError, match=r"deep.*bad") as error:
        combine(stacked, jnp.ones(3))
    assert str(shape) in str(error.value) and "3 clients" in str(error.value)


def test_empty_trees_pass():
    assert combine({"a": STACKED["a"], "extra": ()}, jnp.ones(3))["extra"] == ()


def test_a_state_of_another_form_is_named():
    def combine(key, stacked, weight, state):
        mean, _ = aggregators.weighted_mean().combine(key, stacked, weight, state)
        return mean, {"eta": jnp.float32(1)}

    changing = aggregators.Aggregator(lambda spec: (), combine)
    alg = fedavg(tiny().model, local=make_local(), aggregator=changing)
    given = dict(table=tiny().table, pool=tiny().pool, sampler="full", cohort_size=1)
    simulator = schedule.simulator(alg, weight=np.ones(len(tiny().table.size)), **given)
    with pytest.raises(
        ValueError, match=r"aggregator's state changed from \(\) to .*eta"
    ):
        simulator.run(0, simulator.init(0), 0, 1)
