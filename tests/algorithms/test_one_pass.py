"""A step runs its network once: what else its loss needs are outputs of that pass.

Compilers merge two forward passes of one network, but not their derivatives.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import make_local

from hyperjax.algorithms.fedgen import fedgen
from hyperjax.algorithms.fedjets import fedjets
from hyperjax.algorithms.fedproto import fedproto
from hyperjax.algorithms.fml import fml
from hyperjax.algorithms.mh_pfedhngd import mh_pfedhngd
from hyperjax.algorithms.moon import moon
from hyperjax.models import MLP, from_linen
from hyperjax.types import Batch, ClientData, Cohort, Model, Pool

SHAPE, K, B = (8, 8, 1), 3, 32
KEY = jax.random.key(0)
# Wide enough that what a method adds to the networks' arithmetic is little of it.
WIDE, SMALL = (from_linen(MLP(K, hidden=h), SHAPE, K) for h in ((96, 48), ()))
BATCH = Batch(
    jax.random.normal(KEY, (B, *SHAPE)),
    jnp.arange(B) % K,
    (jnp.arange(B) < B - 5).astype(jnp.float32),
)
POOL = Pool(jnp.ones((B, *SHAPE), jnp.uint8), BATCH.y, jnp.zeros(1), jnp.ones(1))
DATA = ClientData(jnp.arange(B), jnp.int32(B), POOL)


def lone(method, **options):
    def build(model):
        whole = method(model, local=make_local(), **options).client.model
        return whole, whole.init(KEY)

    return build


def in_families(method, *others):
    def build(model):
        models = {"a": model, **{f"b{i}": other for i, other in enumerate(others)}}
        sizes = dict.fromkeys(models, 1)
        alg = method(models, local=make_local(), family_sizes=sizes)
        whole = alg.client["a"].model
        return whole, whole.init(KEY)

    return build


def mixture(model):
    """FedJETs' model, and the variables of a client that was sent two experts."""
    alg = fedjets(model, local=make_local(), num_clients=2, num_experts=2)
    one = jnp.ones(1)
    cohort = Cohort(jnp.zeros(1, jnp.int32), one, one, jnp.int32(0), jnp.float32(2))
    down = alg.server.downlink(KEY, alg.server.init(KEY), cohort)
    down = down._replace(own=jax.tree.map(lambda x: x[0], down.own))
    return alg.client.model, alg.client.deploy(down, model.init(KEY))


# Each method, and the gradients and predictions of the wide and of the small network
# that its step cannot do without.
METHODS = {
    "fml": (in_families(fml, SMALL), (1, 0), (1, 0)),
    "mh_pfedhngd": (in_families(mh_pfedhngd, SMALL), (1, 0), (0, 1)),
    "moon": (lone(moon), (1, 2), (0, 0)),
    "fedproto": (in_families(fedproto), (1, 0), (0, 0)),
    "fedgen": (
        lone(fedgen, hidden_size=4, noise_size=4, generator_batch_size=4),
        (1, 0),
        (0, 0),
    ),
    "fedjets": (mixture, (2, 1), (0, 0)),
}


def twice(model: Model) -> Model:
    """The model with outputs that come of a pass of their own."""

    def loss(key, variables, batch, context):
        value, trained = model.loss(key, variables, batch, context)
        _, again = model.loss(key, variables, batch, context)
        return value, trained._replace(logits=again.logits, features=again.features)

    return model._replace(loss=loss)


def gradient(model):
    """Of the loss by all parameters, as a step computes it."""

    def run(variables, context, batch):
        def loss(params):
            new = {**variables, "params": params}
            value, trained = model.loss(KEY, new, batch, context)
            return value, (trained.stats, trained.info)

        return jax.grad(loss, has_aux=True)(variables["params"])

    return jax.jit(run)


def flops(function, *args) -> float:
    """XLA's own count."""
    return function.lower(*args).compile().cost_analysis()["flops"]


@functools.cache
def parts(model):
    """The cost of a gradient, and of a prediction."""
    variables = model.init(KEY)
    predict = flops(jax.jit(model.predict), variables, BATCH.x)
    return flops(gradient(model), variables, (), BATCH), predict


QUICK = ("fml", "moon")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in METHODS
    ],
)
def test_a_step_costs_one_pass(name):
    build, wide, small = METHODS[name]
    needed = np.dot(parts(WIDE), wide) + np.dot(parts(SMALL), small)
    costs, grads = [], []
    for network in (WIDE, twice(WIDE)):
        model, variables = build(network)
        given = variables, model.visit.context(variables, DATA), BATCH
        costs.append(flops(gradient(model), *given))
        grads.append(gradient(model)(*given))
    assert costs[0] < 1.05 * needed
    # So a second pass would show. FedJETs reads nothing but the outputs.
    assert costs[1] > 1.2 * needed or name == "fedjets"
    chex.assert_trees_all_close(*grads, rtol=1e-6, atol=1e-6)
