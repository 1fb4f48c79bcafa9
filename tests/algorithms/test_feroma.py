"""FEROMA and FLUX: profiles by hand, who is near whom, and what a newcomer gets."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import NUM_CLASSES, NUM_CLIENTS, make_local, tiny

from hyperjax import aggregators, tree
from hyperjax.algorithms.feroma import Known, feroma, profiler
from hyperjax.algorithms.flux import clusters, flux
from hyperjax.engine import comm
from hyperjax.models import linen
from hyperjax.types import AdaptData, ClientData, Cohort, Downlink

KEY = jax.random.key(4)
TERMS = dict(num_clients=NUM_CLIENTS, num_rounds=4)
L = NUM_CLASSES  # numbers of a turned feature


def data_of(client):
    return ClientData(*(jnp.asarray(x[client]) for x in tiny().table), tiny().pool)


@functools.cache
def profiles():
    look = profiler(tiny().model)
    return jax.jit(lambda key, data: look(key, tiny().model.init(KEY), data)), look


def test_a_profile_is_moments_of_turned_features():
    run, look = profiles()
    data = data_of(4)
    found = run(None, data)
    x = linen_features(data) @ look.turn
    y = np.asarray(data.pool.y)[data.rows[: data.size]]
    assert found.shape == (look.size,) and look.free == 2 * L
    np.testing.assert_allclose(found[:L], x.mean(0), atol=1e-5)
    np.testing.assert_allclose(found[L : 2 * L], x.std(0), atol=1e-4)
    for label in range(NUM_CLASSES):
        mine = x[y == label]
        at = 2 * L + L * label
        several = len(mine) >= 2
        mean = mine.mean(0) if several else np.full(L, -1.0)
        std = mine.std(0) if several else np.full(L, -1.0)
        np.testing.assert_allclose(found[at : at + L], mean, atol=1e-5)
        at += L * NUM_CLASSES
        np.testing.assert_allclose(found[at : at + L], std, atol=1e-4)
    np.testing.assert_allclose(look.turn.T @ look.turn, np.eye(L), atol=1e-6)


def linen_features(data):
    batch = jnp.asarray(data.rows[: data.size])
    x = (data.pool.x[batch] / 255.0 - data.pool.mean) / data.pool.std
    return np.asarray(tiny().model.features(tiny().model.init(KEY), x))


def test_a_half_is_of_real_samples_and_another_one_each_time():
    run, _ = profiles()
    one, again = (run(jax.random.key(0), data_of(4)) for _ in range(2))
    other = run(jax.random.key(1), data_of(4))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other) and np.any(one != run(None, data_of(4)))
    assert linen.sizes(tiny().model) == (NUM_CLASSES, 4)


def test_clusters_are_of_those_within_the_elbow():
    rows = jnp.array([[0.0], [0.1], [5.0], [0.2], [5.15], [9.0], [0.15]])
    there = jnp.array([1.0, 1, 1, 1, 1, 1, 0])
    found = np.asarray(clusters(rows, there))
    for who in ({0, 1, 3}, {2, 4}, {5}):
        for i in who:
            assert set(np.flatnonzero(found[i])) == who
    assert not found[6].any() and not found[:, 6].any()
    assert not np.asarray(clusters(rows, jnp.zeros(7))).any()


def known(spread=0.02):
    """Profiles of two kinds of clients, those of even and of odd numbers."""
    num = NUM_CLIENTS
    _, look = profiles()
    kinds = np.repeat(np.arange(4), [L] * 2 + [L * NUM_CLASSES] * 2)
    rows = np.arange(num)[:, None] % 2 + np.linspace(0, spread, num)[:, None] ** 2
    rows = np.broadcast_to(rows, (num, look.size))
    return Known(jnp.asarray(rows), jnp.ones(num), jnp.asarray(kinds))


def profiles_of(factory):
    """Clusters are of clients that are alike, or else an elbow is anywhere."""
    return known(0.0) if factory is flux else known()


@functools.cache
def after(factory, round):
    """Models before and after an exchange in which client k's grows by k."""
    alg = factory(tiny().model, local=make_local(), **TERMS)
    state = alg.server.init(KEY)
    if round >= 2:
        state = state._replace(known=profiles_of(factory))
    ids = jnp.arange(NUM_CLIENTS, dtype=jnp.int32)
    ones = jnp.ones(NUM_CLIENTS)
    cohort = Cohort(ids, ones, ones, jnp.int32(round), jnp.float32(NUM_CLIENTS))
    zero = jax.tree.map(jnp.zeros_like, comm.describe(alg).uplink)
    uplink = jax.tree.map(lambda x: jnp.zeros((NUM_CLIENTS, *x.shape)), zero)
    delta = jax.tree.map(
        lambda x: x + ids.reshape(-1, *[1] * (x.ndim - 1)), uplink.inner.delta
    )
    uplink = uplink._replace(
        inner=uplink.inner._replace(delta=delta), profile=profiles_of(factory).rows
    )
    new, _ = jax.jit(alg.server.update)(KEY, state, uplink, cohort)
    growth = tree.sub(new.models, state.models)
    return alg, new, np.asarray(growth["params/head/bias"][:, 0])


@pytest.mark.parametrize("factory", [feroma, flux])
def test_at_first_it_is_fedavg(factory):
    _, state, growth = after(factory, 0)
    np.testing.assert_allclose(growth, np.mean(np.arange(NUM_CLIENTS)), rtol=1e-5)
    assert not state.known.there.any()
    first = jax.tree.map(lambda x: x[0], state.models)
    chex.assert_trees_all_equal(state.reference, first)


def test_flux_averages_inside_clusters():
    _, _, growth = after(flux, 2)
    even, odd = np.arange(0, NUM_CLIENTS, 2).mean(), np.arange(1, NUM_CLIENTS, 2).mean()
    np.testing.assert_allclose(growth, [even, odd] * (NUM_CLIENTS // 2), rtol=1e-4)


def test_feroma_weighs_by_the_inverse_of_the_distance():
    _, _, growth = after(feroma, 2)
    low, high = (np.asarray(x) for x in known().scale())
    rows = (np.asarray(known().rows) - low) / (high - low)
    gap = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    share = 1 / (gap + 1e-8)
    share /= share.sum(1, keepdims=True)
    np.testing.assert_allclose(growth, share @ np.arange(NUM_CLIENTS), rtol=1e-3)


@pytest.mark.parametrize(
    "factory", [feroma, pytest.param(flux, marks=pytest.mark.slow)]
)
def test_a_newcomer_gets_the_nearest_model_and_a_participant_its_own(factory):
    alg, state, _ = after(factory, 2)
    _, look = profiles()
    plain = aggregators.mean_over_clients(state.models, jnp.ones(NUM_CLIENTS))
    ids = jnp.array([2, NUM_CLIENTS], jnp.int32)
    one = jnp.ones(2)
    cohort = Cohort(ids, one, one, jnp.int32(3), jnp.float32(NUM_CLIENTS))
    # Client 5's inputs look like those of whoever is at row 5.
    variables = {"params": tiny().model.init(KEY)["params"], "stats": {}}
    mine = look(None, variables, data_of(5))
    rows = jnp.zeros_like(state.known.rows).at[5, : look.free].set(mine[: look.free])
    rows = rows.at[jnp.array([0, 1, 2, 3, 4, 6, 7])].set(9.0 + mine)
    state = state._replace(
        known=state.known._replace(rows=rows, there=jnp.ones(NUM_CLIENTS)),
        reference=tree.by_path({"params": variables["params"]}),
    )
    give = alg.server.release(KEY, state, cohort)

    def deployed(place):
        own = jax.tree.map(lambda x: x[place], give.own)
        down = Downlink(give.shared, own, cohort.round)
        side, data = alg.client, data_of(5)
        first = side.init(KEY, KEY, down)
        nothing = data._replace(size=jnp.int32(0))
        ready = side.adapt(KEY, down, first, AdaptData(nothing, data))
        return tree.by_path({"params": side.deploy(down, ready)["params"]})

    for place, row in ((0, 2), (1, 5)):
        expected = jax.tree.map(lambda x, row=row: x[row], state.models)
        chex.assert_trees_all_close(deployed(place), expected, rtol=1e-6)
    assert tree.norm(tree.sub(plain, deployed(1))) > 0.1


def test_a_profile_is_counted_and_so_is_what_it_is_of():
    costs = comm.cost(comm.describe(after(flux, 0)[0]))
    network = 16 * 4 + 4 + (4 + 1) * NUM_CLASSES
    assert costs.up_numbers == network + 2 * L * (1 + NUM_CLASSES)
    assert costs.down_numbers == 2 * network
