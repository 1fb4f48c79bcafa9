"""Federated learning with hypernetworks, simulated in JAX.

The names here are enough to train, score, serve and save from a notebook; the command
`hyperjax` does so from configs. Methods are attributes of the package by their names,
see `methods`.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperjax.api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # What is asked for is imported when it is: a command speaks before JAX is there.
    if name != "__all__" and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    from hyperjax import api, registry

    if name == "__all__":
        return api.__all__
    if name in api.__all__:
        return getattr(api, name)
    if name in registry.methods():
        return registry.find(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from hyperjax import api, registry

    return sorted({*globals(), *api.__all__, *registry.methods()})
