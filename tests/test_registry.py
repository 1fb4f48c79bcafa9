"""Methods by name, and what each takes."""

import functools
import inspect

import federated
import pytest

from hyperjax import models, registry, training
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.registry import hands_on, routed

METHODS = registry.methods()


def outer(model, *, local, rate: float = 0.5, **inner_options):
    return inner(model, local=local, fixed=1, **inner_options)


def inner(model, *, local, rate: float = 0.1, fixed: int = 0, other: str = "x"):
    """What does the work.

    Args:
      model: what is trained.
      fixed, other: two that belong
        together.
    """
    return rate, fixed, other


def test_options_handed_on_stand_in_the_signature_behind_its_own():
    method = hands_on(inner, without=("fixed",))(outer)
    found = registry.options(method)
    assert list(found) == ["rate", "other"]
    assert found["rate"].default == 0.5 and found["rate"].of == "outer"
    assert found["other"][:4] == ("x", str, "two that belong together.", "inner")


def test_options_are_divided_among_those_who_take_them():
    def first(*, a): ...
    def last(*, b): ...

    assert routed(dict(a=1, b=2, c=3), first, last) == (dict(a=1), dict(b=2, c=3))


@pytest.mark.parametrize("name", METHODS)
def test_every_option_has_a_default_a_type_and_a_word(name):
    for option, (default, kind, doc, *_) in registry.options(name).items():
        assert default is not inspect.Parameter.empty, option
        assert kind is not inspect.Parameter.empty, option
        assert doc, option


def test_names_of_other_packages_and_wrong_ones():
    assert registry.find("hyperjax.algorithms.fedavg:fedavg") is fedavg
    with pytest.raises(ValueError, match=r"did you mean 'fedprox'"):
        registry.find("fedprx")
    with pytest.raises(ValueError, match=r"is no method: function\(model"):
        registry.find("hyperjax.tree:add")
    with pytest.raises(ValueError, match=r"expected package.module:function"):
        registry.find("nowhere:fedavg")


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_model_and_no_local_is_refused(name):
    """Nothing is taken from it before: not a batch size, not the shape of inputs."""
    network = models.MLP(3, hidden=(4,))
    with pytest.raises(TypeError, match=r"model must be a hyperjax.Model; got MLP\("):
        federated.build(name, model=network)
    other = functools.partial(training.trainer, batch_size=4)
    with pytest.raises(TypeError, match=r"local must be a hyperjax.Local; got trainer"):
        federated.build(name, local=other)
