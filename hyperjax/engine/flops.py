"""How much arithmetic training is: multiplications and additions of its products.

Counted in the programs as they were traced, of matrix products and convolutions, which
are nearly all there is. XLA's own count sees a loop's body once, however often it runs:
here a loop of fixed length counts as often as it runs, and what is inside one whose
length the data decide, that of local training, is counted apart, per step.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core

from hyperjax import native


class Work(NamedTuple):
    """The arithmetic of a traced program."""

    outside: float  # FLOPs outside of loops of unknown length
    inside: float  # FLOPs of one turn of all those there are, summed
    loops: float  # how many those are; only what has products in it

    @property
    def step(self) -> float:
        """FLOPs of a turn of a loop, the mean over loops."""
        return self.inside / self.loops if self.loops else 0.0


class OfRound(NamedTuple):
    """What a round costs beside the steps in it, and what each of these does, FLOPs.

    Where clients have several phases or networks a step is the mean over these.
    """

    round: float
    step: float


def work(jaxpr: core.Jaxpr, times: float = 1.0) -> Work:
    """Counts the products of a traced program that runs so many times."""
    outside = inside = loops = 0.0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind == "dot_general":
            outside += times * _product(equation)
        elif kind == "conv_general_dilated":
            outside += times * _convolution(equation)
        elif kind == "ffi_call" and native.is_convolution(params["target_name"]):
            outside += times * _native_convolution(equation)
        elif kind == "while":
            body = work(params["body_jaxpr"].jaxpr)
            once = body.outside or body.inside
            inside += times * (body.outside + body.inside)
            # Of loops in loops the innermost turns are the steps.
            loops += times * (body.loops or float(once > 0))
        else:
            inner = [work(part, times * n) for part, n in parts(kind, params)]
            outside, inside, loops = (
                before + sum(column)
                for before, column in zip(
                    (outside, inside, loops),
                    zip(*inner, strict=True) if inner else ((), (), ()),
                    strict=True,
                )
            )
    return Work(outside, inside, loops)


def parts(kind: str, params: dict[str, Any]) -> Iterator[tuple[core.Jaxpr, float]]:
    """Yields the programs inside an equation of a kind, and how often each runs."""
    times = 1.0
    if kind == "scan":
        times = params["length"]
    elif kind == "shard_map":
        times = params["mesh"].size
    elif kind == "cond":
        times = 1 / len(params["branches"])  # the mean over them
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if isinstance(part, core.Jaxpr):
                yield part, times


def _product(equation: Any) -> float:
    """Two for each multiplication with its addition."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    summed = math.prod(shape[axis] for axis in contracted)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * summed


def _native_convolution(equation: Any) -> float:
    """Of two of x, kernel and y, which has the positions, and the third."""
    shapes = [each.aval.shape for each in (*equation.invars, *equation.outvars)]
    _, kernel, y = native.roles(equation.params["target_name"], *shapes)
    return 2.0 * math.prod(y[:3]) * math.prod(kernel)


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    each = math.prod(kernel) / features
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * each
