"""Model transforms: networks whose parameters, or inputs, depend on a condition.

Both transforms compute the condition from the inputs alone, so a deployed model needs
unlabelled data only. `embed_granularity` says which inputs share a condition in
training: "sample" (each its own), "batch" (their mean), "client" (the mean over all of
the client's inputs at the start of the visit; gradients flow through the batch's
part). `deploy_granularity` is "client" (their mean) or "sample".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperjax import compiling
from hyperjax.data import clients
from hyperjax.errors import check_choice
from hyperjax.hypernets import embedding as embeddings
from hyperjax.hypernets.embedding import Embedding
from hyperjax.models import memory
from hyperjax.models.linen import cross_entropy
from hyperjax.types import (
    Array,
    ClientData,
    HyperNet,
    Key,
    Model,
    Outputs,
    PyTree,
    Serve,
    Trained,
    Visit,
    cannot_rebuild,
)

GRANULARITIES = ("sample", "batch", "client")
DEPLOYMENTS = ("client", "sample")
# How e enters; all but "embedding" are deviations from the paper. P e is 1 everywhere
# for a uniform e and P in one place for a one-hot one, hence -1 and the logarithm, both
# 0 or nearly so for a uniform e. An entry of e may vanish: 0.05 bounds its logarithm by
# -3, the magnitude that a one-hot e reaches at P = 20.
ENTRIES: dict[str, Callable] = {
    "embedding": lambda e: e,
    "centred": lambda e: e.shape[-1] * e - 1.0,
    "log_ratio": lambda e: jnp.log(e.shape[-1] * e + 0.05),
}
EMBED_BATCH = 256  # inputs embedded at a time outside training
NETWORKS_AT_ONCE = 16  # networks generated at a time when each sample has its own


def conditioned(
    model: Model,
    embedding: Embedding,
    bind: Callable,
    init: Callable,
    *,
    embed_granularity: str = "batch",
    deploy_granularity: str = "client",
    eval_noise: bool = False,
    enter: str = "embedding",
) -> Model:
    """Returns `model` bound to a condition that is computed from its own inputs.

    Args:
      model: the network underneath; without running statistics if `embed_granularity`
        is "sample", which also predicts in training as it does when deployed
        (no dropout).
      embedding: where the condition comes from.
      bind: `(variables, condition [d], x [B, ...]) -> (variables of model, its x)`.
      init: `(key) -> variables` of everything but the embedding.
      embed_granularity: inputs that share a condition in training: "sample" (none),
        "batch" or "client".
      deploy_granularity: inputs that share one when deployed: "client" or "sample".
      eval_noise: keep NoisyEmbed's noise on outside training.
      enter: how e becomes the condition: as it is ("embedding"), "centred" or as
        "log_ratio" to the uniform one, see `ENTRIES`.

    Raises:
      ValueError: an unknown choice, or a model that has a condition or hooks already.
    """
    for name, value, accepted in (
        ("embed_granularity", embed_granularity, GRANULARITIES),
        ("deploy_granularity", deploy_granularity, DEPLOYMENTS),
        ("enter", enter, ENTRIES),
    ):
        check_choice(name, value, accepted)

    model.check_without("a condition", *Visit._fields, "condition")
    stats = jax.eval_shape(model.init, jax.random.key(0))["stats"]
    if embed_granularity == "sample" and jax.tree.leaves(stats):
        raise ValueError(
            "embed_granularity='sample' gives each input its own network, for which "
            "running statistics (batch-norm) have no meaning; use 'batch' or 'client', "
            "or a model without them"
        )

    parts = _Conditioned(model, embedding, bind, ENTRIES[enter], eval_noise)

    @compiling.traced_once
    def init_all(key):
        key_embed, key_rest = jax.random.split(key)
        rest = init(key_rest)
        params = {"extractor": embedding.init(key_embed), **rest["params"]}
        return {"params": params, "stats": rest["stats"]}

    def loss(key, variables, batch, context):
        key_noise, key_model = jax.random.split(key)
        e, info = parts.embed(key_noise, variables, batch.x)
        penalty, terms = embedding.penalty(e, batch.mask)
        info |= terms
        if embed_granularity == "sample":
            logits = parts.outputs_per_sample(variables, e, batch.x).logits
            value = cross_entropy(logits, batch)
            info = {"loss": value, **info}
            return value + penalty, Trained(variables["stats"], info, logits)
        mean = embeddings.mean_embedding(e, batch.mask)
        if embed_granularity == "client":
            clean = embeddings.mean_embedding(
                parts.embed(None, variables, batch.x)[0], batch.mask
            )
            # The value of the client's mean, the derivative of the batch's own part.
            mean = mean + jax.lax.stop_gradient(context - clean)
        plain, x = parts.bound(variables, mean, batch.x)
        value, trained = model.loss(key_model, plain, batch._replace(x=x), ())
        return value + penalty, trained._replace(info={**trained.info, **info})

    def context(variables, data):
        if embed_granularity == "client":
            return parts.moments(variables, data)[0]
        return ()

    def condition(variables, inputs):
        if deploy_granularity == "client":
            return parts.moments(variables, inputs)[0]
        return ()

    return model.around(
        "sample_shape",
        init=init_all,
        loss=loss,
        apply=parts.apply,
        visit=Visit(context=context),
        serve=Serve(condition, parts.export, parts.inspect),
        with_shape=cannot_rebuild,
    )


class _Conditioned(NamedTuple):
    """A model outside training, bound to the condition that its inputs have."""

    model: Model
    embedding: Embedding
    bind: Callable
    entry: Callable  # (e) -> condition
    eval_noise: bool

    def embed(self, key: Key | None, variables: PyTree, x: Array):
        """Embeddings [B, P] of inputs, and what is logged."""
        return self.embedding.embed(key, variables["params"]["extractor"], x)

    def served(self, variables: PyTree, x: Array) -> Array:
        """Embeddings of inputs outside training, [B, P]."""
        # With a fixed key evaluation stays a function of its inputs.
        key = jax.random.key(0) if self.eval_noise else None
        return self.embed(key, variables, x)[0]

    def bound(self, variables: PyTree, e: Array, x: Array) -> tuple[PyTree, Array]:
        """Variables of the network under one embedding [P], and its inputs."""
        return self.bind(variables, self.entry(e), x)

    def outputs_per_sample(self, variables: PyTree, e: Array, x: Array) -> Outputs:
        """What each input's own network says, for embeddings [B, P]."""

        def one(pair):
            plain, x = self.bound(variables, pair[0], pair[1][None])
            return jax.tree.map(lambda rows: rows[0], self.model.apply(plain, x))

        return jax.lax.map(one, (e, x), batch_size=min(NETWORKS_AT_ONCE, len(x)))

    def moments(self, variables: PyTree, inputs: ClientData) -> tuple[Array, Array]:
        """Mean embedding [P] and mean entropy [] over a client's inputs."""

        def step(sums, batch):
            e = self.served(variables, batch.x)
            total = jnp.sum(batch.mask)
            mean = embeddings.mean_embedding(e, batch.mask)
            entropy = embeddings.entropy(e)
            spread = jnp.sum(jnp.where(batch.mask > 0, entropy, 0.0))
            return sums[0] + total * mean, sums[1] + spread

        start = (jnp.zeros(self.embedding.size), jnp.float32(0))
        sums = clients.fold(step, start, inputs, EMBED_BATCH)
        size = jnp.maximum(inputs.size, 1)
        return sums[0] / size, sums[1] / size

    def apply(self, variables: PyTree, x: Array) -> Outputs:
        """The model's `apply`; without a condition every input has its own."""
        e = memory.get(variables, "condition")
        if isinstance(e, tuple):
            return self.outputs_per_sample(variables, self.served(variables, x), x)
        return self.model.apply(*self.bound(variables, e, x))

    def export(self, variables: PyTree) -> PyTree:
        """The network under the condition, if there is a single one to speak of."""
        e = memory.get(variables, "condition")
        if isinstance(e, tuple):
            return variables
        x = jnp.zeros((1, *self.model.sample_shape))
        return self.bound(variables, e, x)[0]

    def inspect(self, variables: PyTree, inputs: ClientData) -> dict[str, Array]:
        """A client's mean embedding and its inputs' mean entropy."""
        mean, spread = self.moments(variables, inputs)
        return {"embedding": mean, "embedding_entropy": spread}


def generated_from_input(
    model: Model, embedding: Embedding, net: HyperNet, **choices
) -> Model:
    """Returns a model all of whose parameters a hypernetwork emits (Opt.2).

    Its parameters are {"extractor", "hyper"}; the target's are generated at every use
    and never kept. `choices` are those of `conditioned`.
    """

    def bind(variables, condition, x):
        params = net.generate(variables["params"]["hyper"], condition)
        return {"params": params, "stats": variables["stats"]}, x

    def init(key):
        key_net, key_stats = jax.random.split(key)
        stats = model.init(key_stats)["stats"]
        return {"params": {"hyper": net.init(key_net)}, "stats": stats}

    return conditioned(model, embedding, bind, init, **choices)


def concatenated_to_input(model: Model, embedding: Embedding, **choices) -> Model:
    """Returns a model that sees the condition as extra input (Opt.1).

    The network is rebuilt for wider inputs: flat ones, [B, H W c + P], if it accepts
    them, else [B, H, W, c + P] with the condition in extra channels. `choices` are
    those of `conditioned`.

    Raises:
      ValueError: the model cannot be rebuilt, or accepts neither form.
    """
    if model.vocabulary:
        raise ValueError("inputs are tokens, which a condition cannot be joined to")
    *size, channels = model.sample_shape
    numbers = channels
    for length in size:
        numbers *= length
    try:
        wide, flat = model.with_shape((numbers + embedding.size,)), True
    except ValueError:
        wide, flat = model.with_shape((*size, channels + embedding.size)), False

    def join(condition: Array, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1) if flat else x
        extra = jnp.broadcast_to(condition, (*x.shape[:-1], embedding.size))
        return jnp.concatenate([x, extra], axis=-1)

    def bind(variables, condition, x):
        params = variables["params"]["network"]
        return {"params": params, "stats": variables["stats"]}, join(condition, x)

    def init(key):
        variables = wide.init(key)
        return {"params": {"network": variables["params"]}, "stats": variables["stats"]}

    joined = conditioned(wide, embedding, bind, init, **choices)
    # Inputs are still the raw ones, and a network fed its condition is not a plain one.
    serve = joined.serve._replace(export=Serve().export)
    return joined._replace(sample_shape=model.sample_shape, serve=serve)
