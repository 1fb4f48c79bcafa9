"""From configs to objects: names, options, schedules."""

import collections
import importlib
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax import algorithms, calls, registry, server_optimizers
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.mh_pfedhngd import mh_pfedhngd
from hyperjax.data.sources import Source
from hyperjax.engine import comm, evaluate
from hyperjax.launch import build, factories
from hyperjax.protocols import families as protocols_families
from hyperjax.protocols import personalised, pfedhn, zero_shot
from hyperjax.runs import loop
from hyperjax.runs.experiment import populations
from hyperjax.types import Cohort


def config(**fields):
    """FedAvg with some fields changed; `a__b=1` sets `a.b`."""
    found = zero_shot.get_config("fedavg")
    found.data.name, found.model.hidden = "synthetic", (4,)
    found.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in fields.items()}
    )
    return found


# Optimizers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("sgd", "sgd", {}),
        (" sgd ", "sgd", {}),
        ("sgd()", "sgd", {}),
        ("sgd(momentum=0.9, nesterov=True)", "sgd", dict(momentum=0.9, nesterov=True)),
        ("adam(b1=-0.5)", "adam", dict(b1=-0.5)),
        ("x(a=None, b=(1, 2), c='d')", "x", dict(a=None, b=(1, 2), c="d")),
    ],
)
def test_calls_are_parsed(text, name, options):
    assert calls.parse("field", text) == (name, options)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sgd(",
        "sgd(0.9)",
        "sgd(**{})",
        "optax.sgd",
        "a + b",
        "sgd(lr=x)",
        "sgd;adam",
    ],
)
def test_other_forms_are_refused(text):
    with pytest.raises(ValueError, match=r"field=.* is not of the form name or name"):
        calls.parse("field", text)


def run_steps(optimizer, num=3):
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
    state = optimizer.init(params)
    for i in range(num):
        grads = jax.tree.map(lambda w, i=i: w * (0.1 + i), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sgd", optax.sgd(0.05)),
        ("sgd(momentum=0.9, nesterov=True)", optax.sgd(0.05, 0.9, True)),
        ("adam(b1=0.8)", optax.adam(0.05, b1=0.8)),
        ("adamw(weight_decay=0.1)", optax.adamw(0.05, weight_decay=0.1)),
        ("rmsprop", optax.rmsprop(0.05)),
        ("lion", optax.lion(0.05)),
        ("yogi", optax.yogi(0.05)),
    ],
)
def test_optimizers_are_those_of_optax(text, expected):
    found = factories.make_optimizer("field", text, 0.05, {})
    chex.assert_trees_all_equal(run_steps(found), run_steps(expected))


@pytest.mark.parametrize("name", server_optimizers.FEDOPT)
def test_server_optimizers_are_those_of_the_papers(name):
    server = config(server__optimizer=name, server__learning_rate=0.3).server
    expected = server_optimizers.FEDOPT[name](0.3)
    chex.assert_trees_all_equal(
        run_steps(factories.server_optimizer(server)), run_steps(expected)
    )


def test_weight_decay_joins_the_gradient_before_momentum():
    fields = dict(
        local__optimizer="sgd(momentum=0.9)",
        local__weight_decay=0.1,
        local__learning_rate=0.05,
    )
    found = factories.local_optimizer(config(**fields).local)
    expected = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, 0.9))
    chex.assert_trees_all_equal(run_steps(found), run_steps(expected))


def test_what_optax_has_is_what_is_offered():
    names = factories._optax_optimizers()
    assert {"sgd", "adam", "adamw", "lamb", "adafactor", "rmsprop"} <= set(names)
    assert not {"inject_hyperparams", "apply_if_finite", "chain"} & set(names)


# Schedules ---------------------------------------------------------------------------


def factors(rounds, **fields):
    schedule = factories.make_local(config(**fields).local).schedule
    return [float(schedule(jnp.int32(round))) for round in rounds]


def test_the_rate_decays_every_round():
    assert factors((0, 1, 10)) == pytest.approx([1.0, 0.99, 0.99**10])
    constant = factors((0, 7), local__learning_rate_decay=1.0)
    assert constant == [1.0, 1.0]


def test_milestones_multiply_from_their_round_on():
    fields = dict(
        local__learning_rate_decay=1.0,
        local__milestones=(3, 5),
        local__milestone_factor=0.1,
    )
    expected = [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert factors((0, 2, 3, 4, 5, 99), **fields) == pytest.approx(expected)
    fields["local__learning_rate_decay"] = 0.5
    assert factors((3,), **fields) == pytest.approx([0.1 * 0.5**3])


def test_milestones_may_be_fractions_of_the_rounds():
    mixed = config(local__milestones=(1 / 3, 25, 2 / 3), rounds=30).local
    assert factories.milestones(mixed, 30) == [10, 25, 20]
    assert factories.milestones(mixed, 90) == [30, 25, 60]
    assert factories.milestones(mixed, 2) == [1, 25, 1]  # not from the start on
    with pytest.raises(ValueError, match=r"local.milestones has 0\.33.*: a fraction"):
        factories.make_local(mixed)


@pytest.mark.parametrize(
    ("fields", "method", "words"),
    [
        (dict(rounds=30, local__milestones=(10, 30, 60)), {}, "after round 30 and 60"),
        (
            dict(rounds=30),
            dict(name="pfedsim", warmup=1.0),
            "method.warmup says begins",
        ),
        (dict(rounds=30), dict(name="pfedsim", warmup=0.5), None),
        (dict(rounds=30, local__milestones=(1 / 3, 29)), {}, None),
        (dict(rounds=0, local__milestones=(5,)), {}, None),
    ],
)
def test_what_would_begin_after_the_end_is_warned_of(
    fields, method, words, monkeypatch
):
    said = []
    monkeypatch.setattr(
        build.logging, "warning", lambda text, *values: said.append(text % values)
    )
    found = config(**fields)
    found.method = method or found.method
    build.warn_of_the_end(found)
    assert len(said) == (words is not None)
    if words:
        assert words in said[0] and "the run ends after round 30" in said[0]


def test_pfedsim_mixes_after_half_of_whatever_rounds_there_are():
    def sent(rounds, round):
        """What client 0 is sent at a round, with bodies that tell clients apart."""
        found = config(rounds=rounds)
        found.method = dict(name="pfedsim", head="params/head/.*")
        alg = build.make_algorithm(found, build.make_model(found, (2, 2, 1), 3))
        server = alg.server.init(jax.random.key(0))
        models = {
            k: x + jnp.arange(10.0).reshape(10, *[1] * (x.ndim - 1))
            for k, x in server.models.items()
        }
        cohort = Cohort(
            jnp.array([0]), jnp.ones(1), jnp.ones(1), jnp.int32(round), 10.0
        )
        server = server._replace(models=models, phi=jnp.full((10, 10), 0.5))
        own = alg.server.downlink(jax.random.key(0), server, cohort).own
        return {k: bool(jnp.any(x != models[k][:1])) for k, x in own.items()}

    for rounds, first in ((90, 45), (30, 15), (5, 2)):
        assert not any(sent(rounds, first - 1).values())
        assert any(sent(rounds, first).values())


def test_steps_replace_epochs():
    by_epochs = factories.make_local(config(local__epochs=3).local).phases
    assert [(p.epochs, p.steps) for p in by_epochs] == [(3, None)]
    by_steps = factories.make_local(config(local__steps=7).local).phases
    assert [(p.epochs, p.steps) for p in by_steps] == [(None, 7)]


# Models ------------------------------------------------------------------------------


class Mine(nn.Module):
    """A network of a user's own."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        (f"{__name__}:Mine", 4 * 3 + 3),
        ("hyperjax.models.zoo:MLP", 4 * 4 + 4 + 4 * 3 + 3),
    ],
)
def test_a_linen_module_by_its_address(name, count):
    found = config(model__name=name)
    if "Mine" not in name:
        found.model.hidden = (4,)
    model = build.make_model(found, (2, 2, 1), 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    "name",
    [
        "nowhere.module:Class",
        "hyperjax.models:Nothing",
        ":MLP",
    ],
)
def test_an_address_that_leads_nowhere_is_named(name):
    with pytest.raises(ValueError, match=r"model.name=.*package\.module:Class"):
        build.make_model(config(model__name=name), (2, 2, 1), 3)


def test_an_option_that_the_model_does_not_take_is_named():
    with pytest.raises(ValueError, match="option of model='hidden' is unknown"):
        found = config(model__name=f"{__name__}:Mine")
        found.model.hidden = (4,)
        build.make_model(found, (2, 2, 1), 3)


def test_convolutions_follow_the_engine(monkeypatch):
    given = []
    monkeypatch.setattr(
        build.models,
        "from_linen",
        lambda module, *_, **more: given.append(module),
    )
    fields = dict(model__name="lenet_s", engine__conv_rule="patches")
    build.make_model(config(**fields), (28, 28, 1), 10)
    assert given[0].conv_rule == "patches" and given[0].hidden == (50,)


# Methods -----------------------------------------------------------------------------


def test_methods_are_the_modules_of_the_package():
    assert {"fedavg", "hyperfedzero"} <= set(registry.methods())
    for name in registry.methods():
        module = importlib.import_module(f"{algorithms.__name__}.{name}")
        assert callable(getattr(module, name))


@pytest.mark.parametrize(
    ("data", "classes", "num_clients", "most"),
    [
        # 50 clients who draw 10 of 100 classes miss a class with probability 0.9**50.
        ("cifar10", 2, 50, 0.0),
        ("cifar100", 10, 50, 0.03),
        ("cifar100:3.0.2", 10, 50, 0.03),
        ("tiny_imagenet", 20, 50, 0.03),
        ("emnist/byclass", 6, 50, 0.07),
        ("digits", 2, 50, 0.0),
    ],
)
def test_published_classes_a_client_use_the_images(data, classes, num_clients, most):
    num_classes = {10: 100, 20: 200, 6: 62}.get(classes, 10)
    for experiment in (protocols_families, pfedhn):
        config = experiment.get_config(f"data={data}")
        assert config.data.classes_per_client == classes
        config.data.num_clients = num_clients
        y = np.arange(50 * 6 * num_classes, dtype=np.int32) % num_classes
        x = np.zeros((len(y), 1, 1, 1), np.uint8)
        names = tuple(map(str, range(num_classes)))
        source = Source(data, x, y, num_classes, names)
        found = build.federate(source, config)
        if config.data.partition == "class_draws":
            assert found.unassigned / len(y) <= most
        else:  # pFedHN's own: one share of each class is nobody's
            shares = num_clients * classes // num_classes + 1
            assert found.unassigned / len(y) < 1.5 / shares


@pytest.mark.parametrize("option", ["keeep", "momentum"])
def test_unknown_options_of_a_method_are_named(option):
    with pytest.raises(ValueError, match=f"option of method='{option}' is unknown"):
        calls.call("method", fedavg, None, local=None, **{option: 1})


def test_options_that_are_handed_on_are_known_by_name():
    # From MH-pFedHNGD to MH-pFedHN, and from there to FedAvg.
    known = inspect.signature(mh_pfedhngd).parameters
    assert {"lam", "output_size", "persist_optimizer"} <= set(known)
    assert not any(p.kind is p.VAR_KEYWORD for p in known.values())
    with pytest.raises(ValueError, match=r"'outputsize' is unknown; .*'output_size'"):
        calls.call("method", mh_pfedhngd, None, local=None, outputsize=1)


def test_bases_and_corrections_are_parsed():
    found = personalised.get_config("data=mnist5k")
    model = build.make_model(found, (8, 8, 1), 10)
    numbers = {}
    for base in ("fedprox(mu=0.1)", "scaffold", "fedfomo(num_models=2)"):
        found.method.base = base
        messages = comm.describe(build.make_algorithm(found, model))
        numbers[base] = comm.cost(messages).down_numbers
    phi = numbers["fedprox(mu=0.1)"]
    assert list(numbers.values()) == [phi, 2 * phi, 3 * phi]
    found.method.base = "fedbn"
    for base, message in {
        "fedbn": "^method.base='fedbn': .*share_aux='convs'",
        "fedpprox": "did you mean 'fedprox'.*'scaffold'\\)$",
        "fedprox(nu=1)": "option of base=fedprox='nu' .*accepted: 'mu'",
        "fedprox(bn_stats='local')": "option of base=fedprox='bn_stats'",
    }.items():
        found.method.base = base
        with pytest.raises(ValueError, match=message):
            build.make_algorithm(found, model)
    corrected = factories.make_correction(("prox(mu=0.5)", "scaffold"))
    assert corrected.probe and len(corrected.init_server({})) == 2
    with pytest.raises(ValueError, match=r"correction='scafold' .*'scaffold'\?"):
        factories.make_correction("scafold")


def test_an_option_no_factory_takes_is_named():
    found = config()
    found.method = dict(name="opt1", nonsense=1)
    model = build.make_model(found, (2, 2, 1), 3)
    with pytest.raises(ValueError, match="option of method=opt1='nonsense' is"):
        build.make_algorithm(found, model)


@pytest.mark.parametrize("method", ["fedamp", "fedproto", "pfedla", "pfedsim", None])
def test_server_optimizers_that_no_server_would_call_are_refused(method):
    found = config()
    if method:
        found.method = dict(name=method)
    model = build.make_model(found, (2, 2, 1), 3)
    build.make_algorithm(found, model)
    for optimizer, rate in (("adam", 1.0), ("sgd", 0.5)):
        found.server.update(optimizer=optimizer, learning_rate=rate)
        if method is None:  # FedAvg has one
            build.make_algorithm(found, model)
            continue
        message = rf"{optimizer}.*{rate} would change nothing.*{method}.*accepted: sgd"
        with pytest.raises(ValueError, match=message):
            build.make_algorithm(found, model)


# Data --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ids.npy", "ids.npz:users"])
def test_clients_by_given_ids(form, tmp_path):
    ids = np.arange(1000) % 8
    np.save(tmp_path / "ids.npy", ids)
    np.savez(tmp_path / "ids.npz", users=ids, others=ids[:3])
    found = config(
        data__partition="by_client_id",
        data__client_ids=str(tmp_path / form),
        data__num_clients=5,
        data__num_novel=3,
    )
    dealt = build.federate(build.load_source(found.data), found)
    for table in (dealt.train, dealt.novel):
        for rows, size in zip(table.rows, table.size, strict=True):
            assert len(set(ids[rows[:size]])) == 1


@pytest.mark.parametrize("kind", [np.uint16, str])
def test_ids_of_the_training_part_leave_the_test_part_to_the_federation(kind, tmp_path):
    ids = (np.arange(900) % 8).astype(kind)
    np.save(tmp_path / "ids.npy", ids)
    found = config(
        data__partition="by_client_id",
        data__client_ids=str(tmp_path / "ids.npy"),
        data__num_clients=5,
        data__num_novel=3,
    )
    source = build.load_source(found.data)
    test = np.random.default_rng(0).permutation(1000) < 100
    dealt = build.federate(source._replace(test=test), found)
    assert sorted(dealt.test.rows[0, :100]) == np.flatnonzero(test).tolist()
    whose = np.full(1000, "none", "<U9")
    whose[~test] = ids.astype(str)
    for rows, size in zip(dealt.train.rows, dealt.train.size, strict=True):
        assert len(set(whose[rows[:size]])) == 1


@pytest.mark.parametrize(
    ("form", "error", "match"),
    [
        (None, ValueError, "needs data.client_ids: ids.npy, or file.npz:key"),
        ("nowhere.npy", FileNotFoundError, "there is no file .*nowhere.npy"),
        ("nowhere.npz:users", FileNotFoundError, "there is no file .*nowhere.npz"),
        ("ids.npz:user", ValueError, "'user' is unknown; did you mean 'users'"),
        ("ids.npz:short", ValueError, "3 client ids given for the 1000 samples"),
    ],
)
def test_ids_that_cannot_be_read_are_named(form, error, match, tmp_path):
    np.savez(tmp_path / "ids.npz", users=np.arange(1000) % 8, short=np.arange(3))
    found = config(data__partition="by_client_id")
    found.data.client_ids = form and str(tmp_path / form)
    with pytest.raises(error, match=match):
        build.federate(build.load_source(found.data), found)


def test_images_that_cannot_be_shrunk_are_refused_by_the_field():
    with pytest.raises(ValueError, match=r"^data.shrink=3: images of 8x8 cannot be"):
        build.load_source(config(data__name="digits", data__shrink=3).data)


def test_the_datas_seed_is_the_runs_unless_given():
    def tables(**fields):
        found = config(data__partition="iid", **fields)
        return build.federate(build.load_source(found.data), found).train.rows

    np.testing.assert_array_equal(tables(seed=3), tables(seed=9, data__seed=3))
    assert not np.array_equal(tables(seed=3), tables(seed=4))


def test_populations_share_no_sample_and_unseen_ones_do_not_train():
    found = config()
    dealt = build.federate(build.load_source(found.data), found)
    everybody = populations(dealt)
    ids = np.concatenate([p.ids for p in everybody.values()])
    np.testing.assert_array_equal(np.sort(ids), np.arange(10 + 5 + 1))
    assert everybody["pacc"].train is dealt.train
    for name in ("zacc", "gacc"):
        assert np.all(everybody[name].train.size == 0)


def test_samples_of_evaluation_by_sample_have_a_limit_too(monkeypatch):
    small = zero_shot.get_config("hyperfedzero")
    small.data.name, small.model.hidden = "synthetic", (4,)
    small.evaluation.sample_level = True
    small.engine.update(store="host", pool="host", pool_mb=1)
    made = []
    real = evaluate.evaluator

    def evaluator(*args, **options):
        made.append(options["pool_mb"])
        return real(*args, **options)

    monkeypatch.setattr(evaluate, "evaluator", evaluator)
    assert build.build(small).by_sample is not None
    assert made == [1, 1]


def test_samples_are_on_each_device_once():
    small = zero_shot.get_config("hyperfedzero,data=digits,clients=8,novel=2")
    small.model.update(name="mlp", hidden=(4,))
    small.method.hidden = (4,)
    small.evaluation.sample_level = True
    small.engine.devices = 4
    before = jax.live_arrays()  # of other tests
    known = set(map(id, before))
    found = build.build(small)
    assert found.plan["devices"] == 4
    found.evaluator.evaluate(0, loop.start(found).carry, 0)
    shape, there = found.federation.pool.x.shape, collections.defaultdict(set)
    for x in jax.live_arrays():
        if x.shape == shape and x.dtype == np.uint8 and id(x) not in known:
            for part in x.addressable_shards:
                if part.data.shape == shape:
                    there[part.device].add(part.data.unsafe_buffer_pointer())
    assert len(there) == 4 and {len(each) for each in there.values()} == {1}


def test_numerics_reach_every_program_and_the_plan():
    small = zero_shot.get_config("hyperfedzero")
    small.data.name, small.model.hidden = "synthetic", (4,)
    small.evaluation.sample_level = True
    small.engine.update(precision="high", deterministic=True)
    found = build.build(small)
    assert found.plan["precision"] == "high" and found.plan["deterministic"]
    users = found.simulator, found.evaluator, found.by_sample
    assert {user.program.numerics for user in users} == {("high", True)}
    plain = build.build(config())
    assert plain.plan.keys().isdisjoint(("precision", "deterministic"))
    assert plain.simulator.program.numerics == ("", False)


def test_bfloat16_is_in_networks_and_neither_kept_nor_sent():
    fields = dict(engine__precision="bfloat16", data__name="synthetic")
    found = build.build(config(**fields))
    plain = build.build(config(data__name="synthetic"))
    assert found.plan["precision"] == "bfloat16" and found.costs == plain.costs
    states, losses = [], []
    for run in (found, plain):
        through, info = run.simulator.run(0, run.simulator.init(0), 0, 2)
        states.append(through.server.theta)
        losses.append(float(info["loss"][1]))
        if run is found:  # a call of two rounds has the bits of two calls
            carry = run.simulator.init(0)
            for round in (0, 1):
                carry, _ = run.simulator.run(0, carry, round, 1)
            chex.assert_trees_all_equal(carry, through)
    assert {x.dtype for x in jax.tree.leaves(states)} == {jnp.dtype("float32")}
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), states[0])
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), rounded, states[0])
    assert not any(jax.tree.leaves(same))  # the masters are not bfloat16 numbers


def test_a_sample_of_clients_is_evaluated_the_same_every_time():
    found = build.build(config(rounds=2, evaluation__every=1))
    assert found.sampled == {}
    small = config(rounds=2, evaluation__every=1, evaluation__clients=3)
    drawn = build.build(small)
    assert drawn.sampled == {"pacc": (3, 10), "vacc": (3, 10), "zacc": (3, 5)}
    alone, seed = drawn.simulator.init(0), small.seed
    all_scores = found.evaluator.evaluate(seed, alone, 0)
    for _ in range(2):
        scores = drawn.evaluator.evaluate(seed, alone, 0)
        for metric in ("pacc", "zacc"):
            places = drawn.whom[metric]
            assert len(set(places)) == 3
            for name in ("size", "accuracy", "loss"):
                np.testing.assert_allclose(
                    scores[metric][name], all_scores[metric][name][places], rtol=1e-6
                )
        np.testing.assert_array_equal(
            scores["gacc"]["accuracy"], all_scores["gacc"]["accuracy"]
        )
    other = build.build(config(seed=1, evaluation__clients=3))
    assert {*drawn.whom["pacc"]} != {*other.whom["pacc"]}


@pytest.mark.parametrize(
    ("method", "marks"),
    [
        (dict(name="pfedsim"), {"method.warmup": [15]}),  # its default
        (dict(name="pfedsim", warmup=0.2), {"method.warmup": [6]}),
        (dict(name="hyperfednet", base="fedprox(mu=0.1)"), {}),
    ],
)
def test_rounds_that_a_method_counts_are_known_before(method, marks):
    made = config(rounds=30, local__milestones=())
    made.method = method
    assert build.marks(made) == marks
