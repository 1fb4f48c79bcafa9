"""One program an exchange, client state on the host or in a file."""

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.data import clients
from hyperjax.data.clients import Table, is_on_host
from hyperjax.engine import exchange, sharding, stores
from hyperjax.engine.checks import most_samples
from hyperjax.engine.parts import Carry, Parts, Simulator, round_info, turns_of
from hyperjax.types import Array, ClientData


def on_host(parts: Parts, folder: str | None) -> Simulator:
    """One program per exchange; only a cohort's state and row numbers travel."""
    program, groups = parts.program, parts.groups
    table = parts.table
    # Where processes take turns together there is no mesh, and each does it all.
    held = parts.held(dict.fromkeys(groups.names, parts.mesh is not None))

    def empty():
        rows, seen = {}, {}
        for name, spec in parts.rows().items():
            place = folder if folder is None else os.path.join(folder, name)
            rows[name], seen[name] = stores.host_zeros(spec, groups.size(name), place)
        return rows, seen

    def init(root):
        return Carry(parts.init_server(root), *empty())

    def load(arrays):
        server = jax.tree.map(jnp.asarray, arrays.server)
        rows, seen = empty()
        for name, known in arrays.seen.items():
            seen[name][...] = known
            mine, theirs = map(jax.tree.leaves, (rows[name], arrays.rows[name]))
            for x, y in zip(mine, theirs, strict=True):
                # Others are zeros.
                ids = np.flatnonzero(known)
                for some in stores.pieces(x, ids[stores.is_held(ids, held[name])]):
                    x[some] = y[some]
        return Carry(sharding.replicate(server, parts.mesh), rows, seen)

    staged = bool(parts.alg.opening or parts.alg.closing)
    together = staged or not parts.sequential

    def drawn(root, round):
        """The cohort of a round, and by family if clients are together in one."""
        cohort = program("cohort", parts.draw, (root, jnp.int32(round), parts.weight))
        if not together:
            return cohort, {}, {}
        cohorts = program("cohorts", parts.cohorts, (cohort,))
        return cohort, cohorts, places_of(cohorts)

    def places_of(cohorts):
        """Rows of the index table, by family."""
        return jax.tree.map(np.asarray, parts.members(cohorts))

    def data_of(places):
        """What clients train on, on the device as far as it may travel ahead."""
        found = {}
        for name, place in places.items():
            mine, pool = Table(table.rows[place], table.size[place]), parts.pool
            if is_on_host(pool):
                room = most_samples(pool, table, len(place))
                pool, (mine,) = clients.some(pool, mine, room=room)
                pool = jax.tree.map(jnp.asarray, pool)
                pool = sharding.replicate(pool, parts.mesh)
            found[name] = ClientData(*mine, pool)
        return found

    def one_round(root, carry, cohort, cohorts, data):
        opened: dict[str, Array] = {}
        if parts.alg.opening:
            carry, opened = one_exchange(root, carry, cohorts, data, "opening")
        if parts.sequential:
            carry, info = one_by_one(root, carry, cohort)
        else:
            carry, info = one_exchange(root, carry, cohorts, data)
        closed: dict[str, Array] = {}
        if parts.alg.closing:
            carry, closed = one_exchange(root, carry, cohorts, data, "closing")
        return carry, round_info(opened, info, closed)

    def one_by_one(root, carry, cohort):
        infos, turns = [], turns_of(cohort)
        for turn, client in enumerate(np.asarray(cohort.ids)):
            one = jax.tree.map(lambda x, turn=turn: x[turn], turns)
            name = groups.names[groups.family[client]]
            one = one._replace(ids=jnp.asarray(groups.place[[client]]))
            alone = {name: one}
            carry, info = one_exchange(root, carry, alone, data_of(places_of(alone)))
            infos.append(info)
        infos = jax.tree.map(lambda *x: jnp.stack(x), *infos)
        return carry, jax.device_get(exchange.round_info(infos))

    def one_exchange(root, carry: Carry, cohorts, data, stage="exchange"):
        rows, seen = carry.rows, carry.seen
        state, was_seen = {}, {}
        for name, cohort in cohorts.items():
            where = held[name], parts.mesh, program, name
            state[name], was_seen[name] = stores.fetched(
                rows[name], seen[name], np.asarray(cohort.ids), *where
            )
        inputs = (root, carry.server, state, was_seen, data, cohorts)
        inputs = (parts.hyper.values, *sharding.replicate(inputs, parts.mesh))

        def run(values, *inputs):
            return getattr(parts, stage)(values)(*inputs)

        server, state, info = program(stage, run, inputs, donate=(2,))
        if not (staged or parts.sequential):  # it is all there is of a round
            program.keep_work(stage, 1, parts.width)
        for name, cohort in cohorts.items():
            ids, alive = np.asarray(cohort.ids), np.asarray(cohort.active) > 0
            stores.host_scatter(
                rows[name], seen[name], ids, state[name], alive, held[name]
            )
        return carry._replace(server=server), jax.device_get(info)

    def run(root, carry, start, num_rounds):
        root = sharding.replicate(root, parts.mesh)
        infos, stop = [], start + num_rounds
        with ThreadPoolExecutor(1) as porter:
            cohort, cohorts, places = drawn(root, start)
            data = porter.submit(data_of, places)
            for round in range(start, stop):
                now = cohort, cohorts, data.result()
                if round + 1 < stop:  # it is taken there while this one computes
                    cohort, cohorts, places = drawn(root, round + 1)
                    data = porter.submit(data_of, places)
                carry, info = one_round(root, carry, *now)
                infos.append(info)
        return carry, jax.tree.map(lambda *x: np.stack(x), *infos)

    who = parts.visits, parts.participants
    return Simulator(init, load, run, *who, program, held=held)
