"""FedFomo on quadratics, with a prediction whose cross-entropy is known."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q
from federated import make_local, normed, tiny

from hyperjax import training, tree
from hyperjax.algorithms.fedfomo import Own, State, Uplink, fedfomo, parted
from hyperjax.algorithms.hyperfednet import hyperfednet
from hyperjax.algorithms.local_only import local_only
from hyperjax.engine import comm
from hyperjax.models.linen import cross_entropy
from hyperjax.types import ClientData, Cohort, Downlink, Outputs

BODY, HEAD = "params/body/w", "params/head/w"
STILL = q.training(phases=(training.Phase(epochs=0),))


@functools.cache
def model():
    """The quadratics; logits are theta times the optimum b, and all labels are 0."""

    def apply(variables, x):
        params = variables["params"]
        theta = jnp.stack([params["body"]["w"], params["head"]["w"]])
        return Outputs(x.reshape(-1, 5)[:, 3:] * theta)

    return q.model()._replace(apply=apply)


def loss(client, theta):
    """Cross-entropy of a client's samples."""
    return np.log1p(np.exp(theta[1] * q.B[client, 1] - theta[0] * q.B[client, 0]))


@functools.cache
def ours(num_models=2, train=None, **options):
    options.setdefault("epsilon", 0.0)
    return fedfomo(
        model(),
        local=train or q.training(q.DECAYING),
        num_clients=q.N,
        num_models=num_models,
        **options,
    )


def tables(theta):
    """Models [..., 2] by path."""
    theta = jnp.asarray(theta, jnp.float32)
    return {BODY: theta[..., 0], HEAD: theta[..., 1]}


@functools.cache
def _program(alg):
    def update(own, data):
        down = Downlink(own=own, round=jnp.int32(0))
        key = jax.random.key(0)
        return alg.client.update(key, down, alg.client.init(key, key, down), data)[0]

    return jax.jit(update)


def visit(alg, mine, others, rows, size):
    """What one client sends that was given these models, as (theta, scores)."""
    data = ClientData(jnp.asarray(rows, jnp.int32), jnp.int32(size), q.pool())
    up = _program(alg)(Own(tables(mine), tables(others)), data)
    return q.vector(up.model), np.asarray(up.scores)


# Whole exchanges --------------------------------------------------------------------


def held_out(size):
    """A fifth, but at least one of two."""
    return max(1, int(size * 0.2)) if size > 1 else 0


def test_exchanges_equal_the_algorithm():
    models, likes = np.tile(q.START, (q.N, 1)), np.eye(q.N)
    trained, mixed_once = set(), False
    for number, cohort in enumerate(q.PARTIAL):
        alive, sent = [k for k in cohort if k >= 0], {}
        for k in alive:
            own, held = models[k], held_out(q.SIZES[k])
            others = [n for n in range(q.N) if n in trained and n != k]
            chosen = sorted(others, key=lambda n, k=k: (-likes[k, n], n))[:2]
            gains = {n: loss(k, own) - loss(k, models[n]) for n in chosen}
            apart = {n: np.linalg.norm(models[n] - own) for n in chosen}
            scores = {n: gains[n] / apart[n] if held else 0.0 for n in chosen}
            positive = {n: w for n, w in scores.items() if w > 0}
            total = sum(positive.values())
            theta = own + sum(
                w / total * (models[n] - own) for n, w in positive.items()
            )
            mixed_once |= 0 < len(positive) < len(scores)
            theta = q.descend(k, theta, q.SIZES[k] - held, **q.DRIFT)
            sent[k] = theta, scores
        for k, (theta, scores) in sent.items():
            models[k] = theta
            for n, w in scores.items():
                likes[k, n] += w  # of whatever sign
        trained |= set(alive)
        state = q.play(ours(), *q.PARTIAL[: number + 1])
        np.testing.assert_allclose(q.vector(state.server.models), models, **q.CLOSE)
        np.testing.assert_allclose(state.server.preference, likes, **q.CLOSE)
        assert set(np.flatnonzero(state.server.trained)) == trained
    assert mixed_once and np.any(likes < 0)


def test_without_models_of_others_it_is_local_training():
    # On samples that are not held out: 1, 1, 2 and 4 of 1, 2, 3 and 5.
    rest = tuple(n - held_out(n) for n in q.SIZES)
    alone = local_only(model(), local=q.training(q.DECAYING))
    expected = q.play(alone, *q.PARTIAL, sizes=rest)
    state = q.play(ours(0), *q.PARTIAL)
    chex.assert_trees_all_close(state.server.models, expected.rows.kept, **q.CLOSE)
    np.testing.assert_array_equal(state.server.preference, np.eye(q.N))


# Scores and mixture -----------------------------------------------------------------

ROWS = [2] * 8  # client 2's samples: the loss falls as theta_0 rises and theta_1 rises
MINE = (0.5, 0.25)


def test_models_like_ones_own_change_nothing():
    theta, scores = visit(ours(train=STILL), MINE, [MINE, MINE], ROWS, 5)
    np.testing.assert_array_equal(theta, np.float32(MINE))
    np.testing.assert_array_equal(scores, [0, 0])


@pytest.mark.slow
def test_running_statistics_have_no_part_in_a_distance():
    alg = fedfomo(normed(), local=make_local(), num_clients=8, num_models=1)
    key, own = jax.random.key(0), jax.eval_shape(alg.server.init, jax.random.key(0))
    mine = {
        k: 0.5 + 0.3 * jax.random.uniform(jax.random.fold_in(key, i), x.shape[1:])
        for i, (k, x) in enumerate(own.models.items())
    }
    moved = {k: x + 3.0 * k.startswith("stats/") for k, x in mine.items()}
    data = ClientData(tiny().table.rows[3], tiny().table.size[3], tiny().pool)

    def scores(other):
        others = jax.tree.map(lambda x: x[None], other)
        return _program(alg)(Own(mine, others), data).scores

    # Other statistics alone make no other model.
    np.testing.assert_array_equal(scores(moved), [0])
    step = {k: x * (1.3 if k.startswith("params/") else 1) for k, x in mine.items()}
    assert scores(step) != 0
    assert any(k.startswith("stats/") for k in mine)


def test_a_single_better_model_is_taken_whole():
    others = [(1.5, 0.75), (-1.0, 0.5)]
    theta, scores = visit(ours(train=STILL), MINE, others, ROWS, 5)
    np.testing.assert_array_equal(theta, np.float32(others[0]))
    gap = np.linalg.norm(np.subtract(others, MINE), axis=1)
    gains = [loss(2, MINE) - loss(2, other) for other in others]
    np.testing.assert_allclose(scores, gains / gap, rtol=1e-5)
    assert scores[0] > 0 > scores[1]
    # Nobody is better: nothing is taken.
    theta, scores = visit(ours(train=STILL), MINE, others[1:] * 2, ROWS, 5)
    np.testing.assert_array_equal(theta, np.float32(MINE))
    assert np.all(scores < 0)


def test_shares_are_scores_over_their_sum():
    others = [(1.5, 0.75), (0.5, 1.25)]
    theta, scores = visit(ours(train=STILL), MINE, others, ROWS, 5)
    gap = np.linalg.norm(np.subtract(others, MINE), axis=1)
    raw = np.array([loss(2, MINE) - loss(2, other) for other in others]) / gap
    assert np.all(raw > 0)
    np.testing.assert_allclose(scores, raw, rtol=1e-5)
    expected = MINE + raw / raw.sum() @ np.subtract(others, MINE)
    # No better than the scores, which are differences of losses in float32.
    np.testing.assert_allclose(theta, expected, rtol=1e-5)


def test_the_scale_of_losses_does_not_matter(monkeypatch):
    others = [(1.5, 0.75), (0.5, 1.25)]
    theta, scores = visit(ours(train=STILL), MINE, others, ROWS, 5)
    monkeypatch.setattr(
        "hyperjax.training.cross_entropy",
        lambda logits, batch: 4 * cross_entropy(logits, batch),
    )
    # A method of its own, as the others are compiled already.
    other = ours(train=STILL, epsilon_decay=0.0)
    same, more = visit(other, MINE, others, ROWS, 5)
    np.testing.assert_array_equal(more, 4 * scores)  # a power of two: exactly
    np.testing.assert_array_equal(same, theta)


def test_scores_come_from_samples_held_out_and_training_from_the_others():
    # The first of five samples is client 2's, the others 0's; 3's are padding.
    others, rows = [(1.5, 0.75), (-1.0, 0.5)], [2, 0, 0, 0, 0, 3, 3, 3]
    theta, scores = visit(ours(), MINE, others, rows, 5)
    gap = np.linalg.norm(np.subtract(others, MINE), axis=1)
    gains = [loss(2, MINE) - loss(2, other) for other in others]
    np.testing.assert_allclose(scores, gains / gap, rtol=1e-5)
    expected = q.descend(0, np.array(others[0]), 4, **q.DRIFT)
    np.testing.assert_allclose(theta, expected, **q.CLOSE)


@pytest.mark.parametrize(
    ("size", "held"), [(0, 0), (1, 0), (2, 1), (5, 1), (9, 1), (10, 2), (15, 3)]
)
def test_a_fifth_is_held_out(size, held):
    data = ClientData(jnp.arange(16), jnp.int32(size), None)
    train, validation = parted(data, 0.2)
    assert (train.size, validation.size) == (size - held, held)
    assert validation.rows[:held].tolist() == list(range(held))
    assert train.rows[: size - held].tolist() == list(range(held, size))


def test_clients_without_samples_mix_nothing():
    for size, steps in ((0, 0), (1, 1)):
        theta, scores = visit(ours(), MINE, [(1.5, 0.75), (9, 9)], ROWS, size)
        np.testing.assert_array_equal(scores, [0, 0])
        expected = q.descend(2, np.array(MINE), steps, **q.DRIFT)
        np.testing.assert_allclose(theta, expected, **q.CLOSE)


# Whose models -----------------------------------------------------------------------


def server(preference, trained=(1, 1, 1, 1)):
    """Client k's model is (k, 0)."""
    models = tables([(k, 0) for k in range(q.N)])
    trained = jnp.asarray(trained, bool)
    return State(models, jnp.asarray(preference, jnp.float32), trained, jnp.uint32(7))


def cohort(ids, active=None, number=0):
    active = np.ones(len(ids)) if active is None else active
    return Cohort(
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(active, jnp.float32),
        jnp.ones(len(ids)),
        jnp.int32(number),
        jnp.float32(q.N),
    )


def received(alg, state, who):
    """Whose model a client is sent as its own [C], and as others' [C, M]."""
    own = jax.jit(alg.server.downlink)(jax.random.key(0), state, who).own
    return own.model[BODY].tolist(), np.asarray(own.others[BODY]).astype(int)


LIKES = [[9, 1, 2, 3], [0, 9, 5, -1], [7, 8, 9, 8], [1, 1, 1, 9]]


def test_the_best_of_those_that_have_trained():
    who = cohort((2, 0, 3, 1))
    own, others = received(ours(), server(LIKES), who)
    assert own == [2, 0, 3, 1]
    assert others.tolist() == [[1, 3], [3, 2], [0, 1], [2, 0]]
    # Never oneself, nor a model that nobody has trained: then one's own, scored 0.
    own, others = received(ours(), server(LIKES, (1, 0, 0, 1)), who)
    assert others.tolist() == [[3, 0], [3, 0], [0, 3], [0, 3]]
    _, others = received(ours(), server(LIKES, (0, 0, 0, 0)), who)
    assert others.tolist() == [[2, 2], [0, 0], [3, 3], [1, 1]]


def test_unseen_clients_get_the_mean_model():
    own, _ = received(ours(), server(LIKES), cohort((4, 9)))
    assert own == [1.5, 1.5]


def test_a_random_choice_is_one_of_the_others_in_the_first_rounds_only():
    alg = ours(epsilon=1.0, epsilon_decay=0.25)
    greedy, found = [[1, 3], [3, 2], [0, 1], [2, 0]], []
    run = jax.jit(alg.server.downlink)
    for number in (0, 0, 4, 5):
        down = run(jax.random.key(0), server(LIKES), cohort((2, 0, 3, 1), None, number))
        found.append(np.asarray(down.own.others[BODY]).astype(int).tolist())
        for client, others in zip((2, 0, 3, 1), found[-1], strict=True):
            assert client not in others and len(set(others)) == 2
    assert found[0] == found[1] != greedy  # a function of the round
    assert found[2] == found[3] == greedy  # 1 - 4 * 0.25 = 0


def test_scores_are_added_for_the_models_that_were_sent():
    # By client id, whatever the order; 1 dropped out and 4 is padding.
    alg = ours(epsilon=1.0, epsilon_decay=0.25)
    who = cohort((3, 1, 0, 4), (1, 0, 1, 0))
    state = server(LIKES, (1, 1, 1, 0))
    _, others = received(alg, state, who)
    scores = jnp.array([[0.5, -0.25], [0, 0], [-2, 4], [0, 0]])
    up = Uplink(tables([(10 + k, 1) for k in range(4)]), scores)
    after, _ = jax.jit(alg.server.update)(jax.random.key(5), state, up, who)
    expected = np.array(LIKES, float)
    for row, place in ((3, 0), (0, 2)):
        expected[row, others[place]] += scores[place]
    np.testing.assert_array_equal(after.preference, expected)
    np.testing.assert_array_equal(after.models[BODY], [12, 1, 2, 10])
    assert after.trained.tolist() == [True, True, True, True]


# The wire, fusion, and bad input ----------------------------------------------------


def test_own_and_others_down_own_and_scores_up():
    costs = comm.cost(comm.describe(ours(3)))
    assert (costs.down_numbers, costs.up_numbers) == (2 + 3 * 2, 2 + 3)


def test_with_hyperfednet_generators_are_mixed_and_nothing_else():
    def fusion(num_models):
        return hyperfednet(
            normed(),
            local=q.steps(1),
            tile=2,
            embedding_size=4,
            base=f"fedfomo({num_models=})",
            num_clients=q.N,
        )

    # in: w [2, 4, 4], b [2, 4]; out: w [18, 4], b [18]; of four clients.
    phi = 32 + 8 + 72 + 18
    messages = comm.describe(fusion(2))
    for theta in (messages.server.models, messages.own.model, messages.uplink.model):
        assert all(path.startswith("params/hyper/") for path in theta)
    assert tree.count(messages.server.models) == q.N * phi
    costs = comm.cost(messages)
    assert (costs.down_numbers, costs.up_numbers) == (3 * phi, phi + 2)
    # Without others' models there is nothing to mix.
    costs = comm.cost(comm.describe(fusion(0)))
    assert costs.down_numbers == costs.up_numbers == phi


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_clients=0), r"num_clients=0 must be at least 1"),
        (dict(num_models=4), r"num_models=4 must be less than the 4"),
        (dict(num_models=-1), r"num_models=-1 must be at least 0"),
        (
            dict(validation_fraction=0.0),
            r"validation_fraction=0\.0 must be positive and below 1",
        ),
        (
            dict(validation_fraction=1.0),
            r"validation_fraction=1\.0 must be positive and below 1",
        ),
        (dict(max_table_gb=1e-9), r"4 clients x 2 numbers .* max_table_gb=1e-09"),
    ],
)
def test_bad_input(options, message):
    options = dict(num_clients=q.N, num_models=2) | options
    with pytest.raises(ValueError, match=message):
        fedfomo(model(), local=q.training(), **options)
