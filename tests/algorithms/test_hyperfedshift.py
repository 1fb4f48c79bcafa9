"""HyperFedShift: the network it starts from, what it is told, and what it sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import make_local, normed, tiny

from hyperjax import tree
from hyperjax.algorithms import fedavg as fedavg_module
from hyperjax.algorithms import hyperfedshift as module
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.hyperfedshift import EMBEDDINGS, FORMS, hyperfedshift
from hyperjax.data import clients, shift
from hyperjax.engine import comm
from hyperjax.models import MLP, from_linen, memory
from hyperjax.types import Batch, ClientData, Cohort, Downlink

KEY = jax.random.key(3)
SMALL = dict(embedding_size=4, num_directions=2, rank=1, chunk_size=16, width=4)


@functools.cache
def method(model=None, **options):
    alg = hyperfedshift(
        model or tiny().model, local=make_local(), **{**SMALL, **options}
    )
    whole = alg.client.model
    whole = whole._replace(
        init=jax.jit(whole.init),
        apply=jax.jit(whole.apply),
        serve=whole.serve._replace(condition=jax.jit(whole.serve.condition)),
    )
    return alg._replace(client=alg.client._replace(model=whole))


def client_data(rows, size=None, pool=None):
    size = len(rows) if size is None else size
    return ClientData(jnp.asarray(rows), jnp.int32(size), pool or tiny().pool)


DATA = client_data([4, 9, 2, 7, 30, 11])


def moved(variables, seed=0):
    """Variables whose parameters are all drawn: nothing is 0 any more."""
    draw = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape) / 3, jnp.float32),
        variables["params"],
    )
    return {**variables, "params": params}


# The network it starts from ----------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_at_the_start_it_is_the_network_bit_for_bit(form):
    plain, whole = tiny().model, method(form=form).client.model
    start, variables = plain.init(KEY), whole.init(KEY)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4, 1)), jnp.float32)
    for condition in (jnp.zeros(4), jnp.array([2.0, -1.0, 0.3, 5.0])):
        served = memory.put(variables, "condition", condition)
        exported = whole.serve.export(served)
        jax.tree.map(np.testing.assert_array_equal, exported, start)
        np.testing.assert_array_equal(whole.predict(served, x), plain.predict(start, x))


def test_it_begins_by_moving_network_and_directions_alone():
    whole = method().client.model
    variables = whole.init(KEY)
    batch = Batch(jnp.ones((2, 4, 4, 1)), jnp.array([0, 2]), jnp.ones(2))

    def loss(params):
        return whole.loss(KEY, {**variables, "params": params}, batch, DATA)[0]

    grads = tree.by_path(jax.jit(jax.grad(loss))(variables["params"]))
    moving = {path.split("/")[0] for path, x in grads.items() if np.any(x)}
    assert moving == {"network", "basis"}
    assert not any(np.any(x) for path, x in grads.items() if "mixing" in path)


def test_the_published_small_network_has_so_many_numbers():
    mlp = from_linen(MLP(10, hidden=(64,)), (14, 14, 1), 10)
    plain = fedavg(mlp, local=make_local())
    for form, number in (("lowrank", 41_074), ("full", 133_106)):
        alg = hyperfedshift(mlp, local=make_local(), form=form)
        cost = comm.cost(comm.describe(alg))
        # Beside the parameters: z up, mu and sigma down.
        assert (cost.up_numbers, cost.down_numbers) == (number + 16, number + 32)
    constant = hyperfedshift(mlp, local=make_local(), embedding="constant")
    cost = comm.cost(comm.describe(constant))
    assert cost.up_numbers == cost.down_numbers == 41_074 - 13_648 - 15 * 8
    assert comm.cost(comm.describe(plain)).up_numbers == 13_258


@pytest.mark.slow
def test_networks_with_statistics_and_convolutions_train():
    alg = method(normed(), extractor="conv")
    server = alg.server.init(KEY)
    state, uplink = exchange(alg, server)
    assert tree.finite((state, uplink))
    changed = [k for k, x in uplink.inner.delta.items() if np.any(x)]
    assert any(k.startswith("stats/") for k in changed)


# What it is told ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, dict(embedding="moments"), dict(even=True)], ids=str
)
def test_e_is_of_the_inputs_whatever_their_order_padding_or_copies(options):
    whole = method(**options).client.model
    variables = moved(whole.init(KEY))
    e = whole.serve.condition(variables, DATA)
    rows = np.asarray(DATA.rows)
    for same in (
        client_data(rows[::-1].copy()),
        client_data([*rows, 0, 1, 2], size=len(rows)),
        client_data([*rows, *rows, *rows]),
    ):
        found = whole.serve.condition(variables, same)
        np.testing.assert_allclose(found, e, rtol=1e-5, atol=1e-6)
    one = whole.serve.condition(variables, client_data(rows[:1]))
    assert np.isfinite(one).all() and not np.allclose(one, e)
    nothing = whole.serve.condition(variables, client_data(rows, size=0))
    np.testing.assert_array_equal(nothing, np.zeros_like(e))


def test_e_is_standardised_by_what_the_server_says():
    whole = method().client.model
    variables = moved(whole.init(KEY))
    entry = {"mean": jnp.full(4, 0.5), "deviation": jnp.full(4, 2.0)}
    told = memory.put(variables, module.MOMENTS, entry)
    z = whole.serve.condition(variables, DATA)
    found = whole.serve.condition(told, DATA)
    np.testing.assert_allclose(found, (z - 0.5) / 2, rtol=1e-5, atol=1e-6)


def test_the_oracle_is_told_the_clients_shift():
    whole = method(embedding="oracle").client.model
    names = list(shift.PARAMETERS)
    table = np.tile(shift.IDENTITY, (3, 1))
    table[1, names.index("angle")], table[1, names.index("blur")] = 90, 2
    owner = jnp.zeros(len(tiny().pool.y), jnp.int32).at[jnp.array([4, 9])].set(1)
    pool = tiny().pool._replace(owner=owner, shift=jnp.asarray(table))
    turned = whole.serve.condition(None, client_data([4, 9], pool=pool))
    np.testing.assert_allclose(turned[:2], [1, 0], atol=1e-6)
    assert 2.0 in np.asarray(turned)
    plain = whole.serve.condition(None, client_data([5, 6], pool=pool))
    np.testing.assert_array_equal(plain, whole.serve.condition(None, DATA))


def test_moments_are_means_over_fields_of_the_image():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    found = module._pixel_moments(x).reshape(2, 2, 4, 4, 3)
    np.testing.assert_allclose(
        found[0, 0, 1, 2], x[0, 2:4, 4:6].mean((0, 1)), rtol=1e-4
    )
    np.testing.assert_allclose(
        found[1, 1, 3, 0], (x[1, 6:8, 0:2] ** 2).mean((0, 1)), rtol=1e-4
    )


def test_a_constant_e_makes_clients_alike():
    alg = method(embedding="constant")
    served = alg.client.model.serve
    assert served.condition(None, DATA) == ()
    assert module.MOMENTS not in alg.client.model.init(KEY).get("memory", {})


# Classes that count evenly -----------------------------------------------------------


def test_z_is_a_mean_over_classes_whatever_their_shares():
    """By hand; classes of less than two percent count less."""
    pool, labels = tiny().pool, np.asarray(tiny().pool.y)
    rows = np.concatenate([np.flatnonzero(labels == k)[:2] for k in range(3)])
    seen = module.learned(tiny().model, 4, "mlp", 8)
    params = seen.init(KEY)
    inputs = clients.gather(pool, jnp.asarray(rows), jnp.ones(6)).x
    features = np.asarray(seen.features(params, inputs))

    def z(rows):
        def classes(batch):
            return jax.nn.one_hot(batch.y, 3)

        return seen.even_mean(params, client_data(rows), classes, 3)

    means = np.stack([features[2 * k : 2 * k + 2].mean(0) for k in range(3)])
    np.testing.assert_allclose(z(rows), means.mean(0), rtol=1e-5, atol=1e-6)
    skewed = np.concatenate([rows[:2], rows[:2], rows[:2], rows[2:]])
    np.testing.assert_allclose(z(skewed), means.mean(0), rtol=1e-5, atol=1e-6)
    few = np.concatenate([np.repeat(rows[:2], 99), rows[2:4]])
    weight = np.array([1.0, 0.01 / 0.02])
    expected = weight @ means[:2] / weight.sum()
    np.testing.assert_allclose(z(few), expected, rtol=1e-4, atol=1e-5)


def test_an_unseen_client_knows_classes_by_its_own_predictions():
    """By no label, though as classes that count evenly."""
    whole = method(even=True).client.model
    plain = method().client.model
    variables = moved(whole.init(KEY))
    other = tiny().pool._replace(y=jnp.zeros_like(tiny().pool.y))
    e = whole.serve.condition(variables, DATA)
    blind = whole.serve.condition(variables, client_data(DATA.rows, pool=other))
    np.testing.assert_array_equal(e, blind)
    assert not np.allclose(e, plain.serve.condition(variables, DATA))


# Virtual clients ---------------------------------------------------------------------


def test_rows_are_drawn_by_class_shares_whatever_the_padding():
    labels = np.asarray(tiny().pool.y)
    rows = np.flatnonzero(labels < 2)
    shares = jnp.array([0.8, 0.2, 0.0])
    draws = [
        module._by_class(client_data(some, size=len(rows)), shares)(KEY, 4000)
        for some in (rows, np.pad(rows, (0, 7)))
    ]
    np.testing.assert_array_equal(*draws)
    assert set(np.asarray(draws[0])) == set(rows)
    assert np.mean(labels[draws[0]] == 0) == pytest.approx(0.8, abs=0.03)


def test_a_virtual_client_has_the_classes_of_the_client_in_other_shares():
    labels = np.asarray(tiny().pool.y)
    data = client_data(np.flatnonzero(labels != 1))
    keys = jax.random.split(KEY, 2000)
    found = np.asarray(jax.vmap(lambda key: module._mixed(key, data, 3))(keys))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert not found[:, 1].any() and (found[:, [0, 2]] > 0).all()
    # Uniform on the simplex of two classes.
    assert found[:, 0].mean() == pytest.approx(0.5, abs=0.03)
    assert found[:, 0].std() == pytest.approx(1 / np.sqrt(12), abs=0.02)


def test_a_virtual_batch_is_balanced_by_its_own_shares():
    batch = Batch(jnp.ones((3, 4, 4, 1)), jnp.zeros(3, jnp.int32), jnp.ones(3))
    draw, shares = module.with_replacement(DATA), jnp.array([0.5, 0.5, 0.0])
    plain = module._redrawn(KEY, batch, DATA, draw, shares)
    assert plain.prior == () and plain.x.shape == batch.x.shape
    other = batch._replace(prior=jnp.ones(3) / 3)
    balanced = module._redrawn(KEY, other, DATA, draw, shares)
    np.testing.assert_array_equal(balanced.prior, shares)


# What it sends -----------------------------------------------------------------------


def exchange(alg, server):
    """One client's exchange from a server's state: its state and uplink."""
    one = jnp.ones(1)
    cohort = Cohort(jnp.zeros(1, jnp.int32), one, one, jnp.int32(0), jnp.float32(1))
    down = alg.server.downlink(KEY, server, cohort)._replace(round=jnp.int32(0))
    state = alg.client.init(KEY, KEY, down)
    uplink, state, _ = jax.jit(alg.client.update)(KEY, down, state, DATA)
    return state, uplink


def test_a_client_sends_z_of_its_inputs_under_what_it_has_trained():
    alg = method()
    server = alg.server.init(KEY)
    _, uplink = exchange(alg, server)
    theta = tree.add(server.inner.theta, uplink.inner.delta)
    state = alg.client.init(
        KEY,
        KEY,
        Downlink(
            shared=module.Sent((theta, ()), server.mean, server.deviation),
            round=jnp.int32(0),
        ),
    )
    down = Downlink(shared=module.Sent((theta, ()), server.mean, server.deviation))
    variables = alg.client.deploy(down, state)
    z = alg.client.model.serve.condition(variables, DATA)  # of moments 0 and 1
    np.testing.assert_allclose(uplink.description, z, rtol=1e-4, atol=1e-5)


def test_running_moments_by_hand():
    alg = method(moving=0.25)
    server = alg.server.init(KEY)
    theta = tree.zeros_like(server.inner.theta)
    update = jax.jit(alg.server.update)

    def after(server, z, active):
        num = len(active)
        delta = jax.tree.map(lambda x: jnp.zeros((num, *x.shape)), theta)
        inner = fedavg_module.Uplink(delta, ())
        active = jnp.asarray(active, jnp.float32)
        ids = jnp.arange(num, dtype=jnp.int32)
        cohort = Cohort(ids, active, jnp.ones(num), jnp.int32(0), jnp.float32(num))
        sent = jnp.asarray(z, jnp.float32)[:, None] * jnp.ones(4)
        return update(KEY, server, module.Uplink(inner, sent), cohort)[0]

    nobody = after(server, [0, 0, 0], [0, 0, 0])
    assert float(nobody.mean[0]) == 0 and float(nobody.started) == 0
    first = after(nobody, [1, 3, 0], [1, 1, 0])
    np.testing.assert_allclose(first.mean, 2)
    np.testing.assert_allclose(first.deviation, 1.001, rtol=1e-5)
    second = after(first, [4, 0, 0], [1, 0, 0])  # one alone has no deviation
    np.testing.assert_allclose(second.mean, 2 + 0.25 * 2)
    np.testing.assert_allclose(second.deviation, 1.001, rtol=1e-5)
    third = after(second, [0, 4, 8], [1, 1, 1])
    np.testing.assert_allclose(third.mean, 2.5 + 0.25 * 1.5)
    deviation = np.sqrt(32 / 3) + 1e-3
    np.testing.assert_allclose(
        third.deviation, 1.001 + 0.25 * (deviation - 1.001), rtol=1e-5
    )


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_what_clients_say_of_themselves_passes_lossy_channels_unharmed(embedding):
    alg = method(embedding=embedding)
    wanted = (r"description",) if embedding in ("learned", "moments") else ()
    assert alg.exact == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(form="low"), "form='low' is unknown; did you mean 'lowrank'"),
        (dict(embedding="none"), "embedding='none' is unknown"),
        (dict(extractor="lenet"), "extractor='lenet' is unknown"),
        (dict(context=0), "context=0 must be .*at least 1"),
        (dict(rank=0), "rank=0 must be .*at least 1"),
        (dict(moving=0.0), "moving=0.0 must be .*positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hyperfedshift(tiny().model, local=make_local(), **options)
