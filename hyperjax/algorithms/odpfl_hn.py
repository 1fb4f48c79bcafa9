"""ODPFL-HN: a network for a client from the mean embedding of its unlabelled inputs.

Amosy, Eyal, Chechik 2022, "On-Demand Unlabeled Personalized Federated Learning"
(arXiv:2111.08356): the ancestor of HyperFedZero. Clients embed their inputs, e_i =
mean of E(x), and send e_i; the server's hypernetwork answers with H(e_i), which they
train, and whose change goes back through H and then E. A newcomer sends e, from its
unlabelled inputs, and is sent a network: it never trains and needs no label.

It is `pefll` whose E sees no labels, which came later and says how a round goes.
Deviations: no noise on e (their option for differential privacy); the layers of E and
H are not readable, and are PeFLL's; e is of all of a client's inputs.
"""

from hyperjax.algorithms.pefll import pefll
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local
from hyperjax.types import Algorithm, Model


@has_traits(weights="uniform")
@hands_on(pefll, without=("embed_labels", "mask_absent"))
def odpfl_hn(
    model: Model, *, local: Local, embed_batch: int = 0, **pefll_options
) -> Algorithm:
    """Returns ODPFL-HN.

    Args:
      model: the target network.
      local: how clients train, see `fedavg`.
      embed_batch: inputs that e is the mean of in training, drawn anew with
        replacement; 0: all.
      **pefll_options: of `pefll`.
    """
    return pefll(
        model,
        local=local,
        embed_labels=False,
        mask_absent="none",
        embed_batch=embed_batch,
        **pefll_options,
    )
