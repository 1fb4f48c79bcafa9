"""HyperFedNet: clients share a small generator of kernels instead of the network.

Chen, Huang, Xie, Pang 2024, "HyperFedNet: Communication-Efficient Personalized
Federated Learning Via Hypernetwork" (arXiv:2402.18445). Every client generates its
convolutions from embeddings of its own, trains generator, embeddings and everything
else jointly, and sends the generator. So HyperFedNet is FedAvg of a hypernetworked
model that keeps everything but "hyper" at home, and HyperFedNet + X is X of the same
model: `base`.

What the paper leaves open is an argument. Deviations from its listing: the mean is over
participants, not over all clients, and `regenerate="every_step"` reads it end to end.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import jax

from hyperjax.errors import check_choice
from hyperjax.hypernets import tiles
from hyperjax.hypernets.hypernetworked import hypernetworked
from hyperjax.types import Algorithm, Model

# What stays home, by what is shared beside the generator.
KEEP = {
    "none": r"params/(?!hyper/).*",
    "convs": r"params/(embed/.*|generated/.*|network/head/.*|network/.*(?<!/kernel))",
    "convs_and_bn": r"params/(embed/.*|generated/.*|network/head/.*)",
}

# Methods that leave open what stays home, so that they can share the generator.
BASES = (
    "fedavg",
    "fedprox",
    "feddyn",
    "scaffold",
    "fednova",
    "ditto",
    "apfl",
    "pfedme",
    "perfedavg",
    "moon",
    "fedfomo",
    "pfedla",
)


def hyperfednet(
    model: Model,
    *,
    local,
    embedding_size: int = 128,
    hidden_size: int | None = None,
    tile: int = 16,
    share_aux: str = "none",
    regenerate: str = "every_step",
    init: str = "variance",
    slices: str = "input",
    embedding_init: str = "common",
    base: str = "fedavg",
    base_options: Mapping[str, Any] | None = None,
    bn_stats: str = "local",
    **fedavg_options,
) -> Algorithm:
    """Returns HyperFedNet of `model`, or its fusion with another method.

    Args:
      model: a network with 3x3 convolutions of multiples of 16 channels and a last
        layer named "head".
      local: builds a training loop, see `fedavg`.
      embedding_size: n, numbers of an embedding.
      hidden_size: width d of the generator; None for n, as published.
      tile: channels of a tile; 16 as published.
      share_aux: what crosses the wire beside the generator: "none", "convs" (the
        convolutions that are not generated; what HyperFedNet + FedBN shares) or
        "convs_and_bn" (scales and biases of normalisation too). Never the head.
      regenerate: kernels at "every_step", or once "per_round" as the paper's listing
        says, see `hypernetworked`.
      init: see `tiles.tile_net`.
      slices: see `tiles.tile_net`.
      embedding_init: all clients start from a "common" draw, as they do where initial
        models are copies of one (5 to 12 points better after 20 rounds of MNIST), or
        every client draws its "own".
      base: the method that shares the generator, one of `BASES`.
      base_options: its arguments.
      bn_stats: as in `fedavg`.
      **fedavg_options: of `fedavg`: `server_opt`, `correction`, ...

    Raises:
      ValueError: an unknown choice, or no kernel can be generated.
    """
    check_choice("share_aux", share_aux, KEEP)
    check_choice("base", base, BASES)
    template = jax.eval_shape(model.init, jax.random.key(0))["params"]
    net = tiles.tile_net(
        template,
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        tile=tile,
        init=init,
        slices=slices,
    )
    whole = hypernetworked(
        model, net, regenerate=regenerate, embedding_init=embedding_init
    )
    method = getattr(importlib.import_module(f"hyperjax.algorithms.{base}"), base)
    return method(
        whole,
        local=local,
        keep=KEEP[share_aux],
        bn_stats=bn_stats,
        **dict(base_options or {}),
        **fedavg_options,
    )
