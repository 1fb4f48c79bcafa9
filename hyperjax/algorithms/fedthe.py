"""FedTHE: a generic and a personal head, weighted anew for every input without labels.

Jiang, Lin 2023, "Test-Time Robust Personalization for Federated Learning", ICLR
(arXiv:2205.10920). Body and generic head are averaged and trained by the balanced
cross-entropy, the personal head, linear and without a bias, stays home and is trained
on features that it does not move. For an input with logits z_G and z_P of the two heads
and features f, a client predicts with a_G z_G + a_P z_P, where a is what a few steps of
Adam from (1/2, 1/2) on the simplex make of

    s H(a_G z_G + a_P z_P) + (1 - s) (a_G |h - h_G| + a_P |h - h_i|)
    s = cos(softmax z_G, softmax z_P),      h = beta f + (1 - beta) m

H is the entropy, h_i the mean of the client's training features, h_G that of these over
clients, and m is what the client's inputs look like: the mean of their features.

Deviations: m is of all inputs, so that their order changes nothing, where the authors
have a moving average over inputs as they come; h_i is of the network that a client
receives, before it trains; both heads are trained in the same steps. A client without
a personal head, such as one that is never trained, predicts with z_G. FedTHE+, which
also trains the network on views of each input, is `adapt="memo"` of its clients; a is
then not trained through.
"""

import jax
import jax.numpy as jnp
import optax

from hyperjax.algorithms.fedavg import BN_STATS, fedavg
from hyperjax.data import clients
from hyperjax.errors import check_at_least, check_choice, check_number
from hyperjax.models import memory
from hyperjax.models.linen import check_gives, cross_entropy, sizes
from hyperjax.priors import outputs_of
from hyperjax.registry import hands_on
from hyperjax.training import Local, check_given
from hyperjax.types import (
    Algorithm,
    Array,
    ClientData,
    Model,
    Outputs,
    PyTree,
    Serve,
    Visit,
    cannot_rebuild,
)

OWN = "features"  # in memory: h_i


@hands_on(fedavg, without=("keep",))
def fedthe(
    model: Model,
    *,
    local: Local,
    beta: float = 0.1,
    weight_steps: int = 20,
    weight_rate: float = 0.1,
    bn_stats: str = "average",
    **fedavg_options,
) -> Algorithm:
    """Returns FedTHE.

    Args:
      model: body and generic head, a last linear layer named "head".
      local: how clients train, see `fedavg`; the generic head's loss is balanced in any
        case.
      beta: share of an input's own features in h, in [0, 1].
      weight_steps: of Adam, on the weights of the heads.
      weight_rate: their learning rate, ten times the training's as published.
      bn_stats: as in `fedavg`; means of features are sent in any case.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: a number out of range, or a model without such a head or with a
        condition of its own.
    """
    check_given(model, local)
    check_number(at_least=0, at_most=1, beta=beta)
    check_at_least(0, weight_steps=weight_steps)
    check_number(above=0, weight_rate=weight_rate)
    check_choice("bn_stats", bn_stats, BN_STATS)
    model.check_without("fedthe", *Visit._fields, "condition")
    check_gives(model, "features")
    num_classes, num_features = sizes(model)

    def init(key):
        plain = model.init(key)
        own = {"kernel": jnp.zeros((num_features, num_classes))}
        params = {"network": plain["params"], "personal": own}
        nothing = jnp.zeros(num_features)
        stats = {"network": plain["stats"], "features": nothing}
        return memory.put({"params": params, "stats": stats}, OWN, nothing)

    def generic(variables: PyTree) -> PyTree:
        return {part: variables[part]["network"] for part in ("params", "stats")}

    def mean_features(variables: PyTree, data: ClientData) -> Array:
        mask, seen = outputs_of(model, generic(variables), data)
        total = mask @ jnp.asarray(seen.features)
        return total / jnp.maximum(jnp.sum(mask), 1.0)

    def context(variables, data):
        return clients.class_shares(data, num_classes), mean_features(variables, data)

    def loss(key, variables, batch, context):
        shares, mean = context
        balanced, plain = batch._replace(prior=shares), batch._replace(prior=())
        value, trained = model.loss(key, generic(variables), balanced, ())
        features = jax.lax.stop_gradient(trained.features)
        logits = features @ variables["params"]["personal"]["kernel"]
        own = cross_entropy(logits, plain)
        stats = {"network": trained.stats, "features": mean}
        info = {**trained.info, "personal_loss": own}
        # Which head predicts is not known before the client's inputs are.
        told = trained._replace(
            stats=stats, info=info, logits=(), features=(), memory={OWN: mean}
        )
        return value + own, told

    def apply(variables, x):
        seen = model.apply(generic(variables), x)
        kernel = variables["params"]["personal"]["kernel"]
        own = jnp.asarray(seen.features) @ kernel
        inputs = memory.get(variables, "condition")
        inputs = seen.features if isinstance(inputs, tuple) else inputs
        at = beta * seen.features + (1 - beta) * inputs
        means = variables["stats"]["features"], memory.get(variables, OWN)
        far, near = (jnp.linalg.norm(at - mean, axis=-1) for mean in means)
        share = personal_share(seen.logits, own, far, near, weight_steps, weight_rate)
        share = jnp.where(jnp.any(kernel != 0), share, 0.0)[:, None]
        share = jax.lax.stop_gradient(share)
        return Outputs((1 - share) * seen.logits + share * own, seen.features)

    whole = model.around(
        "sample_shape",
        init=init,
        loss=loss,
        apply=apply,
        visit=Visit(context=context),
        serve=Serve(mean_features),  # no single network predicts
        with_shape=cannot_rebuild,
    )
    template = jax.eval_shape(model.init, jax.random.key(0))
    keep = [r"params/personal/.*"]
    if bn_stats == "local" and jax.tree.leaves(template["stats"]):
        keep.append(r"stats/network/.*")
    return fedavg(whole, local=local, keep=tuple(keep), **fedavg_options)


def personal_share(
    generic: Array,
    own: Array,
    generic_gap: Array,
    own_gap: Array,
    steps: int,
    rate: float,
) -> Array:
    """Returns the weight a_P of the personal head for each input, [B].

    Args:
      generic: z_G, [B, K].
      own: z_P, [B, K].
      generic_gap: |h - h_G|, [B].
      own_gap: |h - h_i|, [B].
      steps: of Adam.
      rate: its learning rate.
    """
    beliefs = [jax.nn.softmax(logits) for logits in (generic, own)]
    norms = [jnp.linalg.norm(p, axis=-1) for p in beliefs]
    alike = jnp.sum(beliefs[0] * beliefs[1], -1) / (norms[0] * norms[1])

    def objective(theta):
        a = jax.nn.softmax(theta)
        logits = a[:, :1] * generic + a[:, 1:] * own
        log_p = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        gap = a[:, 0] * generic_gap + a[:, 1] * own_gap
        return jnp.sum(alike * entropy + (1 - alike) * gap)  # inputs do not meet

    optimizer = optax.adam(rate)

    def step(state, _):
        theta, moments = state
        updates, moments = optimizer.update(jax.grad(objective)(theta), moments)
        return (optax.apply_updates(theta, updates), moments), None

    theta = jnp.zeros((len(generic), 2))
    (theta, _), _ = jax.lax.scan(step, (theta, optimizer.init(theta)), None, steps)
    return jax.nn.softmax(theta)[:, 1]
