"""Experiments: published protocols, each with its data sets, which take any method."""

import importlib
from types import ModuleType

NAMES = ("zero_shot", "personalised", "pfedhn", "families")


def find(name: str) -> ModuleType:
    """Returns an experiment's module: `get_config(arg)`, `PRESETS`, `TUNED`."""
    return importlib.import_module(f"hyperjax.protocols.{name}")
