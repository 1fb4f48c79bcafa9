"""Distribution embeddings: what the inputs of a client look like, as a point of the
simplex, with NoisyEmbed and the Balancing Penalty.

HyperFedZero, arXiv:2508.12673. The extractor's architecture, the support of the
penalty and the behaviour at evaluation are not published; each choice is an argument.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax import compiling
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.models import layers
from hyperjax.models.linen import masked_mean
from hyperjax.types import Array, in_one_line

CV_MODES = ("batch_mean", "per_sample")
ENT_REDUCTIONS = ("sum", "mean")
NOISE_NETS = ("shared", "separate")


class Trunk(nn.Module):
    """Returns features [B, 32] of inputs.

    Of images [B, H, W, c]: three strided convolutions and a global average. Of features
    [B, d]: two linear layers with ReLU. Of tokens [B, L] these of how often each token
    of the `vocabulary` is there, over sqrt(L), whatever their order.
    """

    vocabulary: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if x.ndim == 2:
            if self.vocabulary:
                tokens = jax.nn.one_hot(x.astype(jnp.int32), self.vocabulary)
                x = tokens.sum(axis=1) / jnp.sqrt(x.shape[1])
            for _ in range(2):
                x = nn.relu(layers.Dense(32)(x))
            return x
        for features in (8, 16, 32):
            x = nn.relu(layers.Conv(features, 3, stride=2, padding="SAME")(x))
        return x.mean(axis=(1, 2))


class Extractor(nn.Module):
    """Returns the embedding's logits f(x) and, with noise, noisy(x), each [B, P].

    No normalisation layers: their statistics would tell clients apart, and make an
    input's embedding depend on what it is batched with.
    """

    embedding_size: int
    noise: bool = True
    noise_net: str = "shared"
    vocabulary: int = 0

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array | None]:
        features = Trunk(self.vocabulary, name="trunk")(x)
        logits = layers.Dense(self.embedding_size, name="head")(features)
        if not self.noise:
            return logits, None
        if self.noise_net == "separate":
            features = Trunk(self.vocabulary, name="noise_trunk")(x)
        return logits, layers.Dense(self.embedding_size, name="noise_head")(features)


def noisy_embed(key: jax.Array | None, logits: Array, noisy: Array | None) -> Array:
    """Returns e = softmax(f(x) + z softplus(noisy(x))), z ~ N(0, 1) per entry.

    Args:
      key: None switches the noise off.
      logits: f(x), [B, P].
      noisy: noisy(x), [B, P], or None for the ablation without NoisyEmbed.
    """
    if key is not None and noisy is not None:
        logits = logits + jax.random.normal(key, logits.shape) * jax.nn.softplus(noisy)
    return jax.nn.softmax(logits, axis=-1)


def entropy(e: Array) -> Array:
    """Returns -sum_p e log e in nats over the last axis; 0 for a one-hot vector."""
    # 0 log 0 is 0, and has a derivative; 1e-12 is nothing beside any other entry.
    return -jnp.sum(e * jnp.log(e + 1e-12), axis=-1)


def dispersion(e: Array) -> Array:
    """Returns var(P e) / mean(P e) over the last axis: 0 uniform, P - 1 one-hot."""
    scaled = e.shape[-1] * e
    return jnp.var(scaled, axis=-1) / jnp.mean(scaled, axis=-1)


def mean_embedding(e: Array, mask: Array) -> Array:
    """Returns the mean over real samples, [B, P] -> [P]."""
    total = jnp.sum(jnp.where(mask[:, None] > 0, e, 0.0), axis=0)
    return total / jnp.maximum(jnp.sum(mask), 1.0)


def balancing_penalty(
    e: Array,
    mask: Array,
    *,
    cv_mode: str = "batch_mean",
    ent_reduction: str = "sum",
) -> tuple[Array, Array]:
    """Returns the two terms of the Balancing Penalty (equation 4), both minimised.

    Args:
      e: [B, P] embeddings.
      mask: [B] 1 for real samples.
      cv_mode: var / mean of P e over dimensions, for the "batch_mean" embedding (the
        reading under which both terms can be small at once) or averaged "per_sample".
      ent_reduction: entropy summed over dimensions, or their "mean".
    """
    if cv_mode == "batch_mean":
        spread = dispersion(mean_embedding(e, mask))
    else:
        spread = masked_mean(dispersion(e), mask)
    uncertainty = masked_mean(entropy(e), mask)
    if ent_reduction == "mean":
        uncertainty = uncertainty / e.shape[-1]
    return spread, uncertainty


class Embedding(NamedTuple):
    """A distribution embedding as pure functions of its parameters."""

    size: int  # P
    init: Callable  # (key) -> parameters
    embed: Callable  # (key or None, parameters, x) -> (e [B, P], info)
    penalty: Callable  # (e [B, P], mask [B]) -> (penalty [], info)

    def __repr__(self) -> str:
        return in_one_line(self)


def distribution_embedding(
    input_shape: tuple[int, ...],
    vocabulary: int = 0,
    *,
    embedding_size: int = 16,
    alpha: float = 0.1,
    beta: float = 0.01,
    cv_mode: str = "batch_mean",
    ent_reduction: str = "sum",
    noise: bool = True,
    noise_net: str = "shared",
    extractor: nn.Module | None = None,
) -> Embedding:
    """Returns the embedding of HyperFedZero.

    Args:
      input_shape: (H, W, c), (d,) or (L,).
      vocabulary: how many different tokens inputs are made of; 0: they are numbers.
      embedding_size: P.
      alpha: weight of the dispersion of the mean embedding.
      beta: weight of the embeddings' entropy.
      cv_mode: "batch_mean" or "per_sample", see `balancing_penalty`.
      ent_reduction: entropy as a "sum" or "mean" over dimensions.
      noise: NoisyEmbed; False drops the noise head with the noise.
      noise_net: "shared" trunk with its own linear head, or a "separate" network.
      extractor: another linen module with the outputs of `Extractor`.

    Raises:
      ValueError: an unknown choice, a size below 1 or a weight that is not finite.
    """
    for name, value, accepted in (
        ("cv_mode", cv_mode, CV_MODES),
        ("ent_reduction", ent_reduction, ENT_REDUCTIONS),
        ("noise_net", noise_net, NOISE_NETS),
    ):
        check_choice(name, value, accepted)
    check_at_least(1, embedding_size=embedding_size)
    check_number(at_least=0, alpha=alpha, beta=beta)
    module = extractor or Extractor(embedding_size, noise, noise_net, vocabulary)

    @compiling.traced_once
    def init(key):
        return module.init(key, jnp.zeros((1, *input_shape)))["params"]

    trial = jax.eval_shape(
        lambda key: module.apply({"params": init(key)}, jnp.zeros((1, *input_shape))),
        jax.random.key(0),
    )
    if any(out.shape != (1, embedding_size) for out in jax.tree.leaves(trial)):
        raise ValueError(
            f"the extractor returns {jax.tree.map(lambda out: out.shape, trial)} for "
            f"one input; embedding_size={embedding_size} asks for (1, {embedding_size})"
        )

    @compiling.traced_once
    def embed(key, params, x):
        outputs: Any = module.apply({"params": params}, x)
        logits, noisy = outputs
        info = {}
        if noisy is not None:
            # If this falls below about 0.01 the noise has switched itself off.
            info["noise_scale"] = jnp.mean(jax.nn.softplus(noisy))
        return noisy_embed(key, logits, noisy), info

    def penalty(e, mask):
        spread, uncertainty = balancing_penalty(
            e, mask, cv_mode=cv_mode, ent_reduction=ent_reduction
        )
        info = {"dispersion": spread, "entropy": uncertainty}
        return alpha * spread + beta * uncertainty, info

    return Embedding(embedding_size, init, embed, penalty)


def constant_embedding(*, embedding_size: int = 16) -> Embedding:
    """Returns the control: e is uniform whatever the input; no parameters.

    Args:
      embedding_size: P.

    Raises:
      ValueError: it is below 1.
    """
    check_at_least(1, embedding_size=embedding_size)

    def embed(key, params, x):
        shape = (x.shape[0], embedding_size)
        return jnp.full(shape, 1.0 / embedding_size), {}

    return Embedding(
        embedding_size,
        init=lambda key: {},
        embed=embed,
        penalty=lambda e, mask: (jnp.float32(0), {}),
    )
