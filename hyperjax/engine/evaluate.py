"""Deploys a method on clients and scores it, without a trace in the training state.

Every client is deployed the same way, that of `engine/deploy.py`, and scored as
`engine/scoring.py` says.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import rng
from hyperjax.data.clients import Table, is_on_host, room_for, some
from hyperjax.engine import (
    checks,
    deploy,
    families,
    schedule,
    scoring,
    sharding,
    stores,
)
from hyperjax.engine.compiled import Compiled, Hyper
from hyperjax.engine.families import Families
from hyperjax.engine.scoring import Samples
from hyperjax.errors import check_at_least
from hyperjax.types import (
    AdaptData,
    Algorithm,
    Array,
    ClientData,
    Downlink,
    Pool,
    PyTree,
    in_one_line,
)


class Population(NamedTuple):
    """Clients to evaluate: their ids, labelled training rows, and rows to predict."""

    ids: np.ndarray  # [n] int32; ids from N on never trained
    train: Table
    inputs: Table


class Evaluator(NamedTuple):
    """Scores of the clients of every population: {population: {name: [n] values}}.

    `evaluate(root, carry, round)` deploys as the method does. Names: "size",
    "accuracy" (a share), "accuracy_em", "accuracy_oracle", "loss" (these four NaN for a
    client for one of whose samples the outputs are not finite), for methods whose
    deployment differs between clients "accuracy_swapped" (with the next client's
    adapted state) and "distance_swapped" (relative distance between the two deployed
    networks), and whatever `model.serve.inspect` reports. With families, the next
    client is one of the same family, and what only some report is NaN for the others.

    `tune(root, carry, round, epochs)` fine-tunes each client's copy on its training
    samples first, at the learning rate of the last round. Names: "size", "accuracy",
    "loss".

    `deploy(root, carry, round, ids, inputs, train=None)` gives away the networks that
    `evaluate` scores, see `deploy.deployer`.

    `fit(root, carry, round)` is, by family, what participants find out together before
    any client is deployed, see `types.Fit`; () where they need not. `evaluate` and
    `tune` do so too, unless `fitted=` has it.

    `pool` has the samples, on the devices where clients are evaluated unless they are
    on the host.
    """

    evaluate: Callable
    tune: Callable
    deploy: Callable
    program: Compiled
    fit: Callable
    pool: Pool

    def __repr__(self) -> str:
        return in_one_line(self)


def evaluator(
    alg: Algorithm,
    pool: Pool,
    populations: Mapping[str, Population],
    *,
    source_prior: np.ndarray,
    members: Families | None = None,
    novel: Sequence[int] | np.ndarray = (),
    tuned: Mapping[str, Population] | None = None,
    fitting: Population | None = None,
    batch_size: int = 256,
    clients_per_call: int = 64,
    mapper: str | int = "map",
    mesh: Any = None,
    pool_mb: int = 0,
    held: Mapping[str, stores.Held] | None = None,
    program: Compiled | None = None,
    hyper: Hyper | None = None,
) -> Evaluator:
    """Builds the evaluation of a method.

    Args:
      alg: the method.
      pool: the samples.
      populations: who is evaluated; all are padded to one shape, so that one program
        serves them, or one for each family.
      source_prior: [K] class prior of all participating clients' training samples.
      members: who has trained, by family; None for a method without families.
      novel: [m] int, position in `members.names` of clients N to N + m - 1.
      tuned: whom `tune` scores; their training rows are what they are tuned on.
      fitting: participants with samples that they did not train on, for `fit`.
      batch_size: B of prediction.
      clients_per_call: how many clients are on the device at a time.
      mapper: of these, see `sharding.map_clients`.
      mesh: devices to spread clients over.
      pool_mb: how many MB of 2^20 bytes the samples of a call may take on a device, of
        a pool on the host; 0: no limit.
      held: by family, whose rows this process holds of the states that it is given, see
        `schedule.Simulator`; then `mesh` has the devices of all.
      program: the compiler, that of an evaluator of the same method and arguments but
        for pool, populations, prior and values of hyper-parameters, whose programs then
        serve this one too; None for one of its own.
      hyper: see `schedule.simulator`.

    Raises:
      ValueError: the members are not the method's families, somebody who is to be
        evaluated belongs to none, nobody has samples for what the method fits, or those
        of a call do not fit.
    """
    groups, program = families.check(alg, members), program or Compiled(mesh)
    hyper = hyper or Hyper.none(alg)
    fetch = stores.fetcher(held, mesh, program)
    source = jnp.asarray(np.maximum(source_prior, 1e-6), jnp.float32)
    source = source / jnp.sum(source)

    def placed(pool: Pool) -> Samples:
        # One after the other, so that both have the same inputs.
        pool = sharding.replicate(pool, mesh)
        hidden = sharding.replicate(jnp.full(pool.y.shape, -1, pool.y.dtype), mesh)
        there = sharding.replicate(source, mesh)
        return Samples(pool, pool._replace(y=hidden), there)

    # Arguments of the programs, not constants in them: other federations of equal
    # shapes find the programs in the compilation cache.
    everything = None if is_on_host(pool) else placed(pool)

    def samples_of(who: deploy.Clients) -> tuple[deploy.Clients, Samples]:
        """Clients with the samples that they need, all of a pool on the device."""
        if everything is not None:
            return who, everything
        part, tables = some(pool, who.train, who.inputs)
        train, inputs = (Table(*map(jnp.asarray, table)) for table in tables)
        there = placed(jax.tree.map(jnp.asarray, part))
        return who._replace(train=train, inputs=inputs), there

    programs = {
        name: _programs(hyper.method, name, batch_size, mapper, mesh)
        for name in groups.names
    }
    scored = _by_family(groups, novel, populations)
    fine_tuned = _by_family(groups, novel, tuned or {})
    width = max(2, clients_per_call)
    if pool_mb and is_on_host(pool):
        parts = [part for whom in (scored, fine_tuned) for part in whom.values()]
        for population in (each.of for part in parts for each in part.values()):
            num = _most(pool, population, sharding.padded_size(width, mesh))
            what = f"samples of {len(population.ids)} clients who are evaluated, "
            what += f"clients_per_call={clients_per_call} of them at a time"
            checks.check_room(pool, num, pool_mb, what, "fewer at a time")
    sides = families.clients(alg)
    fits = [name for name in groups.names if sides[name].fit is not None]
    if fits and fitting is None:
        raise ValueError(
            "clients adapt to their inputs by what participants find out on samples "
            "that nobody trained on, and participants have set none aside; accepted: "
            "a federation with a validation_fraction above 0, such as 0.2"
        )
    whose = _by_family(groups, novel, {"": fitting} if fitting else {})
    if pool_mb and is_on_host(pool):
        for name in fits:
            they = whose[name][""].of
            num, what = _most(pool, they, len(they.ids)), "samples of all participants"
            checks.check_room(pool, num, pool_mb, what, "a method that fits nothing")

    def run(stage: str, name: str, call: _Call):
        args = (sharding.replicate(call, mesh),)
        return jax.device_get(program(stage, programs[name][stage], args, family=name))

    def fit(root, carry: schedule.Carry, round: int):
        root, found = rng.root_key(root), {}
        for name in groups.names:
            found[name] = ()
            if name in fits:
                they = whose[name][""].of
                tables = (
                    Table(*map(jnp.asarray, t)) for t in (they.train, they.inputs)
                )
                who = deploy.find(carry, name, they.ids, *tables, fetch=fetch)
                who, samples = samples_of(who)
                moment, none = deploy.moment(root, carry, round, name), jnp.int32(0)
                call = _Call(moment, who, samples, none, none, hyper.values, ())
                args = (sharding.replicate(call, mesh),)
                run = programs[name]["fit"]
                found[name] = program("fit", run, args, family=name)
        return found

    def score_part(
        stage, name, shape, carry, moment, epochs, fitted, population: Population
    ):
        num, blocks = len(population.ids), []
        lanes_at_once = sharding.padded_size(min(shape.clients, width), mesh)
        for places, real, lanes in _lanes(num, lanes_at_once):
            who = _some(carry, name, population, places, lanes, shape, fetch)
            who, samples = samples_of(who)
            counts = jnp.int32(lanes), jnp.int32(epochs)
            call = _Call(moment, who, samples, *counts, hyper.values, fitted)
            values = run(stage, name, call)
            blocks.append(jax.tree.map(lambda x, n=real: x[:n], values))
        stacked = jax.tree.map(lambda *x: np.concatenate(x), *blocks)
        return {"size": population.inputs.size.copy(), **stacked}

    def score(stage, whom, root, carry: schedule.Carry, round, epochs: int, fitted):
        root = rng.root_key(root)
        fitted = fit(root, carry, round) if fitted is None else fitted
        found: dict[str, list[_Part]] = {}
        for name, parts in whom.items():
            moment, shape = deploy.moment(root, carry, round, name), _Shape.of(parts)
            score_it = functools.partial(
                score_part, stage, name, shape, carry, moment, epochs, fitted[name]
            )
            for metric, part in parts.items():
                values = part._replace(of=score_it(part.of))
                found.setdefault(metric, []).append(values)
        return {metric: _together(alg, parts) for metric, parts in found.items()}

    def evaluate(root, carry: schedule.Carry, round: int, fitted=None):
        return score("evaluate", scored, root, carry, round, 0, fitted)

    def tune(root, carry: schedule.Carry, round: int, epochs: int, fitted=None):
        check_at_least(0, epochs=epochs)
        return score("tune", fine_tuned, root, carry, round, epochs, fitted)

    deployed = deploy.deployer(
        alg,
        members=members,
        novel=novel,
        batch_size=batch_size,
        mesh=mesh,
        held=held,
        program=program,
        hyper=hyper,
    )

    def give(root, carry, round, ids, inputs, train=None):
        fitted = fit(root, carry, round) if fits else None
        return deployed(root, carry, round, ids, inputs, train, fitted)

    there = pool if everything is None else everything.labelled
    return Evaluator(evaluate, tune, give, program, fit, there)


# What is compiled --------------------------------------------------------------------


class _Call(NamedTuple):
    """The argument of a program: some clients of one family, and what they share."""

    moment: deploy.Moment
    who: deploy.Clients
    samples: Samples
    lanes: Array  # [] int32, how many clients there really are
    epochs: Array  # [] int32, of tuning
    hyper: Mapping[str, float | Array]
    fitted: PyTree  # what participants have found out


class _Ready(NamedTuple):
    """What a client is deployed from."""

    own: PyTree
    state: PyTree  # adapted


class _Pair(NamedTuple):
    """A client that is scored, and the neighbour whose state it borrows."""

    mine: _Ready
    other: _Ready
    inputs: Table


def _programs(
    method: Callable[..., Algorithm],
    name: str,
    batch_size: int,
    mapper: str | int,
    mesh: Any,
) -> dict[str, Callable]:
    """What is compiled for a family: functions of a `_Call`, to values [C] by name.

    That of "fit" is to what participants find out.
    """

    def stage(what: str) -> Callable:
        def run(call: _Call):
            alg = method(call.hyper)
            return _stages(alg, name, batch_size, mapper, mesh)[what](call)

        return run

    return {what: stage(what) for what in ("evaluate", "tune", "fit")}


def _stages(
    alg: Algorithm, name: str, batch_size: int, mapper: str | int, mesh: Any
) -> dict[str, Callable]:
    """The same of a method whose hyper-parameters are known."""
    side = families.clients(alg)[name]

    def arrive(call: _Call):
        pools = call.samples.labelled, call.samples.unlabelled
        return deploy.arrive(alg, name, call.moment, call.who, pools, call.fitted)

    def adapt_one(client: deploy.Arrival, shared: deploy.Shared):
        state, variables, data = deploy.adapt(side, client, shared)
        return _Ready(client.own, state), side.model.serve.inspect(
            variables, data.inputs
        )

    def score_one(pair: _Pair, common: tuple[deploy.Shared, Samples]):
        shared, samples = common
        exam = scoring.exam(pair.inputs, samples, batch_size)

        def deployed(ready: _Ready):
            down = Downlink(shared.down, ready.own, shared.round)
            return side.deploy(down, ready.state)

        variables = deployed(pair.mine)
        found = scoring.own(exam, side.model, variables)
        if jax.tree.leaves(pair.mine):  # or else all clients are deployed alike
            other = deployed(pair.other)
            found |= scoring.swapped(exam, side.model, variables, other)
        return found

    def tune_one(client: deploy.Arrival, common: tuple[deploy.Shared, Samples, Array]):
        shared, samples, epochs = common
        _, variables, data = deploy.adapt(side, client, shared)
        # The round whose learning rate training ended with.
        last = jnp.maximum(shared.round - 1, 0)
        variables = side.tune(client.key, variables, data, last, epochs)
        exam = scoring.exam(client.inputs, samples, batch_size)
        logits = exam.logits(side.model, variables)
        accuracy = exam.accuracy(logits, exam.source)
        return {"accuracy": accuracy, "loss": exam.loss(logits)}

    adapt, score, tune = (
        sharding.map_clients(fn, mapper, mesh)
        for fn in (adapt_one, score_one, tune_one)
    )

    def evaluated(call: _Call):
        arrivals, shared = arrive(call)
        ready, info = adapt(arrivals, shared)
        # The neighbour whose state each client borrows: the next of the population.
        neighbour = (jnp.arange(len(call.who.ids)) + 1) % call.lanes
        others = jax.tree.map(lambda x: x[neighbour], ready)
        pairs = _Pair(ready, others, call.who.inputs)
        return {**score(pairs, (shared, call.samples)), **info}

    def tuned(call: _Call):
        arrivals, shared = arrive(call)
        return tune(arrivals, (shared, call.samples, call.epochs))

    # On every device, since there are few.
    each = functools.partial(sharding.map_clients, mapper=mapper, mesh=None)

    def fitted(call: _Call):
        fit: Any = side.fit
        num = len(call.who.ids)

        def one_round(i, fitted):
            key = jax.random.fold_in(rng.stream(call.moment.root, "fit"), i)
            drawn = jax.random.permutation(key, num)[: fit.drawn(num)]

            def one(place, _):
                # Each may have a network of its own.
                who = jax.tree.map(lambda x: x[place][None], call.who)
                arrivals, shared = arrive(call._replace(who=who))
                client: deploy.Arrival = jax.tree.map(lambda x: x[0], arrivals)
                down = Downlink(shared.down, client.own, shared.round)
                held = ClientData(*client.inputs, call.samples.labelled)
                data = AdaptData(
                    ClientData(*client.train, shared.train),
                    ClientData(*client.inputs, shared.inputs),
                )
                key = jax.random.fold_in(client.key, i)
                return fit.send(key, fitted, down, client.state, data, held)

            return fit.absorb(fitted, each(one)(drawn, ()))

        return jax.lax.fori_loop(0, fit.rounds, one_round, fit.start())

    return {"evaluate": evaluated, "tune": tuned, "fit": fitted}


# Who goes where ----------------------------------------------------------------------


class _Part(NamedTuple):
    """Clients of one family in a population, or their values."""

    places: np.ndarray  # [k] in the population
    of: Any  # a `Population`, ids being numbers inside the family; or {name: [k]}


def _by_family(
    groups: Families, novel: Sequence[int] | np.ndarray, whom: Mapping[str, Population]
) -> dict[str, dict[str, _Part]]:
    """Cuts populations by family: {family: {metric: part}}."""
    found: dict[str, dict[str, _Part]] = {name: {} for name in groups.names}
    for metric, population in whom.items():
        for name, (places, numbers) in groups.numbers(population.ids, novel).items():
            if len(places) == len(population.ids):  # everybody, in order
                found[name][metric] = _Part(places, population._replace(ids=numbers))
                continue
            tables = (
                Table(table.rows[places], table.size[places])
                for table in (population.train, population.inputs)
            )
            found[name][metric] = _Part(places, Population(numbers, *tables))
    return found


def _together(alg: Algorithm, parts: list[_Part]) -> dict[str, np.ndarray]:
    """Per-client values in the order of the population."""
    if not alg.has_families:
        return parts[0].of
    num = sum(len(part.places) for part in parts)
    found: dict[str, np.ndarray] = {}
    for places, values in parts:
        for column, x in values.items():
            empty = np.full((num, *x.shape[1:]), np.nan)
            found.setdefault(column, empty)[places] = x
    return found


class _Shape(NamedTuple):
    """One shape that a family's populations are padded to, so as to share a program."""

    clients: int
    train: int
    inputs: int

    @classmethod
    def of(cls, parts: Mapping[str, _Part]) -> "_Shape":
        """The largest of each length."""
        every = [part.of for part in parts.values()]
        return cls(
            max((len(population.ids) for population in every), default=0),
            max((population.train.rows.shape[1] for population in every), default=0),
            max((population.inputs.rows.shape[1] for population in every), default=0),
        )


def _lanes(num: int, width: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Divides a population of `num` into calls of `width` clients.

    Yields (places in it [width], how many are scored, how many have samples). In a
    population of several calls, each call's last lane only lends its state.
    """
    stride = width if num <= width else width - 1
    for start in range(0, num, stride):
        real = min(stride, num - start)
        lanes = num if num <= width else real + 1
        yield (start + np.arange(width)) % num, real, lanes


def _most(pool: Pool, population: Population, width: int) -> int:
    """How many samples `clients.some` takes for so many of a population, at most."""
    each = np.sort(population.train.size + population.inputs.size)
    # And the sample that padding shows.
    return room_for(min(len(pool.x), int(each[-width:].sum()) + 1))


def _some(
    carry: schedule.Carry,
    family: str,
    population: Population,
    places: np.ndarray,
    lanes: int,
    shape: _Shape,
    fetch: Callable,
) -> deploy.Clients:
    """Some clients of a population; those from `lanes` on have no samples."""
    alive = np.arange(len(places)) < lanes

    def pick(table: Table, length: int) -> Table:
        rows = table.rows[places]
        rows = np.pad(rows, ((0, 0), (0, length - rows.shape[1])))
        size = np.where(alive, table.size[places], 0)
        return Table(jnp.asarray(rows), jnp.asarray(size))

    ids = population.ids[places]
    tables = pick(population.train, shape.train), pick(population.inputs, shape.inputs)
    return deploy.find(carry, family, ids, *tables, fetch=fetch)


def summarise(values: np.ndarray, size: np.ndarray) -> dict[str, float]:
    """Returns percentages of per-client accuracies [n], shares in [0, 1].

    "" is weighted by samples; "_mean", "_std" and "_p10" are over clients. All are NaN
    if a client has no accuracy (NaN): a mean of the others would be one of the lucky.
    """
    percent = 100.0 * np.asarray(values, np.float64)
    return {
        "": float(np.average(percent, weights=np.maximum(size, 1e-9))),
        "_mean": float(percent.mean()),
        "_std": float(percent.std()),
        "_p10": float(np.percentile(percent, 10)),
    }
