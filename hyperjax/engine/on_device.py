"""All rounds of a call in one program, client state on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import hosts
from hyperjax.data.clients import Table
from hyperjax.engine import exchange, sharding, stores
from hyperjax.engine.parts import Carry, Parts, Simulator, round_info, turns_of
from hyperjax.types import ClientData


def on_device(parts: Parts) -> Simulator:
    """All rounds of a call are one program; client state is part of its carry."""
    program, groups, mesh = parts.program, parts.groups, parts.mesh
    owners = {name: sharding.owners(groups.size(name), mesh) for name in groups.names}
    of_all = sharding.owners(len(parts.table.size), mesh)

    def place(owners):
        """Where arrays [N, ...] are; None: where JAX puts them."""
        if mesh is None:
            return None
        return sharding.in_parts(owners) if owners else sharding.everywhere(mesh)

    def put(x, owners):
        return x if mesh is None else hosts.put(x, place(owners))

    places = {name: place(owners[name]) for name in groups.names}
    table = jax.tree.map(np.asarray, parts.table)  # the rectangle, of `ragged.Rows`
    table = jax.tree.map(jnp.asarray, put(table, of_all))

    def init(root):
        carry = Carry(sharding.replicate(parts.init_server(root), mesh), {}, {})
        for name, spec in parts.rows().items():
            zeros = stores.zeros(spec, groups.size(name), places[name])
            carry.rows[name], carry.seen[name] = zeros
        return carry

    def load(arrays):
        server = sharding.replicate(jax.tree.map(jnp.asarray, arrays.server), mesh)
        rows, seen = (
            {name: put(x, owners[name]) for name, x in kept.items()}
            for kept in (arrays.rows, arrays.seen)
        )
        return Carry(server, *jax.tree.map(jnp.asarray, (rows, seen)))

    def many_rounds(root, carry, rounds, table, pool, weight, values):
        trained = parts.exchange(values)
        opening = parts.alg.opening and parts.opening(values)
        closing = parts.alg.closing and parts.closing(values)

        def one_exchange(carry: Carry, cohorts, run=trained):
            server, rows, seen = carry
            data, state, was_seen = {}, {}, {}
            for name, members in parts.members(cohorts).items():
                mine = Table(*(stores.taken(x, members, of_all) for x in table))
                data[name] = ClientData(mine.rows, mine.size, pool)
                state[name], was_seen[name] = stores.gather(
                    rows[name], seen[name], cohorts[name].ids, owners[name]
                )
            server, state, info = run(root, server, state, was_seen, data, cohorts)
            rows, seen = dict(rows), dict(seen)
            for name, cohort in cohorts.items():
                rows[name], seen[name] = stores.scatter(
                    rows[name],
                    seen[name],
                    cohort.ids,
                    state[name],
                    cohort.active > 0,
                    owners[name],
                )
            return Carry(server, rows, seen), info

        def one_client(carry, cohort):
            """An exchange with the only family there is someone of."""
            known = jnp.minimum(cohort.ids[0], len(groups.family) - 1)
            place = jnp.asarray(groups.place)[known]

            def branch(name):
                def run(carry):
                    ids = jnp.where(cohort.active > 0, place, groups.size(name))
                    return one_exchange(carry, {name: cohort._replace(ids=ids)})

                return run

            family = jnp.asarray(groups.family)[known]
            return jax.lax.switch(family, [branch(n) for n in groups.names], carry)

        def body(carry, round):
            cohort, opened, closed = parts.draw(root, round, weight), {}, {}
            if opening:
                carry, opened = one_exchange(carry, parts.cohorts(cohort), opening)
            if not parts.sequential:
                carry, info = one_exchange(carry, parts.cohorts(cohort))
            else:
                carry, infos = jax.lax.scan(one_client, carry, turns_of(cohort))
                info = exchange.round_info(infos)
            if closing:
                carry, closed = one_exchange(carry, parts.cohorts(cohort), closing)
            return carry, round_info(opened, info, closed)

        return jax.lax.scan(body, carry, rounds)

    def run(root, carry, start, num_rounds):
        rounds = jnp.arange(start, start + num_rounds, dtype=jnp.int32)
        root = sharding.replicate(root, mesh)
        args = (root, carry, rounds, *given)
        whole = mesh and sharding.everywhere(mesh)
        outputs = mesh and (Carry(whole, places, places), whole)
        found = program("rounds", many_rounds, args, donate=(1,), places=outputs)
        program.keep_work("rounds", num_rounds, width)
        return found

    given = table, parts.pool, parts.weight, parts.hyper.values
    width = 1 if parts.sequential else parts.width
    who = parts.visits, parts.participants
    held = parts.held({name: where is not None for name, where in owners.items()})
    return Simulator(init, load, run, *who, program, many_rounds, given, width, held)
