"""Per-FedAvg on quadratics and on a small network."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q
from flax import linen as nn
from test_fedavg import MODEL, SHAPE, K

from hyperjax.algorithms.perfedavg import perfedavg
from hyperjax.models import from_linen, layers
from hyperjax.types import Batch, Trained

RATE = 0.2
# Every third of a batch holds a sample, and all samples of a client are the same.
SIZES = (3, 4, 5, 8)


@pytest.mark.parametrize("order", ["first", "exact"])
def test_exchanges_equal_the_formula(order):
    alg = perfedavg(q.model(), local=q.steps(2), inner_learning_rate=RATE, order=order)

    def visit(k, theta):
        hessian = q.A[k] if order == "exact" else np.zeros((2, 2))
        for _ in range(2):
            slope = q.gradient(k, theta - RATE * q.gradient(k, theta))
            theta = theta - q.LR * (np.eye(2) - RATE * hessian) @ slope
        return theta

    theta, _ = q.federate(q.PARTIAL, visit, weight=(1, 2, 3, 4))
    state = q.play(alg, *q.PARTIAL, sizes=SIZES, weight=(1, 2, 3, 4))
    np.testing.assert_allclose(q.vector(state.server.theta), theta, **q.CLOSE)


def batch_of(mask):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(9, *SHAPE)), jnp.float32)
    return Batch(x, jnp.asarray(draw.integers(0, K, 9)), jnp.asarray(mask, jnp.float32))


FULL = batch_of([1, 1, 1, 1, 1, 1, 1, 0, 0])


@functools.cache
def meta(**options):
    """Value and gradient of the loss that a client trains on."""
    local = q.training(batch_size=9)
    alg = perfedavg(MODEL, local=local, inner_learning_rate=RATE, **options)

    @jax.jit
    def run(params, batch):
        def loss(params):
            variables = {"params": params, "stats": {}}
            return alg.client.model.loss(jax.random.key(0), variables, batch, ())[0]

        return jax.value_and_grad(loss)(params)

    return run


def plain_loss(params, batch):
    variables = {"params": params, "stats": {}}
    return MODEL.loss(jax.random.key(0), variables, batch, ())[0]


@functools.cache
def params():
    return jax.jit(MODEL.init)(jax.random.key(5))["params"]


def step(params, direction):
    return jax.tree.map(lambda x, g: x - RATE * g, params, direction)


def test_exact_order_is_the_gradient_through_the_inner_step():
    @jax.jit
    def through(params):
        def loss(params):
            return plain_loss(step(params, jax.grad(plain_loss)(params, FULL)), FULL)

        return jax.value_and_grad(loss)(params)

    found = meta(order="exact", draws="same")(params(), FULL)
    chex.assert_trees_all_close(found, through(params()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("order", ["first", "exact"])
def test_thirds_are_different_draws(order):
    thirds = [jax.tree.map(lambda x, i=i: x[i::3], FULL) for i in range(3)]
    assert [float(third.mask.sum()) for third in thirds] == [3, 2, 2]

    @jax.jit
    def by_hand(theta):
        inner = jax.grad(plain_loss)(theta, thirds[0])
        value, outer = jax.value_and_grad(plain_loss)(step(theta, inner), thirds[1])
        if order == "first":
            return value, outer

        def product(theta):  # its gradient is H(theta; D3) times the outer gradient
            slope = jax.grad(plain_loss)(theta, thirds[2])
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, outer)))

        return value, step(outer, jax.grad(product)(theta))

    found = meta(order=order)(params(), FULL)
    chex.assert_trees_all_close(found, by_hand(params()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("order", ["first", "exact"])
@pytest.mark.parametrize("real", [1, 2])
def test_draws_without_samples_are_the_first(order, real):
    mask = (jnp.arange(len(FULL.mask)) < real).astype(jnp.float32)
    batch = FULL._replace(mask=mask)
    only = [jax.tree.map(lambda x, i=i: x[i : i + 1], FULL) for i in (0, real - 1, 0)]

    def by_hand(theta):
        inner = jax.grad(plain_loss)(theta, only[0])
        value, outer = jax.value_and_grad(plain_loss)(step(theta, inner), only[1])
        if order == "first":
            return value, outer

        def product(theta):
            slope = jax.grad(plain_loss)(theta, only[2])
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, outer)))

        return value, step(outer, jax.grad(product)(theta))

    value, grads = meta(order=order)(params(), batch)
    assert value > 0
    chex.assert_trees_all_close(
        (value, grads), jax.jit(by_hand)(params()), rtol=1e-5, atol=1e-7
    )


def test_the_exact_order_of_convolutions():
    # The rule for loops on the CPU has a reverse derivative only.
    def alg(rule):
        conv = layers.Conv(2, 3, padding="SAME", rule=rule)
        network = nn.Sequential([conv, lambda x: nn.tanh(x).mean((1, 2))])
        model = from_linen(network, SHAPE, 2)
        return perfedavg(model, local=q.training(batch_size=9), order="exact")

    @jax.jit
    def both(key, batch):
        def gradient(model):
            variables = model.init(key)

            def loss(params):
                return model.loss(key, {**variables, "params": params}, batch, ())[0]

            return jax.grad(loss)(variables["params"])

        return tuple(gradient(alg(rule).client.model) for rule in ("scan", "xla"))

    batch = FULL._replace(y=FULL.y % 2)
    chex.assert_trees_all_close(*both(jax.random.key(0), batch), rtol=1e-4, atol=1e-6)


def test_first_order_is_exact_for_a_linear_loss():
    def linear(key, variables, batch, context):
        scale = jnp.sum(batch.x.reshape(9, -1)[:, 0] * batch.mask)
        value = sum(jnp.sum(x) * scale for x in jax.tree.leaves(variables["params"]))
        return value, Trained(variables["stats"], {})

    def gradient(order):
        model = MODEL._replace(loss=linear)
        alg = perfedavg(model, local=q.training(), order=order, draws="same")

        def loss(params):
            variables = {"params": params, "stats": {}}
            return alg.client.model.loss(jax.random.key(0), variables, FULL, ())[0]

        return jax.jit(jax.grad(loss))(params())

    chex.assert_trees_all_equal(gradient("first"), gradient("exact"))


def test_finetuning_takes_plain_steps_at_the_inner_rate():
    # Schedule, clipping, momentum and decay are those of the outer steps.
    train = q.training(
        q.DECAYING, batch_size=8, clip_norm=0.1, schedule=lambda round: 0.25
    )
    alg = perfedavg(q.model(), local=train, inner_learning_rate=RATE)
    expected = q.descend(1, q.START, 3, rate=RATE)
    found = q.tuned(alg, client=1, size=5, epochs=3)
    np.testing.assert_allclose(found, expected, **q.CLOSE)
    # Without it, the starting point is deployed.
    np.testing.assert_array_equal(q.deployed(alg, q.start(alg), 1), q.START)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(order="second"), "order='second' is unknown"),
        (dict(draws="third"), "did you mean 'thirds'"),
        (dict(inner_learning_rate=-0.1), r"inner_learning_rate=-0\.1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        perfedavg(q.model(), local=q.steps(1), **options)


def test_batches_of_two_have_no_thirds():
    with pytest.raises(ValueError, match=r"batches of 2 cannot be cut.*draws='same'"):
        perfedavg(q.model(), local=q.training(batch_size=2))
