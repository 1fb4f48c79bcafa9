"""FedRoD: a balanced generic head, and a personal one from a client's class shares.

Chen, Chao 2022, "On Bridging Generic and Personalized Federated Learning for Image
Classification", ICLR (arXiv:2107.00778). Body and generic head are trained by the
balanced cross-entropy (equation 5, with shares in the place of counts), the personal
head on what they leave over, neither of which it moves:

    CE(z_G + log p_i) + CE(stop(z_G) + z_P),      z_P = h_P(stop(f(x)))

h_P is private ("linear"), or emitted by a small network H from p_i ("hyper"), which is
averaged as the body is. A client predicts with z_G + z_P.

Deviation: "hyper" is deployed with the class shares that label-shift EM finds with the
generic head among the inputs, also for participants, so that nobody needs labels; the
paper has none for new clients. A newcomer's "linear" head is 0: it predicts with z_G.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.data import clients
from hyperjax.errors import check_at_least, check_choice
from hyperjax.models import layers, memory
from hyperjax.models.linen import check_gives, cross_entropy, sizes
from hyperjax.priors import outputs_of, prior_em
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

PERSONAL = ("hyper", "linear")


@hands_on(fedavg, without=("keep",))
def fedrod(
    model: Model,
    *,
    local: Local,
    personal: str = "hyper",
    head_hidden: int = 16,
    **fedavg_options,
) -> Algorithm:
    """Returns FedRoD.

    Args:
      model: body and generic head, a last linear layer named "head".
      local: how clients train, see `fedavg`; its loss is balanced in any case.
      personal: the personal head is emitted from class shares ("hyper"), or private
        ("linear").
      head_hidden: hidden units of H.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: an unknown choice, a size below 1, or a model without such a head or
        with a condition of its own.
    """
    check_given(model, local)
    check_choice("personal", personal, PERSONAL)
    check_at_least(1, head_hidden=head_hidden)
    model.check_without("fedrod", *Visit._fields, "condition")
    check_gives(model, "logits", "features")
    num_classes, num_features = sizes(model)
    hyper = personal == "hyper"
    emit = _Heads(head_hidden, num_features, num_classes)

    def init(key):
        key_model, key_head = jax.random.split(key)
        plain = model.init(key_model)
        if hyper:
            own = emit.init(key_head, jnp.zeros(num_classes))["params"]
        else:
            own = {"kernel": jnp.zeros((num_features, num_classes))}
            own |= {"bias": jnp.zeros(num_classes)}
        params = {"network": plain["params"], "personal": own}
        return {"params": params, "stats": plain["stats"]}

    def generic(variables: PyTree) -> PyTree:
        return {"params": variables["params"]["network"], "stats": variables["stats"]}

    def own_head(variables: PyTree, shares: Array) -> PyTree:
        params = variables["params"]["personal"]
        return emit.apply({"params": params}, shares) if hyper else params

    def loss(key, variables, batch, shares):
        balanced, plain = batch._replace(prior=shares), batch._replace(prior=())
        value, trained = model.loss(key, generic(variables), balanced, ())
        head = own_head(variables, shares)
        features = jax.lax.stop_gradient(trained.features)
        logits = jax.lax.stop_gradient(trained.logits)
        logits = logits + features @ head["kernel"] + head["bias"]
        own = cross_entropy(logits, plain)
        info = {**trained.info, "personal_loss": own}
        return value + own, trained._replace(info=info, logits=logits)

    def condition(variables, inputs):
        mask, seen = outputs_of(model, generic(variables), inputs)
        uniform = jnp.full(num_classes, 1 / num_classes)
        return prior_em(jax.nn.softmax(seen.logits), mask, uniform)

    def network(variables):
        """Both heads as one."""
        shares = memory.get(variables, "condition")
        plain = generic(variables)
        if hyper and isinstance(shares, tuple):
            return plain
        own = own_head(variables, shares)
        head = jax.tree.map(jnp.add, dict(plain["params"]["head"]), dict(own))
        return {**plain, "params": {**plain["params"], "head": head}}

    whole = model.around(
        "sample_shape",
        init=init,
        loss=loss,
        apply=lambda variables, x: model.apply(network(variables), x),
        visit=Visit(context=lambda v, data: clients.class_shares(data, num_classes)),
        serve=Serve(condition, network) if hyper else Serve(export=network),
        with_shape=cannot_rebuild,
    )
    keep = () if hyper else r"params/personal/.*"
    return fedavg(whole, local=local, keep=keep, **fedavg_options)


class _Heads(nn.Module):
    """H: class shares [K] to a head {"kernel": [L, K], "bias": [K]}."""

    hidden: int
    num_features: int
    num_classes: int

    @nn.compact
    def __call__(self, shares: Array) -> PyTree:
        u = nn.relu(layers.Dense(self.hidden, name="hidden")(shares))
        size = (self.num_features + 1) * self.num_classes
        numbers = layers.Dense(size, name="out")(u)
        kernel, bias = jnp.split(numbers, [self.num_features * self.num_classes])
        return {"kernel": kernel.reshape(-1, self.num_classes), "bias": bias}
