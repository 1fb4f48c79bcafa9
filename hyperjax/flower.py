"""A method in a real deployment: its messages through Flower, process to process.

    # my_app.py
    import hyperjax as hj
    from hyperjax import flower

    METHOD = hj.algorithms.scaffold(model, local=local)
    server = flower.server_app(METHOD, num_clients=3, rounds=20, out="server.npz")
    client = flower.client_app(METHOD, own_data)   # (number) -> ClientData

Server and clients exchange what the simulator counts and nothing else: the arrays of a
`Downlink` and of an uplink, in order; their names and shapes both sides know from the
method. With the round's number, which is public, and equal seeds a deployment has the
simulator's keys, and so its states, up to rounding.

`serve` and `visit` are the two sides and know nothing of Flower, so that any other
transport can be put between them. Flower itself is the extra `hyperjax[flower]`; a
client's state is in its node's `context.state`. Start it with

    flower-superlink --insecure --host 127.0.0.1 --port 8000 \\
        --disable-runtime-dependency-installation
    flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9094 \\
        --node-config "partition-id=0"             # one for each client, ports apart
    flwr run . loop --stream

where the folder has a pyproject.toml, and Flower's own config.toml says where "loop"
is: `docs/reference/api/flower.md` has both in full.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import rng, tree
from hyperjax.engine import cohorts, comm, exchange
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.types import ALONE, Algorithm, ClientData, Cohort, Downlink, PyTree

Arrays = list[np.ndarray]
WEIGHTS = ("size", "uniform")


# Messages ----------------------------------------------------------------------------


def to_arrays(message: PyTree) -> Arrays:
    """Returns the arrays of a message, in the order of its leaves, on the host."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(message))]


def from_arrays(arrays: Sequence[np.ndarray], like: PyTree) -> PyTree:
    """Undoes `to_arrays`.

    Args:
      arrays: of a message.
      like: a message of that kind, abstract or not.

    Raises:
      ValueError: they are not those of such a message; the first that is not is named.
    """
    paths, leaves = tree.paths(like), jax.tree.leaves(like)
    if len(arrays) != len(leaves):
        raise ValueError(
            f"a message has {len(arrays)} arrays where {len(leaves)} are expected; do "
            "both sides have the same method and version?"
        )
    found = []
    for path, array, leaf in zip(paths, arrays, leaves, strict=True):
        array, dtype = np.asarray(array), np.dtype(leaf.dtype)
        if array.dtype.kind == "V" and array.dtype.itemsize == dtype.itemsize:
            array = array.view(dtype)  # NumPy's files do not know bfloat16 by name
        if (array.shape, array.dtype) != (leaf.shape, dtype):
            raise ValueError(
                f"{path} of a message is {array.dtype}{array.shape}; "
                f"{dtype}{tuple(leaf.shape)} is expected"
            )
        found.append(jnp.asarray(array))
    return jax.tree.unflatten(jax.tree.structure(like), found)


def check(alg: Algorithm) -> None:
    """Refuses methods whose rounds are more than one exchange with alike clients.

    Raises:
      ValueError: saying what the method has.
    """
    if alg.has_families:
        raise ValueError(
            f"the method has families of clients ({', '.join(sorted(alg.client))}); "
            "a deployment takes methods with one network for all"
        )
    if alg.opening is not None or alg.closing is not None:
        raise ValueError(
            "a round of the method has several exchanges; a deployment takes methods "
            "with one"
        )


# Both sides, whatever is between them -------------------------------------------------


def visit(
    alg: Algorithm,
    number: int,
    data: ClientData,
    round: int,
    down: Sequence[np.ndarray],
    state: Sequence[np.ndarray] | None,
    *,
    seed: int = 0,
    alone: bool = False,
) -> tuple[Arrays, Arrays]:
    """Returns what a client sends and what it keeps.

    Args:
      alg: the method.
      number: of the client, from 0 on.
      data: its samples; of a pool that may be its own.
      round: the number that came with the message.
      down: the message: the shared part of the downlink, and its own.
      state: what it kept last time; None on its first visit.
      seed: of the run, common to all.
      alone: the server steps after every client of a round.

    Raises:
      ValueError: the message, or the state, is not the method's.
    """
    spec = comm.describe(alg)
    shared, own = from_arrays(down, (spec.shared, spec.own))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec.client)
    kept = nothing if state is None else from_arrays(state, spec.client)
    who = jnp.int32(number), jnp.int32(round), jnp.array([state is not None])
    made = _visit(alg, alone)(rng.root_key(seed), *who, shared, own, kept, data)
    return to_arrays(made[0]), to_arrays(made[1])


@functools.lru_cache(maxsize=8)
def _visit(alg: Algorithm, alone: bool) -> Callable:
    @jax.jit
    def one(root, number, round, seen, shared, own, state, data):
        down = Downlink(shared, own, round)
        rows, owns = (jax.tree.map(lambda x: x[None], x) for x in (state, own))
        several = Downlink(shared, owns, round)
        first = exchange.first_visit(alg, root, several, number[None])
        state = jax.tree.map(lambda x: x[0], tree.where_rows(seen, rows, first))
        key = rng.stream(_key(root, round, number, alone), "client_update")
        key = jax.random.fold_in(key, number)
        return alg.client.update(key, down, state, data)[:2]

    return one


def serve(
    alg: Algorithm,
    weight: Sequence[float] | np.ndarray,
    rounds: int,
    send: Callable[[int, dict[int, Arrays]], Mapping[int, Sequence[np.ndarray]]],
    *,
    seed: int = 0,
    cohort_size: int | None = None,
    sequential: bool = False,
) -> PyTree:
    """Returns the server's state after some rounds with clients 0 to N - 1.

    Args:
      alg: the method.
      weight: [N] of clients in means, registered once.
      rounds: how many.
      send: `(round, {client: message}) -> {client: message}`: brings clients what they
        are sent and comes back with what they send. Who is missing has dropped out.
      seed: of the run.
      cohort_size: clients of a round, drawn anew each time; None: all.
      sequential: the server steps after every client of a round.

    Raises:
      ValueError: a message is not the method's, or a number is out of range.
    """
    check(alg)
    check_at_least(0, rounds=rounds)
    given = np.asarray(weight, np.float32)
    num = len(given)
    check_number(at_least=1, at_most=num, whole=True, cohort_size=cohort_size or num)
    root, spec = rng.root_key(seed), comm.describe(alg)
    server = jax.jit(alg.server.init)(rng.stream(root, "common_init"))

    @jax.jit
    def downlink(server, cohort: Cohort):
        key = _key(root, cohort.round, cohort.ids[0], sequential)
        return alg.server.downlink(rng.stream(key, "downlink"), server, cohort)

    @jax.jit
    def update(server, uplinks, cohort: Cohort):
        key = _key(root, cohort.round, cohort.ids[0], sequential)
        alive = cohort.active > 0
        uplinks = tree.where_rows(alive, uplinks, tree.zeros_like(uplinks))
        key = rng.stream(key, "server_update")
        return alg.server.update(key, server, uplinks, cohort)[0]

    nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec.uplink)
    for round in range(rounds):
        for ids in _cohorts(root, round, num, cohort_size, sequential):
            cohort = exchange.make_cohort(
                jnp.asarray(ids), num, jnp.asarray(given), jnp.int32(round), len(ids)
            )
            down = jax.device_get(downlink(server, cohort))
            parts = [
                jax.tree.map(lambda x, i=i: x[i], down.own) for i in range(len(ids))
            ]
            sent = {
                int(client): to_arrays((down.shared, own))
                for client, own in zip(ids, parts, strict=True)
            }
            got = send(round, sent)
            here = np.array([client in got for client in sent], np.float32)
            ups = [
                from_arrays(got[client], spec.uplink) if client in got else nothing
                for client in sent
            ]
            uplinks = jax.tree.map(lambda *x: jnp.stack(x), *ups)
            server = update(server, uplinks, cohort._replace(active=jnp.asarray(here)))
    return jax.device_get(server)


def _key(root: Any, round: Any, client: Any, alone: bool) -> Any:
    """The simulator's key of an exchange; see `exchange.make_joint_exchange`."""
    key = jax.random.fold_in(root, round)
    return jax.random.fold_in(rng.stream(key, ALONE), client) if alone else key


def _cohorts(
    root: Any, round: int, num: int, size: int | None, sequential: bool
) -> list[np.ndarray]:
    """Who takes part in the exchanges of a round, as the simulator draws them."""
    key = rng.stream(jax.random.fold_in(root, round), "cohort")
    sampler = "full" if size is None else "uniform"
    ids = cohorts.sample(sampler, key, num, size or num)
    if not sequential:
        return [np.asarray(ids)]
    ids = jax.random.permutation(rng.stream(key, "order"), ids)
    return [np.asarray([i]) for i in ids]


# Flower ------------------------------------------------------------------------------

_DOWN, _UP, _CLOCK, _STATE = "down", "up", "clock", "state"


def _flower() -> Any:
    """Flower's types.

    Raises:
      ImportError: it is not installed.
    """
    try:
        from flwr import app
    except ImportError as error:
        raise ImportError(
            "flwr is not installed; pip install 'hyperjax[flower]'"
        ) from error
    return app


def server_app(
    alg: Algorithm,
    *,
    num_clients: int,
    rounds: int,
    seed: int = 0,
    weights: str = "size",
    cohort_size: int | None = None,
    sequential: bool = False,
    out: str | None = None,
    timeout: float = 600.0,
) -> Any:
    """Returns a Flower ServerApp that runs a method; see `serve`.

    Args:
      alg: the method.
      num_clients: N; it begins when so many have come, with numbers 0 to N - 1.
      rounds: how many.
      seed: of the run.
      weights: of clients in means: "size", the number of samples that they register,
        or "uniform".
      cohort_size: clients of a round, drawn anew each time; None: all.
      sequential: the server steps after every client of a round.
      out: .npz file that the server's state is written to, by path.
      timeout: seconds to wait for clients to come, or to answer; who does not answer
        has dropped out of the round.

    Raises:
      ImportError: Flower is not installed.
      ValueError: a method that cannot be deployed, or an unknown choice.
    """
    app = _flower()
    from flwr.serverapp import ServerApp

    check(alg)
    check_at_least(1, num_clients=num_clients)
    check_choice("weights", weights, WEIGHTS)
    found = ServerApp()

    @found.main()
    def main(grid: Any, context: Any) -> None:
        nodes, sizes = _registered(app, grid, num_clients, timeout)
        weight = sizes if weights == "size" else np.ones(num_clients)

        def send(round: int, messages: dict[int, Arrays]) -> dict[int, Arrays]:
            clock = app.ConfigRecord(
                {"round": round, "seed": seed, "alone": sequential}
            )
            return _answers(
                grid,
                [
                    app.Message(
                        content=app.RecordDict(
                            {_DOWN: _record(app, arrays), _CLOCK: clock}
                        ),
                        message_type="train",
                        dst_node_id=nodes[client],
                    )
                    for client, arrays in messages.items()
                ],
                {node: client for client, node in nodes.items()},
                timeout,
            )

        server = serve(
            alg,
            weight,
            rounds,
            send,
            seed=seed,
            cohort_size=cohort_size,
            sequential=sequential,
        )
        if out is not None:
            arrays: dict[str, Any] = tree.by_path(server)
            np.savez(str(Path(out).expanduser()), **arrays)

    return found


def _registered(
    app: Any, grid: Any, num_clients: int, timeout: float
) -> tuple[dict[int, int], np.ndarray]:
    """Waits for all clients; returns their nodes, and how many samples they have."""
    until = time.monotonic() + timeout
    while len(ids := list(grid.get_node_ids())) < num_clients:
        if time.monotonic() > until:
            raise TimeoutError(
                f"{len(ids)} of {num_clients} clients came in {timeout:.0f} seconds"
            )
        time.sleep(0.5)
    ask = [
        app.Message(content=app.RecordDict(), message_type="query", dst_node_id=node)
        for node in ids
    ]
    nodes, sizes = {}, np.zeros(num_clients)
    for reply in grid.send_and_receive(ask, timeout=timeout):
        _check_reply(reply)
        told = reply.content["who"]
        number = int(told["number"])
        if not 0 <= number < num_clients or number in nodes:
            raise ValueError(
                f"a client has the number {number}; each of 0 to {num_clients - 1} is "
                "needed once: its node's partition-id"
            )
        nodes[number] = reply.metadata.src_node_id
        sizes[number] = float(told["samples"])
    if len(nodes) < num_clients:
        raise TimeoutError(f"{len(nodes)} of {num_clients} clients said who they are")
    return nodes, sizes


def _answers(
    grid: Any, messages: list[Any], clients: dict[int, int], timeout: float
) -> dict[int, Arrays]:
    """Sends; returns what came back by client."""
    found = {}
    for reply in grid.send_and_receive(messages, timeout=timeout):
        _check_reply(reply)
        arrays = reply.content[_UP].to_numpy_ndarrays()
        found[clients[reply.metadata.src_node_id]] = arrays
    return found


def _check_reply(reply: Any) -> None:
    """A client that fails is a mistake in an app, and no drop-out."""
    if reply.has_error():
        raise RuntimeError(f"a client failed: {reply.error.reason}")


def _record(app: Any, arrays: Arrays) -> Any:
    return app.ArrayRecord(numpy_ndarrays=list(arrays))


def client_app(alg: Algorithm, data: Callable[[int], ClientData]) -> Any:
    """Returns a Flower ClientApp of a method; see `visit`.

    Its number is `partition-id` of its node's configuration.

    Args:
      alg: the method, equal to the server's.
      data: `(number) -> ClientData`, the samples of a client.

    Raises:
      ImportError: Flower is not installed.
      ValueError: a method that cannot be deployed.
    """
    app = _flower()
    from flwr.clientapp import ClientApp

    check(alg)
    found = ClientApp()

    def number_of(context: Any) -> int:
        return int(context.node_config["partition-id"])

    @found.query()
    def query(message: Any, context: Any) -> Any:
        number = number_of(context)
        told = {"number": number, "samples": int(data(number).size)}
        who = app.RecordDict({"who": app.MetricRecord(told)})
        return app.Message(content=who, reply_to=message)

    @found.train()
    def train(message: Any, context: Any) -> Any:
        number, clock = number_of(context), message.content[_CLOCK]
        kept = context.state.get(_STATE)
        up, state = visit(
            alg,
            number,
            data(number),
            int(clock["round"]),
            message.content[_DOWN].to_numpy_ndarrays(),
            None if kept is None else kept.to_numpy_ndarrays(),
            seed=int(clock["seed"]),
            alone=bool(clock["alone"]),
        )
        context.state[_STATE] = _record(app, state)
        content = app.RecordDict({_UP: _record(app, up)})
        return app.Message(content=content, reply_to=message)

    return found
