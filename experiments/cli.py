"""Flags of the launchers, and one readable message instead of a stack trace."""

import os
import re
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from hyperjax.errors import check_choice


def run(main: Callable, needs: tuple[str, ...] = ("workdir",)) -> None:
    """Runs `main() -> exit code` under absl, turning mistakes into messages.

    Args:
      main: reads `flags.FLAGS`.
      needs: flags that must be given.
    """
    flags.DEFINE_bool("debug", False, "Show stack traces.")
    debug = "--debug" in sys.argv

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            for name in needs:
                if flags.FLAGS[name].value is None:
                    raise ValueError(f"--{name} is required; see --help")
            if len(rest) > 1:
                raise ValueError(f"unexpected argument {rest[1]!r}; see --help")
            return rest
        except Exception as error:
            if debug:
                raise
            sys.exit(complain(explain(error)))

    def guarded(argv: list[str]) -> None:
        del argv
        logging.set_verbosity(logging.WARNING)
        try:
            code = main()
        except KeyboardInterrupt:
            code = 130
        except Exception as error:
            if debug:
                raise
            code = complain(str(error) or type(error).__name__)
        sys.exit(code)

    app.run(guarded, flags_parser=parse)


def define_config() -> flags.FlagHolder:
    """Defines --config=file.py[:argument] and --config.field=value."""
    return config_flags.DEFINE_config_file(
        "config", None, "A file with get_config(), as in configs/.", lock_config=True
    )


def complain(message: str) -> int:
    """Prints an error; returns the exit code."""
    print(f"error: {message}\n(--debug shows where)", file=sys.stderr)
    return 2


def explain(error: Exception) -> str:
    """Returns a parser's message; for an unknown config field with the nearest one."""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:  # of a config file that failed
        text = text.splitlines()[-1]
    return _unknown_field() or text


def _unknown_field() -> str | None:
    """Finds the first --config.field that the config file does not have."""
    from experiments.workdir import flatten

    arguments = sys.argv[1:]
    given = [re.match(r"--config\.([\w.]+)", argument) for argument in arguments]
    paths = [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    if not paths or not any(given):
        return None
    try:
        parser = config_flags.config_flags.ConfigFileFlagParser("config")
        fields = list(flatten(parser.parse(paths[-1]).to_dict()))
    except Exception:  # the file itself is at fault: the parser's words must do
        return None
    try:
        for match in filter(None, given):
            check_choice("config field", match.group(1), fields)
    except ValueError as unknown:
        return str(unknown)
    return None


def use_cores(devices: int) -> None:
    """Makes each CPU core a device, so that clients spread over them.

    Two single-threaded devices beat one device with two threads on the small products
    of client training (`benchmarks/round_time.py`). Each holds a copy of the data, so
    by default there are at most 8. Accelerators are untouched. Must run before JAX
    looks for devices.
    """
    jax.config.update("jax_num_cpu_devices", devices or min(num_cores(), 8))


def num_cores() -> int:
    """Returns the number of cores this process may use."""
    return len(os.sched_getaffinity(0))
