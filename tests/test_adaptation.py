"""Test-time adaptation: by hand where it has a formula, and what it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import NUM_CLASSES, make_local, tiny

from hyperjax import tree
from hyperjax.adaptation import with_adaptation
from hyperjax.adaptation.features import SUPPORTS, _pseudo_labels, _supports
from hyperjax.adaptation.memo import VIEWS, memo
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.data import clients
from hyperjax.launch import build
from hyperjax.models import from_linen, memory
from hyperjax.models.zoo import MLPBN
from hyperjax.protocols import zero_shot
from hyperjax.types import AdaptData, ClientData, Outputs

KEY = jax.random.key(2)
ROWS = [4, 9, 2, 7, 30, 11]


@functools.cache
def normed():
    return from_linen(MLPBN(NUM_CLASSES, hidden=(4,)), (4, 4, 1), NUM_CLASSES)


def inputs_of(rows, size=None):
    pool = tiny().pool._replace(y=jnp.full_like(tiny().pool.y, -1))
    size = len(rows) if size is None else size
    return ClientData(jnp.asarray(rows), jnp.int32(size), pool)


@functools.cache
def programs(text, model):
    """FedAvg as a client receives it, and what deploys a client."""
    alg = fedavg(model, local=make_local())
    server = alg.server.init(KEY)
    down = alg.server.downlink(KEY, server, None)._replace(round=jnp.int32(0))
    side = with_adaptation(alg, text).client if text else alg.client
    state = side.init(KEY, KEY, down)

    @jax.jit
    def run(inputs):
        nothing = inputs._replace(size=jnp.int32(0))
        adapted = side.adapt(KEY, down, state, AdaptData(nothing, inputs))
        return side.deploy(down, adapted)

    return side, run


def deployed(text, model, rows=ROWS, size=None):
    return programs(text, model)[1](inputs_of(rows, size))


def images(rows=ROWS):
    pool = tiny().pool
    return (pool.x[jnp.asarray(rows)] / 255.0 - pool.mean) / pool.std


def entropy(model, variables):
    p = jax.nn.softmax(model.predict(variables, images()))
    return float(-(p * jnp.log(p)).sum(-1).mean())


# Batch-norm --------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0, 3])
def test_statistics_are_the_inputs_own_with_those_of_training(prior):
    found = deployed(f"bn(prior={prior})", normed())
    params = found["params"]
    hidden = images().reshape(6, -1) @ params["Dense_0"]["kernel"]
    hidden = np.asarray(hidden + params["Dense_0"]["bias"])
    stats = found["stats"]["batch_stats"]["BatchNorm_0"]
    # Those of training are 0 and 1 here: nothing was trained.
    mean = 6 * hidden.mean(0) / (prior + 6)
    var = (prior + 6 * hidden.var(0, ddof=1)) / (prior + 6)
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-4)


def test_neither_order_nor_padding_counts_and_nobody_keeps_what_was_trained():
    found = deployed("bn", normed())
    for rows, size in ((ROWS[::-1], 6), ([*ROWS, 0, 1], 6)):
        other = deployed("bn", normed(), rows, size)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            other["stats"],
            found["stats"],
        )
    plain = deployed("", normed())
    nobody = deployed("bn", normed(), ROWS, 0)
    jax.tree.map(np.testing.assert_array_equal, nobody["stats"], plain["stats"])
    trained = deployed("bn(prior=1e12)", normed())
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        trained["stats"],
        plain["stats"],
    )


def test_tent_lowers_entropy_by_scales_and_biases_alone():
    plain = deployed("bn", normed())
    found = deployed("tent(learning_rate=0.05, epochs=10)", normed())
    before, after = (tree.by_path(v["params"]) for v in (plain, found))
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    assert moved == {"BatchNorm_0/scale", "BatchNorm_0/bias"}
    assert entropy(normed(), found) < entropy(normed(), plain)


@pytest.mark.parametrize("name", ["bn", "tent"])
def test_networks_without_batch_norm_are_refused_by_name(name):
    alg = fedavg(tiny().model, local=make_local())
    with pytest.raises(ValueError, match=f"adapt='{name}' adapts batch-norm.*mlp_bn"):
        with_adaptation(alg, name)


# Features ----------------------------------------------------------------------------


def test_shot_trains_all_but_the_head_for_certainty():
    plain = deployed("", tiny().model)
    found = deployed("shot(epochs=5, learning_rate=0.1)", tiny().model)
    before, after = (tree.by_path(v["params"]) for v in (plain, found))
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    assert moved == {k for k in before if not k.startswith("head/")}
    assert entropy(tiny().model, found) < entropy(tiny().model, plain)


def test_pseudo_labels_are_of_the_nearest_centroid():
    z = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.1, 1.0], [0.0, 1.0], [5.0, 4.9]])
    # The third was taken for class 0, and is near those of class 1.
    logits = jnp.array(
        [[4.0, 0, 0], [4.0, 0, 0], [1.0, 0, 0], [0, 4.0, 0], [9.0, 0, 0]]
    )
    mask = jnp.array([1.0, 1, 1, 1, 0])
    found = _pseudo_labels(Outputs(logits, z), mask)
    np.testing.assert_array_equal(found[:4], [0, 0, 1, 1])


def test_supports_are_the_surest_of_each_class():
    z = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.0, 1.0]])
    logits = jnp.array([[5.0, 0.0], [0.0, 5.0], [1.0, 0.0], [0.0, 9.0]])
    mask = jnp.array([1.0, 1, 1, 0])
    found = _supports(Outputs(logits, z), mask, 1)
    np.testing.assert_allclose(found, [[1, 0], [0, 1]], atol=1e-6)
    both = _supports(Outputs(logits, z), mask, 0)
    first = np.array([1 + np.sqrt(0.5), np.sqrt(0.5)])
    np.testing.assert_allclose(both[0], first / np.linalg.norm(first), atol=1e-6)


def test_t3a_of_no_input_and_unit_rows_is_the_classifier():
    # Rows that are classified as what they stand for, as in any trained head.
    rows = jnp.eye(3)
    found = _supports(Outputs(rows, rows), jnp.ones(3), 1)
    np.testing.assert_allclose(found, rows, atol=1e-6)
    side, run = programs("t3a", tiny().model)
    served = run(inputs_of(ROWS, 0))
    features = tiny().model.features(memory.without(served, "supports"), images())
    supports = memory.get(served, SUPPORTS)
    np.testing.assert_allclose(
        side.model.predict(served, images()), features @ supports.T, atol=1e-5
    )
    # Untouched variables are predicted with as ever.
    plain = memory.without(served, SUPPORTS)
    np.testing.assert_array_equal(
        side.model.predict(plain, images()), tiny().model.predict(plain, images())
    )


def test_memo_trains_on_each_input_alone_and_forgets():
    text = "memo(steps=2, views=1, degrees=0, moved=0, learning_rate=0.5)"
    model, side = tiny().model, programs(text, tiny().model)[0]
    plain = deployed("", model)

    def by_hand(image):  # the only view of an input is the input
        def uncertain(params):
            p = jax.nn.softmax(model.predict({**plain, "params": params}, image[None]))
            return -jnp.sum(p * jnp.log(p))

        params = plain["params"]
        for _ in range(2):
            step = tree.scale(jax.jit(jax.grad(uncertain))(params), 0.5)
            params = tree.sub(params, step)
        return model.predict({**plain, "params": params}, image[None])[0]

    found = side.model.predict(deployed(text, model), images())
    np.testing.assert_allclose(found, [by_hand(x) for x in images()], atol=1e-5)
    backwards = side.model.predict(deployed(text, model, ROWS[::-1]), images()[::-1])
    np.testing.assert_allclose(backwards[::-1], found, atol=1e-6)


def test_memo_makes_views_agree_and_does_nothing_in_no_steps():
    model = tiny().model
    side, served = programs("memo", model)[0], deployed("memo", model)
    views = memory.get(served, VIEWS)
    assert views.shape == (16, 3)
    assert 1 < float(jnp.abs(views[:, 0]).max()) <= 15
    assert 0 < float(jnp.abs(views[:, 1:]).max()) <= 0.4
    plain = model.predict(deployed("", model), images())
    none = deployed("memo(steps=0)", model)
    still = programs("memo(steps=0)", model)[0].model.predict(none, images())
    np.testing.assert_allclose(still, plain, atol=1e-6)
    # What was not deployed, such as in training, is predicted with as ever.
    bare = memory.without(served, VIEWS)
    np.testing.assert_array_equal(side.model.predict(bare, images()), plain)
    text = "memo(learning_rate=0.3)"
    surer = programs(text, model)[0].model.predict(deployed(text, model), images())

    def mean_entropy(logits):
        p = jax.nn.softmax(logits)
        return float(-(p * jnp.log(p)).sum(-1).mean())

    assert mean_entropy(surer) < mean_entropy(plain)


def test_memo_refuses_what_are_no_images():
    flat = tiny().model._replace(sample_shape=(16,))
    side = fedavg(tiny().model, local=make_local()).client._replace(model=flat)
    with pytest.raises(ValueError, match=r"adapt='memo' turns .* inputs are \[16\]"):
        memo()(side)


# What participants find out first ----------------------------------------------------


@functools.cache
def fitting(text, model):
    """A client's message, and what deploys one that is told something."""
    alg = fedavg(model, local=make_local())
    server = alg.server.init(KEY)
    down = alg.server.downlink(KEY, server, None)._replace(round=jnp.int32(0))
    side = with_adaptation(alg, text).client
    state = side.init(KEY, KEY, down)

    @jax.jit
    def send(fitted, held):
        data = AdaptData(held, clients.withhold_labels(held))
        return side.fit.send(KEY, fitted, down, state, data, held)

    @jax.jit
    def run(fitted, inputs):
        nothing = inputs._replace(size=jnp.int32(0))
        data = AdaptData(nothing, inputs, fitted)
        return side.deploy(down, side.adapt(KEY, down, state, data))

    return side, send, run


def held_of(rows):
    return inputs_of(rows)._replace(pool=tiny().pool)


def test_confusion_counts_are_of_real_samples():
    side, send, _ = fitting("bbse", tiny().model)
    plain = deployed("", tiny().model)
    predicted = np.argmax(tiny().model.predict(plain, images()), -1)
    counts = np.zeros((NUM_CLASSES, NUM_CLASSES))
    np.add.at(counts, (predicted, np.asarray(tiny().pool.y)[ROWS]), 1)
    found = send(side.fit.start(), held_of(ROWS))
    np.testing.assert_array_equal(found, counts)
    padded = held_of([*ROWS, 0, 1])._replace(size=jnp.int32(6))
    np.testing.assert_array_equal(send(side.fit.start(), padded), counts)
    np.testing.assert_array_equal(
        side.fit.absorb(counts, jnp.stack([found, found])), 2 * counts
    )


@pytest.mark.parametrize("text", ["bbse", "em(calibration='none')"])
def test_without_shift_or_inputs_outputs_stay(text):
    side, send, run = fitting(text, tiny().model)
    plain = tiny().model.predict(deployed("", tiny().model), images())
    # Every class is predicted just as often among equal inputs.
    sent = send(side.fit.start(), held_of(ROWS))
    fitted = side.fit.absorb(side.fit.start(), jax.tree.map(lambda x: x[None], sent))
    if text == "bbse":  # what is always right; the classes' own are what is predicted
        predicted = np.bincount(np.argmax(plain, -1), minlength=NUM_CLASSES)
        fitted = jnp.diag(jnp.asarray(predicted, jnp.float32))
    for size in (6, 0):
        found = side.model.predict(run(fitted, inputs_of(ROWS, size)), images())
        np.testing.assert_allclose(found, plain, atol=2e-4)


@pytest.mark.parametrize("model", [tiny().model, normed()], ids=["plain", "normed"])
def test_atp_with_zero_rates_is_the_source(model):
    side, _, run = fitting("atp", model)
    found, plain = run(side.fit.start(), inputs_of(ROWS)), deployed("", model)
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    # A number for each tensor, statistics among them.
    assert len(side.fit.start()) == len(jax.tree.leaves(plain))


def test_atp_moves_a_tensor_along_entropy_and_statistics_to_the_inputs():
    side, _, run = fitting("atp", normed())
    plain, own = deployed("", normed()), deployed("bn", normed())
    stats = {k: float(k.startswith("stats")) for k in side.fit.start()}
    rates = {k: jnp.float32(a) for k, a in stats.items()}
    found = run(rates, inputs_of(ROWS))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        found["stats"],
        own["stats"],
    )
    jax.tree.map(np.testing.assert_array_equal, found["params"], plain["params"])
    rates = {k: jnp.float32(0.1 if "params" in k else 0) for k in rates}
    moved = run(rates, inputs_of(ROWS))
    assert entropy(normed(), moved) < entropy(normed(), plain)


def test_atp_leaves_a_variance_a_hundredth_of_itself():
    side, _, run = fitting("atp", normed())
    rates = {k: jnp.float32(1e6 * k.endswith("/var")) for k in side.fit.start()}
    plain, found = deployed("", normed()), run(rates, inputs_of(ROWS))
    before, after = (tree.by_path(x["stats"]) for x in (plain, found))
    variances = [k for k in before if k.endswith("/var")]
    assert variances
    for name in variances:
        assert np.all(after[name] >= 0.99e-2 * before[name])
        assert np.any(after[name] < 1.01e-2 * before[name])


def test_rates_descend_along_the_loss_of_what_was_adapted():
    side, send, run = fitting("atp(batch_size=6)", tiny().model)
    zero, labels = side.fit.start(), np.asarray(tiny().pool.y)[ROWS]

    def loss(name, rate):
        rates = {k: jnp.float32(rate if k == name else 0) for k in zero}
        logits = side.model.predict(run(rates, inputs_of(ROWS)), images())
        return -float(jax.nn.log_softmax(logits)[np.arange(6), labels].mean())

    sent = send(zero, held_of(ROWS))  # a step, as all samples are a batch
    name, h = "params/head/kernel", 0.05
    slope = (loss(name, h) - loss(name, -h)) / (2 * h)
    size = deployed("", tiny().model)["params"]["head"]["kernel"].size
    np.testing.assert_allclose(sent[name], -0.1 * slope / np.sqrt(size), rtol=0.02)
    # Shorter, and the same way.
    _, send, _ = fitting("atp(batch_size=6, clip=1e-3)", tiny().model)
    short = send(zero, held_of(ROWS))
    np.testing.assert_allclose(tree.norm(short), 1e-4, rtol=1e-5)
    factor = tree.norm(short) / tree.norm(sent)
    np.testing.assert_allclose(short[name], factor * sent[name], rtol=1e-5)


# By config ---------------------------------------------------------------------------


def test_a_config_names_an_adaptation():
    config = zero_shot.get_config("fedavg,data=digits,smoke")
    config.evaluation.adapt = "t3a(keep=5)"
    build.check(config)
    model = build.make_model(config, (8, 8, 1), 10)
    plain, adapted = (
        build.make_algorithm(c, model)
        for c in (zero_shot.get_config("fedavg,data=digits,smoke"), config)
    )
    assert adapted.client.update is not None
    assert adapted.client.model.apply is not plain.client.model.apply
    for text, message in {
        "tnet": "evaluation.adapt='tnet' is unknown; did you mean 'tent'",
        "bn(prio=3)": "prio",
        "bn(prior=-1)": "prior=-1 must be .*at least 0",
        "t3a(keep": "evaluation.adapt",
        "em(calibration='tss')": "calibration='tss' is unknown; did you mean 'ts'",
        "bbse": "evaluation.adapt='bbse' asks .*data.validation_fraction=0",
    }.items():
        config.evaluation.adapt = text
        with pytest.raises(ValueError, match=message):
            build.check(config)
