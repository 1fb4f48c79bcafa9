"""FedProto: class means over clients by hand, and the pull towards them."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import normed
from test_fedavg import FULL, LR, MODEL, PARTS, SHAPE, K, pool
from test_fml import LINE, data_of, flat_of, trained_alone
from test_lg_fedavg import FAMILY_SIZES, joint

from hyperjax.algorithms.fedproto import Prototypes, Uplink, fedproto
from hyperjax.algorithms.local_only import local_only
from hyperjax.engine import comm, families
from hyperjax.models import MLP, from_linen
from hyperjax.types import AdaptData, Cohort, Downlink

NETWORKS = {"plain": LINE, "wide": MODEL}  # L = 4 inputs, or 4 hidden units
FEATURES = 4
CLOSE = dict(rtol=1e-5, atol=1e-6)
DRAW = np.random.default_rng(0)
SENT = Prototypes(
    jnp.float32(DRAW.normal(size=(K, FEATURES))), jnp.array([1.0, 0.0, 1.0])
)
UNKNOWN = Prototypes(SENT.mean, jnp.zeros(K))


@functools.cache
def ours(lam=1.5):
    return fedproto(NETWORKS, local=FULL, family_sizes=FAMILY_SIZES, lam=lam)


def inputs(part):
    """What a client's samples look like to a network, [n, 2, 2, 1]; their labels."""
    x = (np.asarray(pool().x)[part] / 255.0 - pool().mean) / pool().std
    return x, np.asarray(pool().y)[part]


def means_of(z, y):
    """Mean features and samples of each class, in float64."""
    counts = np.bincount(y, minlength=K)
    total = np.stack([np.float64(z)[y == k].sum(0) for k in range(K)])
    return total / np.maximum(counts, 1)[:, None], counts


@functools.cache
def _visit(name, lam):
    side = ours(lam).client[name]

    @jax.jit
    def run(prototypes, data):
        key, down = jax.random.key(0), Downlink(prototypes, round=jnp.int32(0))
        client = side.init(key, key, down)
        return side.update(key, down, client, data)

    return run


def visit(name, part, prototypes, lam=1.5):
    """A client's first visit: its uplink, its parameters by path, its info."""
    uplink, client, info = _visit(name, lam)(prototypes, data_of(part))
    params = {k: x for k, x in client.kept.items() if k.startswith("params/")}
    return uplink, params, info


def started(name):
    return NETWORKS[name].init(jax.random.key(0))["params"]


# Clients ----------------------------------------------------------------------------


def test_unknown_classes_pull_nothing():
    _, found, info = visit("wide", PARTS[1], UNKNOWN)
    expected = trained_alone(MODEL)(started("wide"), data_of(PARTS[1]))
    chex.assert_trees_all_close(found, flat_of({"params": expected}), **CLOSE)
    assert info["pull"] == 0


def test_without_weight_nothing_pulls():
    _, found, info = visit("wide", PARTS[1], SENT, lam=0.0)
    expected = trained_alone(MODEL)(started("wide"), data_of(PARTS[1]))
    chex.assert_trees_all_close(found, flat_of({"params": expected}), **CLOSE)
    assert info["pull"] > 0


def test_features_are_pulled_to_the_prototypes_of_their_class():
    params = started("wide")
    x, y = inputs(PARTS[1])
    assert set(y) == {0, 1, 2}

    def loss(params):
        hidden, head = params["Dense_0"], params["head"]
        z = nn.relu(x.reshape(len(x), -1) @ hidden["kernel"] + hidden["bias"])
        logits = jax.nn.log_softmax(z @ head["kernel"] + head["bias"])
        apart = jnp.sum((z - SENT.mean[y]) ** 2, 1) / FEATURES
        # Nobody has shown the class 1.
        pull = jnp.mean(jnp.where(y == 1, 0.0, apart))
        return 1.5 * pull - jnp.mean(logits[jnp.arange(len(x)), y]), pull

    grads, pull = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = jax.tree.map(lambda w, g: w - LR * g, params, grads)
    _, found, info = visit("wide", PARTS[1], SENT)
    chex.assert_trees_all_close(found, flat_of({"params": expected}), **CLOSE)
    np.testing.assert_allclose(info["pull"], pull, rtol=1e-5)


def test_clients_send_mean_features_of_their_trained_network():
    uplink, params, _ = visit("wide", PARTS[2], SENT)
    x, y = inputs(PARTS[2])
    hidden = (params[f"params/Dense_0/{name}"] for name in ("kernel", "bias"))
    kernel, bias = hidden
    z = np.maximum(x.reshape(len(x), -1) @ kernel + bias, 0)
    mean, counts = means_of(z, y)
    np.testing.assert_allclose(uplink.mean, mean, **CLOSE)
    np.testing.assert_array_equal(uplink.samples, counts)
    # The features of a linear network are its inputs.
    uplink, *_ = visit("plain", PARTS[3], SENT)
    mean, counts = _of_inputs(PARTS[3])
    np.testing.assert_allclose(uplink.mean, mean, **CLOSE)
    np.testing.assert_array_equal(uplink.samples, counts)
    assert 0 in counts and np.all(uplink.mean[counts == 0] == 0)


def _of_inputs(part):
    x, y = inputs(part)
    return means_of(x.reshape(len(x), -1), y)


def test_a_client_without_samples_sends_nothing_that_counts():
    uplink, *_ = visit("wide", np.arange(0), SENT)
    assert np.all(uplink.samples == 0) and np.all(uplink.mean == 0)


def test_fine_tuning_is_pulled_to_the_prototypes_of_today():
    # On a first visit too, when the client has not been told any.
    side = ours().client["wide"]
    key, down = jax.random.key(0), Downlink(SENT, round=jnp.int32(3))
    data = AdaptData(data_of(PARTS[1]), data_of(PARTS[1]))
    adapted = side.adapt(key, down, side.init(key, key, down), data)
    variables = side.deploy(down, adapted)
    chex.assert_trees_all_equal(variables["memory"]["prototypes"], SENT._asdict())


# The server -------------------------------------------------------------------------


def test_prototypes_are_means_over_the_samples_of_all_clients():
    means = np.float32(DRAW.normal(size=(4, K, FEATURES)))
    # Nobody shows the class 1; the last client dropped out: its rows are zero.
    counts = np.float32([[3, 0, 0], [1, 0, 4], [0, 0, 12], [0, 0, 0]])
    expected = np.stack(
        [
            (3 * means[0, 0] + means[1, 0]) / 4,
            SENT.mean[1],
            (4 * means[1, 2] + 12 * means[2, 2]) / 16,
        ]
    )
    means[3] = 0
    ups = {
        name: Uplink(jnp.asarray(means[i]), jnp.asarray(counts[i]))
        for name, i in (("plain", [0, 2]), ("wide", [1, 3]))
    }
    ones = jnp.ones(2)
    # Aggregation weights play no part.
    who = Cohort(jnp.arange(2), ones, 7 * ones, jnp.int32(0), jnp.float32(4))
    cohorts = {name: who for name in NETWORKS}
    for known in (jnp.zeros(K), jnp.array([0.0, 1.0, 0.0])):
        server = Prototypes(SENT.mean, known)
        after, _ = ours().server.update(None, server, ups, cohorts)
        np.testing.assert_allclose(after.mean, expected, rtol=1e-6)
        np.testing.assert_array_equal(after.known, [1, known[1], 1])
    # Some of the families are enough, and all are told the same.
    after, _ = ours().server.update(None, server, {"wide": ups["wide"]}, {"wide": who})
    np.testing.assert_allclose(after.mean[2], means[1, 2], rtol=1e-6)
    downs = ours().server.downlink(None, after, cohorts)
    assert downs["plain"].shared is downs["wide"].shared is after


def test_two_rounds_of_two_networks():
    # Nothing pulls in the first round, which is local training; absent clients and
    # drop-outs have no say.
    run = joint(ours(), PARTS, pool())
    alone = joint(local_only(NETWORKS, local=FULL), PARTS, pool())
    first, apart = (x.play((3, 0, -2)) for x in (run, alone))
    for name in NETWORKS:
        kept = first.rows[name].kept
        found = {k: x for k, x in kept.items() if k.startswith("params/")}
        chex.assert_trees_all_close(found, apart.rows[name].kept, **CLOSE)
    by_hand = [
        means_of_features(first, "plain", 0),
        means_of_features(first, "wide", 3),
    ]
    counts = np.stack([n for _, n in by_hand])
    total = sum(n[:, None] * mean for mean, n in by_hand)
    seen = counts.sum(0) > 0
    expected = total[seen] / counts.sum(0)[seen][:, None]
    np.testing.assert_allclose(first.server.mean[seen], expected, **CLOSE)
    np.testing.assert_array_equal(first.server.known, seen)
    # The second one differs, and holds what the first made.
    second = run.play((0, 1), state=first, first=1)
    told = second.rows["wide"].kept["memory/prototypes/mean"]
    np.testing.assert_array_equal(told[0], first.server.mean)
    assert np.all(told[1] == 0)
    assert second.info["pull"] > 0


def means_of_features(state, name, k):
    x, y = inputs(PARTS[k])
    x = x.reshape(len(x), -1)
    if name == "wide":
        kept = state.rows[name].kept
        kernel, bias = (kept[f"params/Dense_0/{p}"][k // 2] for p in ("kernel", "bias"))
        x = np.maximum(x @ kernel + bias, 0)
    return means_of(x, y)


# The wire, and bad input ------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_mean_and_a_number_for_each_class_each_way(name):
    # Down: means [K, L] and which are known [K]; up: means and samples.
    costs = comm.cost(comm.describe(families.view(ours(), name)))
    assert costs.down_numbers == costs.up_numbers == K * FEATURES + K


def test_families_with_other_features_are_refused():
    models = {**NETWORKS, "broad": from_linen(MLP(K, hidden=(5,)), SHAPE, K)}
    sizes = dict.fromkeys(models, 1)
    with pytest.raises(ValueError, match=r"'plain': \(3, 4\), .*'broad': \(3, 5\)"):
        fedproto(models, local=FULL, family_sizes=sizes)


def test_other_networks_of_equal_features_and_bad_weights():
    # Convolutions with batch-norm and a mean over 4 channels: L = 4 as well.
    wide = from_linen(MLP(3, hidden=(4,)), normed().sample_shape, 3)
    both = {"a": normed(), "b": wide}
    alg = fedproto(both, local=FULL, family_sizes={"a": 1, "b": 1})
    for name in both:
        costs = comm.cost(comm.describe(families.view(alg, name)))
        assert costs.up_numbers == 15
    with pytest.raises(ValueError, match=r"lam=-1\.0 must be at least 0"):
        ours(-1.0)
