"""What belongs to a method in any experiment, and names for variants of methods."""

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from hyperjax import models, registry


class Tuned(NamedTuple):
    """Fields that an experiment has for a method; others are the experiment's."""

    fields: dict[str, Any]
    origin: str
    on: Mapping[str, dict[str, Any]] = MappingProxyType({})  # preset -> further fields


class Alias(NamedTuple):
    """A method under the name of a variant: its fields come after those of `Tuned`."""

    method: str
    fields: dict[str, Any]
    words: str


_CLIPPED = Tuned(
    {"local.clip_norm": 10.0},
    "Deviation: some seeds diverge in round 1 without; of 1, 3, 10 the best by pACC.",
)
_MANY_HEADS = Tuned(
    {
        "server.optimizer": "adam",
        "server.learning_rate": 2e-4,
        "server.sequential": True,
    },
    "arXiv:2507.22330 as its code runs it: clients come one after another.",
    on={
        "digits": {"method.output_size": 2048, "server.learning_rate": 5e-3},
    },
)
_ADAM = {"server.optimizer": "adam", "server.learning_rate": 2e-4}
# What a method declares as its traits (uniform weights, its own count of epochs) is
# followed without an entry here.
TUNED: dict[str, Tuned] = {
    "constant_embedding": _CLIPPED,
    "feddyn": Tuned({"local.clip_norm": 10.0}, "As the authors' code."),
    "fedrep": Tuned(
        {"method.head_epochs": 1, "method.body_epochs": 1},
        "The paper has 10 + 1; the experiments have about one in all.",
    ),
    "hyperfedzero": _CLIPPED,
    "mh_pfedhn": _MANY_HEADS,
    "mh_pfedhngd": _MANY_HEADS,
    "odpfl_hn": Tuned(_ADAM, "PeFLL's: its own code is not public."),
    "pefll": Tuned(_ADAM, "arXiv:2306.05515, the authors' code."),
    "pfedhn": Tuned(
        {
            "server.optimizer": "sgd(momentum=0.9)",
            "server.learning_rate": 1e-2,
            "server.sequential": True,
        },
        "arXiv:2103.04628, section 5.1: the server steps after every client.",
    ),
    "pfedla": Tuned(
        {"server.sequential": True},
        "One client after another, as in public reproductions; False: synchronous.",
    ),
    "pfedlhn": Tuned(
        {
            "server.optimizer": "adamw",
            "server.learning_rate": 3e-4,
            "server.sequential": True,
        },
        "As the authors' instructions: the server steps after every client.",
    ),
    "pfedme": Tuned(
        {
            "local.optimizer": "sgd",
            "local.learning_rate": 0.005,
            "server.learning_rate": 1.0,
        },
        "The paper's eta, on plain steps, and beta.",
    ),
}


def _server(optimizer: str, learning_rate: float) -> dict[str, Any]:
    return {"server.optimizer": optimizer, "server.learning_rate": learning_rate}


ALIASES: dict[str, Alias] = {
    "centre": Alias(
        "fedavg",
        {
            "data.pooled": True,
            "local.epochs": 1,
            "local.steps": None,
            "server.sampler": "full",
        },
        "Centralised training: all participants' images in one place.",
    ),
    "fedavg_ft": Alias(
        "fedavg",
        {"evaluation.finetune_epochs": (0, 4)},
        "FedAvg, also scored after local epochs on a copy (arXiv:2205.13692).",
    ),
    "fedavgm": Alias(
        "fedavg",
        _server("fedavgm(beta=0.9)", 1.0),
        "FedAvg, a server with momentum (arXiv:1909.06335).",
    ),
    "fedadagrad": Alias(
        "fedavg",
        _server("fedadagrad(tau=1e-3)", 0.1),
        "FedAvg, an adaptive server (arXiv:2003.00295, algorithm 2).",
    ),
    "fedadam": Alias(
        "fedavg",
        _server("fedadam(b1=0.9, b2=0.99, tau=1e-3)", 0.1),
        "FedAvg, an adaptive server (arXiv:2003.00295, algorithm 2).",
    ),
    "fedyogi": Alias(
        "fedavg",
        _server("fedyogi(b1=0.9, b2=0.99, tau=1e-3)", 0.01),
        "FedAvg, an adaptive server (arXiv:2003.00295, algorithm 2).",
    ),
    "pfedhn_families": Alias(
        "pfedhn", {}, "pFedHN, each client sent the slice of its own network."
    ),
    "pfedhn_pc": Alias(
        "pfedhn",
        {
            "server.learning_rate": 5e-2,
            "method.keep": (models.HEAD,),
            "method.persist_optimizer": "kept",
        },
        "pFedHN whose clients keep their classifiers (arXiv:2103.04628).",
    ),
    "pfedhn_synchronous": Alias(
        "pfedhn",
        {
            "server.sampler": "full",
            "server.sequential": False,
            # As many visits as a round has clients, in one step so much larger.
            "server.learning_rate": lambda config: (
                1e-2 * config.data.get_ref("num_clients").to_float()
            ),
        },
        "pFedHN, one server step a round on the mean of all gradients.",
    ),
}


def resolve(name: str, others: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """Returns a method's own name, and the fields that make it the named variant.

    Args:
      name: of a method, one of `ALIASES`, or "package.module:function".
      others: words that may have been meant, for the message.

    Raises:
      ValueError: it is unknown.
    """
    if name in ALIASES:
        return ALIASES[name].method, ALIASES[name].fields
    known = [*registry.methods(), *ALIASES]
    if ":" not in name and name not in known:
        near = difflib.get_close_matches(name, [*known, *others], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        more = "--help lists them" if near else f"accepted: {', '.join(known)}"
        raise ValueError(f"method={name!r} is unknown{hint} ({more})")
    return name, {}
