"""Clients with different models in one run.

Clients whose parameters have one structure form a *family*. A method with families has
a mapping from names to client sides, and its server takes and gives mappings with the
same keys, for any subset of the families. Inside a family clients have numbers of
their own, 0 to N_f - 1, which is what `Cohort.ids` holds there. To the engine every
method has families, if only ALONE, whose members are everybody.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hyperjax import rng
from hyperjax.types import (
    ALONE,
    Algorithm,
    Array,
    ClientSide,
    Cohort,
    Key,
    ServerSide,
    in_one_line,
)


class Families(NamedTuple):
    """Who belongs where: N clients in F families, in the order of `names`."""

    names: tuple[str, ...]
    members: dict[str, np.ndarray]  # name -> [N_f] ids, ascending
    family: np.ndarray  # [N] int32, position in `names`
    place: np.ndarray  # [N] int32, number inside the family

    def __repr__(self) -> str:
        return in_one_line(self)

    def size(self, name: str) -> int:
        """N_f."""
        return len(self.members[name])

    def rooms(self, cohort_size: int, multiple: int = 1) -> dict[str, int]:
        """Returns how many of a cohort could be of each family, rounded up."""
        if self.names == (ALONE,):
            return {ALONE: cohort_size}
        most = {name: min(cohort_size, self.size(name)) for name in self.names}
        return {name: -(-num // multiple) * multiple for name, num in most.items()}

    def cohorts(self, cohort: Cohort, multiple: int = 1) -> dict[str, Cohort]:
        """Returns a cohort by family; each has room for all that could be in it."""
        if self.names == (ALONE,):
            return {ALONE: cohort}
        num = len(self.family)
        known = jnp.minimum(cohort.ids, num - 1)
        family = jnp.where(cohort.ids < num, jnp.asarray(self.family)[known], -1)
        place = jnp.asarray(self.place)[known]
        parts = {}
        for i, (name, room) in enumerate(
            self.rooms(cohort.ids.shape[0], multiple).items()
        ):
            here = family == i
            # Stable: members keep their order in the cohort, all others come after.
            order = jnp.argsort(~here, stable=True)
            order = jnp.pad(order, (0, max(0, room - len(order))))[:room]
            inside = jnp.arange(room) < jnp.sum(here)
            parts[name] = cohort._replace(
                ids=jnp.where(inside, place[order], self.size(name)),
                active=jnp.where(inside, cohort.active[order], 0.0),
                weight=jnp.where(inside, cohort.weight[order], 0.0),
            )
        return parts

    def numbers(
        self, ids: np.ndarray, novel: Sequence[int] | np.ndarray
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns where in `ids` a family's clients are, and their numbers inside it.

        Args:
          ids: [n] int; those from N on never trained.
          novel: [m] int, position in `names` of clients N to N + m - 1.

        Returns:
          {name: (places [k] in ids, numbers [k] int32)}, of families with somebody
          there. In a family, all clients who never trained have the number N_f; without
          families they keep their ids.

        Raises:
          ValueError: one of them belongs to no family.
        """
        ids = np.asarray(ids)
        if self.names == (ALONE,):
            return {ALONE: (np.arange(len(ids)), ids.astype(np.int32))}
        family = np.concatenate([self.family, np.asarray(novel, np.int32)])
        if len(ids) and ids.max() >= len(family):
            raise ValueError(
                f"client {ids.max()} belongs to no family; those with one are 0 to "
                f"{len(family) - 1}"
            )
        num, found = len(self.family), {}
        for i, name in enumerate(self.names):
            where = np.flatnonzero(family[ids] == i)
            known = np.minimum(ids[where], num - 1)
            inside = np.where(ids[where] < num, self.place[known], self.size(name))
            if len(where):
                found[name] = (where, inside.astype(np.int32))
        return found

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
        nothing = np.zeros(names_of_clients, np.int32)
        return Families((ALONE,), {ALONE: everybody}, nothing, everybody)
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


def clients(alg: Algorithm) -> Mapping[str, ClientSide]:
    """Returns the client side of every family."""
    return alg.by_family(alg.client)


def check(alg: Algorithm, groups: Families | None) -> Families:
    """Returns the families of a method's clients.

    Args:
      alg: the method.
      groups: who belongs where; None for nobody in particular, without families.

    Raises:
      ValueError: they are not those of the method.
    """
    found = families(0) if groups is None else groups
    if set(found.names) != set(clients(alg)):
        raise ValueError(
            f"the method has the families {sorted(clients(alg))}, the clients belong "
            f"to {list(found.names)}"
        )
    return found


def mapped(alg: Algorithm) -> Algorithm:
    """Returns a method that speaks in mappings, whether it has families or not."""
    if alg.has_families:
        return alg
    given: Any = alg.server

    def downlink(key, state, cohorts):
        return {ALONE: given.downlink(key, state, cohorts[ALONE])}

    def update(key, state, uplinks, cohorts):
        return given.update(key, state, uplinks[ALONE], cohorts[ALONE])

    def release(key, state, cohorts):
        return {ALONE: given.release(key, state, cohorts[ALONE])}

    released = given.release and release
    how = given.mean_only, given.sums
    server = ServerSide(given.init, downlink, update, released, *how)
    opening = alg.opening and mapped(alg.opening)
    closing = alg.closing and mapped(alg.closing)
    return Algorithm(server, clients(alg), alg.exact, opening, closing)


def first_key(key: Key, name: str) -> Key:
    """Returns the key that a client of a family starts from, given that of its number.

    Numbers repeat in other families, so each has a stream of its own.
    """
    return key if name == ALONE else rng.stream(key, name)


def view(alg: Algorithm, name: str) -> Algorithm:
    """Returns a method as one of its families sees it: a method without families.

    The same for the same sides, so that what is remembered of a method, such as
    `comm.describe`, is remembered of its views.
    """
    if not alg.has_families:
        return alg
    opening = alg.opening and view(alg.opening, name)
    closing = alg.closing and view(alg.closing, name)
    return _view(alg.server, alg.client[name], name, alg.exact, opening, closing)


@functools.lru_cache(maxsize=64)
def _view(
    server: Any,
    client: ClientSide,
    name: str,
    exact: tuple[str, ...],
    opening: Algorithm | None,
    closing: Algorithm | None,
) -> Algorithm:
    def downlink(key, state, cohort):
        return server.downlink(key, state, {name: cohort})[name]

    def update(key, state, uplink, cohort):
        return server.update(key, state, {name: uplink}, {name: cohort})

    def init(key, common, down):
        return client.init(first_key(key, name), common, down)

    def release(key, state, cohort):
        return server.release(key, state, {name: cohort})[name]

    one = ServerSide(server.init, downlink, update, server.release and release)
    return Algorithm(one, client._replace(init=init), exact, opening, closing)
