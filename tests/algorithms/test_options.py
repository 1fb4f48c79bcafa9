"""Numbers that no method can mean, for every numeric option of every method."""

import inspect
import re

import pytest
from federated import METHODS, NUM_CLIENTS, ON_NORMS, SMALL, make_local, normed, tiny

from hyperjax import calls, channels, corrections, registry, server_optimizers

INF, NAN = float("inf"), float("nan")
KINDS = {
    "float": (NAN, INF, -INF, "0.1"),
    "float | None": (NAN, INF),
    "int": (NAN, INF, 1.5, -(10**6)),
    "int | None": (NAN, 1.5, -(10**6)),
}


def numbers_of(factory):
    """Names and kinds of a factory's numeric options, handed-on ones included."""
    found = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        kind = inspect.formatannotation(calls.plain_type(parameter.annotation))
        if kind in KINDS:
            found[name] = KINDS[kind]
    return found


def refused(build, name, value):
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))}"):
        build(**{name: value})


def on_the_tiny_model(method):
    """Returns `(**options) -> Algorithm`."""
    factory = registry.find(method)
    accepted = inspect.signature(factory).parameters
    small = {name: x for name, x in SMALL.items() if name in accepted}
    model = normed() if method in ON_NORMS else tiny().model
    if registry.families(method) == "several":
        model, small["family_sizes"] = {"a": model}, {"a": NUM_CLIENTS}

    def build(**options):
        return factory(model, **{"local": make_local(), **small, **options})

    return build


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_every_method_is_checked_by_name(method):
    build = on_the_tiny_model(method)
    for name, values in numbers_of(registry.find(method)).items():
        for value in values:
            refused(build, name, value)


@pytest.mark.parametrize(
    "factory",
    [
        *corrections.CORRECTIONS.values(),
        *channels.CHANNELS.values(),
        *server_optimizers.FEDOPT.values(),
    ],
    ids=lambda factory: factory.__name__,
)
def test_so_are_those_of_what_a_method_is_put_together_from(factory):
    for name, values in numbers_of(factory).items():
        for value in values:
            refused(factory, name, value)
