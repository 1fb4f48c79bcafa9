"""FLowDUP: identities of the random expansion, and what its networks are of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import NUM_CLASSES, make_local, tiny

from hyperjax import tree
from hyperjax.algorithms.flowdup import expanded, flowdup
from hyperjax.engine import comm
from hyperjax.models import memory

KEY = jax.random.key(3)
SMALL = dict(dimensions=5, extractor_size=4)


def test_an_expansion_is_linear_and_known_by_its_seed():
    params = tiny().model.init(KEY)["params"]
    a, b = jax.random.normal(KEY, (2, 5))
    of_a, of_b = expanded(params, a, 0), expanded(params, b, 0)
    both = expanded(params, a - 2 * b, 0)
    jax.tree.map(
        lambda x, y, z: np.testing.assert_allclose(z, x - 2 * y, atol=1e-5),
        of_a,
        of_b,
        both,
    )
    one = expanded(params, jnp.eye(5)[0], 0)["head"]["kernel"]
    # A sign over the root of 5 x 4.
    np.testing.assert_allclose(abs(one), 1 / np.sqrt(20), rtol=1e-6)
    assert 0 < np.sum(np.asarray(one) > 0) < one.size
    other = expanded(params, jnp.eye(5)[0], 1)["head"]["kernel"]
    assert np.any(other != one)


def test_of_v_0_it_is_the_network_that_fedavg_starts_with():
    model = flowdup(tiny().model, local=make_local(), **SMALL).client.model
    plain, variables = tiny().model.init(KEY), model.init(KEY)
    jax.tree.map(np.testing.assert_array_equal, model.serve.export(variables), plain)
    x = jnp.ones((2, 4, 4, 1))
    told = memory.put(variables, "condition", jnp.full(5, 0.7))
    moved = tree.add(plain["params"], expanded(plain["params"], jnp.full(5, 0.7), 0))
    np.testing.assert_allclose(
        model.predict(told, x),
        tiny().model.predict({**plain, "params": moved}, x),
        rtol=1e-6,
    )


def test_neither_the_expansion_nor_v_is_sent():
    costs = comm.cost(comm.describe(flowdup(tiny().model, local=make_local(), **SMALL)))
    network = 16 * 4 + 4 + (4 + 1) * NUM_CLASSES
    numbers = network + (16 + 1) * 4 + (4 + 1) * 5 + 5
    assert costs.up_numbers == costs.down_numbers == numbers


def test_bad_options_are_refused():
    for name, value in dict(dimensions=0, penalty=-1.0, seed=-1, context=0).items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            flowdup(tiny().model, local=make_local(), **{**SMALL, name: value})
