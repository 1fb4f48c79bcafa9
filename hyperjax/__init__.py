"""Federated learning with hypernetworks, simulated in JAX.

The names here are enough to run an experiment from a script; `experiments.train` does
so from a config.
"""

from hyperjax.algorithms.fedavg import fedavg
from hyperjax.algorithms.hyperfedzero import hyperfedzero
from hyperjax.data.federation import federate
from hyperjax.data.sources import Source, load
from hyperjax.engine.comm import cost, describe
from hyperjax.engine.schedule import simulator
from hyperjax.models.linen import from_linen
from hyperjax.training import Local, Phase, trainer
from hyperjax.types import Algorithm, ClientSide, Model, ServerSide

__version__ = "0.1.0"
__all__ = [
    "Algorithm",
    "ClientSide",
    "Local",
    "Model",
    "Phase",
    "ServerSide",
    "Source",
    "cost",
    "describe",
    "fedavg",
    "federate",
    "from_linen",
    "hyperfedzero",
    "load",
    "simulator",
    "trainer",
]
