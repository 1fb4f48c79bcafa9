"""Flags of the launchers, and one readable message instead of a stack trace."""

import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(), such as configs/....py", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show stack traces.")


def run(main: Callable) -> None:
    """Parses --config, --workdir, --debug and exits with what `main` returns."""
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """As absl's parser, with our own way of reporting a bad value."""
    try:
        rest = flags.FLAGS(argv)
        for name in ("config", "workdir"):
            if flags.FLAGS[name].value is None:
                raise ValueError(f"--{name} is required")
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}")
        return rest
    except Exception as error:
        if "--debug" in argv:
            raise
        sys.exit(_complain(_explain(error)))


def _explain(error: Exception) -> str:
    """Adds the nearest field name to ml_collections' words."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text


def _guarded(main: Callable, argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    devices = _CONFIG.value.engine.devices
    use_cores(devices)
    try:
        code = main(_CONFIG.value, _WORKDIR.value)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if _DEBUG.value:
            raise
        code = _complain(str(error) or type(error).__name__)
    sys.exit(code)


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    print("(--debug shows where)", file=sys.stderr)
    return 2


def use_cores(devices: int) -> None:
    """Makes each CPU core a device, so that clients spread over them.

    Two single-threaded devices beat one device with two threads on the small products
    of client training (`benchmarks/round_time.py`). Accelerators are untouched. Must
    run before JAX looks for devices.
    """
    import os

    cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", devices or cores)
