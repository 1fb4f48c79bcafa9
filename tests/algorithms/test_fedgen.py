"""FedGen: FedAvg's identities, the generator's gradient, and losses by hand."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q
from test_fedavg import FULL, MODEL, PARTS, K, cohort_of, nest, pool, stacked

from hyperjax import tree
from hyperjax.algorithms.fedavg import Uplink as Change
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.fedgen import Generator, Uplink, diversity, fedgen
from hyperjax.engine import comm
from hyperjax.models import memory
from hyperjax.types import Batch

EVERYONE = tuple(range(len(PARTS)))
NOISE, HIDDEN, FEATURES = 3, 4, 4
SMALL = dict(noise_size=NOISE, hidden_size=HIDDEN)
HEAD_KERNEL, HEAD_BIAS = "params/head/kernel", "params/head/bias"
CLOSE = dict(rtol=1e-5, atol=1e-6)


@functools.cache
def ours(**options):
    return fedgen(MODEL, local=FULL, **(SMALL | options))


def play(alg, *cohorts, state=None, parts=PARTS):
    """Runs an exchange per cohort; a negative id -1 - k dropped out."""
    state = state or q.start(alg)
    for number, ids in enumerate(cohorts):
        active = np.array([float(i >= 0) for i in ids])
        ids = np.array([-1 - i if i < 0 else i for i in ids], np.int32)
        ids = np.pad(ids, (0, q.N - len(ids)), constant_values=q.N)
        place = np.minimum(ids, q.N - 1)
        who = cohort_of(ids, np.ones(q.N), np.pad(active, (0, q.N - len(active))))
        who = who._replace(round=jnp.int32(number))
        data = stacked([parts[k] for k in place])
        state = q._program(alg)(*state[:3], data, who)
    return jax.device_get(state)


def counts(part):
    return np.bincount(np.asarray(pool().y)[part], minlength=K)


# Whole exchanges --------------------------------------------------------------------


@pytest.mark.slow
def test_without_weights_it_is_fedavg():
    cohorts = (EVERYONE, (2, 0), EVERYONE)
    expected = play(fedavg(MODEL, local=FULL), *cohorts)
    state = play(ours(alpha=0.0, beta=0.0), *cohorts)
    chex.assert_trees_all_close(
        state.server.inner.theta, expected.server.theta, **CLOSE
    )


@pytest.mark.slow
def test_the_first_round_is_fedavgs():
    plain = play(fedavg(MODEL, local=FULL), EVERYONE)
    first = play(ours(), EVERYONE)
    chex.assert_trees_all_close(first.server.inner.theta, plain.server.theta, **CLOSE)
    start = q.start(ours()).server
    assert float(tree.norm(tree.sub(first.server.generator, start.generator))) > 1e-4
    # The next one is not.
    plain = play(fedavg(MODEL, local=FULL), EVERYONE, EVERYONE)
    second = play(ours(), EVERYONE, EVERYONE)
    gap = tree.sub(second.server.inner.theta, plain.server.theta)
    assert float(tree.norm(gap)) > 1e-3


def test_clients_hold_the_generator_as_it_was_sent():
    state, generator = None, q.start(ours()).server.generator
    for number in range(3):
        state = play(ours(), *[EVERYONE] * (number + 1))
        held = state.rows.kept
        for k in EVERYONE:
            found = {
                path.removeprefix("memory/generator/params/"): x[k]
                for path, x in held.items()
                if path.startswith("memory/generator/params/")
            }
            leaves = jax.tree.leaves(generator)
            sent = dict(zip(tree.paths(generator), leaves, strict=True))
            chex.assert_trees_all_equal(found, sent)
        # Coefficients fall from the second round on; labels are the client's own.
        decay = held["memory/generator/decay"]
        np.testing.assert_allclose(decay, [0.98**number if number else 0] * q.N)
        available = held["memory/generator/available"]
        np.testing.assert_array_equal(available, [counts(part) for part in PARTS])
        np.testing.assert_array_equal(state.uplink.counts, available)
        generator = state.server.generator


def test_clients_of_one_label_or_of_none_do_no_harm():
    y = np.asarray(pool().y)
    one = [np.flatnonzero(y == k % K)[:3] for k in range(q.N)]
    state = play(ours(), EVERYONE, EVERYONE, parts=[*one[:3], np.arange(0)])
    assert tree.finite(state)
    assert state.uplink.counts[3].tolist() == [0] * K
    nobody = play(ours(), EVERYONE, state=state, parts=[np.arange(0)] * q.N)
    absent = play(ours(), (-1, -2, -3, -4), state=state)
    chex.assert_trees_all_equal(nobody.server.generator, state.server.generator)
    chex.assert_trees_all_equal(nobody.server.inner.theta, state.server.inner.theta)
    chex.assert_trees_all_equal(absent.server, state.server)


# The generator's step ---------------------------------------------------------------


@functools.cache
def _step():
    return jax.jit(ours(generator_steps=1).server.update)


def gradient(heads, labels):
    """The gradient of a step, [d], from clients' heads (seeds) and label counts."""
    server = q.start(ours(generator_steps=1)).server
    draws = [np.random.default_rng(seed) for seed in heads]
    delta = {
        path: jnp.stack([jnp.float32(draw.normal(size=x.shape)) for draw in draws])
        for path, x in server.inner.theta.items()
    }
    up = Uplink(Change(delta, ()), jnp.asarray(labels, jnp.float32))
    cohort = cohort_of(range(len(heads)), [1] * len(heads))
    after, _ = _step()(jax.random.key(0), server, up, cohort)
    # Adam's first moment is a tenth of it.
    return jax.tree.map(lambda x: 10 * np.asarray(x), after.opt[0].mu)


def test_teachers_are_weighted_by_their_share_of_each_label():
    first, second = (gradient((s, s), [[1] * K] * 2) for s in (1, 2))
    assert float(tree.norm(tree.sub(first, second))) > 0.01
    found = gradient((1, 2), [[3] * K, [1] * K])
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, first, second)
    chex.assert_trees_all_close(found, expected, **CLOSE)
    # Whatever the number of samples: shares sum to one for every label.
    more = gradient((1, 2), [[30] * K, [10] * K])
    chex.assert_trees_all_close(more, expected, **CLOSE)
    # Identical clients are one teacher, however they share the labels.
    single = gradient((1, 2), [[1] * K, [0] * K])
    chex.assert_trees_all_close(single, first, **CLOSE)
    shared = gradient((1, 1), [[5, 0, 2], [1, 4, 7]])
    chex.assert_trees_all_close(shared, first, **CLOSE)


def test_only_labels_that_someone_has_are_drawn():
    found = gradient((1, 2), [[3, 0, 0], [0, 0, 1]])["Dense_0"]["kernel"]
    # Rows of the noise, then of the labels.
    assert np.all(found[NOISE + 1] == 0)
    assert np.all(found[[NOISE, NOISE + 2]] != 0)


def test_diversity_by_hand():
    # Noise (1, 0) apart: mean square 1/2; features (2, 4) apart: mean 3. Of the four
    # pairs two are of a sample with itself: exp(-(1.5 + 1.5) / 4).
    noise, z = jnp.array([[0.0, 1], [1, 1]]), jnp.array([[0.0, 0], [2, -4]])
    np.testing.assert_allclose(diversity(noise, z), np.exp(-0.75), rtol=1e-6)


# The clients' loss ------------------------------------------------------------------

X = np.float32(np.random.default_rng(1).normal(size=(3, 2, 2, 1)))
FULL_BATCH = Batch(jnp.asarray(X), jnp.array([0, 2, 1]), jnp.ones(3))
Z = np.array([0.5, -1.0, 2.0, 0.25])


@functools.cache
def _loss(**options):
    train = FULL._replace(batch_size=3)
    alg = fedgen(MODEL, local=train, generator_batch_size=6, **(SMALL | options))

    def value(theta, extra, batch):
        variables = nest(theta)
        variables = memory.put(variables, "generator", extra)
        return alg.client.model.loss(jax.random.key(2), variables, batch, ())[0]

    return jax.jit(jax.value_and_grad(value))


@functools.cache
def theta():
    return q.start(ours()).server.inner.theta


def extra(available=(1, 1, 1), decay=1.0, constant=True):
    """What a client knows of the generator; a constant one emits Z."""
    params = q.start(ours()).server.generator
    if constant:
        last = dict(kernel=jnp.zeros((HIDDEN, FEATURES)), bias=jnp.float32(Z))
        params = {**params, "Dense_1": last}
    return {
        "params": params,
        "available": jnp.float32(available),
        "decay": jnp.float32(decay),
    }


def added(known, batch=FULL_BATCH, at=None, **options):
    """What the regularisers add to the loss, and to its gradient."""
    at = at or theta()
    value, grads = _loss(**options)(at, known, batch)
    plain, plain_grads = _loss(**options)(at, {**known, "decay": 0.0}, batch)
    return float(value - plain), jax.device_get(tree.sub(grads, plain_grads))


def test_distillation_by_hand():
    # KL(p || f) with p what the head makes of G(y), fixed, and f the predictions.
    value, grads = added(extra(), alpha=0.0, beta=1.0)
    at = jax.device_get(theta())
    p = np.exp(Z @ at[HEAD_KERNEL] + at[HEAD_BIAS])
    p = p / p.sum()
    f = np.asarray(jax.nn.softmax(jax.jit(MODEL.predict)(nest(theta()), X)))
    np.testing.assert_allclose(
        value, np.mean(np.sum(p * np.log(p / f), -1)), rtol=1e-4, atol=1e-6
    )
    # d/db with p fixed; with p free there would be more.
    np.testing.assert_allclose(grads[HEAD_BIAS], np.mean(f - p, 0), atol=1e-6)
    other = np.mean(np.sum(f * np.log(f / p), -1))
    assert abs(value - other) > 1e-3


def test_classification_of_generated_features_by_hand():
    at = jax.device_get(theta())
    logits = Z @ at[HEAD_KERNEL] + at[HEAD_BIAS]
    wrong = np.log(np.sum(np.exp(logits))) - logits
    for label in range(K):
        # B_gen / B = 6 / 3.
        known = extra(available=np.eye(K)[label])
        value, _ = added(known, alpha=1.0, beta=0.0)
        np.testing.assert_allclose(value, 2 * wrong[label], rtol=1e-4)
    # B is that of the training, however few rows a batch has, or of them are real.
    short = jax.tree.map(lambda x: x[:2], FULL_BATCH)
    masks = ([1.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    for batch in (short, *(FULL_BATCH._replace(mask=jnp.array(m)) for m in masks)):
        value, _ = added(extra(available=(0, 0, 5)), batch, alpha=1.0, beta=0.0)
        np.testing.assert_allclose(value, 2 * wrong[2], rtol=1e-4)


def test_of_a_single_sample_nothing_is_distilled():
    one = FULL_BATCH._replace(mask=jnp.array([1.0, 0.0, 0.0]))
    value, grads = added(extra(constant=False), one, alpha=0.0, beta=1.0)
    assert value == 0 and float(tree.norm(grads)) == 0
    two = FULL_BATCH._replace(mask=jnp.array([1.0, 1.0, 0.0]))
    assert added(extra(constant=False), two, alpha=0.0, beta=1.0)[0] > 0


def test_only_labels_the_client_holds_are_drawn():
    # A head that finds the label 1 unlikely by e^-50.
    at = {**theta(), HEAD_BIAS: jnp.array([0.0, -50.0, 0.0])}
    value, _ = added(extra(available=(4, 0, 1)), at=at, alpha=1.0, beta=0.0)
    assert 0 < value < 20
    value, _ = added(extra(available=(0, 1, 0)), at=at, alpha=1.0, beta=0.0)
    assert value > 80


@pytest.mark.parametrize(
    ("decay", "factor"), [(0.5, 0.5), (1e-9, 1e-4), (1e-30, 1e-4), (0.0, 0.0)]
)
def test_weights_fall_to_a_floor(decay, factor):
    known = extra(available=(0, 0, 5))
    whole, _ = added(known, alpha=1.0, beta=0.0)
    value, _ = added({**known, "decay": decay}, alpha=1.0, beta=0.0)
    np.testing.assert_allclose(value, factor * whole, rtol=1e-3, atol=1e-6)


def test_padding_of_a_batch_changes_nothing():
    # Labels of padding are anything; the generator normalises over real samples.
    mask, found = jnp.array([1.0, 1.0, 0.0]), []
    for last, label in itertools.product((0.0, 3.0), (0, 1)):
        batch = Batch(FULL_BATCH.x.at[2].set(last), jnp.array([0, 2, label]), mask)
        found.append(_loss(alpha=1.0, beta=1.0)(theta(), extra(constant=False), batch))
    for other in found[1:]:
        chex.assert_trees_all_close(other, found[0], rtol=1e-6, atol=1e-7)


# The wire, and bad input ------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "features", "count"), [(10, 64, 3_552), (100, 128, 8_544)]
)
def test_published_size_of_the_generator(classes, features, count):
    # (32 + C) 32 + 32 + 64 + 32 L + L
    network = Generator(32, features)
    inputs = jnp.zeros((2, 32)), jnp.zeros((2, classes))
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    assert tree.count(shapes["params"]) == count


def test_model_and_generator_down_model_and_counts_up():
    whole = tree.count(theta())
    # (3 + 3) 4 + 4, twice 4, 4 x 4 + 4.
    generator = (
        (NOISE + K) * HIDDEN + HIDDEN + 2 * HIDDEN + HIDDEN * FEATURES + FEATURES
    )
    costs = comm.cost(comm.describe(ours()))
    assert (costs.down_numbers, costs.up_numbers) == (whole + generator, whole + K)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(noise_size=0), r"noise_size=0 must be at least 1"),
        (dict(hidden_size=0), r"hidden_size=0 must be at least 1"),
        (dict(generator_steps=-1), r"generator_steps=-1 must be at least 0"),
        (dict(head=HEAD_KERNEL), r"a head of kernel and bias, not \['params/head/k"),
        (dict(head="top"), r"'top' matches no variable"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        fedgen(MODEL, local=FULL, **options)
