"""Evaluation: right numbers, no trace in the state, and no dependence on batching."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import NUM_CLASSES, NUM_CLIENTS, make_local, method, tiny, weights

from hyperjax import tree
from hyperjax.adaptation import with_adaptation
from hyperjax.algorithms.fedper import fedper
from hyperjax.data import clients
from hyperjax.engine import comm, deploy, evaluate, schedule, scoring, sharding
from hyperjax.engine.evaluate import Population
from hyperjax.types import ALONE, AdaptData, ClientData, Downlink, Outputs

# One worker runs all, and compiles each program once.
pytestmark = pytest.mark.xdist_group("evaluate")

ROOT = jax.random.key(0)
NUM_NOVEL = 3
SOURCE = np.array([0.2, 0.5, 0.3])
KEPT, ZERO_SHOT = "fedper", "hyperfedzero"


@functools.cache
def trained(stack: str):
    """The state after two rounds in which client 7 never took part."""
    table = clients.Table(*(x[: NUM_CLIENTS - 1] for x in tiny().table))
    sim = schedule.simulator(
        method(stack),
        table,
        tiny().pool,
        weight=weights()[:-1],
        cohort_size=len(table.size),
    )
    carry, _ = sim.run(ROOT, sim.init(ROOT), 0, 2)
    server, rows, seen = jax.device_get(carry)
    one_more = [(0, 1), *[(0, 0)] * 9]
    stored = jax.tree.map(lambda x: np.pad(x, one_more[: x.ndim]), (rows, seen))
    return schedule.Carry(server, *stored)


@functools.cache
def populations() -> dict[str, Population]:
    """All clients on their samples, and three novel ones that share some of them."""
    novel = [np.arange(10, 19), np.arange(30, 35), np.arange(3)]
    nothing = clients.table([np.arange(0)] * NUM_NOVEL)
    ids = np.arange(NUM_CLIENTS + NUM_NOVEL, dtype=np.int32)
    return {
        "pacc": Population(ids[:NUM_CLIENTS], tiny().table, tiny().table),
        "zacc": Population(ids[NUM_CLIENTS:], nothing, clients.table(novel)),
    }


@functools.cache
def scores(stack: str, batch_size=4, clients_per_call=64, devices=1, mapper="map"):
    evaluator = evaluate.evaluator(
        method(stack),
        tiny().pool,
        populations(),
        source_prior=SOURCE,
        batch_size=batch_size,
        clients_per_call=clients_per_call,
        mapper=mapper,
        mesh=sharding.client_mesh(min(clients_per_call, NUM_CLIENTS), devices),
    )
    return evaluator.evaluate(ROOT, trained(stack), 2)


def deployed(carry, client: int):
    """The variables of one client of FedAvg with a head that stays at home."""
    alg = method(KEPT)
    down = Downlink(shared=(carry.server.theta, ()), round=jnp.int32(2))
    state = jax.tree.map(lambda x: x[client], carry.rows[ALONE])
    assert carry.seen[ALONE][client]
    return alg.client.deploy(down, state)


def by_hand(logits, labels, prior):
    """Accuracy in NumPy, after moving from the source prior to another one."""
    with np.errstate(divide="ignore"):
        shifted = np.asarray(logits) + np.log(prior) - np.log(SOURCE)
    return np.mean(shifted.argmax(1) == labels)


def test_scores_equal_those_by_hand():
    found, carry, pool = scores(KEPT)["pacc"], trained(KEPT), tiny().pool
    for client in (0, 4, 5):  # less and more than a batch
        rows = tiny().table.rows[client, : tiny().table.size[client]]
        x = (np.asarray(pool.x)[rows] / 255.0 - pool.mean) / pool.std
        labels = np.asarray(pool.y)[rows]
        variables = deployed(carry, client)
        logits = tiny().model.predict(variables, jnp.asarray(x, jnp.float32))
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        truth = np.bincount(labels, minlength=NUM_CLASSES) / len(labels)
        assert found["accuracy"][client] == pytest.approx(
            by_hand(logits, labels, SOURCE)
        )
        assert found["accuracy_oracle"][client] == pytest.approx(
            by_hand(logits, labels, truth)
        )
        ones = jnp.ones(len(labels))
        prior = scoring.prior_em(jnp.exp(log_probs), ones, jnp.asarray(SOURCE))
        assert found["accuracy_em"][client] == pytest.approx(
            by_hand(logits, labels, np.maximum(prior, 1e-30))
        )
        nll = -log_probs[np.arange(len(labels)), labels].mean()
        assert found["loss"][client] == pytest.approx(nll, rel=1e-5)
        other = deployed(carry, client + 1)
        logits = tiny().model.predict(other, jnp.asarray(x, jnp.float32))
        assert found["accuracy_swapped"][client] == pytest.approx(
            by_hand(logits, labels, SOURCE)
        )
        distance = tree.norm(tree.sub(variables, other)) / tree.norm(variables)
        assert found["distance_swapped"][client] == pytest.approx(
            float(distance), rel=1e-5
        )


def test_sizes_are_those_of_the_inputs():
    for name, population in populations().items():
        np.testing.assert_array_equal(
            scores(KEPT)[name]["size"], population.inputs.size
        )
        for values in scores(KEPT)[name].values():
            assert len(values) == len(population.ids)


def test_another_clients_head_gives_other_answers():
    found = scores(KEPT)["pacc"]
    assert np.all(found["distance_swapped"] > 1e-3)
    assert np.any(found["accuracy_swapped"] != found["accuracy"])


def test_one_model_for_all_has_nothing_to_swap():
    assert not {"accuracy_swapped", "distance_swapped"} & set(scores("fedavg")["pacc"])


def test_unseen_clients_get_networks_of_their_own_without_training():
    found = scores(ZERO_SHOT)["zacc"]
    assert np.all(found["distance_swapped"] > 0)
    assert found["embedding"].shape == (NUM_NOVEL, 4)
    np.testing.assert_allclose(found["embedding"].sum(1), 1.0, rtol=1e-5)


def test_evaluation_leaves_the_state_as_it_is():
    before = tree.sha256(trained(KEPT))
    scores(KEPT)
    assert tree.sha256(trained(KEPT)) == before


def exact(values, names):
    return {k: {n: v[n] for n in names if n in v} for k, v in values.items()}


OWN = ("size", "accuracy", "accuracy_em", "accuracy_oracle", "loss")
SWAPPED = ("accuracy_swapped", "distance_swapped")


@pytest.mark.parametrize(
    "options",
    [
        dict(batch_size=1),
        dict(clients_per_call=3),
        dict(mapper="vmap"),
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                dict(batch_size=64),
                dict(clients_per_call=1),
                dict(devices=4),
            )
        ),
        dict(clients_per_call=5, devices=4, batch_size=3, mapper=2),
    ],
    ids=str,
)
def test_batching_mappers_and_devices_change_nothing(options):
    names = OWN if "clients_per_call" in options else OWN + SWAPPED
    chex.assert_trees_all_close(
        exact(scores(KEPT, **options), names), exact(scores(KEPT), names), rtol=1e-5
    )


def test_calls_of_few_clients_swap_with_the_same_neighbours():
    options = dict(clients_per_call=3)
    chex.assert_trees_all_close(
        exact(scores(KEPT, **options), SWAPPED), exact(scores(KEPT), SWAPPED), rtol=1e-5
    )


# Which outputs are usable is tested below for all of them.
@pytest.mark.parametrize(
    "bad",
    [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (np.inf, -np.inf))],
)
def test_outputs_that_are_not_finite_have_no_accuracy(bad):
    """One sample is enough; padding and other clients do not matter."""
    alg, pool, table = method("fedavg"), tiny().pool, tiny().table
    size = len(pool.y)
    mark = int(table.rows[4, table.size[4] - 1])  # a sample that client 4 holds
    held = {
        c for c in range(NUM_CLIENTS) if mark in table.rows[c, : table.size[c]].tolist()
    }
    assert 4 in held and len(held) < NUM_CLIENTS

    def apply(variables, x):
        logits = tiny().model.predict(variables, x)
        marked = jnp.all(x == shown, axis=tuple(range(1, x.ndim)))
        return Outputs(jnp.where(marked[:, None], bad, logits))

    # All other samples differ from the marked one.
    x = jnp.zeros_like(pool.x).at[jnp.arange(size), 0].set(1).at[mark].set(0)
    pool = pool._replace(x=x)
    shown = clients.gather(pool, jnp.array([mark]), jnp.ones(1)).x[0]
    client = alg.client._replace(model=alg.client.model._replace(apply=apply))
    evaluator = evaluate.evaluator(
        *(alg._replace(client=client), pool, {"pacc": populations()["pacc"]}),
        tuned={"pacc": populations()["pacc"]},
        source_prior=SOURCE,
        batch_size=4,
    )
    names = ("accuracy", "accuracy_em", "accuracy_oracle", "loss")
    scored = evaluator.evaluate(ROOT, trained("fedavg"), 2)["pacc"]
    tuned = evaluator.tune(ROOT, trained("fedavg"), 2, 0)["pacc"]
    for found, columns in ((scored, names), (tuned, ("accuracy", "loss"))):
        for name in columns:
            assert set(np.flatnonzero(np.isnan(found[name]))) == held, name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_outputs_of_low_precision_are_scored_as_float32(dtype):
    variables, table = tiny().model.init(jax.random.key(1)), tiny().table
    data = ClientData(jnp.asarray(table.rows[4, :4]), jnp.int32(4), tiny().pool)
    low = tiny().model._replace(
        apply=lambda *args: Outputs(tiny().model.predict(*args).astype(dtype))
    )
    found = deploy.predict_all(low, variables, data, NUM_CLASSES, 4)
    exact = deploy.predict_all(tiny().model, variables, data, NUM_CLASSES, 4)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, exact.astype(dtype).astype(jnp.float32))


def test_all_predictions_in_stored_order_and_once():
    table, pool, model = tiny().table, tiny().pool, tiny().model
    variables = model.init(jax.random.key(1))
    rows = jnp.pad(jnp.asarray(table.rows[4]), (0, 12 - table.rows.shape[1]))
    data = ClientData(rows, jnp.int32(table.size[4]), pool)
    found = deploy.predict_all(model, variables, data, NUM_CLASSES, 4)
    x = (pool.x[rows] / 255.0 - pool.mean) / pool.std
    expected = model.predict(variables, x)
    np.testing.assert_allclose(found[:9], expected[:9], rtol=1e-5, atol=1e-6)
    assert found.shape == (12, NUM_CLASSES)


# Fine-tuning -------------------------------------------------------------------------


def test_samples_on_the_host_that_do_not_fit_are_refused():
    pool = jax.tree.map(np.asarray, tiny().pool)
    x = np.broadcast_to(np.uint8(0), (2000, 400, 400, 1))  # 0.15 MB each
    far = pool._replace(x=x)

    def build(limit, at_a_time):
        evaluate.evaluator(
            *(method(KEPT), far, populations()),
            source_prior=SOURCE,
            clients_per_call=at_a_time,
            pool_mb=limit,
        )

    build(0, 64)
    build(100, 64)
    build(12, 1)
    with pytest.raises(ValueError, match=r"pool_mb=12 .* clients_per_call=64 of them"):
        build(12, 64)


@functools.cache
def tuner(mapper="map"):
    return evaluate.evaluator(
        method(KEPT),
        tiny().pool,
        populations(),
        tuned=populations(),
        source_prior=SOURCE,
        batch_size=4,
        mapper=mapper,
    )


@functools.cache
def tuned(epochs: int):
    return tuner().tune(ROOT, trained(KEPT), 2, epochs)


def test_fine_tuning_for_no_epochs_scores_what_is_deployed():
    for name, found in tuned(0).items():
        assert set(found) == {"size", "accuracy", "loss"}
        for metric, values in found.items():
            np.testing.assert_allclose(values, scores(KEPT)[name][metric], rtol=1e-5)


def test_fine_tuning_in_blocks_is_that_of_one_after_another():
    found = tuner(mapper=4).tune(ROOT, trained(KEPT), 2, 3)
    chex.assert_trees_all_close(found, tuned(3), rtol=1e-4)


def test_fine_tuned_scores_equal_those_by_hand():
    alg, carry, pool = method(KEPT), trained(KEPT), tiny().pool

    @jax.jit
    def by_hand(variables, rows, size):
        data = ClientData(rows, size, pool)
        key = jax.random.key(5)  # of one batch per epoch, only the order depends on it
        adapt = AdaptData(data, clients.withhold_labels(data))
        after = alg.client.tune(key, variables, adapt, jnp.int32(2), jnp.int32(3))
        logits = tiny().model.predict(
            after, (pool.x[rows] / 255 - pool.mean) / pool.std
        )
        return jax.nn.log_softmax(logits)

    for client in (0, 1, 5):
        rows, size = tiny().table.rows[client], tiny().table.size[client]
        labels = np.asarray(pool.y)[rows[:size]]
        log_probs = np.asarray(by_hand(deployed(carry, client), rows, size))[:size]
        found = {name: x[client] for name, x in tuned(3)["pacc"].items()}
        nll = -log_probs[np.arange(size), labels].mean()
        assert found["loss"] == pytest.approx(nll, rel=1e-4)
        assert found["accuracy"] == np.float32(np.mean(log_probs.argmax(1) == labels))
        assert found["loss"] < tuned(0)["pacc"]["loss"][client]


def test_fine_tuning_is_at_the_rate_of_the_last_round():
    local = make_local(schedule=lambda round: jnp.float32(round < 2))
    found = evaluate.evaluator(
        *(fedper(tiny().model, local=local), tiny().pool, populations()),
        tuned={"pacc": populations()["pacc"]},
        source_prior=SOURCE,
        batch_size=4,
    )
    losses = [
        found.tune(ROOT, trained(KEPT), round, epochs)["pacc"]["loss"]
        for round, epochs in ((2, 0), (2, 1), (3, 1))
    ]
    assert np.all(losses[1] < losses[0])
    np.testing.assert_array_equal(losses[2], losses[0])


def test_fine_tuning_leaves_no_trace():
    before = tree.sha256(trained(KEPT))
    first = tuned(3)
    again = tuner().tune(ROOT, trained(KEPT), 2, 3)
    chex.assert_trees_all_equal(first, again)
    assert tree.sha256(trained(KEPT)) == before


def test_fine_tuning_without_samples_changes_nothing():
    chex.assert_trees_all_equal(tuned(3)["zacc"], tuned(0)["zacc"])


def test_number_of_epochs_is_not_negative():
    with pytest.raises(ValueError, match="epochs=-1 must be at least 0"):
        tuner().tune(ROOT, trained(KEPT), 2, -1)


# Label-shift EM ----------------------------------------------------------------------

EMISSION = np.array(  # p(symbol | class)
    [[0.6, 0.2, 0.1, 0.1], [0.1, 0.5, 0.3, 0.1], [0.1, 0.1, 0.2, 0.6]]
)


def calibrated(num: int, prior: np.ndarray, seed: int = 0):
    """Outputs of the Bayes classifier under SOURCE, on draws from another prior."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(3, num, p=prior)
    symbols = (generator.random((num, 1)) > EMISSION[labels].cumsum(1)).sum(1)
    joint = SOURCE[:, None] * EMISSION  # [class, symbol]
    return jnp.asarray((joint / joint.sum(0)).T[symbols], jnp.float32), labels


@pytest.mark.parametrize("prior", [(0.7, 0.2, 0.1), (0.05, 0.05, 0.9), tuple(SOURCE)])
def test_em_recovers_a_shifted_prior(prior):
    num = 20_000
    probs, labels = calibrated(num, np.array(prior))
    found = scoring.prior_em(probs, jnp.ones(num), jnp.asarray(SOURCE))
    # Counting labels would err by 0.0035; symbols tell about half of what they do.
    np.testing.assert_allclose(found, prior, atol=0.02)
    assert float(jnp.sum(found)) == pytest.approx(1.0, abs=1e-5)
    error = np.abs(np.asarray(found) - np.bincount(labels) / num).max()
    assert error < 0.02


def test_em_finds_the_maximum_of_the_likelihood():
    probs, _ = calibrated(500, np.array([0.7, 0.2, 0.1]), seed=3)
    found = np.asarray(scoring.prior_em(probs, jnp.ones(500), jnp.asarray(SOURCE)))

    def likelihood(prior):
        return np.log(np.asarray(probs) @ (prior / SOURCE)).mean()

    for direction in np.eye(3) - np.eye(3)[[1, 2, 0]]:
        for step in (0.01, -0.01):
            assert likelihood(found) > likelihood(found + step * direction)


def test_em_does_not_see_padding():
    probs, _ = calibrated(200, np.array([0.7, 0.2, 0.1]))
    plain = scoring.prior_em(probs, jnp.ones(200), jnp.asarray(SOURCE))
    filler = jnp.full((56, 3), jnp.nan)
    padded = scoring.prior_em(
        jnp.concatenate([probs, filler]),
        jnp.pad(jnp.ones(200), (0, 56)),
        jnp.asarray(SOURCE),
    )
    np.testing.assert_allclose(plain, padded, atol=1e-5)


def test_em_of_nothing_is_the_source():
    found = scoring.prior_em(jnp.ones((4, 3)) / 3, jnp.zeros(4), jnp.asarray(SOURCE))
    np.testing.assert_allclose(found, SOURCE, rtol=1e-6)


def test_em_of_certain_outputs_is_their_count():
    probs = jax.nn.one_hot(jnp.array([0, 0, 2, 0]), 3)
    found = scoring.prior_em(probs, jnp.ones(4), jnp.asarray(SOURCE))
    np.testing.assert_allclose(found, [0.75, 0.0, 0.25], atol=1e-6)


def test_summary_by_hand():
    found = evaluate.summarise(np.array([1.0, 0.5]), np.array([1, 3]))
    # (1 * 100 + 3 * 50) / 4; the 10th percentile of 50 and 100 is 50 + 0.1 * 50.
    assert found == pytest.approx({"": 62.5, "_mean": 75, "_std": 25, "_p10": 55})


def test_summary_of_who_has_no_accuracy():
    found = evaluate.summarise(np.array([1.0, np.nan]), np.array([1, 3]))
    assert np.isnan(list(found.values())).all()


def test_summary_of_one_client_and_of_clients_without_samples():
    alone = evaluate.summarise(np.array([0.25]), np.array([7]))
    assert alone == pytest.approx({"": 25, "_mean": 25, "_std": 0, "_p10": 25})
    assert evaluate.summarise(np.array([1.0, 0.0]), np.array([5, 0]))[""] == (
        pytest.approx(100)
    )


def test_a_class_that_is_ruled_out_is_an_answer():
    inf = jnp.inf
    logits = jnp.array([[0.0, -inf], [-inf, -inf], [0.0, inf], [0.0, jnp.nan]])
    np.testing.assert_array_equal(scoring.usable(logits), [True, False, False, False])


# What participants find out ----------------------------------------------------------


@functools.cache
def fitted_by(text: str, fitting: bool = True, mapper="map"):
    """An evaluator of FedAvg whose clients are told something first."""
    whom = {"zacc": populations()["zacc"]}
    return evaluate.evaluator(
        with_adaptation(method("fedavg"), text),
        tiny().pool,
        whom,
        source_prior=SOURCE,
        batch_size=4,
        fitting=populations()["pacc"] if fitting else None,
        mapper=mapper,
    )


def test_participants_find_out_together_what_all_are_told():
    carry, pool = trained("fedavg"), tiny().pool
    evaluator = fitted_by("bbse")
    confusion = evaluator.fit(ROOT, carry, 2)[ALONE]
    rows = np.concatenate([r[:n] for r, n in zip(*tiny().table, strict=True)])
    x = (np.asarray(pool.x)[rows] / 255.0 - pool.mean) / pool.std
    variables = method("fedavg").client.deploy(
        Downlink(shared=(carry.server.theta, ()), round=jnp.int32(2)),
        jax.tree.map(lambda x: x[0], carry.rows[ALONE]),
    )
    logits = tiny().model.predict(variables, jnp.asarray(x, jnp.float32))
    expected = np.zeros((NUM_CLASSES, NUM_CLASSES))
    np.add.at(expected, (np.argmax(logits, -1), np.asarray(pool.y)[rows]), 1)
    np.testing.assert_array_equal(confusion, expected)
    # Whoever is deployed, alone too, is told of it.
    values = evaluator.evaluate(ROOT, carry, 2)["zacc"]
    ids, _, inputs = populations()["zacc"]
    one = ClientData(inputs.rows[:1], inputs.size[:1], pool)
    (given,) = evaluator.deploy(ROOT, carry, 2, ids[:1], one)
    labels = np.asarray(pool.y)[inputs.rows[0, : inputs.size[0]]]
    right = np.mean(given.logits.argmax(-1) == labels)
    assert values["accuracy"][0] == pytest.approx(right)


# Whatever is sent: what each method sends is tested in tests/test_adaptation.py.
@pytest.mark.parametrize(
    "text", ["bbse", *(pytest.param(t, marks=pytest.mark.slow) for t in ("em", "atp"))]
)
def test_participants_find_out_in_blocks_what_they_do_one_after_another(text):
    found = [
        fitted_by(text, mapper=mapper).evaluate(ROOT, trained("fedavg"), 2)
        for mapper in ("map", 4)
    ]
    chex.assert_trees_all_close(*found, rtol=1e-3)  # through an optimisation


def test_a_message_of_a_fit_is_counted():
    alg = with_adaptation(method("fedavg"), "bbse")
    numbers = comm.fitting(alg)
    assert (numbers.up_numbers, numbers.down_numbers) == (9, 9)
    rates = comm.fitting(with_adaptation(method("fedavg"), "atp"))
    tensors = len(jax.tree.leaves(trained("fedavg").server.theta))
    assert (rates.up_numbers, rates.down_numbers) == (tensors, tensors)
    bcts = comm.fitting(with_adaptation(method("fedavg"), "em"))
    assert bcts.up_numbers == 1 + 4 + 16 + 3 + 1
    assert comm.fitting(method("fedavg")) == (0, 0, 0, 0)


def test_without_participants_samples_a_fit_is_refused():
    with pytest.raises(ValueError, match="validation_fraction above 0"):
        fitted_by("bbse", fitting=False)
    give = deploy.deployer(with_adaptation(method("fedavg"), "bbse"))
    ids, _, inputs = populations()["zacc"]
    with pytest.raises(ValueError, match="no participants' samples are here"):
        give(ROOT, trained("fedavg"), 2, ids, ClientData(*inputs, tiny().pool))


def test_samples_that_travel_change_no_score():
    far = jax.tree.map(np.asarray, tiny().pool)
    it = evaluate.evaluator(
        *(method(KEPT), far, populations()),
        source_prior=SOURCE,
        batch_size=4,
        clients_per_call=3,
        tuned={"pacc": populations()["pacc"]},
    )
    found = it.evaluate(ROOT, trained(KEPT), 2)
    chex.assert_trees_all_equal(found, scores(KEPT, clients_per_call=3))
    found = it.tune(ROOT, trained(KEPT), 2, 3)["pacc"]
    chex.assert_trees_all_close(found, tuned(3)["pacc"], rtol=1e-6)
