"""Local training, against steps worked out by hand."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax import training
from hyperjax.data import clients
from hyperjax.models import MLP, from_linen, memory
from hyperjax.models.linen import masked_mean
from hyperjax.training import Local, Phase
from hyperjax.types import AdaptData, ClientData, Model, Outputs, Pool, Serve, Trained

LR = 0.1
NAN = float("nan")
PLAIN = optax.sgd(LR)
DECAYING = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(LR, 0.9))


def quadratic():
    """Two scalars a, b with loss mean (a - x)^2 / 2 + mean (b - 2 x)^2 / 2.

    Gradients are a - mean x and b - 2 mean x. One pixel per sample.
    """

    def init(key):
        params = {"a": {"w": jnp.float32(10)}, "b": {"w": jnp.float32(-4)}}
        return {"params": params, "stats": {"seen": jnp.float32(0)}}

    def loss(key, variables, batch, context):
        x = batch.x.reshape(-1)
        a, b = (variables["params"][name]["w"] for name in "ab")
        mean = masked_mean(x, batch.mask)
        value = masked_mean((a - x) ** 2 / 2 + (b - 2 * x) ** 2 / 2, batch.mask)
        stats = {"seen": variables["stats"]["seen"] + jnp.sum(batch.mask)}
        return value, Trained(stats, {"loss": value, "mean_x": mean})

    return Model((1, 1, 1), init, loss, apply=lambda variables, x: Outputs(x))


def pool_of(values):
    """A pool of one-pixel samples whose normalised inputs are `values`."""
    x = np.asarray(values, np.uint8).reshape(-1, 1, 1, 1)
    one = jnp.ones(1)
    return Pool(jnp.asarray(x), jnp.zeros(len(x), jnp.int32), 0 * one, one / 255)


def data_of(values, n_max=8):
    """A client that holds `values`; padding rows show a sample that is not its own."""
    n = len(values)
    rows = np.r_[np.arange(n), np.full(n_max - n, n)].astype(np.int32)
    pool = pool_of([*values, *[99] * (9 - n)])
    return ClientData(jnp.asarray(rows), jnp.int32(n), pool)


@functools.cache
def compiled(optimizer, **options):
    """One program per set of options: all clients of this file have equal shapes."""
    beside = {k: v for k, v in options.items() if k not in Local._fields}
    how = {k: v for k, v in options.items() if k in Local._fields}
    train = training.trainer(quadratic(), Local(optimizer, **how), **beside)
    return jax.jit(lambda *args: train(*args, training.no_adjustment))


def run(data, *, optimizer=PLAIN, seed=0, round=0, **options):
    start = quadratic().init(None)
    key = jax.random.key(seed)
    return compiled(optimizer, **options)(key, start, data, jnp.int32(round))


def weights(variables):
    return {name: float(x["w"]) for name, x in variables["params"].items()}


# One step --------------------------------------------------------------------------


def test_what_is_no_local_is_refused():
    given = functools.partial(training.trainer, optimizer=optax.sgd(1.0))
    with pytest.raises(
        TypeError, match=r"local must be a hyperjax\.Local; got trainer"
    ):
        training.trainer(quadratic(), given)


def test_full_batch_epoch_is_one_gradient_step():
    # mean x = 3: a <- 10 - 0.1 (10 - 3) = 9.3; b <- -4 - 0.1 (-4 - 6) = -3.
    after, info = run(data_of([1, 2, 6]), batch_size=3)
    assert weights(after) == pytest.approx({"a": 9.3, "b": -3.0}, rel=1e-6)
    # Loss before the step: mean of (81 + 64 + 16) / 2 and (36 + 64 + 256) / 2.
    assert float(info["loss"]) == pytest.approx((161 + 356) / 6, rel=1e-6)
    assert float(info["steps"]) == 1 and float(info["samples"]) == 3


@pytest.mark.parametrize("balanced", [False, True])
def test_network_step_equals_plain_gradient_descent(balanced):
    # Of a balanced loss logits come with the class shares 2/5, 1/5, 2/5.
    shift = np.log(np.array([0.4, 0.2, 0.4], np.float32) + 1e-4) * balanced
    x = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 1), np.uint8)
    pool = clients.make_pool(x, np.array([0, 1, 2, 2, 0]), np.arange(5))
    model = from_linen(MLP(3, hidden=(4,)), (2, 2, 1), 3)
    start = jax.jit(model.init)(jax.random.key(3))
    data = ClientData(jnp.arange(5, dtype=jnp.int32), jnp.int32(5), pool)

    def objective(params):  # written out, without masks
        inputs = (jnp.asarray(x) / 255.0 - pool.mean) / pool.std
        logits = model.predict({"params": params, "stats": {}}, inputs)
        return -jnp.mean(jax.nn.log_softmax(logits + shift)[jnp.arange(5), pool.y])

    value, grads = jax.jit(jax.value_and_grad(objective))(start["params"])
    expected = jax.tree.map(lambda w, g: w - LR * g, start["params"], grads)
    # Batch of 8: the three masked rows must not enter the mean.
    train = training.trainer(model, Local(PLAIN, batch_size=8, balanced=balanced))
    after, info = jax.jit(lambda *args: train(*args, training.no_adjustment))(
        jax.random.key(0), start, data, jnp.int32(0)
    )
    chex.assert_trees_all_close(after["params"], expected, atol=1e-7, rtol=1e-6)
    assert float(info["loss"]) == pytest.approx(float(value), rel=1e-6)


def test_last_batch_is_averaged_over_its_real_samples():
    # 5 samples in batches of 4: the second batch holds one sample, x_j, whichever the
    # shuffle leaves over. With m the mean of the others:
    #   a1 = a0 - lr (a0 - m),  a2 = a1 - lr (a1 - x_j).
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    after, info = run(data_of(x), batch_size=4)
    candidates = []
    for j in range(5):
        a1 = 10 - LR * (10 - np.delete(x, j).mean())
        candidates.append(a1 - LR * (a1 - x[j]))
    gap = np.abs(np.array(candidates) - weights(after)["a"])
    assert gap.min() < 5e-6
    assert float(info["steps"]) == 2 and float(info["samples"]) == 5
    # Sample-weighted, so the mean over batches is the mean over samples.
    assert float(info["mean_x"]) == pytest.approx(31 / 5, rel=1e-6)
    assert float(after["stats"]["seen"]) == 5


def test_padding_of_the_table_changes_nothing():
    values = [1, 2, 4, 8, 16, 32, 64]
    plain = run(data_of(values), batch_size=3)
    padded = run(data_of(values, n_max=13), batch_size=3)
    chex.assert_trees_all_close(plain, padded, rtol=1e-7)


@pytest.mark.parametrize("length", [dict(epochs=3), dict(epochs=None, steps=4)])
def test_client_without_samples_returns_its_variables_bitwise(length):
    start = quadratic().init(None)
    after, info = run(
        data_of([]), optimizer=DECAYING, batch_size=2, phases=(Phase(**length),)
    )
    chex.assert_trees_all_equal(after, start)
    # No sample: means are 0, not 0 / 0.
    assert {k: float(v) for k, v in info.items()} == dict.fromkeys(info, 0.0)


# Order and number of visits --------------------------------------------------------


def test_epoch_visits_every_sample_once():
    # Eight powers of two add up to 255 only if each of 1, 2, ..., 128 occurs once.
    values = 2 ** np.arange(8)
    for seed in range(3):
        _, info = run(data_of(values), batch_size=3, seed=seed)
        assert float(info["samples"]) == 8 and float(info["steps"]) == 3
        assert float(info["mean_x"]) * 8 == pytest.approx(255, rel=1e-6)


def test_shuffled_puts_padding_last_and_ignores_it():
    def order(padding, seed=0, size=6):
        data = data_of(range(size), size + padding)
        return np.asarray(clients.shuffled(jax.random.key(seed), data))

    for seed in range(5):
        short, long = order(0, seed), order(7, seed)
        assert sorted(short) == list(range(6))
        assert sorted(long) == list(range(13))
        np.testing.assert_array_equal(short, long[:6])
    assert not np.array_equal(order(0, 0), order(0, 1))


def test_shuffles_are_uniform():
    # Each of 4 samples is first in about a quarter of 4000 shuffles: sd 27.
    data = data_of(range(4), 6)
    keys = jax.random.split(jax.random.key(0), 4000)
    first = jax.vmap(lambda k: clients.shuffled(k, data)[0])(keys)
    assert np.abs(np.bincount(first, minlength=4) - 1000).max() < 5 * 27.4


def test_epochs_are_shuffled_anew():
    # With lr = 1 and batches of one, a is the last sample seen; over many seeds the
    # last sample of one and of two epochs must differ about 7 times in 8.
    data = data_of(2 ** np.arange(8))
    train = training.trainer(quadratic(), Local(optax.sgd(1.0), batch_size=1))
    twice = training.trainer(
        quadratic(), Local(optax.sgd(1.0), batch_size=1, phases=(Phase(epochs=2),))
    )
    start = quadratic().init(None)

    def last(train):
        def one(key):
            out, _ = train(key, start, data, jnp.int32(0), training.no_adjustment)
            return out["params"]["a"]["w"]

        return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 64))

    differ = int(jnp.sum(jnp.abs(last(train) - last(twice)) > 0.5))
    assert 40 <= differ < 64


@pytest.mark.parametrize("steps", [0, 3, 7])
def test_steps_are_taken_exactly(steps):
    # 5 samples in batches of 2: passes of 3 steps with 2 + 2 + 1 samples.
    after, info = run(
        data_of([1, 2, 4, 8, 16]),
        batch_size=2,
        phases=(Phase(steps=steps),),
    )
    assert float(info["steps"]) == steps
    assert float(info["samples"]) == steps // 3 * 5 + steps % 3 * 2
    assert float(after["stats"]["seen"]) == float(info["samples"])


@pytest.mark.parametrize("length", [dict(steps=7), dict(epochs=2)])
def test_every_step_may_draw_a_fresh_full_batch(length):
    # 5 samples in batches of 3: of passes every other batch would hold 2.
    def mean(seed):
        options = dict(batch_size=3, batches="fresh", phases=(Phase(**length),))
        _, info = run(data_of([1, 2, 4, 8, 16]), seed=seed, **options)
        steps = length.get("steps", 4)
        assert float(info["steps"]) == steps
        assert float(info["samples"]) == 3 * steps
        return float(info["mean_x"]) * 3 * steps

    # Sums of steps draws of three different numbers, which differ from step to step.
    sums = [mean(seed) for seed in range(6)]
    assert len({round(total) for total in sums}) > 3
    assert any(total % 7 for total in sums)
    # Of fewer samples than a batch every step sees all.
    _, info = run(
        data_of([1, 2]), batch_size=3, batches="fresh", phases=(Phase(steps=4),)
    )
    assert float(info["samples"]) == 8 and float(info["mean_x"]) == 1.5


def test_a_batch_takes_no_more_rows_than_there_are():
    def widest(batch_size):
        args = (jax.random.key(0), quadratic().init(None), data_of([1, 2, 6]))
        train = compiled(PLAIN, batch_size=batch_size)
        text = str(jax.make_jaxpr(train)(*args, jnp.int32(0)))
        return max(int(n) for n in re.findall(r"[a-z0-9]\[(\d+)[\],]", text))

    assert widest(2**30) == widest(8) <= 9
    many, _ = run(data_of([1, 2, 6]), batch_size=2**30)
    chex.assert_trees_all_equal(many, run(data_of([1, 2, 6]), batch_size=8)[0])


def test_zero_epochs_change_nothing():
    start = quadratic().init(None)
    after, info = run(data_of([1, 2]), batch_size=2, phases=(Phase(epochs=0),))
    chex.assert_trees_all_equal(after, start)
    assert float(info["steps"]) == 0


# Phases ----------------------------------------------------------------------------


def test_frozen_leaves_stay_bitwise_under_momentum_and_decay():
    data = data_of([1, 2, 6])
    both = Phase(epochs=2)
    only_a = Phase(epochs=2, train=r"params/a/.*")
    first, _ = run(data, optimizer=DECAYING, batch_size=2, phases=(both,))
    after, info = run(data, optimizer=DECAYING, batch_size=2, phases=(both, only_a))
    assert weights(after)["b"] == weights(first)["b"] != -4.0
    assert weights(after)["a"] != weights(first)["a"]
    assert float(info["steps"]) == 8
    # Statistics belong to no phase: they go on.
    assert float(after["stats"]["seen"]) == 12


def test_phases_start_with_a_fresh_optimizer():
    # Full batches, momentum 0.9: two phases of one step are two plain steps.
    data = data_of([1, 2, 6])
    phases = (Phase(epochs=1), Phase(epochs=1))
    after, _ = run(data, optimizer=optax.sgd(LR, 0.9), batch_size=3, phases=phases)
    # a: 10 -> 9.3 -> 9.3 - 0.1 * 6.3
    assert weights(after)["a"] == pytest.approx(8.67, rel=1e-6)


def test_phase_pattern_without_match():
    with pytest.raises(ValueError, match=r"params/c/.*paths are.*params/a/w"):
        run(data_of([1]), batch_size=1, phases=(Phase(epochs=1, train=r"params/c/.*"),))


@pytest.mark.parametrize(
    ("freeze", "phase", "frozen"),
    [
        (r"params/b/.*", Phase(epochs=2), "b"),
        (r"params/b/.*", Phase(epochs=2, freeze=r"params/a/.*"), "a"),
        (None, Phase(epochs=2, train=r".*", freeze=r"params/b/.*"), "b"),
    ],
)
def test_freeze_wins_over_train_and_a_phase_over_the_loop(freeze, phase, frozen):
    options = dict(optimizer=DECAYING, batch_size=2)
    data = data_of([1, 2, 6])
    every, _ = run(data, phases=(Phase(epochs=2),), **options)
    after, _ = run(data, phases=(phase,), freeze=freeze, **options)
    other = "ab".replace(frozen, "")
    assert weights(after)[frozen] == {"a": 10, "b": -4}[frozen]
    assert weights(after)[other] == weights(every)[other]


def test_a_phase_that_freezes_nothing_trains_all():
    options = dict(optimizer=DECAYING, batch_size=2, phases=(Phase(2, freeze=()),))
    free, _ = run(data_of([1, 2, 6]), freeze=r"params/b/.*", **options)
    every, _ = run(data_of([1, 2, 6]), **options)
    chex.assert_trees_all_equal(free, every)


def test_freeze_without_match():
    with pytest.raises(ValueError, match=r"params/c/.*paths are.*params/a/w"):
        run(data_of([1]), batch_size=1, freeze=r"params/c/.*")


def test_number_of_epochs_can_be_given_at_the_visit():
    phases = (Phase(epochs=1, train=r"params/a/.*"), Phase(steps=2))
    given = training.trainer(quadratic(), Local(DECAYING, batch_size=2, phases=phases))
    start, data = quadratic().init(None), data_of([1, 2, 6])

    @jax.jit
    def visit(epochs):
        key = jax.random.key(0)
        return given(key, start, data, jnp.int32(0), training.no_adjustment, epochs)

    for epochs in (0, 3):
        lengths = tuple(p._replace(epochs=epochs, steps=None) for p in phases)
        expected = run(data, optimizer=DECAYING, batch_size=2, phases=lengths)
        chex.assert_trees_all_equal(visit(jnp.int32(epochs)), expected)
    chex.assert_trees_all_equal(visit(jnp.int32(0))[0], start)


# Beside the parameters -------------------------------------------------------------

RHO, DECAY = 0.9, 0.5


def heavy_ball(tau):
    return (tau - RHO * (1 - RHO**tau) / (1 - RHO)) / (1 - RHO)


def nesterov(tau):
    # Gradient j of tau acts at once, one step ahead, and in the steps that follow.
    return (tau - RHO**2 * (1 - RHO**tau) / (1 - RHO)) / (1 - RHO)


def decaying(tau):  # what a proximal term does, too
    return (1 - (1 - LR * DECAY) ** tau) / (LR * DECAY)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (PLAIN, lambda tau: tau),
        (optax.sgd(LR, RHO), heavy_ball),
        (optax.sgd(LR, RHO, nesterov=True), nesterov),
        (optax.chain(optax.add_decayed_weights(DECAY), PLAIN), decaying),
    ],
    ids=["sgd", "heavy_ball", "nesterov", "decay"],
)
def test_displacement_is_the_weight_of_all_gradients(optimizer, expected):
    # In units of the rate; clipping is not part of it, the gradient has norm 1.
    for tau in range(7):
        _, info = run(
            data_of(range(tau)),
            optimizer=optimizer,
            batch_size=1,
            clip_norm=0.5,
            probe=True,
        )
        assert float(info["steps"]) == tau
        assert float(info["displacement"]) == pytest.approx(
            LR * expected(tau), rel=2e-6
        )


def test_displacement_follows_schedule_and_phases():
    # Phases start anew: 2 a(4) at a quarter of the rate.
    options = dict(optimizer=optax.sgd(LR, RHO), batch_size=1)
    phases = (Phase(epochs=1), Phase(epochs=1))
    _, info = run(
        data_of(range(4)),
        phases=phases,
        schedule=halving,
        round=2,
        probe=True,
        **options,
    )
    assert float(info["displacement"]) == pytest.approx(
        LR * 2 * heavy_ball(4) / 4, rel=2e-6
    )
    assert "displacement" not in run(data_of(range(4)), **options)[1]


def test_optimizer_state_among_the_variables_goes_on():
    train = training.trainer(
        quadratic(), Local(optax.sgd(LR, RHO), batch_size=3, freeze=r"params/b/.*")
    )
    start = quadratic().init(None)
    opt = train.init_optimizer(start)
    assert [x.shape for x in jax.tree.leaves(opt)] == [()]  # of a alone

    @jax.jit
    def visit(variables):
        key, data = jax.random.key(0), data_of([1, 2, 6])
        return train(key, variables, data, jnp.int32(0), training.no_adjustment)[0]

    first = visit(memory.put(start, "optimizer", opt))
    # 10 - 0.1 * 7, then the trace is 0.9 * 7 + 6.3.
    assert weights(first) == pytest.approx({"a": 9.3, "b": -4.0}, rel=1e-6)
    assert weights(visit(first))["a"] == pytest.approx(9.3 - 1.26, rel=1e-6)
    forgetful = {name: first[name] for name in ("params", "stats")}
    assert weights(visit(forgetful))["a"] == pytest.approx(9.3 - 0.63, rel=1e-6)
    assert "memory" not in visit(forgetful)


@pytest.mark.parametrize("optimizer", [optax.adam(0.5), optax.sgd(0.1, 0.9)])
def test_what_is_apart_has_an_optimizer_of_its_own(optimizer):
    # Over two visits: that of a starts anew, counter and all, that of b goes on.
    train = training.trainer(
        quadratic(),
        Local(optimizer, batch_size=3, phases=(Phase(epochs=3),)),
        apart=r"params/b/.*",
    )
    start = quadratic().init(None)
    opt = {"apart": train.init_optimizer(start)["apart"]}

    @jax.jit
    def visit(variables):
        key, data = jax.random.key(0), data_of([1, 2, 6])
        return train(key, variables, data, jnp.int32(0), training.no_adjustment)[0]

    found = visit(visit(memory.put(start, "optimizer", opt)))
    a, b = jnp.float32(10), jnp.float32(-4)
    state_b = optimizer.init(b)
    for _ in range(2):
        state_a = optimizer.init(a)
        for _ in range(3):
            moved, state_a = optimizer.update(a - 3, state_a)
            a = a + moved
            moved, state_b = optimizer.update(b - 6, state_b)
            b = b + moved
    assert weights(found) == pytest.approx({"a": a, "b": b}, rel=1e-5)
    kept = [*jax.tree.leaves(memory.get(found, "optimizer"))], jax.tree.leaves(state_b)
    chex.assert_trees_all_close(*kept, rtol=1e-5)


@pytest.mark.parametrize(("clip_apart", "b"), [(True, -4 + 10 / 149**0.5), (False, 6)])
def test_what_is_apart_may_escape_the_clip(clip_apart, b):
    # Gradient (7, -10): clipped to 1 together, or a's alone.
    options = dict(optimizer=optax.sgd(1.0), batch_size=3, apart=r"params/b/.*")
    after, _ = run(data_of([1, 2, 6]), clip_norm=1.0, clip_apart=clip_apart, **options)
    a = 10 - (7 / 149**0.5 if clip_apart else 1)
    assert weights(after) == pytest.approx({"a": a, "b": b}, rel=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(LR),
        optax.adamw(LR, weight_decay=0.1),
        optax.rmsprop(LR),
        optax.sign_sgd(LR),
        optax.lars(LR),
        optax.chain(optax.clip(0.5), PLAIN),
    ],
    ids=["adam", "adamw", "rmsprop", "sign", "lars", "clip"],
)
def test_what_weighs_no_gradients_has_no_displacement(optimizer):
    with pytest.raises(ValueError, match=r"SCAFFOLD and FedNova.*: sgd, with any"):
        training.trainer(quadratic(), Local(optimizer, batch_size=1), probe=True)
    training.trainer(quadratic(), Local(optimizer, batch_size=1))


@pytest.mark.parametrize("train", [None, (), r"params/a/.*"])
def test_tuner_trains_on_the_clients_samples(train):
    # Neither the phases nor the frozen parts of a method matter, but its optimizer.
    model = quadratic()._replace(
        serve=Serve(
            lambda variables, inputs: variables["params"]["a"]["w"] + inputs.size
        )
    )
    how = Local(
        optax.sgd(LR, RHO),
        batch_size=3,
        phases=(Phase(steps=7),),
        freeze=r"params/.*",
    )
    tune = training.tuner(model, how, train)
    start = memory.put(model.init(None), "condition", jnp.float32(0))
    data = AdaptData(data_of([1, 2, 6]), data_of([5, 5]))

    @jax.jit
    def tuned(epochs, start):
        return tune(jax.random.key(0), start, data, jnp.int32(0), epochs)

    chex.assert_trees_all_equal(
        tuned(jnp.int32(0), start), memory.put(start, "condition", jnp.float32(12))
    )
    after = tuned(jnp.int32(2), start)
    # a as above; b: -4 + 0.1 * 10, then the trace is 0.9 * 10 + 9.
    b = -4.0 if train else -3 + 1.8
    assert weights(after) == pytest.approx({"a": 8.04, "b": b}, rel=1e-6)
    # The condition is computed anew, on the inputs.
    assert float(memory.get(after, "condition")) == pytest.approx(8.04 + 2, rel=1e-6)
    plain = tuned(jnp.int32(2), memory.without(start, "condition"))
    assert "memory" not in plain and weights(plain) == weights(after)


# Gradient and rate -----------------------------------------------------------------


def test_clip_norm_bounds_the_global_norm():
    # Gradient (7, -10), norm sqrt(149); clipped to norm 2.
    after, _ = run(data_of([1, 2, 6]), batch_size=3, clip_norm=2.0)
    factor = LR * 2 / np.sqrt(149)
    expected = {"a": 10 - 7 * factor, "b": -4 + 10 * factor}
    assert weights(after) == pytest.approx(expected, rel=1e-6)
    loose, _ = run(data_of([1, 2, 6]), batch_size=3, clip_norm=13.0)
    assert weights(loose) == pytest.approx({"a": 9.3, "b": -3.0}, rel=1e-6)


def test_corrections_enter_before_clipping():
    # (7, -10) + (-4, 14) = (3, 4): norm 5, clipped to 1.
    train = training.trainer(quadratic(), Local(PLAIN, batch_size=3, clip_norm=1.0))

    def adjust(grads, params):
        assert set(grads) == set(params) == {"params/a/w", "params/b/w"}
        return {
            "params/a/w": grads["params/a/w"] - 4,
            "params/b/w": grads["params/b/w"] + 14,
        }

    start = quadratic().init(None)
    data = data_of([1, 2, 6])
    after, _ = jax.jit(lambda *args: train(*args, adjust))(
        jax.random.key(0), start, data, jnp.int32(0)
    )
    expected = {"a": 10 - LR * 0.6, "b": -4 - LR * 0.8}
    assert weights(after) == pytest.approx(expected, rel=1e-6)


def halving(round):
    return 0.5**round


@pytest.mark.parametrize("optimizer", [PLAIN, optax.adam(LR)])
def test_schedule_is_a_factor_on_the_update(optimizer):
    def change(round):
        after, _ = run(
            data_of([1, 2, 6]),
            optimizer=optimizer,
            batch_size=3,
            schedule=halving,
            round=round,
        )
        return np.array([weights(after)["a"] - 10, weights(after)["b"] + 4])

    np.testing.assert_allclose(change(1), change(0) / 2, rtol=1e-5)
    np.testing.assert_allclose(change(3), change(0) / 8, rtol=3e-5)


# The client axis -------------------------------------------------------------------


@pytest.mark.parametrize("length", [dict(epochs=2), dict(epochs=None, steps=5)])
def test_vmap_over_ragged_clients_equals_one_by_one(length):
    sizes = [0, 3, 8, 1, 5]
    data = ClientData(
        jnp.asarray(np.random.default_rng(0).integers(0, 20, (5, 8)), jnp.int32),
        jnp.asarray(sizes, jnp.int32),
        pool_of(np.arange(20)),
    )
    model = quadratic()
    how = Local(
        optax.sgd(LR, momentum=0.9),
        batch_size=3,
        phases=(Phase(**length),),
        clip_norm=5.0,
    )
    train = training.trainer(model, how)
    start = model.init(None)

    def one(key, data):
        return train(key, start, data, jnp.int32(0), training.no_adjustment)

    keys = jax.random.split(jax.random.key(7), 5)
    axes = ClientData(0, 0, None)
    together = jax.jit(jax.vmap(one, in_axes=(0, axes)))(keys, data)
    alone = jax.jit(one)
    for i, size in enumerate(sizes):
        row = ClientData(data.rows[i], data.size[i], data.pool)
        mine = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(mine, alone(keys[i], row), rtol=1e-6, atol=1e-6)
        steps = 2 * -(-size // 3) if "steps" not in length else 5 * (size > 0)
        assert float(mine[1]["steps"]) == steps


def test_mean_loss_is_over_samples_and_trains_nothing():
    model = from_linen(MLP(3, hidden=(4,)), (1, 1, 1), 3)
    variables = model.init(jax.random.key(0))
    data = data_of([1, 2, 6])
    logits = model.predict(variables, jnp.float32([1, 2, 6]).reshape(3, 1, 1, 1))
    expected = -jnp.mean(jax.nn.log_softmax(logits)[:, 0])
    found = training.mean_loss(model, variables, data)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(training.mean_loss(model, variables, data_of([]))) == 0.0


# Errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), "batch_size=0 must be at least 1 and"),
        (dict(batch_size=1, clip_norm=0.0), "clip_norm=0.0 must be positive"),
        (dict(batch_size=1, clip_norm=-1.0), "clip_norm=-1.0 must be positive"),
        (dict(batch_size=1, phases=(Phase(),)), "either epochs or steps"),
        (
            dict(batch_size=1, phases=(Phase(epochs=1, steps=3),)),
            "either epochs or steps",
        ),
        (
            dict(batch_size=1, phases=(Phase(epochs=-1),)),
            "epochs=-1 must be at least 0",
        ),
        (dict(batch_size=2.5), "batch_size=2.5 must be a whole number"),
        (dict(batch_size=1, clip_norm=NAN), "clip_norm=nan must be a finite number"),
        (
            dict(batch_size=1, phases=(Phase(steps=NAN),)),
            "steps=nan must be a whole number",
        ),
        (dict(batch_size=1, batches="frehs"), "did you mean 'fresh'"),
    ],
)
def test_bad_arguments_fail_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        training.trainer(quadratic(), Local(PLAIN, **options))


def test_how_clients_train_is_shown_in_a_line():
    usual = Local(optimizer=optax.sgd(0.1), batch_size=32)
    assert repr(usual) == "Local(batch_size=32, phases=(Phase(epochs=1),))"
    phases = (Phase(epochs=2, train="params/head/.*"), Phase(steps=5))
    other = usual._replace(phases=phases, clip_norm=10.0, schedule=lambda round: 0.5)
    assert repr(other) == (
        "Local(batch_size=32, phases=(Phase(epochs=2, train='params/head/.*'), "
        "Phase(steps=5)), clip_norm=10.0)"
    )
