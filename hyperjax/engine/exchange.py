"""One exchange: down, train, up, update; the only place that adds the client axis."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import aggregators, rng, tree
from hyperjax.engine import families, sharding
from hyperjax.types import (
    ALONE,
    Algorithm,
    Array,
    ClientData,
    Cohort,
    Downlink,
    Key,
    Pool,
    PyTree,
    Sums,
)

# Entries of a client's info that are summed over the cohort; the others are averaged,
# weighted by "samples".
SUMMED = ("steps", "samples")


def first_visit(
    alg: Algorithm, root: Key, down: Downlink, ids: Array, family: str = ALONE
) -> PyTree:
    """Returns the initial state of clients of one family, leaves [C, ...].

    `ids` may name clients that never trained: they start by the very same path.
    """
    client = families.clients(alg)[family]
    common = rng.stream(root, "common_init")
    keys = rng.client_keys(rng.stream(root, "client_init"), ids)

    def one(key, own):
        key = families.first_key(key, family)
        return client.init(key, common, Downlink(down.shared, own, down.round))

    return jax.vmap(one)(keys, down.own)


class _Visitor(NamedTuple):
    """What is mapped over: a client of the cohort, leaves [C, ...] for all of them."""

    key: Key
    own: PyTree  # its own part of the downlink
    state: PyTree
    rows: Array  # [n_max] of the pool
    size: Array  # [] of them that count


class _Shared(NamedTuple):
    """What all clients of an exchange have in common."""

    down: PyTree  # the shared part of the downlink
    round: Array
    pool: Pool


def make_exchange(
    alg: Algorithm,
    mapper: str | int = "map",
    mesh: Any = None,
    alone: bool = False,
    streaming: bool = False,
) -> Callable:
    """Builds the exchange of a method without families.

    Args:
      alg: the method.
      mapper: see `sharding.map_clients`.
      mesh: see `sharding.client_mesh`.
      alone: cohorts are single clients, of which a round may have several: keys are
        derived from the client's id too.
      streaming: see `make_joint_exchange`.

    Returns:
      `exchange(root, server, rows, seen, data, cohort) -> (server, rows, info)` with
      rows [C, ...] the stored state of the cohort, seen [C] bool, data a `ClientData`
      with leading axis C on rows and size, and info a dict of means over the cohort.
    """
    joint = make_joint_exchange(alg, mapper, mesh, alone, streaming=streaming)

    def exchange(root, server, *of_cohort):
        server, rows, info = joint(root, server, *({ALONE: x} for x in of_cohort))
        return server, rows[ALONE], info

    return exchange


def make_joint_exchange(
    alg: Algorithm,
    mapper: str | int = "map",
    mesh: Any = None,
    alone: bool = False,
    stage: str = "",
    streaming: bool = False,
) -> Callable:
    """Builds the exchange of a method, with or without families; see `make_exchange`.

    Rows, seen, data and cohort are mappings by family, for all or some of them; with
    `alone` for the single family of the single client. Exchanges of one round that
    differ in `stage` draw from different keys. Blocks are of clients of about a size,
    see `sharding.by_size`, and all else is in the cohort's order, but for the sums of
    `streaming`: with it uplinks are summed up as clients finish, and no more of them
    are in memory than train at a time; it is for servers that are `mean_only` or have
    `sums`.
    """

    def mapped_update(client):
        def one_client(visitor: _Visitor, shared: _Shared):
            down = Downlink(shared.down, visitor.own, shared.round)
            data = ClientData(visitor.rows, visitor.size, shared.pool)
            return client.update(visitor.key, down, visitor.state, data)

        return sharding.map_clients(one_client, mapper, mesh)

    server_side, sides = families.mapped(alg)[:2]
    updates = {name: mapped_update(client) for name, client in sides.items()}
    summed = None if server_side.mean_only else server_side.sums

    def visit(name, root, key, down, rows, seen, data: ClientData, cohort: Cohort):
        """One family's part: (uplinks, new rows, infos), leaves [C, ...]."""
        down = down._replace(round=cohort.round)
        first = first_visit(alg, root, down, cohort.ids, name)
        start = tree.where_rows(seen, rows, first)
        alive = cohort.active > 0
        keys = rng.client_keys(rng.stream(key, "client_update" + name), cohort.ids)
        size = jnp.where(alive, data.size, 0)  # the dead take no step
        visitors = _Visitor(keys, down.own, start, data.rows, size)
        shared = _Shared(down.shared, down.round, data.pool)
        who, back = cohort, None
        if isinstance(mapper, int):
            # A block takes the steps of its largest client.
            devices = 1 if mesh is None or streaming else mesh.size
            order = sharding.by_size(size, devices)
            visitors = jax.tree.map(lambda x: x[order], visitors)
            who, back = _in_order(cohort, order), jnp.argsort(order)
        if streaming:
            per_device = 1 if isinstance(mapper, str) else mapper
            at_a_time = per_device * (1 if mesh is None else mesh.size)
            up, *rest = _streamed(
                updates[name], at_a_time, visitors, shared, who, summed
            )
            if server_side.mean_only:
                up = jax.tree.map(lambda x: x[None], up)  # of one that stands for all
            else:
                up = Sums(up)
        else:
            up, *rest = updates[name](visitors, shared)
            if back is not None:
                up = jax.tree.map(lambda x: x[back], up)
            up = tree.where_rows(alive, up, tree.zeros_like(up))
        if back is not None:
            rest = jax.tree.map(lambda x: x[back], rest)
        new, info = rest
        return up, tree.where_rows(alive, new, rows), info

    def exchange(root, server, rows, seen, data, cohorts: dict[str, Cohort]):
        one, cohort = next(iter(cohorts.items()))
        key = jax.random.fold_in(root, cohort.round)
        if stage:
            key = rng.stream(key, stage)
        if alone:
            # Exchanges of one round have its number in common, not the client.
            key = jax.random.fold_in(rng.stream(key, one), cohort.ids[0])
        downs = server_side.downlink(rng.stream(key, "downlink"), server, cohorts)
        ups, new, infos, active = {}, {}, [], []
        for name, cohort in cohorts.items():
            ups[name], new[name], info = visit(
                name, root, key, downs[name], rows[name], seen[name], data[name], cohort
            )
            infos.append(info)
            active.append(cohort.active)
        if streaming and server_side.mean_only:
            cohorts = {name: _as_one(cohort) for name, cohort in cohorts.items()}
        before = server
        server, server_info = server_side.update(
            rng.stream(key, "server_update"), before, ups, cohorts
        )
        tree.check_kept("the server's state", before, server)
        info = jax.tree.map(lambda *x: jnp.concatenate(x), *infos)
        info = cohort_info(info, jnp.concatenate(active))
        return server, new, {**info, **server_info}

    return exchange


def _mean_of(part: PyTree, cohort: Cohort, total: Array) -> PyTree:
    """What some clients add to the weighted mean of the uplinks."""
    share = cohort.weight * cohort.active / jnp.where(total > 0, total, 1.0)
    return aggregators.sum_over_clients(part, share)


def _streamed(
    update: Callable,
    at_a_time: int,
    visitors: _Visitor,
    shared: _Shared,
    cohort: Cohort,
    summed: Callable | None,
) -> tuple[PyTree, PyTree, PyTree]:
    """Updates some clients at a time and adds up what they send.

    Returns sums over the cohort, as `ServerSide.sums` defines them, or, if `summed` is
    None, the weighted mean of the uplinks; and the new states and infos of all clients,
    leaves [C, ...].
    """
    num = cohort.ids.shape[0]
    total = jnp.sum(cohort.weight * cohort.active)
    steps = -(-num // at_a_time)
    lanes = jnp.arange(steps * at_a_time).reshape(steps, at_a_time)

    def some(lane):
        """Those of a lane: (uplinks, new states, infos), and who they are."""
        place = jnp.minimum(lane, num - 1)
        mine = jax.tree.map(lambda x: x[place], visitors)
        real = lane < num  # those beyond the cohort take no step, and count for nothing
        mine = mine._replace(size=jnp.where(real, mine.size, 0))
        who = cohort._replace(
            ids=cohort.ids[place],
            active=jnp.where(real, cohort.active[place], 0.0),
            weight=cohort.weight[place],
        )
        return update(mine, shared), who

    def partly(lane):
        """What a lane adds to the sums, and (uplinks, new states, infos)."""
        out, who = some(lane)
        up = tree.where_rows(who.active > 0, out[0], tree.zeros_like(out[0]))
        part = _mean_of(up, who, total) if summed is None else summed(up, who)
        return part, out

    def body(sums, lane):
        part, (_, new, info) = partly(lane)
        return tree.add(sums, part), (new, info)

    parts, (like, _, _) = jax.eval_shape(partly, lanes[0])
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts)
    sums, out = jax.lax.scan(body, nothing, lanes)
    if summed is None:
        sums = jax.tree.map(lambda x, one: x.astype(one.dtype), sums, like)
    new, info = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num], out)
    return sums, new, info


def _in_order(cohort: Cohort, order: Array) -> Cohort:
    """A cohort whose clients come in another order."""
    return cohort._replace(
        ids=cohort.ids[order],
        active=cohort.active[order],
        weight=cohort.weight[order],
    )


def _as_one(cohort: Cohort) -> Cohort:
    """A cohort of one client, that stands for all."""
    weight = jnp.sum(cohort.weight * cohort.active)
    return cohort._replace(
        ids=cohort.ids[:1],
        active=jnp.asarray(weight > 0, cohort.active.dtype)[None],
        weight=weight[None],
    )


def cohort_info(info: dict[str, Array], active: Array) -> dict[str, Array]:
    """Reduces per-client info [C] to one value per name."""
    info = tree.where_rows(active > 0, info, tree.zeros_like(info))
    return _reduced(info, active)


def round_info(infos: dict[str, Array]) -> dict[str, Array]:
    """Reduces the infos of a round's exchanges [C] to those of the round."""
    return _reduced(infos, jnp.ones_like(next(iter(infos.values()))))


def _reduced(infos: dict[str, Array], otherwise: Array) -> dict[str, Array]:
    """Sums or means over [C], weighted `otherwise` where no samples are counted."""
    weight = infos.get("samples", otherwise)
    # A mean of nothing is 0, not 0 / 0; samples are whole numbers.
    share = weight / jnp.maximum(jnp.sum(weight), 1.0)
    return {
        name: jnp.sum(x) if name in SUMMED else jnp.tensordot(share, x, axes=1)
        for name, x in infos.items()
    }


def make_cohort(
    ids: Array, num_clients: int, weight: Array, round: Array, padded: int
) -> Cohort:
    """Pads sampled ids [C] to [padded]; `weight` is that of every client, [N]."""
    ids = jnp.pad(ids, (0, padded - ids.shape[0]), constant_values=num_clients)
    active = (ids < num_clients).astype(jnp.float32)
    weight = weight.at[ids].get(mode="clip")
    return Cohort(ids, active, weight, round, jnp.float32(num_clients))
