"""Ahead-of-time compilation, timed."""

import time
from collections.abc import Callable
from typing import Any

import jax

from hyperjax.engine import sharding


class Compiled:
    """Compiles functions on first use and keeps the seconds that took.

    Calls with the same name, structure and shapes reuse the program. With a mesh,
    every output is replicated, so that it can be the next call's input.
    """

    def __init__(self, mesh: Any = None):
        self.seconds = 0.0
        self._mesh = mesh
        self._programs: dict[Any, Callable] = {}

    def __call__(self, name: str, fn: Callable, args: tuple, donate: tuple = ()):
        leaves, structure = jax.tree.flatten(args)
        key = (name, structure, tuple(map(jax.typeof, leaves)))
        if key not in self._programs:
            start = time.perf_counter()
            options: dict[str, Any] = {"donate_argnums": donate}
            if self._mesh is not None:
                options["out_shardings"] = sharding.everywhere(self._mesh)
            self._programs[key] = jax.jit(fn, **options).lower(*args).compile()
            self.seconds += time.perf_counter() - start
        return self._programs[key](*args)
