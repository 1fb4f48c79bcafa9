"""What config fields may hold: laws over every field and argument of every config."""

import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import calls, registry
from hyperjax.launch import build, cli, factories, fields
from hyperjax.protocols import common, personalised, pfedhn, zero_shot

NAN, INF = float("nan"), float("inf")


def fedavg():
    return zero_shot.get_config("fedavg")


def changed(config, field, value):
    """The config with one field set, to a value of any type."""
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({field: value})
    return config


def numbers(value):
    """The numbers in a value, if there are any."""
    items = value if isinstance(value, tuple) else (value,)
    return [x for x in items if isinstance(x, int | float) and not isinstance(x, bool)]


# Numbers -----------------------------------------------------------------------------


def test_the_table_has_every_number_there_is():
    known = common.flat(common.defaults())
    assert set(fields.NUMBERS) <= set(known)
    for field, value in known.items():
        assert not numbers(value) or field in fields.NUMBERS, field
    for field, number in fields.NUMBERS.items():
        default = common.FIELDS[field][0]
        assert number.optional == (default in (int, float))


@pytest.mark.parametrize("field", fields.NUMBERS)
def test_what_is_no_such_number_is_refused_by_name(field):
    number = fields.NUMBERS[field]
    wrong = [NAN, INF, -INF, "word", 1e39, np.float32(NAN), jnp.float32(INF)]
    wrong += [] if number.optional else [None]
    wrong += [True, 0.5, 1.0, 2**32] if number.whole else []
    if number.at_least is not None:
        wrong.append(number.at_least - 1)
    if number.above is not None:
        wrong.append(number.above)
    if number.below is not None:
        wrong.append(number.below)
    for value in wrong:
        given = (value,) if number.several else value
        config = changed(fedavg(), field, given)
        with pytest.raises(ValueError, match=re.escape(field)):
            fields.check(config)
    if number.several:
        with pytest.raises(ValueError, match=f"{field}=3 must be a tuple"):
            fields.check(changed(fedavg(), field, 3))


@pytest.mark.parametrize("name", registry.methods())
def test_numbers_of_a_method_must_be_finite(name):
    for option, value in zero_shot.get_config(name).method.items():
        for bad in (NAN, INF, -INF, 1e39):
            given = tuple(bad for _ in value) if isinstance(value, tuple) else bad
            if not numbers(value):
                continue
            with pytest.raises(ValueError, match=f"method.{option}="):
                fields.check(
                    changed(zero_shot.get_config(name), f"method.{option}", given)
                )


@pytest.mark.parametrize("name", registry.methods())
def test_options_of_a_method_have_the_type_of_its_parameter(name):
    factory = registry.find(name)
    wrong = {int: (1.5, "x", True), float: ("x", True), bool: (1, "x"), str: (3, True)}
    for option, parameter in inspect.signature(factory).parameters.items():
        for value in wrong.get(calls.plain_type(parameter.annotation), ()):
            with pytest.raises(ValueError, match=f"method.{option}={value!r} must be"):
                calls.call("method", factory, None, local=None, **{option: value})


@pytest.mark.parametrize(
    ("annotation", "taken", "refused"),
    [
        (float, (1, 2.5, -3), ("1", None, NAN, True)),
        (int, (0, 7), (1.0, 7.5, "7", None)),
        (float | None, (None, 2), ("x",)),
        (str, ("a",), (1, None, ("a",))),
        (bool, (True,), (1, "True")),
        (tuple[int, ...], (3, "whatever the factory says"), ()),
        (inspect.Parameter.empty, (None, "x"), ()),
    ],
)
def test_plain_annotations_are_checked_and_others_are_not(annotation, taken, refused):
    for value in taken:
        calls.check_option("method.x", value, annotation)
    for value in refused:
        with pytest.raises(ValueError, match=r"method\.x="):
            calls.check_option("method.x", value, annotation)


def test_what_a_factory_refuses_is_named_by_its_field():
    config = personalised.get_config("pfedsim")
    config.method.warmup = 1.5
    model = build.make_model(config, (28, 28, 1), 3)
    with pytest.raises(ValueError, match=r"^method\.warmup=1\.5 must be at least 0"):
        build.make_algorithm(config, model)


@pytest.mark.parametrize("text", ["sgd(momentum=1e999)", "prox(mu=-1e999)"])
def test_numbers_within_text_must_be_finite(text):
    with pytest.raises(ValueError, match=r"uplink='.*': m.*inf must be a finite"):
        calls.parse("uplink", text)


@pytest.mark.parametrize("mark", [1.0, 0.0, 30.5, -0.5, True, "30"])
def test_a_milestone_is_a_round_or_a_fraction(mark):
    config = changed(fedavg(), "local.milestones", (10, mark))
    with pytest.raises(ValueError, match=r"local\.milestones"):
        fields.check(config)


# Other types, names ------------------------------------------------------------------


def test_other_libraries_numbers_become_pythons():
    config = fedavg()
    config.method = dict(name="fedprox", mu=jnp.float32(0.5), keep=["a", "b"])
    for field, value in {
        "local.milestones": tuple(1 + np.arange(2)),
        "evaluation.finetune_epochs": np.array([0, 4]),
        "local.learning_rate": np.float64(0.25),
        "rounds": jnp.int32(7),
        "tensorboard": np.bool_(False),
    }.items():
        changed(config, field, value)
    fields.check(config)
    assert config.local.milestones == (1, 2)
    assert config.evaluation.finetune_epochs == (0, 4)
    assert config.method.keep == ("a", "b") and config.method.mu == 0.5
    for value in (config.method.mu, config.local.learning_rate):
        assert type(value) is float
    assert (type(config.rounds), type(config.tensorboard)) == (int, bool)
    assert all(type(mark) is int for mark in config.local.milestones)


def test_fields_without_numbers_keep_their_type():
    for field, value in common.flat(common.defaults()).items():
        if field in fields.NUMBERS:
            continue
        wrong = (3, "x") if isinstance(value, bool) else (3, True, (1,), b"x")
        for bad in wrong:
            with pytest.raises(ValueError, match=re.escape(field)):
                fields.check(changed(fedavg(), field, bad))


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("local.learnig_rate", "local.learning_rate"),
        ("roundz", "rounds"),
        ("data.aplha", "data.alpha"),
        ("learning_rate", "local.learning_rate"),
        ("optimiser", None),
    ],
)
def test_a_misspelt_field_of_a_file_is_refused_with_the_nearest(field, near):
    config = changed(fedavg(), field, 3)
    with pytest.raises(ValueError, match=f"config field='{field}") as e:
        fields.check(config)
    assert near is None or f"did you mean {near!r}?" in str(e.value)
    assert len(str(e.value)) < 240  # the likely ones alone


def test_what_a_file_leaves_out_is_named():
    for field in common.flat(common.defaults()):
        config = fedavg()
        group, _, name = field.rpartition(".")
        del (config[group] if group else config)[name]
        with pytest.raises(ValueError, match=f"the config has no {field}"):
            fields.check(config)
    with pytest.raises(ValueError, match=r"the config has no method\.name"):
        fields.check(common.defaults())
    with pytest.raises(
        ValueError, match=r"method='fedavg' must be a group.*method.nam"
    ):
        fields.check(changed(common.defaults(), "method", "fedavg"))
    with pytest.raises(ValueError, match=r"must return a ConfigDict"):
        fields.check(common.defaults().to_dict())


# What would change nothing -----------------------------------------------------------


def test_two_lengths_of_local_training_are_refused():
    config = pfedhn.get_config()
    config.local.epochs = 7
    with pytest.raises(ValueError, match=r"local\.epochs=7 and local\.steps=50"):
        build.check(config)
    config.local.steps = None
    build.check(config)
    (phase,) = factories.make_local(config.local).phases
    assert (phase.epochs, phase.steps) == (7, None)
    fedrep = personalised.get_config("fedrep")
    build.check(fedrep)
    for name in ("epochs", "steps"):
        config = changed(personalised.get_config("fedrep"), f"local.{name}", 3)
        with pytest.raises(ValueError, match=rf"local\.{name}=3 would change nothing"):
            build.check(config)


def test_given_fields_that_nothing_looks_at_are_refused():
    config = zero_shot.get_config()
    idle = fields.idle(config)
    assert {"server.cohort_size", "data.client_ids", "start.take"} <= set(idle)
    assert "data.alpha" not in idle and "evaluation.sample_level" not in idle
    for field in idle:
        with pytest.raises(ValueError, match=f"{field} was given and would change"):
            fields.check_used(config, ["rounds", field])
    fields.check_used(config, ["rounds", "data.alpha"])
    for field, value, used in (
        ("server.sampler", "uniform", "server.cohort_size"),
        ("data.partition", "pathological", "data.classes_per_client"),
        ("local.milestones", (3,), "local.milestone_factor"),
        ("engine.store", "host", "engine.memory_map"),
    ):
        assert used in fields.idle(config)
        assert used not in fields.idle(changed(config, field, value))
    known = common.flat(common.defaults())
    assert set(idle) <= set(known)


def test_an_idle_field_of_a_partition_says_which_one_looks_at_it():
    config = fedavg()
    said = r"data\.client_key .*'dirichlet' .*; data\.partition=by_client_id does"
    with pytest.raises(ValueError, match=said):
        fields.check_used(config, ["data.client_key"])
    with pytest.raises(ValueError, match=r"; data.partition=pathological or class_"):
        fields.check_used(config, ["data.classes_per_client"])
    config.data.name = "mine.csv"  # whose column of ids is no feature
    fields.check_used(config, ["data.client_key"])


def test_partitions_take_the_fields_named_after_their_options():
    assert fields.PARTITIONS == {
        "iid": ("samples_per_client",),
        "dirichlet": ("alpha", "min_size", "capped"),
        "mixtures": ("alpha", "samples_per_client"),
        "pathological": ("classes_per_client",),
        "class_shares": ("classes_per_client",),
        "class_draws": ("classes_per_client",),
        "majors": ("classes_per_client", "ratio", "samples_per_client"),
        "groups": ("num_groups", "classes_per_client"),
        "by_client_id": ("client_ids", "min_size"),
        "bootstrap": ("alpha", "samples_per_client"),
    }


# The command line --------------------------------------------------------------------


def test_none_takes_any_optional_field_away():
    argv = ["x", "--config=c.py", "--config.local.steps=None", "--config.rounds=3"]
    kept, removed = cli._split_none([*argv, "-config.data.client_ids=None"])
    assert kept == ["x", "--config=c.py", "--config.rounds=3"]
    assert removed == ["local.steps", "data.client_ids"]
    optional = [f for f, number in fields.NUMBERS.items() if number.optional]
    for field in (*optional, "data.data_dir", "data.client_ids"):
        config = pfedhn.get_config()
        config.lock()
        config.update_from_flattened_dict({field: None})
        build.check(config)


def test_seeds_are_those_of_keys():
    config = fedavg()
    config.seed = 2**32 - 1
    fields.check(config)
    config.seed = 2**32
    with pytest.raises(
        ValueError, match="seed=4294967296 must be at least 0 and below"
    ):
        fields.check(config)
