"""FLowDUP: a client's network is a shared one plus few numbers that its inputs give.

Zakerinia, Scott, Lampert 2025, "Federated Learning with Unlabeled Clients:
Personalization Can Happen in Low Dimensions" (arXiv:2505.15579). Of a client with
inputs X,

    w = w_0 + P v,     v = h(X; psi) in R^k,

with P a fixed random matrix that follows from a seed and is never sent or stored, and
h the mean of a small network over X. Clients train w_0, psi and the centre omega that v
is drawn to, by the cross-entropy and c |v - omega|^2 / 2; FedAvg does the rest.
Deployment needs inputs alone.

Deviations: entries of P are signs over the root of k times a kernel's fan-in; a
step's v is of a context drawn with replacement; all participants have labels (in the
paper those without contribute the penalty). k, c and the layers are not readable.
"""

import math

import jax
import jax.numpy as jnp

from hyperjax import rng, tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.hyperfedshift import EXTRACTORS, learned, with_replacement
from hyperjax.data import clients
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.models import memory
from hyperjax.registry import hands_on
from hyperjax.training import Local, check_given
from hyperjax.types import (
    Algorithm,
    Array,
    Model,
    PyTree,
    Serve,
    Visit,
    cannot_rebuild,
)


@hands_on(fedavg)
def flowdup(
    model: Model,
    *,
    local: Local,
    dimensions: int = 16,
    penalty: float = 1e-2,
    seed: int = 0,
    extractor: str = "mlp",
    extractor_size: int = 64,
    context: int = 64,
    **fedavg_options,
) -> Algorithm:
    """Returns FLowDUP.

    Args:
      model: the classifier, w_0 at the start.
      local: how clients train, see `fedavg`.
      dimensions: k.
      penalty: c.
      seed: of P, known to all.
      extractor: h: one hidden layer ("mlp"), or strided convolutions ("conv").
      extractor_size: of the hidden layer of "mlp".
      context: inputs that a training step's v is of.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: an unknown choice, a number out of range, or a model that has a
        condition or hooks already.
    """
    check_given(model, local)
    check_choice("extractor", extractor, EXTRACTORS)
    check_at_least(
        1, dimensions=dimensions, extractor_size=extractor_size, context=context
    )
    check_at_least(0, seed=seed)
    check_number(at_least=0, penalty=penalty)
    model.check_without("flowdup", *Visit._fields, "condition")
    view = learned(model, dimensions, extractor, extractor_size)

    def init(key):
        # The network's own draw: it starts where FedAvg's does.
        plain = model.init(key)
        params = {"network": plain["params"], "centre": jnp.zeros(dimensions)}
        params |= {"predictor": view.init(rng.stream(key, "predictor"))}
        return {"params": params, "stats": plain["stats"]}

    def plain(variables, v):
        params = variables["params"]["network"]
        moved = tree.add(params, expanded(params, v, seed))
        return {"params": moved, "stats": variables["stats"]}

    def loss(key, variables, batch, draw):
        key_context, key_model = jax.random.split(key)
        rows = with_replacement(draw)(key_context, context)
        seen = clients.gather(draw.pool, rows, jnp.ones(context))
        params = variables["params"]
        v = jnp.mean(view.features(params["predictor"], seen.x), 0)
        value, trained = model.loss(key_model, plain(variables, v), batch, ())
        away = jnp.sum((v - params["centre"]) ** 2) / 2
        info = {**trained.info, "away": away}
        return value + penalty * away, trained._replace(info=info)

    def condition(variables, inputs):
        params = variables["params"]
        v = view.mean(params["predictor"], inputs)
        return jnp.where(inputs.size > 0, v, params["centre"])

    def network(variables):
        v = memory.get(variables, "condition")
        known = not isinstance(v, tuple)
        return plain(variables, v if known else variables["params"]["centre"])

    whole = model.around(
        "sample_shape",
        init=init,
        loss=loss,
        apply=lambda variables, x: model.apply(network(variables), x),
        visit=Visit(context=lambda variables, data: data),
        serve=Serve(condition, network),
        with_shape=cannot_rebuild,
    )
    return fedavg(whole, local=local, **fedavg_options)


def expanded(params: PyTree, v: Array, seed: int) -> PyTree:
    """Returns P v in the form of `params`; P is drawn tensor by tensor."""
    # Behind a barrier, or else the compiler would draw P and keep it.
    key = jax.lax.optimization_barrier(jax.random.key(seed))

    def one(path, leaf):
        signs = jax.random.rademacher(
            rng.stream(key, path), (len(v), *leaf.shape), jnp.float32
        )
        fan_in = math.prod(leaf.shape[:-1])  # 1 for a bias
        return jnp.tensordot(v, signs, 1) / math.sqrt(len(v) * fan_in)

    leaves, structure = jax.tree.flatten(params)
    found = [one(*pair) for pair in zip(tree.paths(params), leaves, strict=True)]
    return jax.tree.unflatten(structure, found)
