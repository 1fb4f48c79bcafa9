"""Four clients with quadratic losses, whose gradients and optima are known.

Client k's loss is (theta - b_k)' A_k (theta - b_k) / 2 with theta = (body, head), and
all of its samples are the same, so its number of samples sets its number of steps and
nothing else.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.data import clients
from hyperjax.engine import exchange, stores
from hyperjax.models.linen import masked_mean
from hyperjax.training import Local, Phase
from hyperjax.types import (
    AdaptData,
    ClientData,
    Cohort,
    Downlink,
    Model,
    Outputs,
    Pool,
    Trained,
)

N, LR = 4, 0.125
# Eigenvalues between 0.58 and 3.42.
A = np.array(
    [[[2, 0.5], [0.5, 1]], [[1, 0], [0, 3]], [[1, -0.5], [-0.5, 1.5]], [[3, 1], [1, 1]]]
)
B = np.array([[1, 2], [-3, 0.5], [4, -1], [0, 3]])
START = np.array([1.0, -1.0])
SIZES = (1, 2, 3, 5)
EVERYONE = tuple(range(N))
# Five exchanges with absent, returning and dropped (-1 - k) clients, in any order.
PARTIAL = ((2, 0), (3, 2, 1), (1, 3), (0, -1 - 2, 3), (2, 3, 0, 1))
BODY, HEAD = r"params/body/.*", r"params/head/.*"

PLAIN = optax.sgd(LR)
# Momentum and decay move whatever they can; DRIFT is the same for `descend`.
DECAYING = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(LR, momentum=0.9))
DRIFT = dict(momentum=0.9, decay=0.1)
CLOSE = dict(rtol=1e-5, atol=1e-5)


@functools.cache
def training(optimizer=PLAIN, batch_size=1, **options):
    """How clients train; batches of one, so that sizes are steps."""
    return Local(optimizer=optimizer, batch_size=batch_size, **options)


def steps(count: int, optimizer=PLAIN):
    """Local training of `count` epochs of one step, for every client."""
    return training(optimizer, batch_size=8, phases=(Phase(epochs=count),))


def gradient(client: int, theta: np.ndarray) -> np.ndarray:
    """The gradient of a client's loss."""
    return A[client] @ (theta - B[client])


def optimum(weight=np.ones(N)) -> np.ndarray:
    """Where the weighted sum of all losses is least."""
    curvature = np.einsum("k,kij->ij", weight, A)
    return np.linalg.solve(curvature, np.einsum("k,kij,kj->i", weight, A, B))


def proximal(client: int, theta: np.ndarray, mu: float, shift=0.0) -> np.ndarray:
    """The minimiser of F_k(u) - <shift, u> + mu/2 |u - theta|^2."""
    curvature = A[client] + mu * np.eye(2)
    return np.linalg.solve(curvature, A[client] @ B[client] + mu * theta + shift)


def descend(
    client, theta, count, *, term=None, rate=LR, momentum=0.0, decay=0.0, train=(1, 1)
) -> np.ndarray:
    """Steps on a client's loss with `term(theta)` added to its gradient.

    Of the coordinates that are not trained nothing moves, whatever the optimizer does.
    """
    trace, train = np.zeros(2), np.array(train)
    for _ in range(count):
        slope = gradient(client, theta) + decay * theta
        trace = momentum * trace + slope + (0.0 if term is None else term(theta))
        theta = theta - rate * trace * train
    return theta


def federate(cohorts, visit, shared=(True, True), weight=(1, 1, 1, 1)):
    """Federated averaging of some coordinates, in float64.

    `visit(client, theta) -> theta` trains. Returns the server's theta, and what all
    clients ended their last visits with, [N, 2].
    """
    theta, own, weight = START, np.tile(START, (N, 1)), np.array(weight, float)
    for cohort in cohorts:
        alive = [k for k in cohort if k >= 0]
        for k in alive:
            own[k] = visit(k, np.where(shared, theta, own[k]))
        mean = np.average(own[alive], axis=0, weights=weight[alive])
        theta = np.where(shared, mean, theta)
    return theta, own


@functools.cache
def model() -> Model:
    def init(key):
        body, head = (jnp.float32(x) for x in START)
        return {"params": {"body": {"w": body}, "head": {"w": head}}, "stats": {}}

    def theta(variables):
        params = variables["params"]
        return jnp.stack([params["body"]["w"], params["head"]["w"]])

    def loss(key, variables, batch, context):
        x = batch.x.reshape(-1, 5)
        a = x[:, jnp.array([[0, 1], [1, 2]])]
        gap = theta(variables) - x[:, 3:]
        value = masked_mean(jnp.einsum("bi,bij,bj->b", gap, a, gap) / 2, batch.mask)
        outside = features(variables, batch.x)
        return value, Trained(variables["stats"], {"loss": value}, features=outside)

    def features(variables, x):
        body = variables["params"]["body"]["w"]
        return jnp.tile(jnp.stack([body, 1.0]), (x.shape[0], 1))

    def apply(variables, x):
        # The answer to any input is theta itself.
        return Outputs(theta(variables)[None], features(variables, x))

    return Model((1, 5, 1), init, loss, apply)


@functools.cache
def pool() -> Pool:
    """One row per client; inputs are (pixel - 50) / 10."""
    x = np.concatenate([A[:, [0, 0, 1], [0, 1, 1]], B], 1) * 10 + 50
    x = jnp.asarray(np.rint(x).astype(np.uint8).reshape(N, 1, 5, 1))
    one = jnp.ones(1)
    return Pool(x, jnp.zeros(N, jnp.int32), one * 50 / 255, one * 10 / 255)


@functools.cache
def averaged(train):
    """FedAvg, which most tests compare with; compiled once for each way to train."""
    return fedavg(model(), local=train)


class State(NamedTuple):
    """What a federation keeps, and what the last exchange sent."""

    server: Any
    rows: Any  # [N, ...]
    seen: Any  # [N]
    uplink: Any = None  # [C, ...] in the cohort's order; zero for inactive clients
    info: Any = None


@functools.cache
def _program(alg):
    """One exchange with the store around it, that also shows the uplinks."""

    def update(key, server, uplink, cohort):
        server, info = alg.server.update(key, server, uplink, cohort)
        return server, {**info, "uplink": uplink}

    shown = alg._replace(server=alg.server._replace(update=update))
    run = exchange.make_exchange(shown)

    def one(server, rows, seen, data, cohort):
        got, were = stores.gather(rows, seen, cohort.ids)
        server, new, info = run(jax.random.key(0), server, got, were, data, cohort)
        alive = cohort.active > 0
        rows, seen = stores.scatter(rows, seen, cohort.ids, new, alive)
        return State(server, rows, seen, info.pop("uplink"), info)

    return jax.jit(one)


@functools.cache
def start(alg) -> State:
    """The state before the first exchange."""
    server = alg.server.init(jax.random.key(0))
    return State(server, *stores.zeros(jax.eval_shape(_first_visit(alg), server), N))


def _first_visit(alg):
    """How a client starts; the messages of a method would take tracing its training."""

    def run(server):
        key, one = jax.random.key(0), jnp.ones(1)
        cohort = Cohort(jnp.zeros(1, jnp.int32), one, one, jnp.int32(0), jnp.float32(N))
        down = alg.server.downlink(key, server, cohort)
        own = jax.tree.map(lambda x: x[0], down.own)
        return alg.client.init(key, key, down._replace(own=own, round=cohort.round))

    return run


@functools.cache
def _table(sizes):
    return clients.table([np.full(n, k) for k, n in enumerate((*sizes, 8))])


def play(alg, *cohorts, state=None, sizes=SIZES, weight=(1, 1, 1, 1)) -> State:
    """Runs one exchange per cohort, a tuple of ids; the others are padding.

    A negative id -1 - k stands for a client k that was drawn and dropped out.
    """
    state = state or start(alg)
    for number, cohort in enumerate(cohorts):
        ids = np.array([*(-1 - i if i < 0 else i for i in cohort)], np.int32)
        active = np.array([float(i >= 0) for i in cohort], np.float32)
        ids = np.pad(ids, (0, N - len(ids)), constant_values=N)
        active = np.pad(active, (0, N - len(active)))
        place = np.minimum(ids, N - 1)
        rows, size = _table(tuple(sizes))
        data = ClientData(rows[place], size[place], pool())
        cohort = Cohort(
            ids,
            active,
            np.asarray(weight, np.float32)[place],
            np.int32(number),
            np.float32(N),
        )
        state = _program(alg)(*state[:3], data, cohort)
    return jax.device_get(state)


def vector(theta, prefix="params") -> np.ndarray:
    """From paths to (body, head) on the last axis."""
    return np.stack([theta[f"{prefix}/{name}/w"] for name in ("body", "head")], -1)


def deployed(alg, state: State, client: int) -> np.ndarray:
    """The theta that a client predicts with; its condition is not adapted."""
    down = Downlink((state.server.theta, ()), round=jnp.int32(0))
    row = jax.tree.map(lambda x: x[client], state.rows)
    variables = alg.client.deploy(down, row)
    return np.asarray(alg.client.model.predict(variables, jnp.zeros((1, 1, 5, 1))))[0]


def tuned(alg, client: int, size: int, epochs: int) -> np.ndarray:
    """The theta that a client predicts with once it is fine-tuned from the start."""
    state = start(alg)
    down = Downlink((state.server.theta, ()), round=jnp.int32(0))
    key = jax.random.key(0)
    data = ClientData(jnp.full(8, client), jnp.int32(size), pool())

    @jax.jit
    def run(key, down, data, epochs):
        adapt = AdaptData(data, clients.withhold_labels(data))
        row = alg.client.init(key, key, down)
        variables = alg.client.deploy(down, alg.client.adapt(key, down, row, adapt))
        tuned = alg.client.tune(key, variables, adapt, down.round, epochs)
        return alg.client.model.predict(tuned, jnp.zeros((1, 1, 5, 1)))[0]

    return np.asarray(run(key, down, data, jnp.int32(epochs)))
