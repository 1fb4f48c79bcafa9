"""FedGen: a generator of features, learnt from clients' heads, regularises them all.

Zhu, Hong, Zhou 2021, "Data-Free Knowledge Distillation for Heterogeneous Federated
Learning", ICML (arXiv:2105.10056), algorithm 1. G(eps, y) maps noise and a label to the
input of the head. After each round the server takes Adam steps on

    alpha_s sum_k w_k(y) CE(head_k(G(eps, y)), y) + eta_s diversity(G)

for labels y that participants hold, with w_k(y) client k's share of them, and then
averages the models. Clients train, from the second round on, with

    CE(f(x), y) + b_t KL(head(G(y)) || f(x)) + a_t (B_gen / B) CE(head(G(y')), y'),

y' drawn from the labels that they hold, a_t = alpha decay^t and b_t = beta decay^t in
round t = 1, 2, ..., but no less than 1e-4 where alpha and beta are not. Both f(x) are
of one pass, with dropout where the network has it. B is the batch
size, also of a last batch that is not full; one of a single sample has no KL term. The
generator has batch statistics in every use and so no running ones to send. Corrected
against the public code: teachers are the clients' own heads, and clients do not change
the generator. Deviations: the server's Adam has neither decay nor schedule, and
fine-tuning keeps the terms of a client's last visit.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from hyperjax import tree, wrappers
from hyperjax.algorithms.fedavg import fedavg, told
from hyperjax.data import clients
from hyperjax.errors import check_at_least, check_number
from hyperjax.models import HEAD, memory
from hyperjax.models.layers import BatchNorm, Dense
from hyperjax.models.linen import check_gives, distillation
from hyperjax.registry import hands_on
from hyperjax.training import Local, check_given
from hyperjax.tree import Patterns
from hyperjax.types import (
    Algorithm,
    Array,
    ClientSide,
    Downlink,
    Key,
    Model,
    PyTree,
    ServerSide,
)

NAME = "generator"  # in a client's memory
COUNT_BATCH = 256  # samples at a time that are counted
FLOOR = 1e-4  # of the coefficients, in the authors' code


class Generator(nn.Module):
    """Noise [B, d] and one-hot labels [B, K] to features [B, L]."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, noise: Array, labels: Array, mask: Array | None = None) -> Array:
        x = Dense(self.hidden)(jnp.concatenate([noise, labels], -1))
        # Statistics of the batch itself, in training and on clients alike.
        x = nn.relu(BatchNorm()(x, True, mask))
        return Dense(self.features)(x)


class State(NamedTuple):
    """FedAvg's state, the generator's parameters and its optimizer."""

    inner: PyTree
    generator: PyTree
    opt: PyTree


class Uplink(NamedTuple):
    """FedAvg's uplink, and how many samples of each label the client has, [K]."""

    inner: PyTree
    counts: Array


@hands_on(fedavg)
def fedgen(
    model: Model,
    *,
    local: Local,
    head: Patterns = HEAD,
    noise_size: int = 32,
    hidden_size: int = 32,
    alpha: float = 10.0,
    beta: float = 10.0,
    decay: float = 0.98,
    generator_steps: int = 5,
    generator_batch_size: int = 32,
    generator_learning_rate: float = 3e-4,
    teacher_weight: float = 1.0,
    diversity_weight: float = 0.0,
    **fedavg_options,
) -> Algorithm:
    """Returns FedGen; defaults are those of the count that HyperFedNet's paper charges.

    Args:
      model: what is trained; its last layer is linear and matches `head`.
      local: how clients train, see `fedavg`.
      head: patterns of the last layer's kernel [L, K] and bias [K].
      noise_size: numbers in eps.
      hidden_size: of the generator (256 in the authors' runs).
      alpha: weight a_0.
      beta: weight b_0.
      decay: factor on both, each round.
      generator_steps: Adam steps a round (50 in the authors' runs).
      generator_batch_size: B_gen.
      generator_learning_rate: of Adam.
      teacher_weight: alpha_s.
      diversity_weight: eta_s (1 in the authors' runs).
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: the head has not the two leaves, a size is below 1, or the model does
        not give its logits in training.
    """
    check_given(model, local)
    check_at_least(
        1,
        noise_size=noise_size,
        hidden_size=hidden_size,
        generator_batch_size=generator_batch_size,
    )
    check_at_least(0, generator_steps=generator_steps)
    check_number(
        at_least=0,
        alpha=alpha,
        beta=beta,
        generator_learning_rate=generator_learning_rate,
        teacher_weight=teacher_weight,
        diversity_weight=diversity_weight,
    )
    check_number(at_least=0, at_most=1, decay=decay)
    check_gives(model, "logits")
    generated = _generated(model, head, noise_size, hidden_size)
    weigh = _Weights(alpha, beta, decay, generator_batch_size / local.batch_size)
    fit = _Fit(
        generator_steps,
        generator_batch_size,
        optax.adam(generator_learning_rate),
        teacher_weight,
        diversity_weight,
    )
    whole = _regularised(model, generated, weigh, generator_batch_size)
    inner = fedavg(whole, local=local, **fedavg_options)
    return Algorithm(
        _server(inner.server, generated, fit),
        _client(inner.client, generated.num_classes, weigh),
        exact=("counts", *(f"inner/{pattern}" for pattern in inner.exact)),
    )


class _Generated(NamedTuple):
    """The generator, and the classifier's last layer, which its features go into."""

    network: Generator
    noise_size: int
    num_classes: int
    kernel: str  # paths of the last layer's parameters
    bias: str

    def init(self, key: Key) -> PyTree:
        """The generator's parameters."""
        shapes = jnp.zeros((2, self.noise_size)), jnp.zeros((2, self.num_classes))
        return self.network.init(key, *shapes)["params"]

    def emit(self, params, key, labels, mask=None) -> tuple[Array, Array]:
        """Features [B, L] for labels [B], and the noise [B, d] that they are of."""
        noise = jax.random.normal(key, (labels.shape[0], self.noise_size))
        variables = {"params": params, **_no_statistics(self.network)}
        given = noise, jax.nn.one_hot(labels, self.num_classes), mask
        z, _ = self.network.apply(variables, *given, mutable=["batch_stats"])
        return z, noise

    def classify(self, theta: PyTree, z: Array) -> Array:
        """Logits of the last layer, [B, L] -> [B, K]; parameters by path."""
        return z @ theta[self.kernel] + theta[self.bias]


def _generated(
    model: Model, head: Patterns, noise_size: int, hidden_size: int
) -> _Generated:
    """A generator of what the last layer of a model takes."""
    template = jax.eval_shape(model.init, jax.random.key(0))
    params = {"params": template["params"]}
    tops, _ = tree.splitter(params, head).split(params)
    named = {path.rpartition("/")[2]: path for path in tops}
    if set(named) != {"kernel", "bias"}:
        raise ValueError(f"fedgen needs a head of kernel and bias, not {sorted(tops)}")
    num_features, num_classes = tops[named["kernel"]].shape
    network = Generator(hidden_size, num_features)
    return _Generated(network, noise_size, num_classes, named["kernel"], named["bias"])


def _draw(key: Key, available: Array, count: int) -> Array:
    """Labels, uniformly among those available (all, if none is), [count]."""
    logits = jnp.where(available > 0, 0.0, -jnp.inf)
    logits = jnp.where(jnp.any(available > 0), logits, 0.0)
    return jax.random.categorical(key, logits, shape=(count,))


# The clients' model ------------------------------------------------------------------


class _Weights(NamedTuple):
    """Of the terms in the clients' loss."""

    alpha: float
    beta: float
    decay: float
    share: float  # B_gen / B, not of a short last batch: it must not weigh these more

    def fallen(self, round: Array) -> Array:
        """decay^t, which is 0 in the first round."""
        # Not down to 0 itself, which would be a first round again.
        falling = jnp.maximum(self.decay ** round.astype(jnp.float32), 1e-30)
        return jnp.where(round > 0, falling, 0.0)

    def now(self, fallen: Array) -> tuple[Array, Array]:
        """a_t and b_t."""
        return _falling(self.alpha, fallen), _falling(self.beta, fallen)


def _falling(start: float, decay: Array) -> Array:
    """A coefficient that has fallen by `decay`, which is 0 where there is none yet."""
    fallen = jnp.minimum(start, jnp.maximum(start * decay, FLOOR))
    return jnp.where(decay > 0, fallen, 0.0)


def _regularised(
    model: Model, generated: _Generated, weigh: _Weights, batch_size: int
) -> Model:
    """A model whose loss has the two terms of a generator that is in its memory."""

    def beginning(key, variables):
        return {
            "params": generated.init(key),
            "available": jnp.zeros(generated.num_classes),
            "decay": jnp.float32(0),
        }

    inner = memory.with_entry(model, NAME, beginning)

    def loss(key, variables, batch, context):
        value, trained = inner.loss(key, variables, batch, context)
        told_of = memory.get(variables, NAME)
        # `key` itself is the model's, for dropout.
        key_same, key_draw, key_other = jax.random.split(jax.random.fold_in(key, 1), 3)
        theta = tree.by_path({"params": variables["params"]})
        z, _ = generated.emit(told_of["params"], key_same, batch.y, batch.mask)
        taught = jax.lax.stop_gradient(generated.classify(theta, z))
        kl = distillation(trained.logits, taught, batch)
        labels = _draw(key_draw, told_of["available"], batch_size)
        z, _ = generated.emit(told_of["params"], key_other, labels)
        wrong = optax.softmax_cross_entropy_with_integer_labels(
            generated.classify(theta, z), labels
        )
        a, b = weigh.now(told_of["decay"])
        # The generator normalises over a batch, and of one sample nothing is left.
        b = jnp.where(jnp.sum(batch.mask) > 1, b, 0.0)
        return value + b * kl + a * weigh.share * jnp.mean(wrong), trained

    return inner._replace(loss=loss)


# Server ------------------------------------------------------------------------------


class _Fit(NamedTuple):
    """How the server trains the generator."""

    steps: int
    batch_size: int
    optimizer: optax.GradientTransformation
    teacher_weight: float
    diversity_weight: float

    def __call__(self, key, before, generated: _Generated, heads, counts) -> PyTree:
        """Steps on (parameters, optimizer's state).

        Args:
          key: for noise and labels.
          before: where to start.
          generated: whose features the heads are shown.
          heads: last layers by path, leaves [C, ...].
          counts: samples of each label that their clients hold, [C, K].
        """
        present = jnp.sum(counts, 0)
        share = counts / jnp.maximum(present, 1e-12)  # w_k(y); 0 for absent labels

        def objective(params, key):
            key_labels, key_noise = jax.random.split(key)
            labels = _draw(key_labels, present, self.batch_size)
            z, noise = generated.emit(params, key_noise, labels)
            logits = jax.vmap(generated.classify, (0, None))(heads, z)  # [C, B, K]
            wrong = jax.vmap(
                optax.softmax_cross_entropy_with_integer_labels, (0, None)
            )(logits, labels)
            taught = jnp.mean(jnp.sum(share[:, labels] * wrong, 0))
            spread = self.diversity_weight * diversity(noise, z)
            return self.teacher_weight * taught + spread

        def step(i, state):
            params, opt = state
            grads = jax.grad(objective)(params, jax.random.fold_in(key, i))
            # Batch-norm takes this bias out, so its derivative is zero; Adam would make
            # steps of the rounding errors.
            grads["Dense_0"]["bias"] = jnp.zeros_like(grads["Dense_0"]["bias"])
            updates, opt = self.optimizer.update(grads, opt)
            return optax.apply_updates(params, updates), opt

        fitted = jax.lax.fori_loop(0, self.steps, step, before)
        some = jnp.sum(present) > 0  # heads of nobody teach nothing
        return jax.tree.map(lambda x, y: jnp.where(some, x, y), fitted, before)


def _server(inner: ServerSide, generated: _Generated, fit: _Fit) -> ServerSide:
    """FedAvg's server, which also trains the generator and sends it."""

    def init(common):
        params = generated.init(common)
        return State(inner.init(common), params, fit.optimizer.init(params))

    def downlink(key, server, cohort):
        down = inner.downlink(key, server.inner, cohort)
        return down._replace(shared=(down.shared, server.generator))

    def update(key, server, uplink, cohort):
        theta, delta = server.inner.theta, uplink.inner.delta
        heads = {p: theta[p] + delta[p] for p in (generated.kernel, generated.bias)}
        counts = uplink.counts * (cohort.active > 0)[:, None]
        before = server.generator, server.opt
        generator, opt = fit(key, before, generated, heads, counts)
        after, info = inner.update(key, server.inner, uplink.inner, cohort)
        return State(after, generator, opt), info

    return ServerSide(init, downlink, update)


# Client ------------------------------------------------------------------------------


def _client(inner: ClientSide, num_classes: int, weigh: _Weights) -> ClientSide:
    """FedAvg's client, which remembers the generator and reports its labels."""
    side = wrappers.through(
        inner, lambda down: Downlink(down.shared[0], down.own, down.round)
    )

    def update(key, down, client, data):
        counts = count_labels(data, num_classes)
        entry = {
            "params": down.shared[1],
            "available": counts,
            "decay": weigh.fallen(down.round),
        }
        client = told(client, {NAME: entry})
        sent, client, info = side.update(key, down, client, data)
        return Uplink(sent, counts), client, info

    return side._replace(update=update)


def count_labels(data, num_classes: int) -> Array:
    """Returns how many samples of each label a client has, [K] float32."""

    def step(total, batch):
        return total + batch.mask @ jax.nn.one_hot(batch.y, num_classes)

    return clients.fold(step, jnp.zeros(num_classes), data, COUNT_BATCH)


def diversity(noise: Array, z: Array) -> Array:
    """The paper's penalty on features that differ less than their noise, []."""
    apart = jnp.mean(jnp.square(noise[:, None] - noise[None]), -1)
    near = jnp.mean(jnp.abs(z[:, None] - z[None]), -1)
    return jnp.exp(jnp.mean(-apart * near))


def _no_statistics(network: Generator) -> PyTree:
    """Running statistics that are never read: every use has those of its batch."""
    zero = jnp.zeros(network.hidden)
    return {"batch_stats": {"BatchNorm_0": {"mean": zero, "var": zero + 1.0}}}
