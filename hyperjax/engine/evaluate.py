"""Deploys a method on clients and scores it, without a trace in the training state.

Every client is deployed the same way: `client.adapt` on its labelled training samples
(none for a zero-shot client) and its unlabelled inputs, then `client.deploy`. Beside
the plain accuracy each client gets that of two controls which need nothing but the
model's own outputs: label-shift EM, and its oracle.

Saerens, Latinne, Decaestecker 2002, "Adjusting the Outputs of a Classifier to New a
Priori Probabilities", Neural Computation 14(1): `prior_em` is their equation 2.4.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import rng, tree
from hyperjax.data import clients
from hyperjax.data.clients import Table
from hyperjax.engine import exchange, schedule, sharding, stores
from hyperjax.engine.compiled import Compiled
from hyperjax.types import (
    AdaptData,
    Algorithm,
    Array,
    ClientData,
    Downlink,
    Model,
    Pool,
    PyTree,
)

EM_STEPS = 1000  # upper bound; it stops once the prior moves by less than 1e-6
SCORES = ("accuracy", "accuracy_em", "accuracy_oracle", "accuracy_swapped", "loss")


class Population(NamedTuple):
    """Clients to evaluate: their ids, labelled training rows, and rows to predict."""

    ids: np.ndarray  # [n] int32; ids from N on never trained
    train: Table
    inputs: Table


def prior_em(probs: Array, mask: Array, source: Array) -> Array:
    """Estimates a client's class prior from a model's outputs on unlabelled inputs.

    Args:
      probs: [n, K] predicted probabilities of a model trained under `source`.
      mask: [n] float32, 1 for real samples.
      source: [K] class prior of the training data.

    Returns:
      [K] prior at which expectation maximisation converged; `source` if n is 0.
    """
    total = jnp.maximum(jnp.sum(mask), 1.0)

    def step(state):
        prior, _, count = state
        joint = probs * (prior / source)
        posterior = joint / jnp.maximum(jnp.sum(joint, -1, keepdims=True), 1e-30)
        new = jnp.sum(jnp.where(mask[:, None] > 0, posterior, 0.0), 0) / total
        return new, jnp.max(jnp.abs(new - prior)), count + 1

    def moving(state):
        return (state[1] > 1e-6) & (state[2] < EM_STEPS)

    start = (source, jnp.float32(jnp.inf), jnp.int32(0))
    prior = jax.lax.while_loop(moving, step, start)[0]
    return jnp.where(jnp.sum(mask) > 0, prior, source)


def _correct(logits, labels, mask, prior, source):
    """Number of right answers after moving logits from prior `source` to `prior`."""
    # Floored: a class the client does not hold must lose, yet stay finite.
    shift = jnp.log(jnp.maximum(prior, 1e-30)) - jnp.log(source)
    right = jnp.argmax(logits + shift, -1) == labels
    return jnp.sum(jnp.where(mask > 0, right, False).astype(jnp.float32))


def predict_all(
    model: Model, variables: PyTree, data: ClientData, num_classes: int, batch_size: int
) -> Array:
    """Returns logits [n_max, K] in stored order; n_max a multiple of the batch size."""

    def step(state, batch):
        i, logits = state
        new = model.predict(variables, batch.x)
        return i + 1, jax.lax.dynamic_update_slice(logits, new, (i * batch_size, 0))

    empty = jnp.zeros((data.rows.shape[0], num_classes), jnp.float32)
    return clients.fold(step, (jnp.int32(0), empty), data, batch_size)[1]


class Evaluator(NamedTuple):
    """`evaluate(root, carry, round) -> {population: {name: [n] per-client values}}`.

    Names: "size", "accuracy" (a share), "accuracy_em", "accuracy_oracle", "loss", for
    methods whose deployment differs between clients "accuracy_swapped" (with the next
    client's adapted state) and "distance_swapped" (relative distance between the two
    deployed networks), and whatever `model.inspect` reports.
    """

    evaluate: Callable
    program: Compiled


def evaluator(
    alg: Algorithm,
    pool: Pool,
    populations: Mapping[str, Population],
    *,
    source_prior: np.ndarray,
    batch_size: int = 256,
    clients_per_call: int = 64,
    mesh: Any = None,
) -> Evaluator:
    """Builds the evaluation of a method.

    Args:
      alg: the method.
      pool: the samples.
      populations: who is evaluated; all are padded to one shape, so that one program
        serves them.
      source_prior: [K] class prior of all participating clients' training samples.
      batch_size: B of prediction.
      clients_per_call: how many clients are on the device at a time.
      mesh: devices to spread clients over.
    """
    program = Compiled(mesh)
    largest = max(len(population.ids) for population in populations.values())
    width = sharding.padded_size(min(largest, max(2, clients_per_call)), mesh)
    longest = [
        max(
            getattr(population, name).rows.shape[1]
            for population in populations.values()
        )
        for name in ("train", "inputs")
    ]
    source = jnp.asarray(np.maximum(source_prior, 1e-6), jnp.float32)
    source = source / jnp.sum(source)
    unlabelled = pool._replace(y=jnp.full_like(pool.y, -1))
    pools = sharding.replicate((pool, unlabelled), mesh)

    def adapt_one(mapped, shared):
        key, own, row, (train, train_size), (inputs, inputs_size) = mapped
        common, round, (pool, unlabelled) = shared
        down = Downlink(common, own, round)
        data = AdaptData(
            ClientData(train, train_size, pool),
            ClientData(inputs, inputs_size, unlabelled),
        )
        adapted = alg.client.adapt(key, down, row, data)
        variables = alg.client.deploy(down, adapted)
        return adapted, alg.client.model.inspect(variables, data.inputs)

    def score_one(mapped, shared):
        own, adapted, other_own, other, (rows, size) = mapped
        common, round, (pool, unlabelled) = shared
        model = alg.client.model
        variables = alg.client.deploy(Downlink(common, own, round), adapted)
        n_max = rows.shape[0]
        length = -(-n_max // batch_size) * batch_size
        data = ClientData(jnp.pad(rows, (0, length - n_max)), size, unlabelled)
        labels = pool.y[data.rows]
        mask = (jnp.arange(length) < size).astype(jnp.float32)

        def all_logits(variables):
            return predict_all(model, variables, data, len(source), batch_size)

        logits = all_logits(variables)
        count = jnp.maximum(size, 1)
        log_probs = jax.nn.log_softmax(logits)
        truth = jnp.zeros_like(source).at[labels].add(mask) / count
        estimate = prior_em(jnp.exp(log_probs), mask, source)
        nll = -jnp.take_along_axis(log_probs, labels[:, None], 1)[:, 0]
        result = {
            "accuracy": _correct(logits, labels, mask, source, source) / count,
            "accuracy_em": _correct(logits, labels, mask, estimate, source) / count,
            "accuracy_oracle": _correct(logits, labels, mask, truth, source) / count,
            "loss": jnp.sum(jnp.where(mask > 0, nll, 0.0)) / count,
        }
        if jax.tree.leaves((own, adapted)):
            swapped = alg.client.deploy(Downlink(common, other_own, round), other)
            right = _correct(all_logits(swapped), labels, mask, source, source)
            mine, theirs = model.export(variables), model.export(swapped)
            distance = tree.norm(tree.sub(mine, theirs)) / tree.norm(mine)
            result |= {"accuracy_swapped": right / count, "distance_swapped": distance}
        return result

    map_adapt = sharding.map_clients(adapt_one, "map", mesh)
    map_score = sharding.map_clients(score_one, "map", mesh)

    def evaluate_block(
        root, round, server, rows, seen, ids, train, inputs, pools, real
    ):
        key = jax.random.fold_in(rng.stream(root, "evaluate"), round)
        cohort = exchange.Cohort(
            ids, jnp.ones(len(ids)), jnp.ones(len(ids)), jnp.int32(round)
        )
        down = alg.server.downlink(rng.stream(key, "downlink"), server, cohort)
        down = down._replace(round=cohort.round)
        start = tree.where_rows(seen, rows, exchange.first_visit(alg, root, down, ids))
        keys = rng.client_keys(rng.stream(key, "adapt"), ids)
        shared = (down.shared, down.round, pools)
        adapted, seen_info = map_adapt((keys, down.own, start, train, inputs), shared)
        # The neighbour whose state each client borrows: the next of the population.
        neighbour = (jnp.arange(len(ids)) + 1) % real
        other_own, other = jax.tree.map(lambda x: x[neighbour], (down.own, adapted))
        scores = map_score((down.own, adapted, other_own, other, inputs), shared)
        return {**scores, **seen_info}

    def evaluate_one(root, carry: schedule.Carry, round: int, population: Population):
        blocks = []
        num = len(population.ids)
        # In a population of several calls, each call's last lane only lends its state.
        stride = width if num <= width else width - 1
        for start in range(0, num, stride):
            real = min(stride, num - start)
            lanes = num if num <= width else real + 1
            alive = np.arange(width) < lanes
            place = (start + np.arange(width)) % num
            ids = population.ids[place]
            state, seen = _stored(carry, ids)
            args = (
                root,
                jnp.int32(round),
                carry.server,
                state,
                seen,
                jnp.asarray(ids),
                _pick(population.train, place, alive, longest[0]),
                _pick(population.inputs, place, alive, longest[1]),
                pools,
                jnp.int32(lanes),
            )
            args = sharding.replicate(args, mesh)
            out = jax.device_get(program("evaluate", evaluate_block, args))
            blocks.append(jax.tree.map(lambda x, n=real: x[:n], out))
        stacked = jax.tree.map(lambda *x: np.concatenate(x), *blocks)
        return {"size": population.inputs.size.copy(), **stacked}

    def evaluate(root, carry: schedule.Carry, round: int):
        return {
            name: evaluate_one(root, carry, round, population)
            for name, population in populations.items()
        }

    return Evaluator(evaluate, program)


def _stored(carry: schedule.Carry, ids: np.ndarray):
    """The stored state of clients; those from N on have none."""
    num_clients = len(carry.seen)
    rows, seen = stores.host_gather(carry.rows, carry.seen, ids)
    return rows, seen & (ids < num_clients)


def _pick(table: Table, place: np.ndarray, alive: np.ndarray, length: int):
    """Rows and sizes of clients, padded to `length`; the dead have no samples."""
    rows = np.pad(table.rows[place], ((0, 0), (0, length - table.rows.shape[1])))
    return jnp.asarray(rows), jnp.asarray(np.where(alive, table.size[place], 0))


def summarise(values: np.ndarray, size: np.ndarray) -> dict[str, float]:
    """Returns percentages of per-client accuracies [n], shares in [0, 1].

    "" is weighted by samples; "_mean", "_std" and "_p10" are over clients.
    """
    percent = 100.0 * np.asarray(values, np.float64)
    return {
        "": float(np.average(percent, weights=np.maximum(size, 1e-9))),
        "_mean": float(percent.mean()),
        "_std": float(percent.std()),
        "_p10": float(np.percentile(percent, 10)),
    }
