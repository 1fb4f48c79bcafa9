"""Control of HyperFedZero: the same hypernetwork with a fixed, uniform embedding.

It is FedAvg of a classifier in another parametrisation. What HyperFedZero gains over
FedAvg but not over this control comes from the parametrisation, not from conditioning.
"""

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.hyperfedzero import emitted
from hyperjax.hypernets import embedding
from hyperjax.registry import hands_on
from hyperjax.types import Algorithm, Model


@hands_on(fedavg, without=("condition_source",))
def constant_embedding(
    model: Model,
    *,
    local,
    embedding_size: int = 16,
    chunk_size: int = 576,
    chunk_embedding_size: int = 16,
    hidden: tuple[int, ...] = (300, 300),
    out_scale: str = "none",
    norm_scale_offset: float = 0.0,
    **fedavg_options,
) -> Algorithm:
    """Returns the control; arguments as in `hyperfedzero`."""
    whole = emitted(
        model,
        embedding.constant_embedding(embedding_size),
        hypernet=dict(
            chunk_size=chunk_size,
            chunk_embedding_size=chunk_embedding_size,
            hidden=hidden,
            out_scale=out_scale,
            norm_scale_offset=norm_scale_offset,
        ),
    )
    return fedavg(whole, local=local, **fedavg_options)
