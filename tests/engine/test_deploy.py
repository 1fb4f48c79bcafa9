"""Single clients get the networks that are scored, whoever asks for them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import NUM_CLIENTS, method, tiny
from test_evaluate import (
    KEPT,
    ROOT,
    SOURCE,
    ZERO_SHOT,
    deployed,
    populations,
    scores,
    trained,
)

from hyperjax.engine import deploy, evaluate, sharding
from hyperjax.types import ClientData, Outputs, Pool

# One worker runs all, and compiles each program once.
pytestmark = pytest.mark.xdist_group("evaluate")

CLOSE = dict(rtol=1e-5, atol=1e-6)  # batches of clients differ


@functools.cache
def deployer(stack: str):
    return deploy.deployer(method(stack), batch_size=4)


def data_of(metric: str, places=slice(None), pool=None):
    """Training samples and inputs of some clients of a population."""
    pool = pool or tiny().pool
    train, inputs = populations()[metric][1:]
    return [ClientData(x.rows[places], x.size[places], pool) for x in (inputs, train)]


@functools.cache
def everybody(stack: str, metric: str):
    ids = populations()[metric].ids
    return deployer(stack)(ROOT, trained(stack), 2, ids, *data_of(metric))


@pytest.mark.parametrize("stack", [KEPT, ZERO_SHOT])
@pytest.mark.parametrize("metric", ["pacc", "zacc"])
def test_outputs_are_those_that_are_scored(stack, metric):
    inputs = populations()[metric].inputs
    for i, found in enumerate(everybody(stack, metric)):
        labels = np.asarray(tiny().pool.y)[inputs.rows[i, : inputs.size[i]]]
        assert len(found.logits) == len(labels) == inputs.size[i]
        nll = -jax.nn.log_softmax(found.logits)[np.arange(len(labels)), labels]
        expected = {k: x[i] for k, x in scores(stack)[metric].items()}
        assert float(nll.mean()) == pytest.approx(expected["loss"], rel=1e-5)
        right = np.mean(found.logits.argmax(-1) == labels)
        assert right == pytest.approx(expected["accuracy"])


def test_a_participant_has_what_it_stored():
    for client, found in enumerate(everybody(KEPT, "pacc")[:-1]):
        expected = deployed(trained(KEPT), client)
        chex.assert_trees_all_equal(found.variables, expected)
        chex.assert_trees_all_equal(found.network, expected)
    # The last one never took part, so it starts as those who cannot.
    never, novel = everybody(KEPT, "pacc")[-1], everybody(KEPT, "zacc")[0]
    chex.assert_trees_all_equal(never.variables, novel.variables)


def test_the_network_predicts_as_the_method_does():
    """What is given away needs nothing of the hypernetwork."""
    inputs, pool = populations()["zacc"].inputs, tiny().pool
    for i, found in enumerate(everybody(ZERO_SHOT, "zacc")):
        rows = inputs.rows[i, : inputs.size[i]]
        x = (pool.x[rows] / 255.0 - pool.mean) / pool.std
        assert set(found.network["params"]) == {"Dense_0", "head"}
        logits = tiny().model.predict(found.network, x)
        np.testing.assert_allclose(logits, found.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stack", [KEPT, ZERO_SHOT])
def test_alone_or_beside_others_in_any_order(stack):
    order = [5, 2, 7]
    some = deployer(stack)(ROOT, trained(stack), 2, order, *data_of("pacc", order))
    (alone,) = deployer(stack)(ROOT, trained(stack), 2, [2], *data_of("pacc", [2]))
    expected = [everybody(stack, "pacc")[i] for i in order]
    chex.assert_trees_all_close([*some, alone], [*expected, expected[1]], **CLOSE)


def test_inputs_may_be_of_any_pool_and_their_labels_are_not_looked_at():
    pool, (inputs, _) = tiny().pool, data_of("zacc")
    back = jnp.arange(len(pool.y))[::-1]
    other = Pool(pool.x[back], jnp.full_like(pool.y, 2), pool.mean, pool.std)
    moved = ClientData(len(pool.y) - 1 - inputs.rows, inputs.size, other)
    ids = populations()["zacc"].ids
    found = deployer(ZERO_SHOT)(ROOT, trained(ZERO_SHOT), 2, ids, moved)
    chex.assert_trees_all_close(found, everybody(ZERO_SHOT, "zacc"), **CLOSE)


def test_clients_adapt_on_what_they_are_given():
    """A method whose clients keep sums of the labels that they are shown."""
    alg = method("fedavg")

    def total(data):
        alive = jnp.arange(data.rows.shape[0]) < data.size
        return jnp.sum(jnp.where(alive, data.pool.y[data.rows], 0))

    client = alg.client._replace(
        adapt=lambda key, down, state, data: (total(data.train), total(data.inputs)),
        deploy=lambda down, seen: {"params": {}, "seen": seen},
        model=alg.client.model._replace(apply=lambda variables, x: Outputs(x[:, 0, 0])),
    )
    give = deploy.deployer(alg._replace(client=client), batch_size=4)
    inputs, train = data_of("pacc", [4, 1])
    shifted = train.pool._replace(y=train.pool.y + 1)
    sizes = tiny().table.size[[4, 1]]
    rows = [tiny().table.rows[i, :size] for i, size in zip((4, 1), sizes, strict=True)]
    labels = [int(np.asarray(tiny().pool.y)[r].sum()) for r in rows]
    for given, expected in (
        (train, labels),
        (train._replace(pool=shifted), labels + sizes),
        (None, [0, 0]),
    ):
        found = give(ROOT, trained("fedavg"), 2, [4, 1], inputs, given)
        seen = [one.variables["seen"] for one in found]
        np.testing.assert_array_equal([x[0] for x in seen], expected)
        np.testing.assert_array_equal([x[1] for x in seen], -sizes)


@pytest.mark.parametrize("devices", [1, 4])
def test_an_evaluator_gives_away_what_it_scores(devices):
    mesh = sharding.client_mesh(NUM_CLIENTS, devices)
    found = evaluate.evaluator(
        *(method(KEPT), tiny().pool, populations()),
        source_prior=SOURCE,
        batch_size=4,
        mesh=mesh,
    )
    carry = sharding.replicate(trained(KEPT), mesh)
    one = found.deploy(ROOT, carry, 2, [3], *data_of("pacc", [3]))
    chex.assert_trees_all_close(one, everybody(KEPT, "pacc")[3:4], **CLOSE)


def test_a_seed_is_a_root_and_keys_follow_from_it():
    inputs = data_of("zacc", [0])[0]
    give, carry = deployer("fedper"), trained("fedper")
    seed, key = (give(root, carry, 2, [9], inputs) for root in (0, ROOT))
    chex.assert_trees_all_equal(seed, key)


@pytest.mark.parametrize(
    ("ids", "places", "message"),
    [
        ([0.5], [0], r"ids=\[0\.5\]; accepted: one whole number or more"),
        ([], [], r"ids=\[\]; accepted"),
        (3, [0], "ids=3; accepted"),
        ([-1], [0], "client=-1 must be at least 0"),
        ([1, 2], [0], r"train has rows of shape \(1, .*for 2 clients; accepted"),
    ],
)
def test_mistakes_are_named(ids, places, message):
    with pytest.raises(ValueError, match=message):
        deployer(KEPT)(ROOT, trained(KEPT), 2, ids, *data_of("pacc", places))


def test_images_of_another_shape_are_refused():
    inputs, _ = data_of("zacc", [0])
    wide = inputs.pool._replace(x=jnp.zeros((3, 5, 5, 1), jnp.uint8))
    with pytest.raises(ValueError, match=r"samples of shape \(5, 5, 1\); the network"):
        deployer(KEPT)(ROOT, trained(KEPT), 2, [8], inputs._replace(pool=wide))
