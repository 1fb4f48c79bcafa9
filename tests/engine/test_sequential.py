"""Rounds whose clients come one after another, on quadratics."""

import functools
from typing import Any, NamedTuple

import chex
import federated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q

from hyperjax import rng, tree
from hyperjax.algorithms.pfedla import pfedla
from hyperjax.data import clients
from hyperjax.engine import checkpoint, cohorts, comm, schedule, stores
from hyperjax.types import ALONE, Algorithm, ClientData, Cohort

ROOT, ROUNDS = jax.random.key(3), 3


class Diary(NamedTuple):
    """A server's state, and whom it met when."""

    inner: Any
    ids: Any  # [16] int32, -1 where the page is empty
    rounds: Any  # [16] int32


@functools.cache
def method() -> Algorithm:
    """pFedLA, whose server remembers everybody, with heads that stay home."""
    alg = pfedla(
        q.model(),
        local=q.training(q.DECAYING),
        num_clients=q.N,
        embedding_size=4,
        hidden_size=4,
        keep=q.HEAD,
    )
    server = alg.server

    def init(common):
        empty = jnp.full(16, -1, jnp.int32)
        return Diary(server.init(common), empty, empty)

    def update(key, state, uplink, cohort):
        inner, info = server.update(key, state.inner, uplink, cohort)
        page = jnp.argmax(state.ids < 0)
        ids = state.ids.at[page].set(cohort.ids[0])
        rounds = state.rounds.at[page].set(cohort.round)
        return Diary(inner, ids, rounds), info

    diary = alg._replace(
        server=server._replace(
            init=init,
            downlink=lambda key, state, cohort: server.downlink(
                key, state.inner, cohort
            ),
            update=update,
        )
    )
    return federated.traced_once(diary)


def table():
    return clients.table([np.full(n, k) for k, n in enumerate(q.SIZES)])


@functools.cache
def simulator(store="device", sequential=True, cohort_size=3, alg=method):
    return schedule.simulator(
        alg(),
        table(),
        q.pool(),
        weight=np.ones(q.N),
        cohort_size=cohort_size,
        sampler="uniform",
        sequential=sequential,
        store=store,
    )


def rounds(sim, start, num=ROUNDS, carry=None, root=ROOT):
    """Runs rounds one by one, so that all runs share one program."""
    carry, infos = sim.init(root) if carry is None else carry, []
    for number in range(start, start + num):
        carry, info = sim.run(root, carry, number, 1)
        infos.append(info)
    return jax.device_get((carry, infos))


@functools.cache
def whole(store="device"):
    return rounds(simulator(store), 0)


def order(carry, number):
    """Whom the server met in a round."""
    diary = carry.server
    return [int(k) for k in diary.ids[diary.rounds == number]]


def test_cohorts_are_dealt_with_one_by_one_by_the_algorithms_functions():
    alg, (carry, _) = method(), whole()
    common = rng.stream(ROOT, "common_init")
    server = alg.server.init(common)
    rows, seen = stores.zeros(comm.describe(alg).client, q.N)
    rows, seen = jax.tree.map(np.array, rows), np.zeros(q.N, bool)

    @jax.jit
    def turn(server, row, seen, cohort, rows, size):
        key = ROOT  # nothing of all this depends on keys, but for the first server
        down = alg.server.downlink(key, server, cohort)
        own = jax.tree.map(lambda x: x[0], down.own)
        down = down._replace(own=own, round=cohort.round)
        new = alg.client.init(key, common, down)
        row = jax.tree.map(lambda x, y: jnp.where(seen, x, y), row, new)
        data = ClientData(rows, size, q.pool())
        up, row, _ = alg.client.update(key, down, row, data)
        up = jax.tree.map(lambda x: x[None], up)
        return alg.server.update(key, server, up, cohort)[0], row

    for number in range(ROUNDS):
        for k in order(carry, number):
            one, ids, population = jnp.ones(1), jnp.array([k]), jnp.float32(q.N)
            cohort = Cohort(ids, one, one, jnp.int32(number), population)
            row = jax.tree.map(lambda x, k=k: x[k], rows)
            data = jax.tree.map(lambda x, k=k: x[k], table())
            server, row = turn(server, row, seen[k], cohort, *data)
            seen[k] = True
            for x, y in zip(jax.tree.leaves(rows), jax.tree.leaves(row), strict=True):
                x[k] = y
    chex.assert_trees_all_close(carry.server, server, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_close(carry.rows[ALONE], rows, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(carry.seen[ALONE], seen)


# Either kind of rounds is compared with one by hand: this one above, the other in the
# tests of methods.
@pytest.mark.slow
def test_of_one_client_it_is_a_parallel_round():
    # Nothing of these clients' training depends on keys, which differ.
    in_turn, at_once = (
        rounds(simulator(cohort_size=1, sequential=s), 0) for s in (True, False)
    )
    chex.assert_trees_all_equal(in_turn, at_once)


@pytest.mark.slow  # that follows of the rounds by hand
def test_of_several_clients_it_is_not():
    at_once, _ = rounds(simulator(sequential=False), 0)
    models = whole()[0].server.inner.models, at_once.server.inner.models
    assert float(tree.norm(tree.sub(*models))) > 1e-3


def test_host_and_device_agree():
    chex.assert_trees_all_equal(whole("host"), whole("device"))


@functools.cache
def opened() -> Algorithm:
    """The same, whose rounds open with an exchange that the diary marks by its size."""
    alg = method()

    def update(key, state, uplink, cohort):
        inner, info = alg.server.update(key, state, uplink, cohort)
        ids = jnp.where(
            inner.ids == state.ids, inner.ids, 100 + jnp.int32(jnp.sum(cohort.active))
        )
        return inner._replace(ids=ids), info

    opening = alg._replace(server=alg.server._replace(update=update))
    return alg._replace(opening=opening)


@pytest.mark.slow
def test_a_round_may_open_with_everybody():
    found = {}
    for store in ("device", "host"):
        found[store], infos = rounds(simulator(store, alg=opened), 0, 2)
        for number, info in enumerate(infos):
            plain = order(whole()[0], number)
            assert order(found[store], number) == [103, *plain]
            assert info["opening_samples"] == info["samples"] > 0
    chex.assert_trees_all_close(found["host"], found["device"], rtol=1e-6, atol=1e-7)
    at_once, _ = rounds(simulator(sequential=False, alg=opened), 0, 1)
    assert order(at_once, 0) == [103, min(order(whole()[0], 0))]


@pytest.mark.parametrize("store", ["device", "host"])
def test_a_resumed_run_has_the_same_bits(store, tmp_path):
    sim = simulator(store)
    half, _ = rounds(sim, 0, 2)
    checkpoint.save(tmp_path, 2, half)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), half)
    restored = checkpoint.restore(tmp_path, template)
    carry = sim.load(restored.carry)
    carry, _ = rounds(sim, restored.round, ROUNDS - restored.round, carry)
    assert tree.sha256(carry) == tree.sha256(whole(store)[0])


def test_the_order_is_random_but_a_function_of_root_and_round():
    carry, _ = whole()
    drawn = [order(carry, number) for number in range(ROUNDS)]
    assert all(len(set(ids)) == 3 for ids in drawn)
    assert any(ids != sorted(ids) for ids in drawn)
    assert len(set(map(tuple, drawn))) > 1
    # Whatever happened before.
    late, _ = rounds(simulator(), 2, 1)
    assert order(late, 2) == drawn[2]
    other, _ = rounds(simulator(), 0, root=jax.random.key(4))
    assert [order(other, number) for number in range(ROUNDS)] != drawn


def test_the_cohort_is_the_one_of_a_parallel_round():
    carry, _ = whole()
    for number in range(ROUNDS):
        key = rng.stream(jax.random.fold_in(ROOT, number), "cohort")
        expected = cohorts.sample("uniform", key, q.N, 3)
        assert sorted(order(carry, number)) == sorted(expected.tolist())


def test_steps_and_samples_are_summed_and_losses_averaged():
    carry, infos = whole()
    for number, info in enumerate(infos):
        count = sum(q.SIZES[k] for k in order(carry, number))
        assert info["samples"].tolist() == info["steps"].tolist() == [count]
        assert np.all(np.isfinite(info["loss"]))
    # All start alike: the first client of the first round has the loss of the start.
    carry, (info,) = rounds(simulator(cohort_size=1), 0, 1)
    (k,) = order(carry, 0)
    theta, total = q.START, 0.0
    for count in range(q.SIZES[k]):
        theta = q.descend(k, q.START, count, **q.DRIFT)
        gap = theta - q.B[k]
        total += gap @ q.A[k] @ gap / 2
    np.testing.assert_allclose(info["loss"], [total / q.SIZES[k]], rtol=1e-5)
