"""Channels: what is sent, what arrives, and what it costs."""

import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratics as q
from federated import make_local, method, normed, tiny

from hyperjax import models, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.mh_pfedhn import mh_pfedhn
from hyperjax.algorithms.mh_pfedhngd import mh_pfedhngd
from hyperjax.channels import topk, with_uplink
from hyperjax.engine import comm, families
from hyperjax.models import zoo
from hyperjax.types import Cohort

DRAW = np.random.default_rng(0)
MESSAGE = {
    "matrix": jnp.float32(DRAW.normal(size=(3, 7))),  # floor(0.3 x 21) = 6
    "vector": jnp.float32(DRAW.normal(size=10)),  # 3
    "few": jnp.float32(DRAW.normal(size=3)),  # none
}


def largest(x, fraction):
    """An array whose other entries are zero."""
    x = np.asarray(x)
    flat, kept = x.reshape(-1), np.zeros(x.size, x.dtype)
    number = int(np.floor(fraction * x.size))
    order = np.argsort(-np.abs(flat), kind="stable")[:number]
    kept[order] = flat[order]
    return kept.reshape(x.shape)


# Encoding ---------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
def test_the_largest_arrive_exactly_and_the_others_as_zero(fraction):
    channel = topk(fraction)
    wire = jax.jit(channel.encode)(MESSAGE)
    for path, x in MESSAGE.items():
        number = int(np.floor(fraction * x.size))
        assert wire[path].values.shape == wire[path].places.shape == (number,)
        assert wire[path].places.dtype == jnp.int32
    found = jax.jit(channel.decode)(wire, MESSAGE)
    expected = {path: largest(x, fraction) for path, x in MESSAGE.items()}
    chex.assert_trees_all_equal(found, expected)


def test_by_hand():
    x = jnp.array([0.5, -4.0, 0.0, 3.0, -1.0])
    wire = topk(0.4).encode(x)
    np.testing.assert_array_equal(wire.values, [-4, 3])
    np.testing.assert_array_equal(wire.places, [1, 3])
    np.testing.assert_array_equal(topk(0.4).decode(wire, x), [0, -4, 0, 3, 0])


def test_each_client_sends_its_own_largest():
    rows, channel = jnp.float32(DRAW.normal(size=(4, 10))), topk(0.3)
    wire = jax.vmap(channel.encode)(rows)
    assert wire.values.shape == wire.places.shape == (4, 3)
    found = jax.vmap(lambda x: channel.decode(x, rows[0]))(wire)
    np.testing.assert_array_equal(found, [largest(x, 0.3) for x in rows])
    # Padding and drop-outs are zeros, places and all: no change.
    empty = channel.decode(jax.tree.map(lambda x: jnp.zeros_like(x[0]), wire), rows[0])
    np.testing.assert_array_equal(empty, np.zeros(10))


@pytest.mark.parametrize("fraction", [0.0, -0.3, 1.01, float("nan")])
def test_bad_fractions(fraction):
    with pytest.raises(
        ValueError, match=r"fraction=.* must be.* positive and at most 1"
    ):
        topk(fraction)


# Methods ----------------------------------------------------------------------------


def sparse(alg, fraction):
    """A method whose uplink is sparse."""

    def describe(name):
        return comm.describe(families.view(alg, name)).uplink

    return with_uplink(alg, topk(fraction), describe)


SIZES = {"deep": 83, "line": 51}  # 3 x 17 numbers, and 4 x 17 + 3 x 5


@functools.cache
def heterogeneous(factory=mh_pfedhn):
    line = models.from_linen(models.MLP(3, hidden=()), (4, 4, 1), 3)
    return factory(
        {"deep": tiny().model, "line": line},
        local=make_local(),
        family_sizes={"deep": 2, "line": 2},
        output_size=32,
        embedding_size=4,
        hidden_size=4,
        num_layers=1,
        server_opt=optax.sgd(0.1),
    )


def test_families_are_updated_as_if_by_hand():
    alg, changed = heterogeneous(), sparse(heterogeneous(), 0.3)
    server = alg.server.init(jax.random.key(0))
    ones = jnp.ones(2)
    who = Cohort(jnp.arange(2), ones, ones, jnp.int32(0), jnp.float32(4))
    cohorts = dict.fromkeys(SIZES, who)
    ups = {k: jnp.float32(DRAW.normal(size=(2, n))) for k, n in SIZES.items()}
    encode = jax.vmap(topk(0.3).encode)
    # Nothing is exact; an array alone has an empty path.
    wires = {name: ({}, encode({"": up})) for name, up in ups.items()}
    masked = {k: jnp.stack([largest(x, 0.3) for x in up]) for k, up in ups.items()}
    found, _ = jax.jit(changed.server.update)(None, server, wires, cohorts)
    update = jax.jit(alg.server.update)
    expected, _ = update(None, server, masked, cohorts)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)
    whole, _ = update(None, server, ups, cohorts)
    assert np.any(np.abs(whole.tables["line"] - found.tables["line"]) > 1e-6)
    # What is sent down does not change.
    assert changed.server.downlink is alg.server.downlink


def test_what_opens_a_round_is_sent_as_it_is():
    # MH-pFedHNGD's changes of the global model, which is as large as "line".
    alg = heterogeneous(mh_pfedhngd)
    changed = sparse(alg, 0.3)
    assert changed.opening is alg.opening is not None
    assert changed.client["line"].update is not alg.client["line"].update


@pytest.mark.parametrize("name", SIZES)
def test_bytes_of_a_sparse_and_an_exact_part(name):
    plain = comm.cost(comm.describe(families.view(heterogeneous(mh_pfedhngd), name)))
    alg = sparse(heterogeneous(mh_pfedhngd), 0.3)
    costs = comm.cost(comm.describe(families.view(alg, name)))
    assert costs.up_bytes == 8 * int(0.3 * SIZES[name]) + 4 * SIZES["line"]
    assert costs.up_numbers == 2 * int(0.3 * SIZES[name]) + SIZES["line"]
    assert costs[0] == plain.down_numbers == SIZES[name] + SIZES["line"]


@pytest.mark.parametrize("name", SIZES)
def test_values_and_places_are_four_bytes_each(name):
    plain = comm.cost(comm.describe(families.view(heterogeneous(), name)))
    alg = sparse(heterogeneous(), 0.3)
    costs = comm.cost(comm.describe(families.view(alg, name)))
    number = int(0.3 * SIZES[name])
    assert plain.up_numbers == SIZES[name]
    assert (costs.up_numbers, costs.up_bytes) == (2 * number, 8 * number)
    assert costs[0] == plain.down_numbers == SIZES[name]


@pytest.mark.slow
def test_published_networks_send_three_fifths_of_the_bytes():
    # 0.3 x (4 + 4) / 4 = 60 %; the network for 32x32 images and 100 classes.
    network = models.from_linen(zoo.MHCNN(100), (32, 32, 3), 100)
    alg = mh_pfedhn({"a": network}, local=make_local(), family_sizes={"a": 2})
    costs = comm.cost(comm.describe(families.view(sparse(alg, 0.3), "a")))
    assert costs.down_bytes == 4 * 239_856
    assert costs.up_bytes == 8 * 71_956
    assert 0.599 < costs.up_bytes / costs.down_bytes <= 0.6
    # The changes of the global model are 4 bytes a number.
    alg = mh_pfedhngd({"a": network}, local=make_local(), family_sizes={"a": 2})
    costs = comm.cost(comm.describe(families.view(sparse(alg, 0.3), "a")))
    assert costs.down_bytes == 4 * 479_712
    assert costs.up_bytes == 8 * 71_956 + 4 * 239_856


@functools.cache
def vectors():
    """Quadratics with ten more numbers, which decay alone moves."""
    plain = q.model()

    def init(key):
        variables = plain.init(key)
        more = jnp.linspace(-2.0, 3.0, 10)
        return {**variables, "params": {**variables["params"], "more": more}}

    return plain._replace(init=init)


def test_a_method_without_families():
    plain = fedavg(vectors(), local=q.training(q.DECAYING))
    everything = q.play(sparse(plain, 1.0), *q.PARTIAL)
    expected = q.play(plain, *q.PARTIAL)
    chex.assert_trees_all_close(everything.server, expected.server, rtol=1e-6)
    # One exchange: means of the largest changes; of a single number there are none.
    some = q.play(sparse(plain, 0.3), (3, 1, -3))
    one = q.play(plain, (3, 1, -3))
    delta = one.uplink.delta["params/more"]
    start = q.start(plain).server.theta
    mean = np.mean([largest(x, 0.3) for x in delta[:2]], 0)
    np.testing.assert_allclose(
        some.server.theta["params/more"], start["params/more"] + mean, rtol=1e-6
    )
    for path in ("params/body/w", "params/head/w"):
        assert some.server.theta[path] == start[path] != one.server.theta[path]


def test_networks_with_statistics_describe_themselves():
    alg = sparse(fedavg(normed(), local=make_local()), 0.5)
    plain = comm.describe(fedavg(normed(), local=make_local())).uplink
    numbers = sum(x.size // 2 for x in jax.tree.leaves(plain))
    assert comm.cost(comm.describe(alg)).up_bytes == 8 * numbers


@pytest.mark.parametrize("name", ["fednova", "scaffold"])
def test_what_a_correction_counts_on_arrives(name):
    # FedNova divides by a displacement, which is one number; SCAFFOLD's c is the mean
    # of what clients remember.
    build = getattr(importlib.import_module(f"hyperjax.algorithms.{name}"), name)
    alg = build(q.model(), local=q.steps(2))
    uplink = comm.describe(alg).uplink
    through = with_uplink(alg, topk(1.0), lambda _: uplink)
    state, plain = q.play(through, *q.PARTIAL), q.play(alg, *q.PARTIAL)
    chex.assert_trees_all_close(state.server, plain.server, rtol=1e-6)
    nothing = q.play(with_uplink(alg, topk(0.9), lambda _: uplink), *q.PARTIAL)
    exact, wire = nothing.uplink  # of single numbers nothing goes through the channel
    assert tree.count(wire) == 0 and all(np.any(x) for x in exact.values())
    if name == "scaffold":
        memory = jax.tree.map(lambda x: x.mean(0), nothing.rows.correction)
        chex.assert_trees_all_close(nothing.server.correction, memory, rtol=1e-5)


@pytest.mark.parametrize("name", ["fedgen", "fedfomo", "fedjets"])
def test_counts_and_scores_are_sent_as_they_are(name):
    alg = method(name)
    assert alg.exact
    uplink = comm.describe(alg).uplink
    exact = tree.splitter(uplink, alg.exact).split(uplink)[0]
    through = with_uplink(alg, topk(0.1), lambda _: uplink)
    sent, _ = comm.describe(through).uplink
    assert {k: x.shape for k, x in sent.items()} == {
        k: x.shape for k, x in exact.items()
    }
