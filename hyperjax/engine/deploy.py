"""Deploys clients from the state of a run: what scoring, tuning and serving share.

A client is deployed by `client.adapt` on its labelled training samples (none for a
zero-shot client) and its unlabelled inputs, then by `client.deploy`. Its keys follow
from the root, the round and its id, so that it gets the same network whoever asks and
whoever is deployed beside it. Nothing of it is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import rng, tree
from hyperjax.data import clients
from hyperjax.data.clients import Table
from hyperjax.engine import checks, exchange, families, schedule, sharding, stores
from hyperjax.engine.compiled import Compiled, Hyper
from hyperjax.engine.families import Families
from hyperjax.errors import check_at_least
from hyperjax.types import (
    AdaptData,
    Algorithm,
    Array,
    ClientData,
    ClientSide,
    Cohort,
    Downlink,
    Key,
    Model,
    Pool,
    PyTree,
    in_one_line,
)


class Moment(NamedTuple):
    """A run after some rounds, as one family sees it."""

    root: Key
    round: Array  # [] int32, how many rounds have been
    server: PyTree
    population: Array  # [] float32, N_f


class Clients(NamedTuple):
    """Who is to be deployed, of one family and from one call: leaves [C, ...]."""

    ids: Any  # [C] int32, numbers inside the family; those from N_f on never trained
    state: PyTree  # stored rows
    seen: Any  # [C] bool, whether they count
    train: Table  # labelled samples; size 0 for a zero-shot client
    inputs: Table


class Arrival(NamedTuple):
    """A client before its deployment; leaves [C, ...] for several."""

    key: Key
    own: PyTree  # its own part of the downlink
    state: PyTree
    train: Table
    inputs: Table


class Shared(NamedTuple):
    """What clients who are deployed together have in common."""

    down: PyTree  # the shared part of the downlink
    round: Array
    train: Pool  # of the labelled samples
    inputs: Pool  # of the inputs, every label withheld
    fitted: PyTree = ()  # see `types.Fit`


class Adapted(NamedTuple):
    """A client that is ready to predict."""

    state: PyTree  # of `client.adapt`
    variables: PyTree
    data: AdaptData  # what it has looked at


class Deployed(NamedTuple):
    """What a client gets; host arrays.

    `variables` are those that its family's model predicts with. `network` is what would
    run on the client: variables of a plain network (`model.serve.export`), which for a
    method with a classifier per sample is none of its own. `about` is what the method
    reports of a client (`model.serve.inspect`), such as its embedding.
    """

    variables: PyTree
    network: PyTree
    logits: Array  # [n, K] float32, of its inputs in the order given
    about: dict[str, Array]

    def __repr__(self) -> str:
        return in_one_line(self)


def moment(root: Key, carry: schedule.Carry, round: int, family: str) -> Moment:
    """Returns a run with the state `carry` after `round` rounds."""
    population = jnp.float32(len(carry.seen[family]))
    return Moment(root, jnp.int32(round), carry.server, population)


def find(
    carry: schedule.Carry,
    family: str,
    ids: np.ndarray,
    train: Table,
    inputs: Table,
    *,
    fetch: Callable = lambda *given: stores.host_gather(*given[:3]),
) -> Clients:
    """Returns clients with the state that is stored of them; who never trained: none.

    Args:
      carry: the state of a run, on the device or the host.
      family: theirs.
      ids: [C] int32, numbers inside the family.
      train: labelled samples, [C] rows.
      inputs: what they are to predict, [C] rows.
      fetch: `(rows, seen, ids, family) -> (rows, seen)` of these; by default they are
        all here.
    """
    rows, seen = fetch(carry.rows[family], carry.seen[family], ids, family)
    known = ids < len(carry.seen[family])
    return Clients(jnp.asarray(ids), rows, seen & known, train, inputs)


def arrive(
    alg: Algorithm,
    family: str,
    at: Moment,
    who: Clients,
    pools: tuple[Pool, Pool],
    fitted: PyTree = (),
) -> tuple[Arrival, Shared]:
    """Returns clients of one family with what the server sends them; to be traced.

    `pools` are those of labelled samples and of inputs without their labels.
    """
    key = jax.random.fold_in(rng.stream(at.root, "evaluate"), at.round)
    ones = jnp.ones(len(who.ids))
    cohort = Cohort(who.ids, ones, ones, jnp.int32(at.round), at.population)
    server = families.mapped(alg).server
    send = server.release or server.downlink
    down = send(rng.stream(key, "downlink"), at.server, {family: cohort})[family]
    down = down._replace(round=cohort.round)
    first = exchange.first_visit(alg, at.root, down, who.ids, family)
    start = tree.where_rows(who.seen, who.state, first)
    keys = rng.client_keys(rng.stream(key, "adapt"), who.ids)
    arrival = Arrival(keys, down.own, start, who.train, who.inputs)
    return arrival, Shared(down.shared, down.round, *pools, fitted)


def adapt(side: ClientSide, client: Arrival, shared: Shared) -> Adapted:
    """Returns one client of a family, adapted and deployed."""
    down = Downlink(shared.down, client.own, shared.round)
    data = AdaptData(
        ClientData(*client.train, shared.train),
        ClientData(*client.inputs, shared.inputs),
        shared.fitted,
    )
    state = side.adapt(client.key, down, client.state, data)
    return Adapted(state, side.deploy(down, state), data)


# Prediction --------------------------------------------------------------------------


def in_batches(data: ClientData, batch_size: int) -> tuple[ClientData, int]:
    """Returns data padded to whole batches, and the size B of these.

    B is `batch_size`, or the client's n_max if that is less.
    """
    n_max = data.rows.shape[0]
    width = min(batch_size, n_max)
    return data._replace(rows=jnp.pad(data.rows, (0, -n_max % width))), width


def predict_all(
    model: Model, variables: PyTree, data: ClientData, num_classes: int, batch_size: int
) -> Array:
    """Returns logits [n_max, K] in stored order; n_max a multiple of the batch size.

    They are float32, in whatever precision the model computes.
    """

    def step(state, batch):
        i, logits = state
        new = model.predict(variables, batch.x).astype(logits.dtype)
        return i + 1, jax.lax.dynamic_update_slice(logits, new, (i * batch_size, 0))

    empty = jnp.zeros((data.rows.shape[0], num_classes), jnp.float32)
    return clients.fold(step, (jnp.int32(0), empty), data, batch_size)[1]


def deployer(
    alg: Algorithm,
    *,
    members: Families | None = None,
    novel: Sequence[int] | np.ndarray = (),
    batch_size: int = 256,
    mesh: Any = None,
    held: Mapping[str, stores.Held] | None = None,
    program: Compiled | None = None,
    hyper: Hyper | None = None,
) -> Callable[..., list[Deployed]]:
    """Builds the deployment of single clients.

    Args:
      alg: the method.
      members: who has trained, by family; None for a method without families.
      novel: [m] int, position in `members.names` of clients N to N + m - 1.
      batch_size: B of prediction.
      mesh: see `sharding.client_mesh`; where a run's state is, if on several devices.
      held: see `evaluate.evaluator`.
      program: the compiler; None for one of its own.
      hyper: see `schedule.simulator`.

    Returns:
      `deploy(root, carry, round, ids, inputs, train=None, fitted=None) -> [Deployed]`,
      a client each
      in the order of `ids`, the one that `Evaluator.evaluate(root, carry, round)`
      scores for equal data (equal up to rounding: batches of clients differ):

      root: a key or a seed, that of the run.
      carry: a run's state (`schedule.Carry`), as trained, or restored to the host.
      round: how many rounds it has been through.
      ids: [n] int. Participants have 0 to N - 1 and start from their stored state;
        other numbers never trained, and start as on a first visit. Novel clients of a
        federation have N to N + M - 1, and whoever is none of them, such as the global
        test set, N + M.
      inputs: the clients' inputs, rows [n, n_max] and sizes [n] of any pool; labels in
        that pool are not looked at.
      train: labelled samples to adapt on, likewise and of any pool; None for none.
      fitted: by family, what participants have found out, of `evaluate.Evaluator.fit`;
        None for a method whose clients need not be told.

      All networks of a call are on the device at once. It raises ValueError if there
      are not n rows, images have another shape than the network's, a client has no
      family, or nobody has found out what it needs to be told.
    """
    groups = families.check(alg, members)
    program, hyper = program or Compiled(mesh), hyper or Hyper.none(alg)
    values, fetch = hyper.values, stores.fetcher(held, mesh, program)
    programs = {name: _program(hyper.method, name, batch_size) for name in groups.names}

    def deploy(
        root: Any,
        carry: schedule.Carry,
        round: int,
        ids: Sequence[int] | np.ndarray,
        inputs: ClientData,
        train: ClientData | None = None,
        fitted: Mapping[str, PyTree] | None = None,
    ) -> list[Deployed]:
        ids, root = np.asarray(ids), rng.root_key(root)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise ValueError(f"ids={ids.tolist()}; accepted: one whole number or more")
        check_at_least(0, round=round, client=int(ids.min()))
        if train is None:
            nothing = jnp.zeros((len(ids), 1), jnp.int32)
            train = ClientData(nothing, nothing[:, 0], inputs.pool)
        for name, data in (("train", train), ("inputs", inputs)):
            _check(alg, name, data, len(ids))
        pools = train.pool, clients.withhold_labels(inputs).pool
        found: dict[int, Deployed] = {}
        for name, (places, numbers) in groups.numbers(ids, novel).items():
            tables = (Table(x.rows[places], x.size[places]) for x in (train, inputs))
            who = find(carry, name, numbers, *tables, fetch=fetch)
            if fitted is None and families.clients(alg)[name].fit is not None:
                raise ValueError(
                    "the method's clients adapt to their inputs by what participants "
                    "find out first, and no participants' samples are here"
                )
            told = () if fitted is None else fitted[name]
            args = moment(root, carry, round, name), who, pools, told
            args = (*sharding.replicate(args, mesh), values)
            out = jax.device_get(program("deploy", programs[name], args, family=name))
            for i, place in enumerate(places):
                one = jax.tree.map(lambda x, i=i: x[i], out)
                size = int(inputs.size[place])
                found[int(place)] = one._replace(logits=one.logits[:size])
        return [found[i] for i in range(len(ids))]

    return deploy


def _program(method: Callable[..., Algorithm], name: str, batch_size: int) -> Callable:
    """What is compiled for a family: a function from its clients to `Deployed`s."""

    def deploy_all(
        at: Moment,
        who: Clients,
        pools: tuple[Pool, Pool],
        fitted: PyTree,
        values: Any,
    ) -> Deployed:
        alg = method(values)
        side = families.clients(alg)[name]
        model = side.model
        arrivals, shared = arrive(alg, name, at, who, pools, fitted)

        def deploy_one(client: Arrival) -> Deployed:
            _, variables, data = adapt(side, client, shared)
            inputs, width = in_batches(data.inputs, batch_size)
            x = jax.ShapeDtypeStruct((1, *model.sample_shape), jnp.float32)
            num_classes = jax.eval_shape(model.predict, variables, x).shape[-1]
            logits = predict_all(model, variables, inputs, num_classes, width)
            about = model.serve.inspect(variables, data.inputs)
            return Deployed(variables, model.serve.export(variables), logits, about)

        return jax.lax.map(deploy_one, arrivals)

    return deploy_all


def _check(alg: Algorithm, name: str, data: ClientData, num: int) -> None:
    """Refuses data that are not those of `num` clients of the method."""
    checks.check_images(alg, data.pool)
    if len(np.shape(data.rows)) != 2 or not (
        len(data.rows) == num and np.shape(data.size) == (num,)
    ):
        raise ValueError(
            f"{name} has rows of shape {np.shape(data.rows)} and sizes of shape "
            f"{np.shape(data.size)} for {num} clients; accepted: [{num}, n_max] and "
            f"[{num}]"
        )
