"""Control of HyperFedZero: the same hypernetwork with a fixed, uniform embedding.

It is FedAvg of a classifier in another parametrisation. What HyperFedZero gains over
FedAvg but not over this control comes from the parametrisation, not from conditioning.
"""

from collections.abc import Callable

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.hyperfedzero import emitted
from hyperjax.hypernets import embedding, mlp
from hyperjax.registry import hands_on, routed
from hyperjax.training import Local, check_given
from hyperjax.types import Algorithm, Model

PARTS = (embedding.constant_embedding, mlp.chunked_mlp, fedavg)


@hands_on(*PARTS, without=("condition_size",))
def constant_embedding(
    model: Model, *, local: Local, hypernet: str | Callable = "", **options
) -> Algorithm:
    """Returns the control.

    Args:
      model: the target classifier; all its parameters are generated.
      local: how clients train, see `fedavg`.
      hypernet: another hypernetwork than the chunked one, see `hyperfedzero`.
      **options: of `embedding.constant_embedding`, `mlp.chunked_mlp` and `fedavg`, as
        in `hyperfedzero`.
    """
    check_given(model, local)
    uniform, chunked, averaging = routed(options, *PARTS)
    whole = emitted(model, embedding.constant_embedding(**uniform), chunked, hypernet)
    return fedavg(whole, local=local, **averaging)
