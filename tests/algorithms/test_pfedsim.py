"""pFedSim on quadratics with a head of two features and three classes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q

from hyperjax.algorithms.fedavg import Uplink, fedavg
from hyperjax.algorithms.local_only import local_only
from hyperjax.algorithms.pfedsim import LARGEST, State, pfedsim
from hyperjax.engine import comm
from hyperjax.types import Cohort

BODY, KERNEL, BIAS = "params/body/w", "params/head/kernel", "params/head/bias"
DRAW = np.random.default_rng(0)
HEADS = np.float32(DRAW.normal(size=(q.N, 2, 3)))
BODIES = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
LATE = 9  # any round after the warm-up


@functools.cache
def model():
    """The quadratics, whose second number is an entry of the head's kernel."""
    plain = q.model()

    def init(key):
        kernel = jnp.array([[q.START[1], 0.5, 2.0], [1.0, -1.0, 0.25]], jnp.float32)
        head = {"kernel": kernel, "bias": jnp.ones(3)}
        body = {"w": jnp.float32(q.START[0])}
        return {"params": {"body": body, "head": head}, "stats": {}}

    def narrow(variables):
        params = variables["params"]
        head = {"w": params["head"]["kernel"][0, 0]}
        return {**variables, "params": {"body": params["body"], "head": head}}

    return plain._replace(
        init=init,
        loss=lambda key, v, *rest: plain.loss(key, narrow(v), *rest),
        apply=lambda v, x: plain.apply(narrow(v), x),
    )


@functools.cache
def ours(warmup_rounds=0):
    return pfedsim(
        model(),
        local=q.training(q.DECAYING),
        num_clients=q.N,
        num_rounds=8,
        warmup=warmup_rounds / 8,
    )


def server(phi=None, heads=HEADS):
    phi = jnp.eye(q.N) if phi is None else jnp.asarray(phi, jnp.float32)
    biases = jnp.arange(3.0 * q.N).reshape(q.N, 3)
    models = {BODY: jnp.asarray(BODIES), KERNEL: jnp.asarray(heads), BIAS: biases}
    return State(models, phi)


def cohort(ids, active=None, number=LATE):
    active = np.ones(len(ids)) if active is None else active
    return Cohort(
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(active, jnp.float32),
        jnp.ones(len(ids)),
        jnp.int32(number),
        jnp.float32(q.N),
    )


@jax.jit
def received(state, who):
    return ours().server.downlink(jax.random.key(0), state, who).own


@jax.jit
def absorbed(state, uplink, who):
    return ours().server.update(jax.random.key(0), state, uplink, who)[0]


def similarities(heads, state=None, ids=(0, 1, 2, 3), active=None):
    """Phi after clients have come back with given heads [C, 2, 3]."""
    state, who = state or server(), cohort(ids, active)
    delta = jax.tree.map(jnp.zeros_like, received(state, who))
    delta[KERNEL] = heads - received(state, who)[KERNEL]
    return np.array(absorbed(state, Uplink(delta, ()), who).phi)


def cosines(heads):
    """Mean over classes of cosines, no less than 0, in float64."""
    unit = np.float64(heads) / np.linalg.norm(heads, axis=1, keepdims=True)
    return np.maximum(np.einsum("alk,blk->ab", unit, unit) / 3, 0)


# Training ---------------------------------------------------------------------------


def test_warm_up_is_fedavg():
    weight = (1, 2, 3, 4)
    plain = fedavg(model(), local=q.training(q.DECAYING))
    expected = q.play(plain, *q.PARTIAL, weight=weight)
    state = q.play(ours(len(q.PARTIAL)), *q.PARTIAL, weight=weight)
    for client in q.EVERYONE:
        one = {path: x[client] for path, x in state.server.models.items()}
        chex.assert_trees_all_close(one, expected.server.theta, **q.CLOSE)
    # Similarities are learnt later.
    assert np.all(state.server.phi == 0)
    # Nobody, or nobody of any weight, leaves everything as it is.
    for cohorts, weight in (((-1, -3),), (1, 1, 1, 1)), ((q.EVERYONE,), (0, 0, 0, 0)):
        after = q.play(ours(len(q.PARTIAL)), *cohorts, state=state, weight=weight)
        chex.assert_trees_all_equal(after.server, state.server)


def test_a_client_that_resembles_nobody_trains_alone():
    # Cohorts of one never learn a similarity, so that Phi = I.
    alone = local_only(model(), local=q.training(q.DECAYING))
    cohorts = ((2,), (0,), (2,), (3,), (0,), (2,))
    expected = q.play(alone, *cohorts).rows.kept
    state = q.play(ours(), *cohorts)
    for path, x in state.server.models.items():
        # The one that never came has what everybody started with.
        np.testing.assert_allclose(x[[0, 2, 3]], expected[path][[0, 2, 3]], **q.CLOSE)
        assert np.all(x[1] == q.start(ours()).server.models[path][1])


def test_after_the_warm_up_training_goes_on_from_its_result():
    state = q.play(ours(1), q.EVERYONE, (1,), (1,))
    theta = np.mean([q.descend(k, q.START, q.SIZES[k], **q.DRIFT) for k in range(4)], 0)
    np.testing.assert_allclose(
        state.server.models[BODY][[0, 2, 3]], theta[0], **q.CLOSE
    )
    # Momentum starts anew at every visit.
    for _ in range(2):
        theta = q.descend(1, theta, q.SIZES[1], **q.DRIFT)
    found = state.server.models
    np.testing.assert_allclose(
        (found[BODY][1], found[KERNEL][1, 0, 0]), theta, **q.CLOSE
    )


# Mixing -----------------------------------------------------------------------------


def test_bodies_are_mixed_and_heads_never():
    # -ln(1 - 0.75) = ln 4, -ln(1 - 0.5) = ln 2, -ln(1 - 0.9999) = ln 10^4.
    phi = np.eye(q.N)
    phi[1, 3] = phi[3, 1] = 0.75
    phi[1, 0] = phi[0, 1] = 0.5
    found = received(server(phi), cohort((1, 2, 3)))
    most = np.log(1e4)
    raw = np.array([np.log(2), most, 0, np.log(4)])
    three = (most * 8 + np.log(4) * 2) / (most + np.log(4))
    # 1 - 0.9999 has a relative error of 6e-4 in float32, its logarithm of 7e-5.
    np.testing.assert_allclose(
        found[BODY], [raw @ BODIES / raw.sum(), 4, three], rtol=1e-4
    )
    np.testing.assert_array_equal(found[KERNEL], HEADS[[1, 2, 3]])
    np.testing.assert_array_equal(found[BIAS], server().models[BIAS][1:])


def test_weights_sum_to_one():
    # So bodies that are all 1 stay 1, and no weight is infinite where Phi is 1.
    phi = np.random.default_rng(1).uniform(size=(q.N, q.N))
    for similar in (phi, np.ones((q.N, q.N)), np.zeros((q.N, q.N))):
        state = server(similar)
        state = state._replace(models={**state.models, BODY: jnp.ones(q.N)})
        found = received(state, cohort(q.EVERYONE))[BODY]
        np.testing.assert_allclose(found, np.ones(q.N), rtol=3e-7)


def test_identical_heads_have_equal_say():
    phi = similarities(np.stack([HEADS[0]] * 4))
    np.testing.assert_allclose(phi, np.ones((4, 4)), rtol=1e-6)
    assert np.all(phi > LARGEST)
    # After the cut-off all weights are 1/4: (1 + 2 + 4 + 8) / 4.
    found = received(server(phi), cohort(q.EVERYONE))[BODY]
    np.testing.assert_allclose(found, np.full(4, 3.75), rtol=1e-6)


def test_unseen_clients_get_the_mean_model():
    phi = np.full((q.N, q.N), 0.5)
    found = received(server(phi), cohort((4, 17)))
    np.testing.assert_allclose(found[BODY], [3.75, 3.75], rtol=1e-6)
    np.testing.assert_allclose(found[KERNEL], [HEADS.mean(0)] * 2, rtol=1e-5)


# Similarities -----------------------------------------------------------------------


def test_similarities_are_mean_cosines_of_columns():
    phi = similarities(HEADS)
    np.testing.assert_allclose(phi, cosines(HEADS), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(phi, phi.T, rtol=1e-6)
    assert np.any(phi == 0) and np.all(phi >= 0)
    # Norms of heads do not matter, of whole ones or of single classes.
    factor = np.float32([[0.5], [2], [8], [1]])[..., None] * np.float32([1, 2, 4])
    np.testing.assert_allclose(similarities(HEADS * factor), phi, rtol=1e-5, atol=1e-6)


def test_a_head_of_zeros_resembles_nobody():
    heads = HEADS.copy()
    heads[2] = 0
    phi = similarities(heads)
    assert np.all(phi[2] == 0) and np.all(phi[:, 2] == 0)


def test_only_pairs_that_took_part_together_change():
    before = np.random.default_rng(2).uniform(size=(q.N, q.N)).astype(np.float32)
    # Client 0 dropped out, 4 is padding; whatever order the others come in.
    new = np.float32(np.random.default_rng(3).normal(size=(4, 2, 3)))
    after = similarities(new, server(before), (3, 0, 1, 4), (1, 0, 1, 0))
    pair = np.ix_([3, 1], [3, 1])
    expected = before.copy()
    expected[pair] = cosines(new[[0, 2]])
    np.testing.assert_allclose(after[pair], expected[pair], rtol=1e-5)
    after[pair] = expected[pair]
    np.testing.assert_array_equal(after, expected)


# The wire, and bad input ------------------------------------------------------------


def test_a_whole_model_each_way():
    costs = comm.cost(comm.describe(ours()))
    assert (costs.down_numbers, costs.up_numbers) == (10, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_clients=0), r"num_clients=0 must be at least 1"),
        (dict(num_rounds=-1), r"num_rounds=-1 must be .*at least 0"),
        (dict(warmup=-0.1), r"warmup=-0\.1 must be at least 0 and at most 1"),
        (dict(warmup=1.5), r"warmup=1\.5 must be at least 0 and at most 1"),
        (dict(warmup=float("nan")), r"warmup=nan must be a finite number"),
        (dict(head=q.BODY), r"needs a head with a kernel.*body/w"),
        (dict(head="top"), r"'top' matches no variable"),
        (dict(num_clients=10**12), r"10{12} clients x 10 numbers .* = 40000\.0 GB"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        pfedsim(
            model(),
            local=q.training(),
            **{"num_clients": 4, "num_rounds": 8, **options},
        )
