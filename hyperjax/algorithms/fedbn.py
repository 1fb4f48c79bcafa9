"""FedBN: everything is federated but normalisation.

Li, Jiang, Zhang, Kamp, Dou 2021, "FedBN: Federated Learning on Non-IID Features via
Local Batch Normalization", ICLR (arXiv:2102.07623). Scales, biases and running
statistics stay on the client, found by structure (a layer that owns a "scale"), not by
name. A client that never trained has initial ones.
"""

import re

import jax

from hyperjax import tree
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.registry import hands_on
from hyperjax.training import Local, check_given
from hyperjax.types import Algorithm, Model, PyTree


@hands_on(fedavg, without=("keep",))
def fedbn(
    model: Model, *, local: Local, bn_stats: str = "local", **fedavg_options
) -> Algorithm:
    """Returns FedBN; without normalisation layers it is FedAvg.

    Args:
      model: what is trained.
      local: how clients train, see `fedavg`.
      bn_stats: as in `fedavg`.
      **fedavg_options: of `fedavg`.
    """
    check_given(model, local)
    template = jax.eval_shape(model.init, jax.random.key(0))
    keep = normalisation(template)
    return fedavg(model, local=local, keep=keep, bn_stats=bn_stats, **fedavg_options)


def normalisation(variables: PyTree) -> tuple[str, ...]:
    """Returns patterns of the parameters of all layers that own a "scale"."""
    paths = tree.paths({"params": variables["params"]})
    layers = [path.removesuffix("/scale") for path in paths if path.endswith("/scale")]
    return tuple(re.escape(layer) + "/.*" for layer in layers)
