"""Clients with different models in one run.

Clients whose parameters have one structure form a *family*. A method with families has
a mapping from names to client sides, and its server takes and gives mappings with the
same keys, for any subset of the families. Inside a family clients have numbers of their
own, 0 to N_f - 1, which is what `Cohort.ids` holds there. A method without families is
one family called "" whose members are everybody.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hyperjax import rng
from hyperjax.types import Algorithm, Array, ClientSide, Cohort, ServerSide

ALONE = ""


class Families(NamedTuple):
    """Who belongs where: N clients in F families, in the order of `names`."""

    names: tuple[str, ...]
    members: dict[str, np.ndarray]  # name -> [N_f] ids, ascending
    family: np.ndarray  # [N] int32, position in `names`
    place: np.ndarray  # [N] int32, number inside the family

    def size(self, name: str) -> int:
        """N_f."""
        return len(self.members[name])

    def split(self, cohort: Cohort, multiple: int = 1) -> dict[str, Cohort]:
        """Cuts a cohort by family; each part has room for all that could be in it."""
        if self.names == (ALONE,):
            return {ALONE: cohort}
        num = len(self.family)
        known = jnp.minimum(cohort.ids, num - 1)
        family = jnp.where(cohort.ids < num, jnp.asarray(self.family)[known], -1)
        place = jnp.asarray(self.place)[known]
        parts = {}
        for i, name in enumerate(self.names):
            room = min(cohort.ids.shape[0], self.size(name))
            room = -(-room // multiple) * multiple
            here = family == i
            order = jnp.argsort(~here, stable=True)
            order = jnp.pad(order, (0, max(0, room - len(order))))[:room]
            inside = jnp.arange(room) < jnp.sum(here)
            parts[name] = cohort._replace(
                ids=jnp.where(inside, place[order], self.size(name)),
                active=jnp.where(inside, cohort.active[order], 0.0),
                weight=jnp.where(inside, cohort.weight[order], 0.0),
            )
        return parts

    def everywhere(self, name: str, ids: Array) -> Array:
        """Returns the ids in the whole population of numbers in a family."""
        if self.names == (ALONE,):
            return ids
        known = jnp.minimum(ids, self.size(name) - 1)
        whole = jnp.asarray(self.members[name])[known]
        return jnp.where(ids < self.size(name), whole, len(self.family))


def families(names_of_clients: Mapping[str, np.ndarray] | int) -> Families:
    """Builds `Families` from members by name, or of N clients without any.

    Raises:
      ValueError: a family is empty, or the members are not 0..N-1, each once.
    """
    if isinstance(names_of_clients, int):
        everybody = np.arange(names_of_clients, dtype=np.int32)
        return Families((ALONE,), {ALONE: everybody}, 0 * everybody, everybody)
    names = tuple(sorted(names_of_clients))
    for name in names:
        kind = np.asarray(names_of_clients[name]).dtype
        if len(names_of_clients[name]) and kind.kind not in "iu":
            raise ValueError(f"members of family {name!r} are {kind}, not integers")
    members = {name: np.sort(names_of_clients[name]).astype(np.int32) for name in names}
    everyone = np.concatenate([members[name] for name in names])
    num = len(everyone)
    if not np.array_equal(np.sort(everyone), np.arange(num)):
        raise ValueError(f"families must hold each of 0..{num - 1} once")
    family, place = np.zeros(num, np.int32), np.zeros(num, np.int32)
    for i, name in enumerate(names):
        if not len(members[name]):
            raise ValueError(f"family {name!r} has no members")
        family[members[name]] = i
        place[members[name]] = np.arange(len(members[name]))
    return Families(names, members, family, place)


def clients(alg: Algorithm) -> dict[str, ClientSide]:
    """Returns the client side of every family."""
    if isinstance(alg.client, ClientSide):
        return {ALONE: alg.client}
    return {name: _member(client, name) for name, client in alg.client.items()}


def _member(client: ClientSide, name: str) -> ClientSide:
    """A family's clients start from keys of their own: numbers repeat in others."""

    def init(key, common, down):
        return client.init(rng.stream(key, name), common, down)

    return client._replace(init=init)


def server(alg: Algorithm) -> ServerSide:
    """Returns a server that speaks in mappings, whether the method has families."""
    if not isinstance(alg.client, ClientSide):
        return alg.server

    def downlink(key, state, cohorts):
        return {ALONE: alg.server.downlink(key, state, cohorts[ALONE])}

    def update(key, state, uplinks, cohorts):
        return alg.server.update(key, state, uplinks[ALONE], cohorts[ALONE])

    return alg.server._replace(downlink=downlink, update=update)


def view(alg: Algorithm, name: str) -> Algorithm:
    """Returns a method as one of its families sees it.

    The same for the same sides, so that what is remembered of a method, such as
    `comm.describe`, is remembered of its views.
    """
    if isinstance(alg.client, ClientSide):
        return alg
    opening = alg.opening and view(alg.opening, name)
    return _view(alg.server, alg.client[name], name, alg.exact, opening)


@functools.lru_cache(maxsize=64)
def _view(
    server: ServerSide,
    client: ClientSide,
    name: str,
    exact: tuple[str, ...],
    opening: Algorithm | None,
) -> Algorithm:
    def downlink(key, state, cohort):
        return server.downlink(key, state, {name: cohort})[name]

    def update(key, state, uplink, cohort):
        return server.update(key, state, {name: uplink}, {name: cohort})

    one = server._replace(downlink=downlink, update=update)
    return Algorithm(one, _member(client, name), exact, opening)


def pack(alg: Algorithm, by_name: dict):
    """Returns a mapping by family, or its only value for a method without families."""
    return by_name[ALONE] if isinstance(alg.client, ClientSide) else by_name


def unpack(alg: Algorithm, packed) -> dict:
    """Undoes `pack`."""
    return {ALONE: packed} if isinstance(alg.client, ClientSide) else packed
