"""FedRoD: two heads, of which one follows class shares and moves nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import make_local, tiny

from hyperjax import tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.fedrod import PERSONAL, fedrod
from hyperjax.engine import comm
from hyperjax.models import MLP, from_linen, memory
from hyperjax.models.linen import cross_entropy
from hyperjax.types import Batch, ClientData

KEY = jax.random.key(5)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 4, 1)), jnp.float32)
BATCH = Batch(X, jnp.array([0, 2, 2, 0]), jnp.ones(4))
SHARES = jnp.array([0.25, 0.0, 0.75])


@functools.cache
def model_of(personal="hyper"):
    return fedrod(tiny().model, local=make_local(), personal=personal).client.model


def test_it_has_the_published_number_of_numbers():
    mlp = from_linen(MLP(10, hidden=(64,)), (14, 14, 1), 10)
    plain, hyper, linear = (
        comm.cost(comm.describe(alg)).up_numbers
        for alg in (
            fedavg(mlp, local=make_local()),
            fedrod(mlp, local=make_local()),
            fedrod(mlp, local=make_local(), personal="linear"),
        )
    )
    assert hyper - plain == 11_226  # H for a head of 64 x 10, 16 hidden units
    assert linear == plain


@pytest.mark.parametrize("personal", PERSONAL)
def test_the_loss_is_balanced_and_the_personal_head_moves_nothing_else(personal):
    whole = model_of(personal)
    variables = whole.init(KEY)
    generic = {"params": variables["params"]["network"], "stats": variables["stats"]}

    def loss(params):
        return whole.loss(KEY, {**variables, "params": params}, BATCH, SHARES)

    (value, trained), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    logits = tiny().model.predict(generic, X)
    balanced = cross_entropy(logits, BATCH._replace(prior=SHARES))
    own = cross_entropy(trained.logits, BATCH)
    assert float(value) == pytest.approx(float(balanced + own), rel=1e-5)

    def alone(params):
        logits = tiny().model.predict({**generic, "params": params}, X)
        return cross_entropy(logits, BATCH._replace(prior=SHARES))

    expected = jax.jit(jax.grad(alone))(generic["params"])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        grads["network"],
        expected,
    )
    assert any(np.any(x) for x in jax.tree.leaves(grads["personal"]))


def test_a_client_predicts_with_both_heads_as_one():
    whole = model_of()
    variables = whole.init(KEY)
    served = memory.put(variables, "condition", SHARES)
    logits = whole.loss(KEY, variables, BATCH, SHARES)[1].logits
    np.testing.assert_allclose(whole.predict(served, X), logits, rtol=1e-4, atol=1e-5)
    exported = whole.serve.export(served)
    plain = tiny().model
    np.testing.assert_allclose(plain.predict(exported, X), logits, rtol=1e-4, atol=1e-5)
    assert tree.paths(exported) == tree.paths(plain.init(KEY))


def test_a_newcomer_without_a_head_of_its_own_has_the_generic_one():
    whole = model_of("linear")
    variables = whole.init(KEY)
    assert whole.serve.condition(variables, None) == ()
    network = {"params": variables["params"]["network"], "stats": variables["stats"]}
    np.testing.assert_array_equal(
        whole.predict(variables, X), tiny().model.predict(network, X)
    )


def test_class_shares_are_those_of_em_with_the_generic_head():
    whole = model_of()
    variables = whole.init(KEY)
    data = ClientData(jnp.array([3, 8, 1, 0, 0]), jnp.int32(3), tiny().pool)
    shares = whole.serve.condition(variables, data)
    assert shares.shape == (3,) and float(shares.sum()) == pytest.approx(1, abs=1e-4)
    nothing = whole.serve.condition(variables, data._replace(size=jnp.int32(0)))
    np.testing.assert_allclose(nothing, 1 / 3, rtol=1e-6)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="personal='hyped' is unknown; did you mean"):
        fedrod(tiny().model, local=make_local(), personal="hyped")
    with pytest.raises(ValueError, match="head_hidden=0 must be"):
        fedrod(tiny().model, local=make_local(), head_hidden=0)
