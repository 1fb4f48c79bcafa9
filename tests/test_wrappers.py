"""What clients look at, are sent and do before they predict, by hand."""

import chex
import federated
import jax
import jax.numpy as jnp
import pytest

from hyperjax import wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.types import AdaptData, Batch, ClientData, ClientSide, Downlink
from hyperjax.wrappers import (
    with_condition_of,
    with_few_inputs,
    with_refreshed_statistics,
)


def test_the_condition_is_of_inputs_of_a_choice():
    """The adapted client is what `adapt` was given to look at."""
    side = ClientSide(*[None] * 6)._replace(adapt=lambda key, down, c, data: data)
    alg = federated.method("fedavg")._replace(client=side)
    pool = federated.tiny().pool
    train = ClientData(jnp.array([7, 8, 9]), jnp.int32(2), pool)
    inputs = ClientData(jnp.array([1, 2, 3, 4]), jnp.int32(4), pool._replace(y=-pool.y))
    data = AdaptData(train, inputs)
    assert with_condition_of(alg) is alg
    chosen = with_condition_of(alg, condition_source="local_train_inputs")
    found = chosen.client.adapt(None, None, None, data)
    # Its own rows, of the pool without labels; `train` itself is as it was.
    assert (found.inputs.rows.tolist(), int(found.inputs.size)) == ([7, 8, 9, 0], 2)
    assert found.inputs.pool is inputs.pool and found.train is train
    none = data._replace(train=train._replace(size=jnp.int32(0)))
    found = chosen.client.adapt(None, None, None, none).inputs
    assert (found.rows.tolist(), int(found.size)) == ([1, 2, 3, 4], 4)


def test_a_client_is_deployed_by_few_of_its_inputs():
    side = ClientSide(*[None] * 6)._replace(adapt=lambda key, down, c, data: data)
    alg = federated.method("fedavg")._replace(client=side)
    pool = federated.tiny().pool
    inputs = ClientData(jnp.array([5, 6, 7, 8, 0]), jnp.int32(4), pool)
    data = AdaptData(inputs._replace(size=jnp.int32(0)), inputs)

    def looked_at(num, key):
        found = with_few_inputs(alg, num).client.adapt(
            jax.random.key(key), (), (), data
        )
        assert found.train is data.train
        return set(found.inputs.rows[: int(found.inputs.size)].tolist())

    some = [looked_at(2, key) for key in range(8)]
    assert all(len(rows) == 2 for rows in some)
    assert set().union(*some) == {5, 6, 7, 8}
    assert looked_at(9, 0) == {5, 6, 7, 8}
    with pytest.raises(ValueError, match="context=0"):
        with_few_inputs(alg, 0)


def test_unknown_condition_source():
    with pytest.raises(ValueError, match=r"did you mean 'eval_inputs'"):
        with_condition_of(federated.method("fedavg"), condition_source="eval_input")


@pytest.mark.slow
def test_statistics_at_home_may_see_what_is_deployed():
    model = federated.normed()
    plain = fedavg(model, local=federated.make_local(), bn_stats="local")
    alg = with_refreshed_statistics(plain)
    table, pool = federated.tiny().table, federated.tiny().pool
    key = jax.random.key(0)
    server = alg.server.init(key)
    down = Downlink(shared=(server.theta, ()), round=jnp.int32(0))
    state = alg.client.init(key, key, down)
    rows, size = jnp.asarray(table.rows[0]), jnp.asarray(table.size[0])
    train = ClientData(rows, size, pool)
    inputs = train._replace(pool=pool._replace(y=jnp.full_like(pool.y, -1)))

    def deployer(alg):
        @jax.jit
        def deployed(train):
            data = AdaptData(train, inputs)
            adapted = alg.client.adapt(key, down, state, data)
            return alg.client.deploy(down, adapted)

        return deployed

    refreshed, kept = deployer(alg), deployer(plain)
    found, before = refreshed(train), kept(train)
    expected, loss = before, jax.jit(model.loss)
    for first in range(0, int(size), 64):  # one pass, in batches of 64
        chosen = rows[first : min(first + 64, int(size))]
        x = (pool.x[chosen] / 255.0 - pool.mean) / pool.std
        batch = Batch(x, pool.y[chosen], jnp.ones(len(chosen)))
        stats = loss(key, expected, batch, ())[1].stats
        expected = {**expected, "stats": stats}
    chex.assert_trees_all_close(found["stats"], expected["stats"], rtol=1e-5)
    chex.assert_trees_all_equal(found["params"], before["params"])
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), found, before)
    assert all(jax.tree.leaves(moved["stats"]))
    # A client without samples keeps its own.
    nobody = train._replace(size=jnp.int32(0))
    chex.assert_trees_all_equal(refreshed(nobody), before)


def test_a_client_reads_other_messages_and_is_told_the_rest():
    def shown(*names):
        return lambda *args: dict(zip(names, args, strict=True))

    client = ClientSide(
        init=shown("key", "common", "down"),
        update=shown("key", "down", "state", "data"),
        adapt=shown("key", "down", "state", "data"),
        deploy=shown("down", "state"),
        tune=None,
        model=None,
    )
    side = wrappers.through(client, lambda down: down[0], lambda down, s: s + down[1])
    down = ("plain", "!")
    assert side.init("k", "c", down) == dict(key="k", common="c", down="plain")
    told = dict(key="k", down="plain", state="s!", data="d")
    assert side.update("k", down, "s", "d") == side.adapt("k", down, "s", "d") == told
    assert side.deploy(down, "s") == dict(down="plain", state="s")
