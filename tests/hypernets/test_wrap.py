"""Models bound to a condition: which inputs share one, and where gradients flow."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.data import clients
from hyperjax.hypernets import embedding, mlp, wrap
from hyperjax.models import MLP, LeNet, from_linen, memory
from hyperjax.models.linen import cross_entropy
from hyperjax.types import Batch, ClientData, cannot_rebuild

SHAPE = (4, 4, 1)
K, P, N = 3, 4, 20
KEY = jax.random.key(0)


def spec(init):
    return jax.eval_shape(init, KEY)


def filled(init, seed=0):
    """Parameters of the right shapes (compiling an `init` takes long)."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.float32(rng.normal(scale=0.5, size=x.shape)), spec(init)
    )


TARGET = from_linen(MLP(K, hidden=(4,)), SHAPE, K)
NET = mlp.chunked_mlp(
    spec(TARGET.init)["params"],
    condition_size=P,
    chunk_size=10,
    chunk_embedding_size=2,
    hidden=(6,),
)


class Linear(nn.Module):
    """An extractor that compiles fast."""

    noise: bool

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        logits = nn.Dense(P, name="head")(x)
        return logits, nn.Dense(P, name="noise_head")(x) if self.noise else None


@functools.cache
def make_embedding(alpha=0.0, beta=0.0, noise=False):
    return embedding.distribution_embedding(
        SHAPE, embedding_size=P, alpha=alpha, beta=beta, extractor=Linear(noise)
    )


@functools.cache
def generated(e=None, **choices):
    return wrap.generated_from_input(TARGET, e or make_embedding(), NET, **choices)


@functools.cache
def pool():
    rng = np.random.default_rng(3)
    x = rng.integers(0, 256, (N, *SHAPE), np.uint8)
    return clients.make_pool(x, rng.integers(0, K, N), np.arange(N))


def client(rows, padding=0):
    padded = np.r_[rows, np.zeros(padding, int)].astype(np.int32)
    return ClientData(jnp.asarray(padded), jnp.int32(len(rows)), pool())


def batch(rows=range(6), masked=2):
    """Real samples, then masked ones that must not matter."""
    rows = np.r_[list(rows), np.full(masked, 19)].astype(np.int32)
    mask = np.arange(len(rows)) < len(rows) - masked
    return clients.gather(pool(), rows, mask.astype(np.float32))


def real(batch):
    keep = np.asarray(batch.mask) > 0
    return Batch(*(np.asarray(x)[keep] for x in (batch.x, batch.y, batch.mask)))


def target_loss(phi, e, batch):
    """Cross-entropy of the network generated for e, [P]."""
    params = NET.generate(phi, e)
    logits = TARGET.predict({"params": params, "stats": {}}, batch.x)
    return cross_entropy(logits, batch)


def embed(variables, x):
    return make_embedding().embed(None, variables["params"]["extractor"], x)[0]


@functools.cache
def differentiated(model):
    def loss(params, variables, batch, context, key):
        return model.loss(key, {**variables, "params": params}, batch, context)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def value_and_grads(model, variables, batch, context=()):
    (value, trained), grads = differentiated(model)(
        variables["params"], variables, batch, context, KEY
    )
    return value, trained.info, grads


# Training --------------------------------------------------------------------------


def test_batch_loss_and_chain_rule():
    # d loss / d phi = (vjp of the hypernetwork)(d cross-entropy / d theta).
    model = generated(make_embedding(alpha=0.3, beta=0.2))
    variables, data = filled(model.init), batch()
    value, info, grads = value_and_grads(model, variables, data)

    @jax.jit
    def by_hand(variables):
        own = real(data)
        phi = variables["params"]["hyper"]
        e = embed(variables, own.x)
        theta, pullback = jax.vjp(NET.generate, phi, jnp.mean(e, axis=0))
        loss, grad_theta = jax.value_and_grad(
            lambda p: cross_entropy(
                TARGET.predict({"params": p, "stats": {}}, own.x), own
            )
        )(theta)
        penalty = embedding.balancing_penalty(e, jnp.ones(6))
        return loss, penalty, pullback(grad_theta)[0]

    loss, (spread, uncertainty), grad_phi = by_hand(variables)
    assert float(info["loss"]) == pytest.approx(float(loss), rel=1e-6)
    expected = loss + 0.3 * spread + 0.2 * uncertainty
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert float(info["dispersion"]) == pytest.approx(float(spread), rel=1e-5)
    assert float(info["entropy"]) == pytest.approx(float(uncertainty), rel=1e-6)
    chex.assert_trees_all_close(grads["hyper"], grad_phi, rtol=1e-5, atol=1e-7)
    assert float(tree.norm(grads["extractor"])) > 0


def test_sample_loss_generates_a_network_per_sample():
    model = generated(embed_granularity="sample")
    variables, data = filled(model.init), batch()
    value, _, _ = value_and_grads(model, variables, data)
    own = real(data)
    one = jax.jit(
        lambda e, x, y: target_loss(
            variables["params"]["hyper"], e, Batch(x[None], y[None], np.ones(1))
        )
    )
    losses = [
        float(one(e, x, y))
        for e, x, y in zip(jax.jit(embed)(variables, own.x), own.x, own.y, strict=True)
    ]
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-6)
    together, _, _ = value_and_grads(generated(), variables, data)
    assert abs(float(together) - float(value)) > 1e-4


def test_sample_mode_with_equal_embeddings_equals_batch_mode():
    constant = embedding.constant_embedding(embedding_size=P)
    variables = filled(generated(constant).init)
    outputs = [
        value_and_grads(
            generated(constant, embed_granularity=granularity), variables, batch()
        )
        for granularity in ("sample", "batch")
    ]
    chex.assert_trees_all_close(*outputs, rtol=1e-5, atol=1e-6)


def test_client_mode_uses_the_clients_mean_and_trains_the_extractor():
    model = generated(embed_granularity="client")
    variables, data = filled(model.init), batch(range(6))
    everything = client(range(15), padding=2)
    context = jax.jit(model.visit.context)(variables, everything)
    x = clients.gather(pool(), np.arange(15), np.ones(15)).x
    client_mean = np.asarray(jax.jit(embed)(variables, x)).mean(0)
    np.testing.assert_allclose(context, client_mean, atol=1e-6)
    value, _, grads = value_and_grads(model, variables, data, context)

    # The value is that of the client's mean; its derivative that of the batch's mean.
    @jax.jit
    @jax.value_and_grad
    def by_hand(params):
        own = real(data)
        mean = jnp.mean(embed({"params": params}, own.x), axis=0)
        shifted = mean + jax.lax.stop_gradient(client_mean - mean)
        return target_loss(params["hyper"], shifted, own)

    expected, expected_grads = by_hand(variables["params"])
    direct = jax.jit(target_loss)(variables["params"]["hyper"], client_mean, real(data))
    assert float(value) == pytest.approx(float(direct), rel=1e-6)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-6)
    assert float(tree.norm(grads["extractor"])) > 1e-4


def test_client_mode_over_a_full_batch_equals_batch_mode():
    variables, data = filled(generated().init), batch(range(6))
    model = generated(embed_granularity="client")
    context = jax.jit(model.visit.context)(variables, client(range(6)))
    chex.assert_trees_all_close(
        value_and_grads(model, variables, data, context),
        value_and_grads(generated(), variables, data),
        rtol=1e-5,
        atol=1e-6,
    )
    assert generated().visit.context(variables, client(range(6))) == ()


def test_noise_enters_training_only():
    model = generated(make_embedding(noise=True))
    variables = filled(model.init)
    loss = jax.jit(model.loss)
    values = [
        float(loss(jax.random.key(seed), variables, batch(), ())[0])
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]
    silent = jax.jit(model.serve.condition)(variables, client(range(6)))
    expected = np.asarray(jax.jit(embed)(_without_noise(variables), batch().x))[:6]
    np.testing.assert_allclose(silent, expected.mean(0), atol=1e-6)


def _without_noise(variables):
    extractor = {
        k: v for k, v in variables["params"]["extractor"].items() if k != "noise_head"
    }
    return {"params": {**variables["params"], "extractor": extractor}}


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Dense(2)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(K)(x)


def test_statistics_of_the_target_are_moved_not_generated():
    target = from_linen(Normalised(), SHAPE, K)
    net = mlp.chunked_mlp(
        spec(target.init)["params"], condition_size=P, chunk_size=16, hidden=(4,)
    )
    model = wrap.generated_from_input(target, make_embedding(), net)
    assert tree.paths(spec(model.init)["stats"]) == [
        "batch_stats/BatchNorm_0/mean",
        "batch_stats/BatchNorm_0/var",
    ]
    variables = filled(model.init)
    stats = jax.jit(model.loss)(KEY, variables, batch(), ())[1].stats
    mean, before = (
        np.asarray(s["batch_stats"]["BatchNorm_0"]["mean"])
        for s in (stats, variables["stats"])
    )
    assert np.abs(mean - before).max() > 1e-4


# Deployment ------------------------------------------------------------------------


def deployed(model, variables, inputs):
    return memory.put(
        variables, "condition", jax.jit(model.serve.condition)(variables, inputs)
    )


def test_client_deployment_is_one_plain_network():
    model = generated()
    variables = deployed(model, filled(model.init), client(range(7, 17), padding=3))
    x = clients.gather(pool(), np.arange(N), np.ones(N)).x
    mean = np.asarray(jax.jit(embed)(variables, x))[7:17].mean(0)
    np.testing.assert_allclose(memory.get(variables, "condition"), mean, atol=1e-6)
    assert float(jnp.sum(memory.get(variables, "condition"))) == pytest.approx(
        1, abs=1e-6
    )
    plain = jax.jit(model.serve.export)(variables)
    assert jax.tree.structure(plain) == jax.tree.structure(spec(TARGET.init))
    np.testing.assert_allclose(
        jax.jit(model.predict)(variables, x),
        jax.jit(TARGET.predict)(plain, x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_sample_deployment_generates_a_network_per_input():
    # 20 inputs: one full group of networks and a rest.
    model = generated(deploy_granularity="sample")
    variables = deployed(model, filled(model.init), client(range(5)))
    assert memory.get(variables, "condition") == ()
    x = clients.gather(pool(), np.arange(N), np.ones(N)).x

    @jax.jit
    def one(x):
        e = embed(variables, x[None])[0]
        params = NET.generate(variables["params"]["hyper"], e)
        return TARGET.predict({"params": params, "stats": {}}, x[None])[0]

    logits = jax.jit(model.predict)(variables, x)
    np.testing.assert_allclose(
        logits, np.stack([one(v) for v in x]), rtol=1e-5, atol=1e-5
    )
    # There is no single network to export.
    assert model.serve.export(variables) is variables


def test_labels_do_not_enter_conditions():
    model = generated()
    variables = filled(model.init)
    inputs = client(range(10))
    permuted = inputs._replace(pool=pool()._replace(y=pool().y[::-1]))
    condition, inspect = jax.jit(model.serve.condition), jax.jit(model.serve.inspect)
    for other in (permuted, clients.withhold_labels(inputs)):
        np.testing.assert_array_equal(
            condition(variables, inputs), condition(variables, other)
        )
        chex.assert_trees_all_equal(
            inspect(variables, inputs), inspect(variables, other)
        )


def test_inspection_over_more_than_one_group_of_inputs():
    # 300 inputs are embedded in two groups; repeating rows repeats their embeddings.
    model = generated()
    variables = filled(model.init)
    rows = np.random.default_rng(0).integers(0, N, 300)
    out = jax.jit(model.serve.inspect)(variables, client(rows, padding=9))
    x = clients.gather(pool(), np.arange(N), np.ones(N)).x
    e = jax.jit(embed)(variables, x)
    np.testing.assert_allclose(out["embedding"], np.asarray(e)[rows].mean(0), rtol=1e-5)
    expected = np.asarray(embedding.entropy(e))[rows].mean()
    assert float(out["embedding_entropy"]) == pytest.approx(expected, rel=1e-5)


def test_condition_of_a_client_without_inputs_is_finite():
    model = generated()
    condition = jax.jit(model.serve.condition)(
        filled(model.init), client([], padding=2)
    )
    np.testing.assert_array_equal(condition, np.zeros(P))


def test_evaluation_noise_is_fixed():
    e = make_embedding(noise=True)
    noisy, silent = generated(e, eval_noise=True), generated(e)
    variables = filled(noisy.init)
    first, again, without = (
        np.asarray(jax.jit(m.serve.condition)(variables, client(range(4))))
        for m in (noisy, noisy, silent)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - without).max() > 1e-3
    assert first.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("enter", "expected"),
    [
        ("embedding", [0.7, 0.1, 0.1, 0.1]),
        ("centred", [1.8, -0.6, -0.6, -0.6]),  # 4 e - 1
        ("log_ratio", [*np.log([2.85, 0.45, 0.45, 0.45])]),  # log(4 e + 0.05)
    ],
)
def test_ways_for_the_condition_to_enter(enter, expected):
    model = generated(enter=enter)
    variables = memory.put(
        filled(model.init), "condition", np.float32([0.7, 0.1, 0.1, 0.1])
    )
    params = jax.jit(NET.generate)(variables["params"]["hyper"], np.float32(expected))
    chex.assert_trees_all_close(
        jax.jit(model.serve.export)(variables)["params"], params, rtol=1e-5, atol=1e-5
    )


def test_constant_embedding_has_no_parameters():
    model = generated(embedding.constant_embedding(embedding_size=P))
    params = spec(model.init)["params"]
    assert tree.count(params["extractor"]) == 0
    assert tree.count(params) == tree.count(params["hyper"])
    condition = jax.jit(model.serve.condition)(filled(model.init), client(range(3)))
    np.testing.assert_allclose(condition, np.full(P, 0.25), atol=1e-7)


# Opt.1: the condition as extra input ------------------------------------------------


def test_flat_networks_get_wider_inputs():
    e = embedding.distribution_embedding((28, 28, 1))
    base = from_linen(MLP(10), (28, 28, 1), 10)
    model = wrap.concatenated_to_input(base, e)
    network = spec(model.init)["params"]["network"]
    assert network["Dense_0"]["kernel"].shape == (784 + 16, 200)
    assert tree.count(network) == 199_210 + 16 * 200
    assert model.sample_shape == (28, 28, 1)


def test_convolutions_get_extra_channels():
    e = embedding.distribution_embedding((28, 28, 1))
    base = from_linen(LeNet(10), (28, 28, 1), 10)
    model = wrap.concatenated_to_input(base, e)
    network = spec(model.init)["params"]["network"]
    assert network["Conv_0"]["kernel"].shape == (5, 5, 1 + 16, 20)
    assert tree.count(network) == 431_080 + 5 * 5 * 16 * 20


class Mean(nn.Module):
    """Accepts [B, H, W, c] only."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(x.mean(axis=(1, 2)))


@pytest.mark.parametrize("module", [MLP(K, hidden=(4,)), Mean()])
def test_concatenated_inputs(module):
    base = from_linen(module, SHAPE, K)
    model = wrap.concatenated_to_input(base, make_embedding())
    variables = filled(model.init)
    e = np.float32([0.7, 0.1, 0.1, 0.1])
    x = np.asarray(batch().x)
    if isinstance(module, MLP):
        wide = np.concatenate([x.reshape(8, 16), np.tile(e, (8, 1))], axis=1)
    else:
        wide = np.concatenate([x, np.broadcast_to(e, (8, 4, 4, P))], axis=3)
    plain = {"params": variables["params"]["network"], "stats": {}}
    np.testing.assert_allclose(
        jax.jit(model.predict)(memory.put(variables, "condition", e), x),
        jax.jit(base.with_shape(wide.shape[1:]).predict)(plain, wide),
        rtol=1e-5,
        atol=1e-6,
    )
    _, _, grads = value_and_grads(model, variables, batch())
    assert float(tree.norm(grads["extractor"])) > 1e-5


def test_concatenation_of_a_model_that_cannot_be_rebuilt():
    fixed = TARGET._replace(with_shape=cannot_rebuild)
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        wrap.concatenated_to_input(fixed, make_embedding())


# Errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(embed_granularity="sampel"), r"embed_granularity='sampel'.*'sample'"),
        (dict(deploy_granularity="clients"), r"deploy_granularity='clients'.*'client'"),
        (dict(deploy_granularity="batch"), r"accepted: 'client', 'sample'"),
        (dict(enter="centered"), r"enter='centered'.*did you mean 'centred'"),
    ],
)
def test_unknown_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        generated(**choices)
