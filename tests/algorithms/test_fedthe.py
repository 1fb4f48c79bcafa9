"""FedTHE: what two heads say of an input, and whose inputs it is like."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import make_local, tiny

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.fedthe import OWN, fedthe, personal_share
from hyperjax.engine import comm
from hyperjax.models import memory
from hyperjax.models.linen import cross_entropy
from hyperjax.types import Batch, ClientData

KEY = jax.random.key(5)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 4, 1)), jnp.float32)
BATCH = Batch(X, jnp.array([0, 2, 2, 0]), jnp.ones(4))
SHARES = jnp.array([0.25, 0.0, 0.75])


@functools.cache
def whole():
    model = fedthe(tiny().model, local=make_local()).client.model
    return model._replace(init=jax.jit(model.init), apply=jax.jit(model.apply))


def generic(variables):
    return {part: variables[part]["network"] for part in ("params", "stats")}


def with_a_head(variables):
    kernel = variables["params"]["personal"]["kernel"]
    own = {"kernel": jax.random.normal(KEY, kernel.shape)}
    return {**variables, "params": {**variables["params"], "personal": own}}


def test_a_mean_of_features_goes_up_and_down():
    costs = (
        comm.cost(comm.describe(alg))
        for alg in (
            fedavg(tiny().model, local=make_local()),
            fedthe(tiny().model, local=make_local()),
        )
    )
    plain, ours = costs
    width = whole().init(KEY)["stats"]["features"].size
    assert ours.up_numbers - plain.up_numbers == width
    assert ours.down_numbers - plain.down_numbers == width
    apart = fedthe(tiny().model, local=make_local(), bn_stats="local")
    fewer = fedavg(tiny().model, local=make_local(), bn_stats="local")
    cost, less = (comm.cost(comm.describe(alg)) for alg in (apart, fewer))
    assert cost.up_numbers - less.up_numbers == width


def test_the_generic_head_is_balanced_and_the_personal_one_moves_nothing_else():
    variables = with_a_head(whole().init(KEY))
    mean = jnp.arange(variables["stats"]["features"].size, dtype=jnp.float32)

    def loss(params):
        new = {**variables, "params": params}
        return whole().loss(KEY, new, BATCH, (SHARES, mean))

    (value, trained), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    seen = tiny().model.apply(generic(variables), X)
    balanced = cross_entropy(seen.logits, BATCH._replace(prior=SHARES))
    logits = seen.features @ variables["params"]["personal"]["kernel"]
    own = cross_entropy(logits, BATCH)
    assert float(value) == pytest.approx(float(balanced + own), rel=1e-5)
    np.testing.assert_array_equal(trained.stats["features"], mean)
    np.testing.assert_array_equal(trained.memory[OWN], mean)

    def alone(params):
        logits = tiny().model.predict({**generic(variables), "params": params}, X)
        return cross_entropy(logits, BATCH._replace(prior=SHARES))

    expected = jax.jit(jax.grad(alone))(generic(variables)["params"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, grads["network"], expected)
    assert np.any(grads["personal"]["kernel"])


def test_a_client_without_a_head_of_its_own_has_the_generic_one():
    variables = whole().init(KEY)
    plain = tiny().model.predict(generic(variables), X)
    np.testing.assert_array_equal(whole().predict(variables, X), plain)
    assert np.any(whole().predict(with_a_head(variables), X) != plain)


def test_weights_follow_adam_on_the_published_objective():
    random = np.random.default_rng(1)
    z = random.normal(size=(2, 3, 4)) * 2
    gaps = random.uniform(0.5, 2, (2, 3))
    found = personal_share(*map(jnp.float32, (*z, *gaps)), 20, 0.1)

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    for i in range(3):
        p, q = softmax(z[:, i])
        s = p @ q / np.sqrt(p @ p * (q @ q))

        def objective(theta, i=i, s=s):
            a = softmax(theta)
            belief = softmax(a @ z[:, i])
            return -s * belief @ np.log(belief) + (1 - s) * a @ gaps[:, i]

        theta, m, v = np.zeros(2), np.zeros(2), np.zeros(2)
        for t in range(1, 21):
            both = np.eye(2) * 1e-6
            g = [objective(theta + d) - objective(theta - d) for d in both]
            g = np.array(g) / 2e-6
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            theta -= 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert float(found[i]) == pytest.approx(softmax(theta)[1], abs=2e-4)


def test_where_heads_disagree_the_nearer_mean_decides():
    sure = jnp.array([[9.0, 0, 0]])
    other = jnp.array([[0, 9.0, 0]])
    near, far = jnp.array([0.1]), jnp.array([5.0])
    assert personal_share(sure, other, far, near, 20, 0.1)[0] > 0.8
    assert personal_share(sure, other, near, far, 20, 0.1)[0] < 0.2
    assert personal_share(sure, other, near, far, 0, 0.1)[0] == 0.5


def test_it_is_served_by_the_mean_of_its_inputs_features():
    variables = whole().init(KEY)
    data = ClientData(jnp.array([3, 8, 1, 0, 0]), jnp.int32(3), tiny().pool)
    mean = whole().serve.condition(variables, data)
    again = data._replace(rows=jnp.array([1, 3, 8, 7, 7]))
    np.testing.assert_allclose(mean, whole().serve.condition(variables, again), 1e-5)
    served = with_a_head(memory.put(variables, "condition", mean))
    assert np.all(np.isfinite(whole().predict(served, X)))
    nothing = whole().serve.condition(variables, data._replace(size=jnp.int32(0)))
    assert not np.any(nothing)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(beta=1.5), "beta=1.5 must be"),
        (dict(weight_steps=-1), "weight_steps=-1 must be"),
        (dict(weight_rate=0.0), "weight_rate=0.0 must be"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fedthe(tiny().model, local=make_local(), **options)
