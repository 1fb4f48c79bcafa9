"""FML: two networks that teach each other, of which one is averaged."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import normed
from test_fedavg import FULL, MODEL, PARTS, SHAPE, K, one_round, pool, stacked
from test_lg_fedavg import FAMILY_SIZES, MEMBERS, joint

from hyperjax import rng, training, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.fml import fml, mutual
from hyperjax.engine import comm, families
from hyperjax.models import MLP, from_linen
from hyperjax.models.linen import cross_entropy, distillation
from hyperjax.types import Batch, ClientData, Model, Outputs, Trained

LINE = from_linen(MLP(K, hidden=()), SHAPE, K)
NETWORKS = {"plain": LINE, "wide": MODEL}  # 15 and 35 parameters
SMALL = 15
CLOSE = dict(rtol=1e-5, atol=1e-6)


def flat_of(variables):
    """From a network's parameters to paths -> leaves."""
    params = {"params": variables["params"]}
    return dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))


def data_of(part):
    """The data of one client."""
    rows, size, _ = stacked([part])
    return ClientData(rows[0], size[0], pool())


@functools.cache
def trained_alone(model):
    """`(params, data) -> params` of a client that does nothing but local training."""
    train, no = training.trainer(model, FULL), training.no_adjustment

    @jax.jit
    def run(params, data):
        start = {"params": params, "stats": {}}
        after, _ = train(jax.random.key(0), start, data, jnp.int32(0), no)
        return after["params"]

    return run


# The loss ---------------------------------------------------------------------------


def logits_model(z):
    """A network whose parameters are its logits for every input."""

    def apply(variables, x):
        return Outputs(jnp.broadcast_to(variables["params"]["z"], (len(x), K)))

    def loss(key, variables, batch, context):
        logits = apply(variables, batch.x).logits
        value = cross_entropy(logits, batch)
        return value, Trained({}, {"loss": value}, logits)

    return Model(
        sample_shape=(1,),
        init=lambda key: {"params": {"z": jnp.array(z)}, "stats": {}},
        loss=loss,
        apply=apply,
    )


# The last sample is padding.
BATCH = Batch(jnp.zeros((3, 1)), jnp.array([0, 1, 2]), jnp.array([1.0, 1.0, 0.0]))
OWN, SHARED = [0.5, -1.0, 2.0], [1.0, 0.3, -0.7]


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.0, 1.0), (0.3, 0.8), (0.0, 0.5), (0.5, 0.0)]
)
def test_gradients_by_hand(alpha, beta):
    both = mutual(logits_model(OWN), logits_model(SHARED), alpha, beta)
    variables = both.init(jax.random.key(0))

    def loss(params):
        full = {**variables, "params": params}
        return both.loss(jax.random.key(0), full, BATCH, both.visit.context(full, None))

    grads, trained = jax.grad(loss, has_aux=True)(variables["params"])
    own, shared = (np.exp(z) / np.sum(np.exp(z)) for z in (OWN, SHARED))
    label = np.array([0.5, 0.5, 0])
    # d/dz CE = p - y; d/dz KL(q || softmax(z)) = softmax(z) - q, with q fixed.
    expected = alpha * (own - label) + (1 - alpha) * (own - shared)
    np.testing.assert_allclose(grads["own"]["z"], expected, **CLOSE)
    expected = beta * (shared - label) + (1 - beta) * (shared - own)
    np.testing.assert_allclose(grads["shared"]["z"], expected, **CLOSE)
    assert trained.stats == {"own": {}, "shared": {}}
    np.testing.assert_allclose(trained.logits, [OWN] * 3)
    info = trained.info
    np.testing.assert_allclose(info["loss"], -np.log(own) @ label, rtol=1e-5)
    np.testing.assert_allclose(info["shared_loss"], -np.log(shared) @ label, rtol=1e-5)


def test_divergence_is_that_of_the_teacher_from_the_student():
    own, shared = (np.exp(z) / np.sum(np.exp(z)) for z in (OWN, SHARED))
    rows = jnp.tile(jnp.array([OWN]), (3, 1)), jnp.tile(jnp.array([SHARED]), (3, 1))
    found = distillation(*rows, BATCH)
    np.testing.assert_allclose(found, shared @ np.log(shared / own), rtol=1e-5)
    found = distillation(*reversed(rows), BATCH)
    np.testing.assert_allclose(found, own @ np.log(own / shared), rtol=1e-5)


def test_it_predicts_with_its_own_and_exports_it():
    both = mutual(MODEL, LINE, 0.5, 0.5)
    variables = both.init(jax.random.key(0))
    own = MODEL.init(jax.random.split(jax.random.key(0))[0])
    chex.assert_trees_all_equal(both.serve.export(variables), own)
    x = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    expected = MODEL.predict(own, x)
    np.testing.assert_array_equal(both.predict(variables, x), expected)


# Whole exchanges --------------------------------------------------------------------


@pytest.mark.slow
def test_with_labels_alone_both_train_apart():
    alg = fml(NETWORKS, local=FULL, family_sizes=FAMILY_SIZES, alpha=1.0, beta=1.0)
    # Client 3 comes late, client 0 drops out of the second round.
    rounds, weight = ((2, 0, 1), (3, -1, 1)), [len(part) for part in PARTS]
    run = joint(alg, PARTS, pool())
    state = run.play(*rounds, weight=weight)
    # The shared one is FedAvg's, over clients of all families.
    theirs = {
        path.replace("/shared", ""): x for path, x in run.start().server.theta.items()
    }
    server = plain_line().server.init(jax.random.key(0))._replace(theta=theirs)
    for ids in ((0, 1, 2), (1, 3)):
        parts = [PARTS[k] for k in ids]
        _, server, *_ = one_round(plain_line(), parts, ids=ids, start=server)
    theirs = {
        path.replace("params", "params/shared"): x for path, x in server.theta.items()
    }
    chex.assert_trees_all_close(state.server.theta, theirs, **CLOSE)
    # Own ones follow their own gradients, each visit from where they were.
    common = rng.stream(jax.random.key(0), "common_init")
    for name, model in NETWORKS.items():
        for place, k in enumerate(MEMBERS[name]):
            params = model.init(jax.random.split(common)[0])["params"]
            for _ in range({0: 1, 1: 2, 2: 1, 3: 1}[k]):
                params = trained_alone(model)(params, data_of(PARTS[k]))
            found = {
                path.replace("/own", ""): x[place]
                for path, x in state.rows[name].kept.items()
            }
            expected = flat_of({"params": params})
            chex.assert_trees_all_close(found, expected, **CLOSE)


@functools.cache
def plain_line():
    return fedavg(LINE, local=FULL)


@functools.cache
def ours():
    return fml(NETWORKS, local=FULL, family_sizes=FAMILY_SIZES)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smallest_network_each_way_and_no_other(name):
    messages = comm.describe(families.view(ours(), name))
    assert all(path.startswith("params/shared/") for path in messages.uplink.delta)
    costs = comm.cost(messages)
    assert costs.up_numbers == costs.down_numbers == SMALL
    assert costs.up_bytes + costs.down_bytes == 2 * 4 * SMALL


def test_own_statistics_stay_home():
    models = {"a": normed(), "b": LINE.with_shape(normed().sample_shape)}
    alg = fml(models, local=FULL, family_sizes={"a": 1, "b": 1})
    messages = comm.describe(families.view(alg, "a"))
    own = {path for path in messages.client.kept if path.startswith("stats/own/")}
    assert len(own) == 4
    assert not any("stats" in path for path in messages.uplink.delta)


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_weights_outside_the_unit_interval(name, value):
    with pytest.raises(
        ValueError, match=rf"{name}={value} must be.* at least 0 and at most 1"
    ):
        fml(NETWORKS, local=FULL, family_sizes=FAMILY_SIZES, **{name: value})
