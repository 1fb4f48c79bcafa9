"""How much the compiler is asked to do.

Nearly all of compiling for the CPU is LLVM's work. At its level 1 a program takes three
quarters of the time to compile and no longer to run; at level 0 a third, but it runs
several times longer, which is nothing for one that runs once. Levels change results by
rounding. What JAX_DISABLE_MOST_OPTIMIZATIONS or XLA_FLAGS say goes before.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

_LEVEL = "xla_backend_optimization_level"
_DISABLED = "jax_disable_most_optimizations"
OFTEN, ONCE = 1, 0  # levels, by how often a program runs
BFLOAT16 = "bfloat16"
# Of float32 products, as jax_default_matmul_precision; "": as JAX is set up. With the
# last one networks compute in bfloat16 too, see `models.from_linen`.
PRECISIONS = ("", "default", "high", "highest", BFLOAT16)


class Numerics(NamedTuple):
    """How programs round; nothing but `BFLOAT16` changes anything on a CPU.

    Attributes:
      precision: of `PRECISIONS`, of float32 products on an accelerator. Parameters are
        kept, sent and averaged in float32 whatever it is.
      deterministic: on a GPU, programs that give equal bits every time, and slower
        ones (`xla_gpu_deterministic_ops`); other backends do so anyway.
    """

    precision: str = ""
    deterministic: bool = False

    def options(self) -> dict[str, Any]:
        """Returns what the compiler is told for it."""
        asked = self.deterministic and jax.default_backend() == "gpu"
        return {"xla_gpu_deterministic_ops": True} if asked else {}


def level(times: int = OFTEN) -> int | None:
    """Returns the level that programs for the CPU get; None where it is not ours."""
    given = _LEVEL in os.environ.get("XLA_FLAGS", "")
    if given or jax.config.read(_DISABLED):
        return None
    return times if jax.default_backend() == "cpu" else None


def options(times: int = OFTEN) -> dict[str, Any]:
    """Returns what `jax.jit` is told for it."""
    chosen = level(times)
    return {} if chosen is None else {"compiler_options": {_LEVEL: chosen}}


def traced_once(fn: Callable) -> Callable:
    """Returns a function that Python goes through once for each form of arguments.

    A method is traced for its messages, for each of its programs and for each place in
    them, and going through Flax is most of that. What is traced is what `fn` is.
    """
    return jax.jit(fn, inline=True)


def once(fn: Callable) -> Callable:
    """Returns a function compiled for a single call."""
    return lambda *args: jax.jit(fn, **options(ONCE))(*args)
