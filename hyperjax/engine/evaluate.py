"""Deploys a method on clients and scores it, without a trace in the training state.

Every client is deployed the same way: `client.adapt` on its labelled training samples
(none for a zero-shot client) and its unlabelled inputs, then `client.deploy`. Beside
the plain accuracy each client gets that of two controls which need nothing but the
model's own outputs: label-shift EM, and its oracle.

A client has no accuracy, which is NaN here and null in files, if the outputs for any of
its samples are not finite: the class of NaN would be class 0, and right now and then.

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
from hyperjax.errors import check_at_least
from hyperjax.types import (
    AdaptData,
    Algorithm,
    Array,
    ClientData,
    Cohort,
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


def _accuracy(logits, labels, mask, prior, source):
    """Share of right answers after moving logits from prior `source` to `prior`, [].

    NaN if the logits of any real sample are not finite.
    """
    # Floored: a class the client does not hold must lose, yet stay finite.
    shift = jnp.log(jnp.maximum(prior, 1e-30)) - jnp.log(source)
    right = jnp.argmax(logits + shift, -1) == labels
    return _mean_if_finite(right, logits, mask)


def _loss(logits, labels, mask):
    """Mean negative log-likelihood of the real samples, []; NaN as accuracies are."""
    log_probs = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_probs, labels[:, None], 1)[:, 0]
    return _mean_if_finite(nll, logits, mask)


def usable(logits: Array) -> Array:
    """Returns whether logits [..., K] say anything, [...] bool.

    They do without NaN and positive infinity; minus infinity rules a class out, but not
    all of them.
    """
    return jnp.all(logits < jnp.inf, -1) & jnp.any(jnp.isfinite(logits), -1)


def _mean_if_finite(values, logits, mask):
    """Mean of real samples' values [n], 0 without any; NaN if some are not `usable`."""
    finite = jnp.all(usable(logits) | (mask <= 0))
    total = jnp.sum(jnp.where(mask > 0, values.astype(jnp.float32), 0.0))
    return jnp.where(finite, total / jnp.maximum(jnp.sum(mask), 1.0), jnp.nan)


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


class Evaluator(NamedTuple):
    """Scores of the clients of every population: {population: {name: [n] values}}.

    `evaluate(root, carry, round)` deploys as the method does. Names: "size",
    "accuracy" (a share), "accuracy_em", "accuracy_oracle", "loss" (these four NaN for a
    client for one of whose samples the outputs are not finite), for methods whose
    deployment differs between clients "accuracy_swapped" (with the next client's
    adapted state) and "distance_swapped" (relative distance between the two deployed
    networks), and whatever `model.inspect` reports.

    `tune(root, carry, round, epochs)` fine-tunes each client's copy on its training
    samples first, at the learning rate of the last round. Names: "size", "accuracy",
    "loss".
    """

    evaluate: Callable
    tune: Callable
    program: Compiled


def evaluator(
    alg: Algorithm,
    pool: Pool,
    populations: Mapping[str, Population],
    *,
    source_prior: np.ndarray,
    tuned: Mapping[str, Population] | None = None,
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
      tuned: whom `tune` scores; their training rows are what they are tuned on.
      batch_size: B of prediction.
      clients_per_call: how many clients are on the device at a time.
      mesh: devices to spread clients over.
    """
    program = Compiled(mesh)
    source = jnp.asarray(np.maximum(source_prior, 1e-6), jnp.float32)
    source = source / jnp.sum(source)
    unlabelled = pool._replace(y=jnp.full_like(pool.y, -1))
    # Arguments of the programs, not constants in them: other federations of equal
    # shapes find the programs in the compilation cache.
    pools = sharding.replicate((pool, unlabelled, source), mesh)

    def adapt_one(mapped, shared):
        key, own, row, (train, train_size), (inputs, inputs_size) = mapped
        common, round, (pool, unlabelled, _), _ = shared
        down = Downlink(common, own, round)
        data = AdaptData(
            ClientData(train, train_size, pool),
            ClientData(inputs, inputs_size, unlabelled),
        )
        adapted = alg.client.adapt(key, down, row, data)
        variables = alg.client.deploy(down, adapted)
        return adapted, variables, data

    def inspect_one(mapped, shared):
        adapted, variables, data = adapt_one(mapped, shared)
        return adapted, alg.client.model.inspect(variables, data.inputs)

    def prediction(inputs, pools):
        """A function from variables to logits, labels, mask, all [n], and prior [K]."""
        rows, size = inputs
        n_max = rows.shape[0]
        width = min(batch_size, n_max)
        length = -(-n_max // width) * width
        data = ClientData(jnp.pad(rows, (0, length - n_max)), size, pools[1])
        mask = (jnp.arange(length) < size).astype(jnp.float32)

        def all_logits(variables):
            model, num_classes = alg.client.model, len(source_prior)
            return predict_all(model, variables, data, num_classes, width)

        return all_logits, pools[0].y[data.rows], mask, pools[2]

    def tune_one(mapped, shared):
        key, inputs, epochs = mapped[0], mapped[-1], shared[-1]
        _, variables, data = adapt_one(mapped, shared)
        last = jnp.maximum(shared[1] - 1, 0)  # whose learning rate training ended with
        variables = alg.client.tune(key, variables, data, last, epochs)
        all_logits, labels, mask, source = prediction(inputs, shared[2])
        logits = all_logits(variables)
        return {
            "accuracy": _accuracy(logits, labels, mask, source, source),
            "loss": _loss(logits, labels, mask),
        }

    def score_one(mapped, shared):
        own, adapted, other_own, other, inputs = mapped
        common, round, pools, _ = shared
        model = alg.client.model
        variables = alg.client.deploy(Downlink(common, own, round), adapted)
        all_logits, labels, mask, source = prediction(inputs, pools)
        logits = all_logits(variables)
        count = jnp.maximum(inputs[1], 1)
        truth = jnp.zeros_like(source).at[labels].add(mask) / count
        estimate = prior_em(jax.nn.softmax(logits), mask, source)
        result = {
            "accuracy": _accuracy(logits, labels, mask, source, source),
            "accuracy_em": _accuracy(logits, labels, mask, estimate, source),
            "accuracy_oracle": _accuracy(logits, labels, mask, truth, source),
            "loss": _loss(logits, labels, mask),
        }
        if jax.tree.leaves((own, adapted)):
            swapped = alg.client.deploy(Downlink(common, other_own, round), other)
            borrowed = all_logits(swapped)
            mine, theirs = model.export(variables), model.export(swapped)
            distance = tree.norm(tree.sub(mine, theirs)) / tree.norm(mine)
            result |= {
                "accuracy_swapped": _accuracy(borrowed, labels, mask, source, source),
                "distance_swapped": distance,
            }
        return result

    map_inspect = sharding.map_clients(inspect_one, "map", mesh)
    map_score = sharding.map_clients(score_one, "map", mesh)
    map_tune = sharding.map_clients(tune_one, "map", mesh)

    def arrivals(root, round, carry_parts, ids, population):
        """Keys, own downlinks and state of clients, and the shared downlink."""
        server, rows, seen = carry_parts
        key = jax.random.fold_in(rng.stream(root, "evaluate"), round)
        ones = jnp.ones(len(ids))
        cohort = Cohort(ids, ones, ones, jnp.int32(round), population)
        down = alg.server.downlink(rng.stream(key, "downlink"), server, cohort)
        down = down._replace(round=cohort.round)
        start = tree.where_rows(seen, rows, exchange.first_visit(alg, root, down, ids))
        keys = rng.client_keys(rng.stream(key, "adapt"), ids)
        return (keys, down.own, start), (down.shared, down.round)

    def evaluate_block(
        root, round, parts, ids, population, train, inputs, pools, lanes, epochs
    ):
        mapped, down = arrivals(root, round, parts, ids, population)
        shared = (*down, pools, epochs)
        adapted, seen_info = map_inspect((*mapped, train, inputs), shared)
        # The neighbour whose state each client borrows: the next of the population.
        neighbour = (jnp.arange(len(ids)) + 1) % lanes
        own = mapped[1]
        other_own, other = jax.tree.map(lambda x: x[neighbour], (own, adapted))
        scores = map_score((own, adapted, other_own, other, inputs), shared)
        return {**scores, **seen_info}

    def tune_block(
        root, round, parts, ids, population, train, inputs, pools, lanes, epochs
    ):
        mapped, down = arrivals(root, round, parts, ids, population)
        return map_tune((*mapped, train, inputs), (*down, pools, epochs))

    def score_all(name, block, whom, root, carry: schedule.Carry, round, epochs):
        root = rng.root_key(root)
        return {
            metric: score_population(
                name, block, _Shape.of(whom), root, carry, round, epochs, population
            )
            for metric, population in whom.items()
        }

    def score_population(name, block, shape, root, carry, round, epochs, population):
        blocks = []
        num = len(population.ids)
        width = sharding.padded_size(min(shape.clients, max(2, clients_per_call)), mesh)
        # In a population of several calls, each call's last lane only lends its state.
        stride = width if num <= width else width - 1
        for start in range(0, num, stride):
            real = min(stride, num - start)
            lanes = num if num <= width else real + 1
            alive = np.arange(width) < lanes
            place = (start + np.arange(width)) % num
            ids = population.ids[place]
            args = (
                root,
                jnp.int32(round),
                (carry.server, *_stored(carry, ids)),
                jnp.asarray(ids),
                jnp.float32(len(carry.seen)),
                _pick(population.train, place, alive, shape.train),
                _pick(population.inputs, place, alive, shape.inputs),
                pools,
                jnp.int32(lanes),
                jnp.int32(epochs),
            )
            args = sharding.replicate(args, mesh)
            out = jax.device_get(program(name, block, args))
            blocks.append(jax.tree.map(lambda x, n=real: x[:n], out))
        stacked = jax.tree.map(lambda *x: np.concatenate(x), *blocks)
        return {"size": population.inputs.size.copy(), **stacked}

    def evaluate(root, carry: schedule.Carry, round: int):
        return score_all("evaluate", evaluate_block, populations, root, carry, round, 0)

    def tune(root, carry: schedule.Carry, round: int, epochs: int):
        check_at_least(0, epochs=epochs)
        whom = tuned or {}
        return score_all("tune", tune_block, whom, root, carry, round, epochs)

    return Evaluator(evaluate, tune, program)


class _Shape(NamedTuple):
    """One shape that all populations are padded to, so that one program serves them."""

    clients: int
    train: int
    inputs: int

    @classmethod
    def of(cls, populations: Mapping[str, Population]) -> "_Shape":
        """The largest of each length."""
        every = populations.values()
        return cls(
            max(len(population.ids) for population in every),
            max(population.train.rows.shape[1] for population in every),
            max(population.inputs.rows.shape[1] for population in every),
        )


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
