"""A model with something beside it: one more entry among its statistics.

Statistics stay out of gradient and optimizer and, under `pattern`, on the client: a
place for what a client remembers of itself or is told by the server.
"""

from collections.abc import Callable
from functools import partial

from hyperjax.types import Model, PyTree, cannot_rebuild


def split(variables: PyTree, name: str) -> tuple[PyTree, PyTree]:
    """Returns the model's own variables, and the entry beside them."""
    stats = dict(variables["stats"])
    entry = stats.pop(name)
    return {**variables, "stats": stats}, entry


def join(variables: PyTree, name: str, entry: PyTree) -> PyTree:
    """Puts the entry beside the model's own variables."""
    return {**variables, "stats": {**variables["stats"], name: entry}}


def pattern(name: str) -> str:
    """Returns the pattern of the entry's paths."""
    return rf"stats/{name}/.*"


def beside(
    model: Model,
    name: str,
    start: Callable,
    deployed: Callable = lambda variables, entry: variables,
) -> Model:
    """Returns `model` with an entry `name` that its own functions never see.

    It passes through all of them, `loss` included; whoever has a use for it replaces
    that function.

    Args:
      model: without such an entry.
      name: of the entry.
      start: `(key, variables) -> entry`.
      deployed: `(variables, entry) -> variables` of the model that is looked at from
        outside: its predictions, condition, features and so on.
    """

    def seen(hook):
        return lambda variables, *rest: hook(deployed(*split(variables, name)), *rest)

    def within(hook):
        def run(variables):
            ours, entry = split(variables, name)
            return join(hook(ours), name, entry)

        return run

    def init(key):
        variables = model.init(key)
        return join(variables, name, start(key, variables))

    def loss(key, variables, batch, context):
        ours, entry = split(variables, name)
        value, trained = model.loss(key, ours, batch, context)
        return value, trained._replace(stats={**trained.stats, name: entry})

    return model.around(
        "sample_shape",
        init=init,
        loss=loss,
        predict=seen(model.predict),
        context=lambda variables, data: model.context(split(variables, name)[0], data),
        condition=seen(model.condition),
        export=seen(model.export),
        inspect=seen(model.inspect),
        # The entry may depend on the shape in ways that nobody here knows.
        with_shape=cannot_rebuild,
        features=seen(model.features),
        arrive=lambda key, variables: within(partial(model.arrive, key))(variables),
        visit=within(model.visit),
        leave=within(model.leave),
    )
