"""Ahead-of-time compilation, timed."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from hyperjax import compiling, hosts
from hyperjax.engine import flops, sharding
from hyperjax.errors import first_line
from hyperjax.types import ALONE, Algorithm, Array, in_one_line

_GUARDED = (("disallow", "disallow_explicit"), "data and results are moved as needed")
# Settings of JAX, the values under which nothing here can run, and why.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "jax_enable_x64": (
        (True,),
        "states, messages and data are float32 and int32 throughout",
    ),
    "jax_numpy_dtype_promotion": (
        ("strict",),
        "products of counts and float32 numbers rely on promotion",
    ),
    "jax_numpy_rank_promotion": (
        ("raise",),
        "biases and masks rely on broadcasting",
    ),
    "jax_transfer_guard": _GUARDED,
    "jax_transfer_guard_host_to_device": _GUARDED,
    "jax_transfer_guard_device_to_host": _GUARDED,
    "jax_no_tracing": ((True,), "programs are traced"),
    "jax_no_execution": ((True,), "programs are run"),
}


def setting(name: str) -> Any:
    """Returns a setting of JAX in this process; None if this JAX has no such one."""
    return getattr(jax.config, name, None)


def check_jax() -> None:
    """Finds out whether JAX, as it is set up in this process, can run programs.

    Raises:
      ValueError: a setting has a value that programs cannot be traced under, or JAX
        finds none of the devices that it was told to use.
    """
    for name, (refused, reason) in _REFUSED.items():
        value = setting(name)
        if value in refused:
            raise ValueError(
                f"{name.upper()}={value}, a setting of JAX, does not go with hyperjax: "
                f"{reason}. Unset it in the environment or in jax.config"
            )
    try:
        jax.local_devices()
    except Exception as error:  # for cuda an AssertionError without words
        raise ValueError(
            f"JAX finds no device: {first_line(error)}. "
            f"JAX_PLATFORMS={setting('jax_platforms') or ''} asks for one that is not "
            "there, or whose plugin is not installed; unset it, or give "
            "JAX_PLATFORMS=cpu"
        ) from error


class Hyper(NamedTuple):
    """Hyper-parameters of a method that are arguments of its programs.

    One program then serves all values. What is built in is what sets shapes and
    branches.
    """

    values: Mapping[str, float | Array]
    # Builds the method from values that may be traced, [] float32: of one structure.
    method: Callable[[Mapping[str, Any]], Algorithm]

    def __repr__(self) -> str:
        return in_one_line(self)

    @classmethod
    def none(cls, alg: Algorithm) -> "Hyper":
        """Those of a method with everything built in."""
        return cls({}, lambda values: alg)


class Compiled:
    """Compiles functions on first use and keeps the seconds that took.

    Calls with the same name, family, structure and shapes reuse the program. With a
    mesh, every output is replicated, so that it can be the next call's input, but for
    what `places` puts elsewhere: a prefix of the output, of shardings. Under
    JAX_DISABLE_JIT nothing is compiled: functions run operation by operation.
    `times` says how often a program runs, see `compiling`, as it does of `numerics`.
    `work` is the arithmetic of a round once a program of rounds was compiled.
    `watcher` is told the name of what is being compiled, and None when that is done.
    """

    def __init__(
        self, mesh: Any = None, numerics: compiling.Numerics = compiling.Numerics()
    ):
        check_jax()
        self.numerics = numerics
        self.seconds = 0.0
        self.watcher: Callable[[str | None], object] = lambda name: None
        self.mesh = mesh
        self.work: flops.OfRound | None = None
        self._traced: dict[str, flops.Work] = {}
        self._programs: dict[Any, Callable] = {}

    def __call__(self, name: str, fn: Callable, args: tuple, **options: Any) -> Any:
        """Calls the program that `made` returns."""
        return self.made(name, fn, args, **options)(*args)

    def made(
        self,
        name: str,
        fn: Callable,
        args: tuple,
        donate: tuple = (),
        family: str = ALONE,
        times: int = compiling.OFTEN,
        places: Any = None,
    ) -> Callable:
        """Returns the program of a call, which is not called."""
        if setting("jax_disable_jit"):
            return lambda *args: sharding.replicate(fn(*args), self.mesh)
        leaves, structure = jax.tree.flatten(args)
        key = (name, family, structure, tuple(map(jax.typeof, leaves)))
        if key not in self._programs:
            start = time.perf_counter()
            self.watcher(name)
            chosen = compiling.options(times)
            if more := self.numerics.options():
                chosen["compiler_options"] = chosen.get("compiler_options", {}) | more
            options = {"donate_argnums": donate, **chosen}
            if self.mesh is not None:
                options["out_shardings"] = places or sharding.everywhere(self.mesh)
            try:
                traced: Any = self._trace(jax.jit(fn, **options), args)
                self._programs[key] = traced.lower().compile()
                self._traced[name] = flops.work(traced.jaxpr.jaxpr)
            finally:
                self.watcher(None)
            if self.mesh is not None:
                hosts.meet()  # the first to wait for the others does so 30 s only
            self.seconds += time.perf_counter() - start
        return self._programs[key]

    def _trace(self, fn: Any, args: tuple) -> Any:
        if not self.numerics.precision:
            return fn.trace(*args)
        with jax.default_matmul_precision(self.numerics.precision):
            return fn.trace(*args)

    def keep_work(self, name: str, rounds: int, width: int = 1, points: int = 1):
        """Sets `work` from a program that has just been made, of so many rounds.

        Args:
          name: of the program; if it was there before, nothing is set.
          rounds: that it runs, of every point.
          width: clients, or points with a client each, that a device trains at a time.
          points: that it runs side by side.
        """
        traced = self._traced.pop(name, None)
        if traced is not None:
            each = flops.OfRound(traced.outside / rounds / points, traced.step / width)
            self.work = each
