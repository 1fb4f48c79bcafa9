"""A client's memory: what it remembers of itself or is told, beside its model.

`variables["memory"]` is {name: entry}, there if there is an entry. Memory stays on the
client by definition: it is neither trained nor averaged, and a model's own functions
never see it. Names in use beyond those of methods: "optimizer", states to go on with
(`training.trainer`), and "condition", the label-free description of the client that a
deployed model serves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from hyperjax.types import Model, PyTree, Visit, cannot_rebuild


def get(variables: PyTree, name: str, default: Any = ()) -> PyTree:
    """Returns an entry."""
    return variables.get("memory", {}).get(name, default)


def put(variables: PyTree, name: str, entry: PyTree) -> PyTree:
    """Returns variables with an entry."""
    return {**variables, "memory": {**variables.get("memory", {}), name: entry}}


def without(variables: PyTree, *names: str) -> PyTree:
    """Returns variables without some entries, whether they are there or not."""
    entries = variables.get("memory", {})
    left = {name: entry for name, entry in entries.items() if name not in names}
    rest = {name: tree for name, tree in variables.items() if name != "memory"}
    return {**rest, "memory": left} if left else rest


def with_entry(
    model: Model,
    name: str,
    start: Callable,
    deployed: Callable = lambda variables, entry: variables,
) -> Model:
    """Returns `model` with an entry that its own functions never see.

    It passes by all of them, `loss` included; whoever has a use for it replaces that
    function, and a loss that renews it says so in `Trained.memory`.

    Args:
      model: without such an entry.
      name: of the entry.
      start: `(key, variables) -> entry`.
      deployed: `(variables, entry) -> variables` of the model that is looked at from
        outside: its outputs and what it serves by.
    """

    def seen(variables):
        return deployed(without(variables, name), get(variables, name))

    def within(hook):
        def run(variables):
            return put(hook(without(variables, name)), name, get(variables, name))

        return run

    def init(key):
        variables = model.init(key)
        return put(variables, name, start(key, variables))

    def loss(key, variables, batch, context):
        return model.loss(key, without(variables, name), batch, context)

    return model.around(
        "sample_shape",
        init=init,
        loss=loss,
        apply=lambda variables, x: model.apply(seen(variables), x),
        visit=Visit(
            arrive=lambda key, v: within(partial(model.visit.arrive, key))(v),
            enter=within(model.visit.enter),
            context=lambda v, data: model.visit.context(without(v, name), data),
            leave=within(model.visit.leave),
        ),
        serve=model.serve.seen(seen),
        # The entry may depend on the shape in ways that nobody here knows.
        with_shape=cannot_rebuild,
    )
