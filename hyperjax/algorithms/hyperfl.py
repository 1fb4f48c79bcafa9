"""HyperFL: clients share a hypernetwork, and nothing that it is conditioned on.

Guo et al. 2025, "A New Federated Learning Framework Against Gradient Inversion
Attacks", AAAI (arXiv:2412.07187). The feature extractor of client i is h(v_i; phi); v_i
and the classifier psi_i are private, and phi alone is averaged. A visit trains psi_i
first, then phi and v_i. What is sent is 129 numbers for each of the extractor's.

A newcomer has neither embedding nor classifier: without training it predicts with those
of the start, by chance ("zacc"), and fine-tuning gives it both.

Deviations: one local optimizer for both phases (0.1 and 0.02 are published); networks
are generated anew whenever they predict, where the authors' code lags by a step.
"""

import jax

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.errors import check_at_least
from hyperjax.hypernets import heads
from hyperjax.models.linen import sizes
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local, Phase, check_given
from hyperjax.types import (
    Algorithm,
    Model,
    Serve,
    Visit,
    cannot_rebuild,
)

PRIVATE = (r"params/embedding", r"params/head/.*")
SHARED = r"hypernetwork/.*"  # of the parameters


@has_traits(own_length=True)
@hands_on(fedavg, without=("keep",))
def hyperfl(
    model: Model,
    *,
    local: Local,
    embedding_size: int = 64,
    hidden_size: int = 128,
    head_epochs: int = 1,
    body_epochs: int = 5,
    **fedavg_options,
) -> Algorithm:
    """Returns HyperFL.

    Args:
      model: extractor and classifier, a last linear layer named "head".
      local: how clients train, see `fedavg`; its length is that of the phases.
      embedding_size: of v.
      hidden_size: of the hypernetwork's one hidden layer.
      head_epochs: local epochs of the classifier.
      body_epochs: local epochs of phi and v.
      **fedavg_options: of `fedavg`.

    Raises:
      ValueError: a size or a number of epochs is out of range, or a model without such
        a head, with a condition or with hooks.
    """
    check_given(model, local)
    check_at_least(0, head_epochs=head_epochs, body_epochs=body_epochs)
    model.check_without("hyperfl", *Visit._fields, "condition")
    whole = generated(model, embedding_size, hidden_size)
    phases = (
        Phase(epochs=head_epochs, train=PRIVATE[1]),
        Phase(epochs=body_epochs, freeze=PRIVATE[1]),
    )
    return fedavg(
        whole, local=local._replace(phases=phases), keep=PRIVATE, **fedavg_options
    )


def generated(model: Model, embedding_size: int = 64, hidden_size: int = 128) -> Model:
    """Returns a model whose extractor is h(v; phi), of the parameters phi, v and psi.

    These are "hypernetwork", "embedding" and "head".

    Args:
      model: extractor and classifier, a last linear layer named "head".
      embedding_size: of v.
      hidden_size: of the hypernetwork's one hidden layer.

    Raises:
      ValueError: a size is out of range, or the model has no such head.
    """
    check_at_least(1, embedding_size=embedding_size, hidden_size=hidden_size)
    sizes(model)  # refuses a model without a head
    template = dict(jax.eval_shape(model.init, jax.random.key(0))["params"])
    del template["head"]
    net = heads.per_tensor(
        template,
        condition_size=embedding_size,
        hidden_size=hidden_size,
        num_hidden=0,
        activated=True,
    )

    def draw(key):
        return jax.random.normal(key, (embedding_size,))

    def init(key):
        key_model, key_net, key_own = jax.random.split(key, 3)
        plain = model.init(key_model)
        params = {"hypernetwork": net.init(key_net), "embedding": draw(key_own)}
        params |= {"head": plain["params"]["head"]}
        return {"params": params, "stats": plain["stats"]}

    def arrive(key, variables):
        params = {**variables["params"], "embedding": draw(key)}
        return {**variables, "params": params}

    def network(variables):
        params = variables["params"]
        body = net.generate(params["hypernetwork"], params["embedding"])
        whole = {**body, "head": params["head"]}
        return {"params": whole, "stats": variables["stats"]}

    return model.around(
        "sample_shape",
        init=init,
        loss=lambda key, v, *args: model.loss(key, network(v), *args),
        apply=lambda variables, x: model.apply(network(variables), x),
        visit=Visit(arrive=arrive),
        serve=Serve(export=network),
        with_shape=cannot_rebuild,
    )
