"""MOON on quadratics whose features are (body, 1) for any input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q

from hyperjax.algorithms.moon import moon
from hyperjax.engine import comm
from hyperjax.types import Batch, Outputs

MU, TEMPERATURE = 0.8, 0.5
TRAIN = q.training(q.DECAYING)


@functools.cache
def ours(mu=MU):
    return moon(q.model(), local=TRAIN, mu=mu, temperature=TEMPERATURE)


def previous(state):
    return q.vector(state.rows.kept, "memory/previous/params")


def cosine(a, b):
    """Of the features (a, 1) and (b, 1), and its derivative by a."""
    norms = np.sqrt((a * a + 1) * (b * b + 1))
    return (a * b + 1) / norms, (b - a * (a * b + 1) / (a * a + 1)) / norms


def contrast_gradient(theta, received, before):
    # log(1 + e^(far - near)), in which only z depends on theta.
    near, near_slope = (x / TEMPERATURE for x in cosine(theta[0], received[0]))
    far, far_slope = (x / TEMPERATURE for x in cosine(theta[0], before[0]))
    share = 1 / (1 + np.exp(near - far))
    return np.array([MU * share * (far_slope - near_slope), 0.0])


def test_exchanges_equal_the_algorithm():
    theta, own, seen = q.START, np.zeros((q.N, 2)), set()
    for number, cohort in enumerate(q.PARTIAL):
        alive = [k for k in cohort if k >= 0]
        for k in alive:
            before = own[k].copy() if k in seen else theta

            def term(now, before=before, received=theta):
                return contrast_gradient(now, received, before)

            own[k] = q.descend(k, theta, q.SIZES[k], term=term, **q.DRIFT)
            seen.add(k)
        theta = own[alive].mean(0)
        state = q.play(ours(), *q.PARTIAL[: number + 1])
        np.testing.assert_allclose(q.vector(state.server.theta), theta, **q.CLOSE)
        np.testing.assert_allclose(previous(state), own, **q.CLOSE)


def test_contrast_is_log_two_on_first_visits():
    # The previous model is the received one: at all steps, whatever the model becomes.
    first = q.play(ours(), q.EVERYONE)
    np.testing.assert_allclose(first.info["contrast"], np.log(2), rtol=1e-6)
    second = q.play(ours(), q.EVERYONE, state=first)
    assert second.info["contrast"] >= 0
    assert abs(second.info["contrast"] - np.log(2)) > 1e-3
    plain = q.play(q.averaged(TRAIN), q.EVERYONE)
    np.testing.assert_allclose(
        q.vector(first.uplink.delta), q.vector(plain.uplink.delta), rtol=1e-6
    )


def test_mu_zero_is_fedavg():
    plain = q.play(q.averaged(TRAIN), *q.PARTIAL)
    without = q.play(ours(0.0), *q.PARTIAL)
    np.testing.assert_allclose(
        q.vector(without.server.theta), q.vector(plain.server.theta), rtol=1e-6
    )
    state = q.play(ours(), *q.PARTIAL)
    gap = q.vector(state.server.theta) - q.vector(plain.server.theta)
    assert np.abs(gap).max() > 1e-3


def test_features_of_zero_have_a_gradient():
    # All units of a ReLU off: the cosine is 0 / 0.
    def nothing(variables, x):
        body = variables["params"]["body"]["w"]
        return Outputs(jnp.ones(1), jax.nn.relu(jnp.full((len(x), 3), -1.0) * body**2))

    def loss(key, variables, batch, context):
        value, trained = q.model().loss(key, variables, batch, context)
        return value, trained._replace(features=nothing(variables, batch.x).features)

    off = q.model()._replace(apply=nothing, loss=loss)
    model = moon(off, local=TRAIN).client.model
    variables = model.init(jax.random.key(0))
    batch = Batch(jnp.ones((2, 1, 5, 1)), jnp.zeros(2, jnp.int32), jnp.ones(2))
    context = model.visit.context(variables, None)

    def loss(params):
        after = {**variables, "params": params}
        return model.loss(jax.random.key(0), after, batch, context)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert np.all(np.isfinite([value, *jax.tree.leaves(grads)]))


def test_previous_models_stay_off_the_wire():
    costs = comm.cost(comm.describe(ours()))
    assert costs.up_numbers == costs.down_numbers == 2
    np.testing.assert_array_equal(
        q.deployed(ours(), q.start(ours()), 0), np.float32(q.START)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mu=-1.0), r"mu=-1\.0 must be at least 0"),
        (dict(temperature=0.0), r"ture=0\.0 must be positive"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        moon(q.model(), local=TRAIN, **options)


def test_model_without_a_head():
    model = q.model()._replace(apply=lambda v, x: Outputs(jnp.ones((len(x), 2))))
    with pytest.raises(ValueError, match="no layer named 'head'"):
        moon(model, local=TRAIN)
