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
from hyperjax.algorithms.fedper import HEAD
from hyperjax.data import clients
from hyperjax.errors import check_at_least, check_number
from hyperjax.models.beside import beside, pattern
from hyperjax.models.layers import BatchNorm, Dense
from hyperjax.models.linen import check_gives, distillation
from hyperjax.registry import hands_on
from hyperjax.training import Local
from hyperjax.tree import Patterns
from hyperjax.types import Algorithm, Array, Downlink, Model, PyTree, ServerSide

NAME = "generator"  # among a client's statistics
COUNT_BATCH = 256
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
    keep: Patterns = (),
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
      keep: patterns of variables that stay home.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: the head has not the two leaves, a size is below 1, or the model does
        not give its logits in training.
    """
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
    template = jax.eval_shape(model.init, jax.random.key(0))
    tops, _ = tree.splitter({"params": template["params"]}, head).split(
        {"params": template["params"]}
    )
    named = {path.rpartition("/")[2]: path for path in tops}
    if set(named) != {"kernel", "bias"}:
        raise ValueError(f"fedgen needs a head of kernel and bias, not {sorted(tops)}")
    num_features, num_classes = tops[named["kernel"]].shape
    network = Generator(hidden_size, num_features)
    adam = optax.adam(generator_learning_rate)

    def emit(generator, key, labels, mask=None):
        noise = jax.random.normal(key, (labels.shape[0], noise_size))
        variables = {"params": generator, **_no_statistics(network)}
        one_hot = jax.nn.one_hot(labels, num_classes)
        z, _ = network.apply(variables, noise, one_hot, mask, mutable=["batch_stats"])
        return z, noise

    def classify(params, z):
        """Logits of the last layer, [B, L] -> [B, K]; params by path."""
        return z @ params[named["kernel"]] + params[named["bias"]]

    def draw(key, available, count):
        """Labels, uniformly among those available, [count]."""
        logits = jnp.where(available > 0, 0.0, -jnp.inf)
        logits = jnp.where(jnp.any(available > 0), logits, 0.0)
        return jax.random.categorical(key, logits, shape=(count,))

    # The clients' model ----------------------------------------------------------

    def start(key):
        noise, labels = jnp.zeros((2, noise_size)), jnp.zeros((2, num_classes))
        return network.init(key, noise, labels)["params"]

    def beginning(key, variables):
        return {
            "params": start(key),
            "available": jnp.zeros(num_classes),
            "decay": jnp.float32(0),  # decay^t; 0 in the first round
        }

    plain = beside(model, NAME, beginning)
    full = local.batch_size

    def loss(key, variables, batch, context):
        value, trained = plain.loss(key, variables, batch, context)
        extra = trained.stats[NAME]
        key_same, key_draw, key_other = jax.random.split(jax.random.fold_in(key, 1), 3)
        params = tree.by_path({"params": variables["params"]})
        z, _ = emit(extra["params"], key_same, batch.y, batch.mask)
        taught = jax.lax.stop_gradient(classify(params, z))
        kl = distillation(trained.logits, taught, batch)
        labels = draw(key_draw, extra["available"], generator_batch_size)
        z, _ = emit(extra["params"], key_other, labels)
        generated = optax.softmax_cross_entropy_with_integer_labels(
            classify(params, z), labels
        )
        # B is not the batch's own size: a short last one must not weigh these more.
        share = generator_batch_size / full
        a, b = (_falling(start, extra["decay"]) for start in (alpha, beta))
        # The generator normalises over a batch, and of one sample nothing is left.
        b = jnp.where(jnp.sum(batch.mask) > 1, b, 0.0)
        total = value + b * kl + a * share * jnp.mean(generated)
        return total, trained

    whole = plain._replace(loss=loss)
    home = (*tree.as_patterns(keep), pattern(NAME))
    inner = fedavg(whole, local=local, keep=home, **fedavg_options)

    # Server ----------------------------------------------------------------------

    def init(common):
        generator = start(common)
        return State(inner.server.init(common), generator, adam.init(generator))

    def downlink(key, server, cohort):
        down = inner.server.downlink(key, server.inner, cohort)
        return down._replace(shared=(down.shared, server.generator))

    def update(key, server, uplink, cohort):
        theta = server.inner.theta
        counts = uplink.counts * (cohort.active > 0)[:, None]
        present = jnp.sum(counts, 0)
        share = counts / jnp.maximum(present, 1e-12)  # w_k(y), [C, K]
        heads = {
            path: theta[path] + uplink.inner.delta[path] for path in named.values()
        }

        def objective(generator, key):
            key_labels, key_noise = jax.random.split(key)
            labels = draw(key_labels, present, generator_batch_size)
            z, noise = emit(generator, key_noise, labels)
            logits = jax.vmap(classify, (0, None))(heads, z)  # [C, B, K]
            wrong = jax.vmap(
                optax.softmax_cross_entropy_with_integer_labels, (0, None)
            )(logits, labels)
            taught = jnp.mean(jnp.sum(share[:, labels] * wrong, 0))
            return teacher_weight * taught + diversity_weight * diversity(noise, z)

        def step(i, state):
            generator, opt = state
            grads = jax.grad(objective)(generator, jax.random.fold_in(key, i))
            # Batch-norm takes this bias out, so its derivative is zero; Adam would make
            # steps of the rounding errors.
            grads["Dense_0"]["bias"] = jnp.zeros_like(grads["Dense_0"]["bias"])
            updates, opt = adam.update(grads, opt)
            return optax.apply_updates(generator, updates), opt

        fitted = jax.lax.fori_loop(
            0, generator_steps, step, (server.generator, server.opt)
        )
        some = jnp.sum(present) > 0
        generator, opt = jax.tree.map(
            lambda x, y: jnp.where(some, x, y), fitted, (server.generator, server.opt)
        )
        after, info = inner.server.update(key, server.inner, uplink.inner, cohort)
        return State(after, generator, opt), info

    # Client ----------------------------------------------------------------------

    side = wrappers.through(
        inner.client, lambda down: Downlink(down.shared[0], down.own, down.round)
    )

    def client_update(key, down, client, data):
        counts = count_labels(data, num_classes)
        falling = jnp.maximum(decay ** down.round.astype(jnp.float32), 1e-30)
        extra = {
            "params": down.shared[1],
            "available": counts,
            "decay": jnp.where(down.round > 0, falling, 0.0),
        }
        client = told(client, {NAME: extra})
        sent, client, info = side.update(key, down, client, data)
        return Uplink(sent, counts), client, info

    server = ServerSide(init, downlink, update)
    exact = ("counts", *(f"inner/{pattern}" for pattern in inner.exact))
    return Algorithm(server, side._replace(update=client_update), exact=exact)


def count_labels(data, num_classes: int) -> Array:
    """Returns how many samples of each label a client has, [K] float32."""

    def step(total, batch):
        return total + batch.mask @ jax.nn.one_hot(batch.y, num_classes)

    return clients.fold(step, jnp.zeros(num_classes), data, COUNT_BATCH)


def _falling(start: float, decay: Array) -> Array:
    """A coefficient that has fallen by `decay`, which is 0 where there is none yet."""
    fallen = jnp.minimum(start, jnp.maximum(start * decay, FLOOR))
    return jnp.where(decay > 0, fallen, 0.0)


def diversity(noise: Array, z: Array) -> Array:
    """The paper's penalty on features that differ less than their noise, []."""
    apart = jnp.mean(jnp.square(noise[:, None] - noise[None]), -1)
    near = jnp.mean(jnp.abs(z[:, None] - z[None]), -1)
    return jnp.exp(jnp.mean(-apart * near))


def _no_statistics(network: Generator) -> PyTree:
    """Running statistics that are never read: every use has those of its batch."""
    zero = jnp.zeros(network.hidden)
    return {"batch_stats": {"BatchNorm_0": {"mean": zero, "var": zero + 1.0}}}
