"""What methods share whose clients have networks of several families."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from hyperjax import tree, wrappers
from hyperjax.errors import check_at_least
from hyperjax.types import Algorithm, Cohort, Model, ServerSide


def smallest(models: Mapping[str, Model]) -> Model:
    """Returns the network with the fewest parameters."""

    def count(model):
        return tree.count(jax.eval_shape(model.init, jax.random.key(0))["params"])

    return min(models.values(), key=count)


def together(cohorts: Iterable[Cohort]) -> Cohort:
    """Returns several cohorts of a round as one."""
    first, *others = cohorts
    joined = {
        field: jnp.concatenate([getattr(c, field) for c in (first, *others)])
        for field in ("ids", "active", "weight")
    }
    return first._replace(**joined)


def check(
    models: Mapping[str, Model],
    sizes: Mapping[str, int] | None,
    num_clients: int | None = None,
) -> None:
    """Refuses sizes that are not those of the models' families.

    Raises:
      ValueError: other families, a size below 1, or not `num_clients` in all.
    """
    sizes = sizes or {}
    if set(sizes) != set(models):
        raise ValueError(
            f"family_sizes is of {sorted(sizes)}, models of {sorted(models)}"
        )
    check_at_least(1, **sizes)
    if num_clients not in (None, sum(sizes.values())):
        raise ValueError(
            f"family_sizes={dict(sizes)} are {sum(sizes.values())} clients, "
            f"num_clients={num_clients}"
        )


def averaged(algorithms: Mapping[str, Algorithm]) -> Algorithm:
    """Returns one method of FedAvgs whose models differ in what stays home only.

    Their shared variables have equal paths and shapes, and are averaged over the
    clients of all families together.

    Raises:
      ValueError: shared variables differ (the message names the families).
    """
    sides = dict(algorithms)
    first, *others = sides
    shapes = {
        name: {path: x.shape for path, x in wrappers.shared(alg).items()}
        for name, alg in sides.items()
    }
    for name in others:
        if shapes[name] != shapes[first]:
            raise ValueError(
                f"families {first!r} and {name!r} do not share the same variables: "
                f"{shapes[first]} and {shapes[name]}"
            )
    server = sides[first].server

    def downlink(key, state, cohorts):
        return {name: server.downlink(key, state, c) for name, c in cohorts.items()}

    def update(key, state, uplinks, cohorts):
        sent = [uplinks[name] for name in cohorts]
        uplink = jax.tree.map(lambda *x: jnp.concatenate(x), *sent)
        # FedAvg's server asks for nobody's number, so these may repeat.
        return server.update(key, state, uplink, together(cohorts.values()))

    return Algorithm(
        ServerSide(server.init, downlink, update),
        {name: alg.client for name, alg in sides.items()},
    )
