"""A model with a second, personal set of variables that stays on the client.

The second set lies beside the first, under "personal" in parameters and in statistics,
so that patterns on the model's own paths go on to hold.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hyperjax import tree
from hyperjax.types import Model, PyTree, Visit

NAME = "personal"


def without(variables: PyTree) -> PyTree:
    """Returns the model's own variables: those of which there is a personal copy."""
    params, stats = variables["params"], variables["stats"]
    return {
        **variables,
        "params": {name: params[name] for name in params[NAME]},
        "stats": {name: stats[name] for name in stats.get(NAME, {})},
    }


def only(variables: PyTree) -> PyTree:
    """Returns the personal variables, in the model's structure."""
    stats = variables["stats"].get(NAME, {})
    return {**variables, "params": variables["params"][NAME], "stats": stats}


def join(shared: PyTree, own: PyTree) -> PyTree:
    """Puts both sets together."""
    return {
        **shared,
        "params": {**shared["params"], NAME: own["params"]},
        "stats": join_stats(shared["stats"], own["stats"]),
    }


def join_stats(shared: PyTree, own: PyTree) -> PyTree:
    """Puts both sets of statistics together; there may be none."""
    return {**shared, NAME: own} if jax.tree.leaves(own) else shared


def kept(template: PyTree) -> tuple[str, ...]:
    """Returns the patterns of personal variables, for a model of this structure."""
    patterns = (rf"params/{NAME}/.*",)
    return patterns + ((rf"stats/{NAME}/.*",) if template["stats"] else ())


def both(patterns: Sequence[str] | str | None) -> tuple[str, ...]:
    """Returns patterns on paths of the model's own parameters, and on the copies'."""
    given = tree.as_patterns(patterns)
    return (*given, *(p.replace("params/", f"params/{NAME}/") for p in given))


def doubled(model: Model) -> Model:
    """Returns a model of both sets, with the personal one's predictions.

    Its loss is the sum of both sets', each as if it were alone, on the same batch.
    The personal set starts as a copy: of what a client received on its first visit, so
    that a client that never trained predicts as the global model does.
    """

    def copied(variables):
        return join(
            variables,
            jax.tree.map(jnp.copy, {k: variables[k] for k in ("params", "stats")}),
        )

    def loss(key, variables, batch, context):
        shared, own = without(variables), only(variables)
        value, seen = model.loss(key, shared, batch, context)
        own_value, trained = model.loss(key, own, batch, context)
        stats = join_stats(seen.stats, trained.stats)
        info = {**seen.info, "personal_loss": own_value}
        return value + own_value, trained._replace(stats=stats, info=info)

    def around(hook):
        return lambda variables: join(hook(without(variables)), hook(only(variables)))

    return model.around(
        "sample_shape",
        init=lambda key: copied(model.init(key)),
        loss=loss,
        apply=lambda variables, x: model.apply(only(variables), x),
        visit=Visit(
            arrive=lambda key, v: copied(model.visit.arrive(key, without(v))),
            enter=around(model.visit.enter),
            context=lambda v, data: model.visit.context(without(v), data),
            leave=around(model.visit.leave),
        ),
        serve=model.serve.seen(only),
        with_shape=lambda shape: doubled(model.with_shape(shape)),
    )
