"""LG-FedAvg is FedPer with the roles of head and body exchanged."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics as q

from hyperjax.algorithms.fedper import fedper
from hyperjax.algorithms.lg_fedavg import lg_fedavg
from hyperjax.data import clients
from hyperjax.engine import comm, exchange, families, stores
from hyperjax.types import ClientData, Cohort

TRAIN = q.training(q.DECAYING)


@pytest.mark.parametrize(("share", "home"), [(q.HEAD, q.BODY), (q.BODY, q.HEAD)])
def test_equals_fedper_of_the_other_part(share, home):
    alg = lg_fedavg(q.model(), local=TRAIN, share=share)
    ours = q.play(alg, *q.PARTIAL)
    mirror = q.play(fedper(q.model(), local=TRAIN, head=home), *q.PARTIAL)
    jax.tree.map(np.testing.assert_array_equal, (ours[:2]), (mirror[:2]))


def test_shares_the_head_alone():
    alg = lg_fedavg(q.model(), local=TRAIN)
    assert set(q.start(alg).server.theta) == {"params/head/w"}
    costs = comm.cost(comm.describe(alg))
    assert costs.up_numbers == costs.down_numbers == 1


def test_share_without_match():
    with pytest.raises(ValueError, match=r"params/top.*paths are: params/body/w"):
        lg_fedavg(q.model(), local=TRAIN, share="params/top/.*")


# Over families ----------------------------------------------------------------------

MEMBERS = {"plain": np.array([0, 2]), "wide": np.array([1, 3])}
FAMILY_SIZES = {name: len(ids) for name, ids in MEMBERS.items()}


class Joint(NamedTuple):
    """A method with families on the four clients of some pool."""

    start: Callable  # () -> State
    play: Callable  # (*cohorts, state=None, weight=ones) -> State


def joint(alg, parts=None, pool=None) -> Joint:
    """Compiles a method for clients who hold `parts` of a pool, or quadratics."""
    parts = parts or [np.full(n, k) for k, n in enumerate(q.SIZES)]
    groups, table = families.families(MEMBERS), clients.table(parts)

    def update(key, server, uplinks, cohorts):
        server, info = alg.server.update(key, server, uplinks, cohorts)
        return server, {**info, "uplink": uplinks}

    shown = alg._replace(server=alg.server._replace(update=update))
    run = exchange.make_joint_exchange(shown)

    @jax.jit
    def one(server, rows, seen, cohort, pool):
        cohorts = groups.cohorts(cohort)
        data, got, were = {}, {}, {}
        for name, part in cohorts.items():
            place = jnp.minimum(groups.everywhere(name, part.ids), q.N - 1)
            data[name] = ClientData(
                jnp.asarray(table.rows)[place], jnp.asarray(table.size)[place], pool
            )
            got[name], were[name] = stores.gather(rows[name], seen[name], part.ids)
        server, new, info = run(jax.random.key(0), server, got, were, data, cohorts)
        for name, part in cohorts.items():
            rows[name], seen[name] = stores.scatter(
                rows[name], seen[name], part.ids, new[name], part.active > 0
            )
        return q.State(server, rows, seen, info.pop("uplink"), info)

    @functools.cache
    def start():
        rows, seen = {}, {}
        for name in groups.names:
            spec = comm.describe(families.view(alg, name)).client
            rows[name], seen[name] = stores.zeros(spec, groups.size(name))
        return q.State(alg.server.init(jax.random.key(0)), rows, seen)

    def play(*cohorts, state=None, weight=(1, 1, 1, 1), first=0):
        """One exchange per cohort; a negative id -1 - k dropped out."""
        state = state or start()
        for number, cohort in enumerate(cohorts, first):
            ids = np.array([-1 - i if i < 0 else i for i in cohort], np.int32)
            ids = np.pad(ids, (0, q.N - len(ids)), constant_values=q.N)
            active = np.float32([i >= 0 for i in cohort])
            weights = np.float32(weight)[np.minimum(ids, q.N - 1)]
            active = np.pad(active, (0, q.N - len(active)))
            who = Cohort(ids, active, weights, np.int32(number), np.float32(q.N))
            who = jax.tree.map(jnp.asarray, who)
            state = one(*state[:3], who, q.pool() if pool is None else pool)
        return jax.device_get(state)

    return Joint(start, play)


def whole(by_family):
    """From leaves [N_f, ...] by family to leaves [N, ...]; the paths they share."""
    order = np.argsort(np.concatenate(list(MEMBERS.values())))
    common = set.intersection(*(set(x) for x in by_family.values()))
    return {
        path: np.concatenate([by_family[name][path] for name in MEMBERS])[order]
        for path in common
    }


@functools.cache
def wide():
    """The quadratics with three more numbers in the body, which decay alone moves."""
    plain = q.model()

    def init(key):
        variables = plain.init(key)
        body = {**variables["params"]["body"], "more": jnp.ones(3)}
        return {**variables, "params": {**variables["params"], "body": body}}

    return plain._replace(init=init)


NETWORKS = {"plain": q.model(), "wide": wide()}


def test_heads_are_averaged_over_the_clients_of_all_families():
    weight = (1, 2, 3, 4)
    networks = dict(reversed(NETWORKS.items()))
    alg = lg_fedavg(networks, local=TRAIN, family_sizes=FAMILY_SIZES)
    state = joint(alg).play(*q.PARTIAL, weight=weight)
    # As if they were one population: their other numbers stay home.
    single = lg_fedavg(q.model(), local=TRAIN)
    expected = q.play(single, *q.PARTIAL, weight=weight)
    chex.assert_trees_all_close(state.server.theta, expected.server.theta, **q.CLOSE)
    kept = {name: rows.kept for name, rows in state.rows.items()}
    chex.assert_trees_all_close(whole(kept), expected.rows.kept, **q.CLOSE)
    more = kept["wide"]["params/body/more"]
    assert more.shape == (2, 3) and np.all((more > 0) & (more < 1))
    for name in MEMBERS:
        costs = comm.cost(comm.describe(families.view(alg, name)))
        assert costs.up_numbers == costs.down_numbers == 1


def test_the_order_of_families_in_a_mapping_does_not_matter():
    alg = lg_fedavg(NETWORKS, local=TRAIN, family_sizes=FAMILY_SIZES)
    server = alg.server.init(jax.random.key(0))
    template = comm.describe(families.view(alg, "plain")).uplink
    one = jnp.ones(1)
    cohorts, ups = {}, {}
    for name, weight, change in (("plain", 1.0, 8.0), ("wide", 3.0, 4.0)):
        who = Cohort(jnp.zeros(1, jnp.int32), one, weight * one, jnp.int32(0), 2 * one)
        cohorts[name] = who
        ups[name] = jax.tree.map(lambda x, c=change: c * one, template)
    ups = dict(reversed(ups.items()))
    after, _ = alg.server.update(jax.random.key(0), server, ups, cohorts)
    # -1 + (8 + 3 x 4) / 4
    np.testing.assert_allclose(after.theta["params/head/w"], 4.0, rtol=1e-6)


def test_families_with_other_heads_are_refused():
    with pytest.raises(ValueError, match=r"'plain' and 'wide' do not share the same"):
        lg_fedavg(NETWORKS, local=TRAIN, share=q.BODY)
