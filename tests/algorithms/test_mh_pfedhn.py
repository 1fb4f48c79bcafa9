"""MH-pFedHN on tiny networks of which two share a head, and the published numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import NUM_CLASSES, Normed, make_local, tiny
from jax.flatten_util import ravel_pytree

from hyperjax import training, tree, wrappers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.mh_pfedhn import mh_pfedhn
from hyperjax.engine import comm, exchange, families
from hyperjax.hypernets.multi_head import multi_head
from hyperjax.models import MLP, ZOO, from_linen
from hyperjax.types import Batch, ClientData, Cohort, Downlink

KEY = jax.random.key(0)
SHAPE, RATE = (4, 4, 1), 0.125
# Numbers of parameters; with 32 outputs they make 2, 2 and 3 embeddings.
SIZES = {"line": 51, "norm": 53, "deep": 83}
HEADS = {"line": "2", "norm": "2", "deep": "3"}
MEMBERS = {"line": 3, "norm": 2, "deep": 2}
NET = dict(output_size=32, embedding_size=4, hidden_size=4, num_layers=1)
# A server whose step is the clipped gradient itself.
BARE = optax.sgd(1.0)
ADAM = optax.adam(0.05)
CLOSE = dict(rtol=1e-4, atol=1e-6)
BN = "stats/batch_stats/norm/"


def wrapped(module):
    return from_linen(module, SHAPE, NUM_CLASSES)


@functools.cache
def networks():
    return {
        "line": wrapped(MLP(NUM_CLASSES, hidden=())),
        "norm": wrapped(Normed()),
        "deep": wrapped(MLP(NUM_CLASSES, hidden=(4,))),
    }


@functools.cache
def one_plain_step():
    """A single step on all samples of a client."""
    return training.Local(optimizer=optax.sgd(RATE), batch_size=16)


@functools.cache
def ours(server_opt=BARE, **options):
    return mh_pfedhn(
        networks(),
        local=one_plain_step(),
        family_sizes=MEMBERS,
        server_opt=server_opt,
        embedding_deviation=1.0,
        **{**NET, **options},
    )


def start(alg):
    return _first(alg.server)


@functools.cache
def _first(side):
    return side.init(KEY)  # draws compile slowly; step by step methods share them


def cohort(ids, active=None):
    ones = jnp.ones(len(ids))
    active = ones if active is None else jnp.asarray(active, jnp.float32)
    ids = jnp.asarray(ids, jnp.int32)
    return Cohort(ids, active, ones, jnp.int32(0), jnp.float32(7))


@functools.cache
def _programs(side):
    return jax.jit(side.downlink), jax.jit(side.update)


def received(alg, server, **ids):
    """Flat networks [C, K] of clients by family."""
    cohorts = {name: cohort(who) for name, who in ids.items()}
    downs = _programs(alg.server)[0](KEY, server, cohorts)
    return {name: down.own for name, down in downs.items()}


def absorbed(alg, server, deltas, active=None, **ids):
    """The server once clients sent their changes {family: [C, K]}."""
    active = active or {}
    cohorts = {name: cohort(who, active.get(name)) for name, who in ids.items()}
    after, info = _programs(alg.server)[1](KEY, server, deltas, cohorts)
    assert info.keys() == {"gradient_norm"}
    return after, float(info["gradient_norm"])


def changes(seed, length=1.0, **ids):
    """Random changes of clients by family."""
    draw = np.random.default_rng(seed)
    return {
        name: jnp.float32(length * draw.normal(size=(len(who), SIZES[name])))
        for name, who in ids.items()
    }


def learnt(server):
    return server.phi, server.tables


# The gradient ------------------------------------------------------------------------


@functools.cache
def generated():
    """(phi, table, name) -> all networks of a family, [N_f, K]."""
    net = multi_head(list(SIZES.values()), **NET)

    def all_of(phi, table, name):
        head = phi["heads"][HEADS[name]]
        one = lambda v: net.generate(phi["extractor"], head, v, SIZES[name])  # noqa: E731
        return jax.vmap(one)(table)

    return all_of


@functools.partial(jax.jit, static_argnames="chosen")
def end_to_end(learnt, chosen):
    """The mean loss of clients (family, place) on their samples, and its gradient."""

    def mean(learnt):
        phi, tables = learnt
        total = 0.0
        for name, place in chosen:
            theta = generated()(phi, tables[name], name)[place]
            model = networks()[name]
            variables = model.init(KEY)
            _, cut = ravel_pytree(variables["params"])
            variables = {**variables, "params": cut(theta)}
            rows, _ = samples(name, place)
            x = (tiny().pool.x[rows] / 255.0 - tiny().pool.mean) / tiny().pool.std
            batch = Batch(x, tiny().pool.y[rows], jnp.ones(len(rows)))
            total += model.loss(KEY, variables, batch, ())[0]
        return total / len(chosen)

    return jax.value_and_grad(mean)(learnt)


def samples(name, place):
    """A client's rows and how many there are."""
    k = {"line": 0, "norm": 3, "deep": 5}[name] + place
    size = int(tiny().table.size[k])
    return tiny().table.rows[k, :size], size


def exchanged(alg, server, **ids):
    """The server after an exchange in which clients really train."""
    cohorts, data, rows, seen = {}, {}, {}, {}
    for name, who in ids.items():
        found = [samples(name, place) for place in who]
        cohorts[name] = cohort(who)
        padded = [np.pad(r, (0, 9 - n)) for r, n in found]
        size = jnp.array([n for _, n in found])
        data[name] = ClientData(jnp.array(padded), size, tiny().pool)
        spec = comm.describe(families.view(alg, name)).client
        rows[name] = jax.tree.map(
            lambda s, n=len(who): jnp.zeros((n, *s.shape), s.dtype), spec
        )
        seen[name] = jnp.zeros(len(who), bool)
    run = jax.jit(exchange.make_joint_exchange(alg))
    server, rows, info = run(KEY, server, rows, seen, data, cohorts)
    return server, rows, info


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(dict(deep=(1,)), marks=pytest.mark.slow),
        dict(line=(2, 0), norm=(1,), deep=(0,)),
    ],
    ids=["one client", "several families"],
)
def test_one_plain_step_is_the_end_to_end_gradient(ids):
    alg = ours()
    before = learnt(start(alg))
    after, _, info = exchanged(alg, start(alg), **ids)
    found = tree.sub(before, learnt(after))
    chosen = tuple((name, place) for name, who in ids.items() for place in who)
    value, grads = end_to_end(before, chosen)
    assert 0 < tree.norm(grads) * RATE < 50  # not clipped
    assert info["gradient_norm"] == pytest.approx(tree.norm(grads) * RATE, rel=1e-4)
    chex.assert_trees_all_close(found, tree.scale(grads, RATE), **CLOSE)
    # A small step that way lowers the loss, one the other way raises it.
    for factor, sign in ((-0.05, -1), (0.05, 1)):
        moved = tree.add(before, tree.scale(found, factor))
        assert sign * (end_to_end(moved, chosen)[0] - value) > 0


@jax.jit
def pulled(learnt, deltas):
    """The VJP of changes {family: [N_f, K]} of all clients, by differentiation."""

    def product(learnt):
        phi, tables = learnt
        return sum(
            jnp.vdot(generated()(phi, tables[name], name), delta)
            for name, delta in deltas.items()
        )

    return jax.grad(product)(learnt)


def test_several_clients_are_the_mean_of_their_pulls():
    alg = ours()
    ids = dict(line=(2, 0, 1), deep=(1,))
    deltas = changes(0, **ids)
    # Client 1 of "line" was drawn and dropped out: it does not count.
    deltas["line"] = deltas["line"].at[2].set(0)
    after, _ = absorbed(alg, start(alg), deltas, dict(line=(1, 1, 0)), **ids)
    total = None
    for name, row, place in (("line", 0, 2), ("line", 1, 0), ("deep", 0, 1)):
        alone = {k: jnp.zeros((n, SIZES[k])) for k, n in MEMBERS.items()}
        alone[name] = alone[name].at[place].set(deltas[name][row])
        one = pulled(learnt(start(alg)), alone)
        total = one if total is None else tree.add(total, one)
    expected = tree.add(learnt(start(alg)), tree.scale(total, 1 / 3))
    chex.assert_trees_all_close(learnt(after), expected, **CLOSE)


def test_weighted_changes_make_weighted_steps():
    alg, ids = ours(), dict(norm=(1,), deep=(0,))
    one, other = changes(1, **ids), changes(2, **ids)

    def step(deltas):
        after, _ = absorbed(alg, start(alg), deltas, **ids)
        return tree.sub(learnt(after), learnt(start(alg)))

    mixed = tree.add(tree.scale(one, 2.0), tree.scale(other, -3.0))
    expected = tree.add(tree.scale(step(one), 2.0), tree.scale(step(other), -3.0))
    chex.assert_trees_all_close(step(mixed), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_clipped_over_all_it_reaches():
    alg, ids, steps = ours(), dict(line=(2, 1), deep=(0,)), []
    for length in (1.0, 1e4):
        deltas = changes(3, length, **ids)
        after, norm = absorbed(alg, start(alg), deltas, **ids)
        steps.append(tree.sub(learnt(after), learnt(start(alg))))
        assert float(tree.norm(steps[-1])) == pytest.approx(min(norm, 50), rel=1e-3)
    assert norm > 50
    unit = [tree.scale(s, 1 / float(tree.norm(s))) for s in steps]
    chex.assert_trees_all_close(*unit, rtol=1e-3, atol=1e-4)


# Whose step it is --------------------------------------------------------------------


def test_others_keep_their_bits_moments_and_counts():
    alg = ours(ADAM)
    everyone = {name: tuple(range(n)) for name, n in MEMBERS.items()}
    before, _ = absorbed(alg, start(alg), changes(4, **everyone), **everyone)
    after, _ = absorbed(alg, before, changes(5, line=(1,)), line=(1,))

    def digest(of):
        return tree.sha256(jax.device_get(of))

    def parts(server):
        found = {"extractor": (server.phi["extractor"], server.opt["extractor"])}
        for m in ("2", "3"):
            found[m] = (server.phi["heads"][m], server.opt["heads"][m])
        for name, num in MEMBERS.items():
            stored = (server.tables[name], server.opt["tables"][name])
            for k in range(num):
                found[name, k] = jax.tree.map(lambda x, k=k: x[k], stored)
        return {key: digest(x) for key, x in found.items()}

    old, new = parts(before), parts(after)
    moved = {key for key in old if old[key] != new[key]}
    assert moved == {"extractor", "2", ("line", 1)}
    # One who drops out is as idle.
    ids, active = dict(line=(1,), deep=(0, 1)), dict(deep=(0, 0))
    deltas = changes(5, line=(1,)) | {"deep": jnp.zeros((2, SIZES["deep"]))}
    dropped, _ = absorbed(alg, before, deltas, active, **ids)
    same = {k: v == parts(dropped)[k] for k, v in old.items()}
    assert {key for key in old if not same[key]} == moved
    chex.assert_trees_all_close(dropped, after, **CLOSE)
    # Nobody at all moves nothing.
    nobody, _ = absorbed(alg, before, deltas, dict(line=(0,), deep=(0, 0)), **ids)
    chex.assert_trees_all_equal(nobody, before)


def test_what_is_frozen_keeps_its_bits_and_lends_no_length():
    alg = ours(freeze=("extractor/.*", "heads/2/.*"))
    server, ids = start(alg), dict(line=(0, 2), deep=(1,))
    deltas = changes(1, length=1e3, **ids)
    after, norm = absorbed(alg, server, deltas, **ids)
    for part in ("extractor", ("heads", "2")):
        pick = lambda s, p=part: s.phi[p] if p == "extractor" else s.phi["heads"]["2"]  # noqa: E731
        chex.assert_trees_all_equal(pick(after), pick(server))
    moved = tree.sub(
        (after.phi["heads"]["3"], after.tables),
        (server.phi["heads"]["3"], server.tables),
    )
    assert norm > 50 and float(tree.norm(moved)) == pytest.approx(50, rel=1e-3)
    assert all(np.any(x) for x in jax.tree.leaves(moved[0]))


def test_heads_may_be_kept_apart():
    alg = ours(share_heads=False)
    server, ids = start(alg), dict(line=(0, 2))
    assert sorted(server.phi["heads"]) == ["2_line", "2_norm", "3_deep"]
    one, other = (server.phi["heads"][f"2_{name}"]["w"] for name in ("line", "norm"))
    assert np.all(one != other)  # draws of their own
    after, _ = absorbed(alg, server, changes(1, **ids), **ids)
    np.testing.assert_array_equal(after.phi["heads"]["2_norm"]["w"], other)
    assert np.any(after.phi["heads"]["2_line"]["w"] != one)
    # Where no two families share one, it is the method itself but for names and draws.
    together = start(ours())
    head = together.phi["heads"]["3"]
    server.phi["heads"]["3_deep"], server.phi["extractor"] = (
        head,
        together.phi["extractor"],
    )
    tables = {**server.tables, "deep": together.tables["deep"]}
    found = received(alg, server._replace(tables=tables), deep=(0, 1))
    chex.assert_trees_all_equal(found, received(ours(), together, deep=(0, 1)))


def test_extractors_may_be_kept_apart():
    alg = ours(share_extractor=False)
    server, ids = start(alg), dict(line=(0, 2))
    assert sorted(server.phi["extractor"]) == sorted(MEMBERS)
    line, norm = (jax.tree.leaves(server.phi["extractor"][k]) for k in ("line", "norm"))
    assert all(np.any(a != b) for a, b in zip(line, norm, strict=True))
    after, _ = absorbed(alg, server, changes(1, **ids), **ids)
    for name in MEMBERS:  # who was absent does not move
        before, now = (s.phi["extractor"][name] for s in (server, after))
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, now)
        assert any(jax.tree.leaves(moved)) == (name == "line")
    # With equal extractors it is the method itself.
    together = start(ours())
    same = dict.fromkeys(MEMBERS, together.phi["extractor"])
    alike = together._replace(phi={**together.phi, "extractor": same})
    found = received(alg, alike, line=(0, 1), deep=(0, 1))
    chex.assert_trees_all_equal(
        found, received(ours(), together, line=(0, 1), deep=(0, 1))
    )


def test_every_tensor_counts_its_own_steps():
    alg = ours(ADAM)
    server, num_rounds = start(alg), 2
    for number in range(num_rounds):
        for name, num in MEMBERS.items():
            for k in np.random.default_rng(number).permutation(num):
                deltas = changes(k, **{name: (k,)})
                server, _ = absorbed(alg, server, deltas, **{name: (k,)})
    counts = jax.tree.map(
        lambda opt: np.asarray(opt[0].count),
        server.opt,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert counts["extractor"] == num_rounds * 7
    assert counts["heads"] == {"2": num_rounds * 5, "3": num_rounds * 2}
    for name, num in MEMBERS.items():
        np.testing.assert_array_equal(counts["tables"][name], [num_rounds] * num)


def test_the_step_is_that_of_the_optimizer_on_each_tensor():
    alg, bare = ours(ADAM), ours()
    ids = dict(norm=(0,), deep=(1, 0))
    deltas = changes(6, **ids)
    stepped, _ = absorbed(bare, start(bare), deltas, **ids)
    grads = tree.sub(learnt(start(bare)), learnt(stepped))
    after, _ = absorbed(alg, start(alg), deltas, **ids)
    # The first step of Adam is -0.05 g / (|g| + eps) for every entry.
    moved = tree.sub(learnt(after), learnt(start(alg)))
    for found, g in zip(jax.tree.leaves(moved), jax.tree.leaves(grads), strict=True):
        clear = np.abs(g) > 1e-4
        expected = np.where(clear, -0.05 * np.sign(g), found)
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4)


# Only sizes are known ----------------------------------------------------------------


def test_networks_of_one_size_are_one_to_the_server():
    # 20 h + 3 at h = 2, and 34 + 3 + 6.
    modules = {"wide": MLP(NUM_CLASSES, (2,)), "tall": MLP(NUM_CLASSES, (2, 1))}
    alg = mh_pfedhn(
        {name: wrapped(module) for name, module in modules.items()},
        local=one_plain_step(),
        family_sizes={"wide": 2, "tall": 2},
        server_opt=ADAM,
        **NET,
    )
    server = start(alg)
    same = server.tables["wide"]
    server = server._replace(tables={"wide": same, "tall": same})
    own = received(alg, server, wide=(1, 0), tall=(1, 0))
    assert own["wide"].shape == (2, 43)
    np.testing.assert_array_equal(own["wide"], own["tall"])
    delta = jnp.sin(jnp.arange(43.0))[None]
    wide, _ = absorbed(alg, server, {"wide": delta}, wide=(1,))
    tall, _ = absorbed(alg, server, {"tall": delta}, tall=(1,))
    chex.assert_trees_all_equal(wide.phi, tall.phi)
    np.testing.assert_array_equal(wide.tables["wide"], tall.tables["tall"])


@pytest.mark.parametrize(
    "order",
    [
        *(("c", "b", "a"), ("b", "c", "a")),
        pytest.param(("a", "b", "c"), marks=pytest.mark.slow),
    ],
)
def test_heads_are_found_by_size_whatever_families_are_called(order):
    # The largest, the smallest and the one between, under every name.
    models = dict(zip(order, networks().values(), strict=True))
    alg = mh_pfedhn(
        models,
        local=one_plain_step(),
        family_sizes=dict.fromkeys(reversed(order), 1),
        **NET,
    )
    server = start(alg)
    chex.assert_trees_all_equal(server.phi, start(ours(ADAM)).phi)
    heads = {
        m: {"w": 0 * head["w"], "b": 0 * head["b"] + int(m)}
        for m, head in server.phi["heads"].items()
    }
    server = server._replace(phi={**server.phi, "heads": heads})
    own = received(alg, server, **dict.fromkeys(order, (0,)))
    for name, inner in zip(order, networks(), strict=True):
        np.testing.assert_array_equal(
            own[name], np.full((1, SIZES[inner]), HEADS[inner], float)
        )


def test_unseen_clients_get_the_network_of_the_mean_embedding():
    alg = ours()
    server = start(alg)
    own = received(alg, server, line=(0, 3, 17), deep=(2,))
    for name, rows in own.items():
        table = server.tables[name]
        mean = jnp.mean(table, 0, keepdims=True)
        expected = generated()(server.phi, jnp.concatenate([table[:1], mean]), name)
        want = expected[jnp.array([0, 1, 1][-len(rows) :])]
        np.testing.assert_allclose(rows, want, rtol=1e-5, atol=1e-6)
    # Nor does training one move an embedding.
    after, _ = absorbed(alg, server, changes(7, line=(3,)), line=(3,))
    chex.assert_trees_all_equal(after.tables, server.tables)


# The wire ----------------------------------------------------------------------------


def test_statistics_stay_at_home():
    alg = ours()
    _, rows, _ = exchanged(alg, start(alg), norm=(0, 1))
    messages = comm.describe(families.view(alg, "norm"))
    assert messages.own.shape == messages.uplink.shape == (SIZES["norm"],)
    assert messages.shared == ()
    kept = rows["norm"].kept
    assert set(kept) == {BN + "mean", BN + "var"}
    # They moved, for each client to its own.
    assert np.all(kept[BN + "mean"] != 0)
    assert kept[BN + "mean"][0] != kept[BN + "mean"][1]
    plain = comm.describe(families.view(alg, "deep"))
    assert tree.count(plain.client) == 0


@pytest.mark.parametrize(
    ("name", "numbers", "num_bytes"),
    [
        ("mh_cnn", 239_856, 959_424),
        ("vgg8", 274_664, 1_098_656),
        ("mh_resnet10", 353_028, 1_412_112),
        ("mh_resnet12", 529_092, 2_116_368),
        ("mh_resnet18", 571_236, 2_284_944),
    ],
)
@pytest.mark.slow  # tests/benchmarks/test_family_table.py counts them too
def test_published_costs(name, numbers, num_bytes):
    model = from_linen(ZOO[name](100), (32, 32, 3), 100)
    alg = mh_pfedhn({name: model}, local=make_local(), family_sizes={name: 10})
    messages = comm.describe(families.view(alg, name))
    assert comm.cost(messages) == (numbers, numbers, num_bytes, num_bytes)


# Order of the flat vector ------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("mh_cnn", "mh_mlp"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("vgg8", "mh_resnet10", "squeezenet1_1")
        ),
    ],
)
def test_vectors_come_back_as_they_were(name):
    model = from_linen(ZOO[name](10), (32, 32, 3), 10)
    alg = fedavg(model, local=make_local(), bn_stats="local")
    vector = wrappers.flat(alg)
    params = jax.eval_shape(model.init, KEY)["params"]
    numbers = jnp.arange(tree.count(params), dtype=jnp.float32)
    assert vector.size == len(numbers)

    @jax.jit
    def around(numbers):
        theta = vector.cut(numbers)
        return theta, vector.join(theta)

    theta, back = jax.device_get(around(numbers))
    np.testing.assert_array_equal(back, numbers)
    # Every tensor is a run of its own, in the order of paths.
    first = 0
    for path, shape in zip(tree.paths(params), jax.tree.leaves(params), strict=True):
        found = theta["params/" + path]
        assert found.shape == shape.shape
        np.testing.assert_array_equal(found.reshape(-1), first + np.arange(found.size))
        first += found.size


def test_generated_scales_land_on_scales():
    alg = ours()
    client = alg.client["norm"]
    numbers = jnp.arange(1.0, SIZES["norm"] + 1)
    down = Downlink(own=numbers, round=jnp.int32(0))
    state = client.init(KEY, KEY, down)
    variables = client.deploy(down, state)
    params = networks()["norm"].init(KEY)["params"]
    chex.assert_trees_all_equal(variables["params"], ravel_pytree(params)[1](numbers))
    assert variables["params"]["norm"]["scale"].shape == (1,)
    # Without one step of training its answer is that of these numbers.
    x = jax.random.normal(KEY, (5, *SHAPE))
    found = networks()["norm"].predict(variables, x)
    norm, head = variables["params"]["norm"], variables["params"]["head"]
    statistics = variables["stats"]["batch_stats"]["norm"]
    assert statistics["mean"] == 0 and statistics["var"] == 1
    inputs = x * norm["scale"] / np.sqrt(1 + 1e-5) + norm["bias"]
    expected = inputs.reshape(5, -1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# Bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(output_size=0), "output_size=0 must be at least 1"),
        (dict(embedding_size=0), "embedding_size=0 must be at least 1"),
        (dict(freeze="heads/9/.*"), "'heads/9/.*' matches no variable"),
        (dict(keep="params/top/.*"), "'params/top/.*' matches no variable"),
        (dict(family_sizes={"line": 3}), r"family_sizes.*\['line'\].*'deep'"),
        (dict(family_sizes={**MEMBERS, "norm": 0}), "norm=0 must be at least 1"),
    ],
)
def test_bad_input(options, message):
    options = {"family_sizes": MEMBERS, **NET, **options}
    with pytest.raises(ValueError, match=message):
        mh_pfedhn(networks(), local=one_plain_step(), **options)
