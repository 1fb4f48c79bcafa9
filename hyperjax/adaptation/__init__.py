"""Test-time adaptation: what a deployed client makes of its unlabelled inputs.

`with_adaptation(alg, "bn(prior=16)")` returns a method whose clients adapt what they
are deployed with, and training does not change. All of a client's inputs are looked at
before the first is predicted, where the papers go batch by batch. An unseen client
sends nothing and needs no label. "em", "bbse" and "atp" are told
what participants find out first, on samples that nobody trained on.

Each refuses, by name, networks that it can do nothing for.
"""

from collections.abc import Callable

from hyperjax import calls
from hyperjax.adaptation.atp import atp
from hyperjax.adaptation.batch_norm import bn, tent
from hyperjax.adaptation.features import shot, t3a
from hyperjax.adaptation.label_shift import bbse, em
from hyperjax.adaptation.memo import memo
from hyperjax.errors import check_choice
from hyperjax.types import Algorithm, ClientSide

FIELD = "evaluation.adapt"
# Text in a config -> factory of what changes a client.
ADAPTATIONS: dict[str, Callable[..., Callable[[ClientSide], ClientSide]]] = {
    "bn": bn,
    "tent": tent,
    "shot": shot,
    "t3a": t3a,
    "memo": memo,
    "em": em,
    "bbse": bbse,
    "atp": atp,
}
# Those that are told what participants find out first.
FITTED = ("em", "bbse", "atp")


def with_adaptation(alg: Algorithm, text: str, field: str = FIELD) -> Algorithm:
    """Returns a method whose deployed clients adapt to their inputs.

    Args:
      alg: with or without families.
      text: a key of `ADAPTATIONS` with options, such as "bn(prior=16)".
      field: for what, for messages.

    Raises:
      ValueError: an unknown name or option, or a network that it cannot adapt.
    """
    return alg.with_clients(factory(text, field))


def factory(text: str, field: str = FIELD) -> Callable[[ClientSide], ClientSide]:
    """Returns what changes a client, of a text; see `with_adaptation`."""
    name, options = calls.parse(field, text)
    check_choice(field, name, ADAPTATIONS)
    return calls.call(field, ADAPTATIONS[name], **options)


def check_held_out(text: str, validation_fraction: float) -> None:
    """Refuses an adaptation that needs samples which participants did not set aside.

    Raises:
      ValueError: naming it and the field that sets them aside.
    """
    name, _ = calls.parse(FIELD, text)
    if name in FITTED and not validation_fraction:
        raise ValueError(
            f"evaluation.adapt={name!r} asks participants for what they find out on "
            "samples that they did not train on, and data.validation_fraction=0 sets "
            "none aside; accepted: a share above 0, such as "
            "--config.data.validation_fraction=0.2"
        )
