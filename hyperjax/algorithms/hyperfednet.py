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

import inspect
from collections.abc import Callable
from typing import Any

import jax

from hyperjax import calls, registry
from hyperjax.algorithms.fedavg import fedavg
from hyperjax.errors import check_at_least, check_choice
from hyperjax.hypernets import generators, tiles
from hyperjax.hypernets.hypernetworked import hypernetworked
from hyperjax.registry import hands_on, has_traits
from hyperjax.training import Local, check_given
from hyperjax.types import Algorithm, Model

# What stays home, by what is shared beside the generator.
KEEP = {
    "none": r"params/(?!hyper/).*",
    "convs": r"params/(embed/.*|generated/.*|network/head/.*|network/.*(?<!/kernel))",
    "convs_and_bn": r"params/(embed/.*|generated/.*|network/head/.*)",
}


@has_traits(base_option="base")
@hands_on(fedavg, without=("keep",))
def hyperfednet(
    model: Model,
    *,
    local: Local,
    embedding_size: int = 128,
    hidden_size: int | None = None,
    tile: int = 16,
    share_aux: str = "none",
    regenerate: str = "every_step",
    init: str = "variance",
    slices: str = "input",
    embedding_init: str = "common",
    hypernet: str | Callable = "",
    base: str = "fedavg",
    num_clients: int | None = None,
    num_rounds: int | None = None,
    bn_stats: str = "local",
    **fedavg_options,
) -> Algorithm:
    """Returns HyperFedNet of `model`, or its fusion with another method.

    Args:
      model: a network with 3x3 convolutions of multiples of 16 channels, or any for
        which there is a `hypernet`, and a last layer named "head".
      local: how clients train, see `fedavg`.
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
      hypernet: instead of tiles, one that emits all weights (leaves of two axes and
        more) but the head's, for dense, recurrent and token networks, too:
        "chunked_mlp(hidden=(32,))" or one of yours, see `hypernets.generators`. It has
        one embedding; what is about tiles counts for nothing.
      base: the method that shares the generator, one of `bases()`, with its options:
        "fedprox(mu=0.1)"; or one of yours, "package.module:method(option=1)".
      num_clients, num_rounds: for bases that must know them.
      bn_stats: as in `fedavg`.
      **fedavg_options: of `fedavg`: `server_opt`, `correction`, ...

    Raises:
      ValueError: an unknown choice, or no kernel can be generated.
    """
    check_given(model, local)
    check_choice("share_aux", share_aux, KEEP)
    known = dict(num_clients=num_clients, num_rounds=num_rounds)
    check_at_least(
        0, **{k: number for k, number in known.items() if number is not None}
    )
    build = _base(base, known)
    template = jax.eval_shape(model.init, jax.random.key(0))["params"]
    if hypernet:

        def emit(weights):
            return generators.generator(hypernet, weights, embedding_size)

        net = tiles.of_all_weights(template, emit, embedding_size)
    else:
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
    return build(
        whole, local=local, keep=KEEP[share_aux], bn_stats=bn_stats, **fedavg_options
    )


def bases() -> list[str]:
    """Returns the methods that leave open what stays home, and so can share it."""
    return [name for name in registry.methods() if registry.traits(name).base]


def _base(text: str, known: dict[str, int | None]) -> Callable[..., Algorithm]:
    """Returns the method that a text names, with the options in it."""
    name, options = calls.parse("base", text)
    if name == "fedbn":
        raise ValueError("base='fedbn': HyperFedNet + FedBN is share_aux='convs'")
    if ":" not in name:
        check_choice("base", name, bases())
    method = registry.find(name, "base")
    takes = inspect.signature(method).parameters
    if "keep" not in takes:
        raise ValueError(
            f"base={name!r} decides itself what stays home (no `keep` "
            "in its signature, where @registry.hands_on(fedavg) puts it)"
        )
    theirs = registry.own_options(name)
    for option in options:
        check_choice(f"option of base={name}", option, theirs)
    needed = {k: number for k, number in known.items() if k in takes}
    for option, number in needed.items():
        if number is None:
            raise ValueError(f"base={name!r} must know {option}")
    offered = inspect.signature(fedavg).parameters

    def build(model: Model, **handed_on: Any) -> Algorithm:
        # FedAvg's options that the base sets itself can be left alone, not chosen.
        for option in [k for k in handed_on if k not in takes]:
            value = handed_on.pop(option)
            if option not in offered or value != offered[option].default:
                raise ValueError(
                    f"{option}={value!r} is not for base={name!r}, which sets it itself"
                )
        given: dict[str, Any] = {**options, **needed, **handed_on}
        return calls.call("base", method, model, **given)

    return build
