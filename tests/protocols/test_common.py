"""Fields, and the options that a name brings."""

import flax.linen as nn
import ml_collections
import numpy as np
import pytest

from hyperjax import models, registry
from hyperjax.launch import build
from hyperjax.protocols import common, zero_shot


class Mine(nn.Module):
    """A network of a user's own, with options of several types."""

    num_classes: int
    width: int = 3
    drop: float = 0
    sizes: tuple[int, ...] = (2, 2)
    blocks: int | tuple[int, ...] = 1
    inner: nn.Module | None = None
    act: object = nn.relu  # no text says what

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(nn.Dense(self.width)(x.reshape(len(x), -1)))


class Headless(nn.Module):
    """Its outputs are its own affair."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(len(x), -1))


@registry.hands_on(registry.find("fedavg"))
def mine(model, *, local, strength: float, words="a", how=None, call=len, **options):
    """A method of a user's own, without a default for `strength`."""
    if not isinstance(strength, float):
        raise TypeError(f"strength={strength}")
    return registry.find("fedavg")(model, local=local, **options)


def made(**given):
    """An own config, as files of old have it; `a__b=1` sets `a.b`."""
    config = common.defaults()
    config.method = dict(name="fedprox")
    for field, value in given.items():
        group, _, name = field.partition("__")
        config[group][name] = value
    return config


def test_every_field_has_words_that_fit_a_line():
    for field, (default, words) in common.FIELDS.items():
        assert 3 < len(words) < 80 and words[-1] not in ",;:", field
        value = common.flat(common.defaults())[field]
        assert value is None if isinstance(default, type) else value == default


@pytest.mark.parametrize("name", registry.methods())
def test_options_of_a_method_are_those_of_its_signature(name):
    config = made(method__name=name)
    common.fill(config)
    known = registry.options(name)
    assert set(config.method) == {"name", *known}
    for option, value in config.method.items():
        if option == "correction":
            assert value == ""
        elif option != "name":
            assert value == known[option].default


@pytest.mark.parametrize("name", models.ZOO)
def test_options_of_a_network_are_its_fields(name):
    config = made(model__name=name)
    common.fill(config)
    module = models.ZOO[name](num_classes=3)
    for option, value in config.model.items():
        assert option == "name" or getattr(module, option) == value
    assert "conv_rule" not in config.model and "num_classes" not in config.model


def test_what_is_given_stays_and_gets_the_type_of_its_annotation():
    config = made(method__mu=1, method__keep=["a"], model__hidden=(4,))
    common.fill(config)
    common.fill(config)
    assert type(config.method.mu) is float and config.model.hidden == (4,)
    for keep in ("a", ("a", "b"), ()):  # text or several
        config.method.keep = keep
        assert config.method.keep == keep
    with pytest.raises(TypeError):
        config.method.mu = "much"


def test_a_reference_to_another_field_is_kept():
    config = made(method__name="fedfomo")
    config.method.num_models = config.get_ref("rounds") // 10
    common.fill(config)
    config.rounds = 30
    assert config.method.num_models == 3


def test_a_filled_copy_leaves_the_original_alone():
    plain = ml_collections.ConfigDict(made().to_dict())  # as one that is read back
    plain.method = dict(name="fedprox")
    for config in (made(), plain):
        before = config.to_dict()
        found = common.filled(config)
        found.rounds, found.method.mu = 3, 0.5
        assert config.to_dict() == before
        found.method = dict(name="ditto")
        assert found.method.lam == 1.0


@pytest.mark.parametrize("locked", [False, True])
def test_another_name_brings_its_own_options(locked):
    config = zero_shot.get_config("fedprox,data=digits")
    if locked:
        config.lock()
    config.method.name = "ditto"
    assert config.method.lam == 1.0 and "mu" not in config.method
    config.model.name = "lenet"
    assert config.model.hidden == (500,)  # not the digits' (32,) of another network
    assert config.is_locked == locked
    config.method.lam = 3.0
    config.method.name = "ditto"  # no other one
    assert config.method.lam == 3.0
    again = common.filled(config)
    again.method.name = "fedprox"
    assert again.method.mu == 0.1 and config.method.lam == 3.0
    config.method.name = "nonsense"  # refused where configs are checked
    with pytest.raises(ValueError, match=r"method\.name='nonsense'"):
        build.check(config)


def test_change_sets_names_before_options():
    config = made()
    fields_ = {"method.lam": 2.0, "method.name": "ditto", "rounds": 7}
    common.change(config, {**fields_, "server.learning_rate": lambda c: c.rounds / 2})
    assert (config.method.name, config.method.lam, config.rounds) == ("ditto", 2.0, 7)
    with pytest.raises(KeyError, match="mu"):
        common.change(config.lock(), {"method.mu": 1.0})


def test_a_network_of_ones_own_takes_options():
    config = made(model__name=f"{__name__}:Mine")
    common.fill(config)
    expected = dict(name=f"{__name__}:Mine", width=3, drop=0.0, sizes=(2, 2), blocks=1)
    assert config.model.to_dict() == expected | {"inner": None}
    config.model.width, config.model.blocks = 5, (1, 2)
    model = build.make_model(config, (2, 2, 1), 3)
    assert sum(map(np.size, _arrays(model))) == 4 * 5 + 5 + 5 * 3 + 3


def _arrays(model):
    import jax

    return jax.tree.leaves(model.init(jax.random.key(0)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:Headless", "has no field `num_classes`: .*must take the number"),
        (f"{__name__}:made", "is no class of a linen module"),
        ("hyperjax.models:Nothing", r"package\.module:Class"),
        ("nonsense", "model.name='nonsense' is unknown"),
    ],
)
def test_what_is_no_network_for_a_config_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        common.filled(made(model__name=name))


def test_a_method_of_ones_own_takes_options():
    name = f"{__name__}:mine"
    config = made(method__name=name)
    common.fill(config)
    assert config.method.strength is None and config.method.words == "a"
    assert "call" not in config.method  # which no text says
    assert config.method.bn_stats == "average"
    config.data.name = "synthetic"
    model = build.make_model(config, (2, 2, 1), 3)
    with pytest.raises(TypeError, match=r"required.*'strength'"):
        build.make_algorithm(config, model)
    config.method.strength, config.method.how = 2.0, (1, "x")
    build.make_algorithm(config, model)
    config = zero_shot.get_config(f"{name},data=digits")
    assert config.method.name == name and config.local.learning_rate == 0.05
