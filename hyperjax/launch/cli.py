"""Flags of the launchers, and one readable message instead of a stack trace."""

import contextlib
import difflib
import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from jax.extend.backend import clear_backends
from ml_collections import config_flags

from hyperjax import hosts, protocols, registry
from hyperjax.engine.compiled import setting
from hyperjax.engine.progress import Progress, Silent
from hyperjax.launch import overview
from hyperjax.protocols import common, methods


def run(
    main: Callable,
    needs: tuple[str, ...] = ("workdir",),
    takes_arguments: bool = False,
    together: bool = False,
    apart: bool = False,
) -> None:
    """Runs `main() -> exit code` under absl, turning mistakes into messages.

    Args:
      main: reads `flags.FLAGS`.
      needs: flags that must be given.
      takes_arguments: `main` is called with what is given beside flags.
      together: of several processes all run `main`, in step; by default process 0 does.
      apart: they do not meet, and each runs `main`.
    """
    flags.DEFINE_bool("debug", False, "Show stack traces.")
    asked = _Processes()
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a locale may not have all of Unicode
            stream.reconfigure(errors="backslashreplace")
    sys.argv[1:] = map(_expand_config, sys.argv[1:])

    def parse(argv: list[str]) -> list[str]:
        try:
            sys.argv, removed = _split_none(argv)
            if "config" in flags.FLAGS:
                parser: Any = flags.FLAGS["config"].parser
                sys.argv, parser.chosen = _split_names(sys.argv)
            if {"--help", "-help", "-h"} & set(argv):
                print(overview.text(sys.modules["__main__"].__doc__ or "", _asked()))
                sys.exit(0)
            rest = flags.FLAGS(sys.argv)
            _check_config(removed)
            hosts.check_flags(*asked.given())
            for name in needs:
                if flags.FLAGS[name].value is None:
                    raise ValueError(f"--{name} is required; see --help")
            if len(rest) > 1 and not takes_arguments:
                raise ValueError(f"unexpected argument {rest[1]!r}; see --help")
            return rest
        except BrokenPipeError:
            sys.exit(_nobody_reads())
        except Exception as error:
            if debug:
                raise
            sys.exit(complain(explain(error)))

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        keep_programs()
        try:
            with asked.joined(debug, apart):
                code = main(*argv[1:]) if together or hosts.is_first() else 0
        except KeyboardInterrupt:
            code = 130
        except BrokenPipeError:
            code = _nobody_reads()
        except Exception as error:
            if debug:
                raise
            code = complain(str(error) or type(error).__name__)
        sys.exit(code)

    app.run(guarded, flags_parser=parse)


def _nobody_reads() -> int:
    """Ends quietly, as `--help | head` expects; returns a shell's code of SIGPIPE."""
    # What is still buffered would fail again when the interpreter closes the stream.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


class _Processes:
    """Flags that say which process of several this is."""

    def __init__(self) -> None:
        self.coordinator = flags.DEFINE_string(
            "coordinator", None, "HOST:PORT of process 0, of several processes."
        )
        self.num_processes = flags.DEFINE_integer(
            "num_processes", None, "How many processes there are."
        )
        self.process_id = flags.DEFINE_integer(
            "process_id", None, "Which of them this is, from 0."
        )
        self.distributed = flags.DEFINE_bool(
            "distributed", False, "Ask SLURM, Open MPI, a TPU, ... for these."
        )

    def given(self) -> tuple[str | None, int | None, int | None]:
        """The first three, which go together."""
        return self.coordinator.value, self.num_processes.value, self.process_id.value

    def joined(
        self, debug: bool, apart: bool
    ) -> contextlib.AbstractContextManager[None]:
        """See `hosts.joined`; nothing where there are no others to meet."""
        if apart or not (self.distributed.value or self.coordinator.value):
            hosts.hear()
            return contextlib.nullcontext()
        return hosts.joined(*self.given(), trace=debug)


def part_of_processes() -> str | None:
    """Returns "i/n" where flags say that this is process i of n; None without them."""
    values = flags.FLAGS
    if values.distributed:
        raise ValueError("--distributed: of a sweep give each process its --index=i/n")
    if values.num_processes is None:
        return None
    return f"{values.process_id}/{values.num_processes}"


def define_config() -> flags.FlagHolder:
    """Defines --config=file.py[:argument] and --config.field=value."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "An experiment and what it is of, zero_shot:fedprox,data=digits; or a file of "
        "yours with get_config().",
        lock_config=True,
    )
    flags.FLAGS["config"].parser = ConfigParser("config")
    return holder


class ConfigParser(config_flags.config_flags.ConfigFileFlagParser):
    """Reads an experiment of the package or a file, and adds all options to it.

    Attributes:
      chosen: names given by --config.method.name and --config.model.name; they bring
        their own options, and a method what the experiment has for it.
    """

    chosen: Mapping[str, str] = {}

    def parse(self, path: str) -> Any:
        """Returns the config of "zero_shot:argument" or "file.py:argument"."""
        config = self._read(path)
        if not isinstance(config, ml_collections.ConfigDict):
            return config  # `fields.check` says so, as of a file that failed
        fields: dict[str, Any] = {}
        if "model" in self.chosen:
            fields["model.name"] = self.chosen["model"]
        if "method" in self.chosen:
            name, own = methods.resolve(self.chosen["method"])
            again = self._again(path, config, self.chosen["method"])
            if again is None or again.method.name != name:
                fields |= {"method.name": name, **own}
            else:
                config = again
        common.change(config, fields)
        if self._lock_config:
            config.lock()
        return config

    def _read(self, path: str) -> Any:
        file, _, arg = path.partition(":")
        name = Path(file).stem if file.endswith(".py") else file
        usual = str(Path(file).parent) in (".", "configs")
        if Path(file).is_file():
            return super().parse(path)
        if name in protocols.NAMES and usual:
            return protocols.find(name).get_config(arg)
        experiments = ", ".join(protocols.NAMES)
        if name in (*registry.methods(), *methods.ALIASES):
            raise ValueError(
                f"{name!r} is a method; give the experiment before it, as in "
                f"{protocols.NAMES[0]}:{name} (experiments: {experiments})"
            )
        near = difflib.get_close_matches(name, protocols.NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no file {file!r} and no such experiment{hint} "
            f"(experiments: {experiments})"
        )

    def _again(self, path: str, config: Any, method: str) -> Any:
        """The config as if its argument had named a method; None if it takes none."""
        if not config.get("experiment"):
            return None
        file, _, arg = path.partition(":")
        try:
            return self._read(f"{file}:{arg}{arg and ','}method={method}")
        except TypeError:  # a file of the user's own that takes no argument
            return None


def define_path(name: str, default: str | None, help: str) -> flags.FlagHolder:
    """Defines a flag for a file or folder; `~` is the home folder."""
    return flags.DEFINE(
        _PathParser(), name, default, help, serializer=flags.ArgumentSerializer()
    )


class _PathParser(flags.ArgumentParser):
    """Expands `~`, which shells leave alone after "="."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        if not argument.strip():
            raise ValueError("it is empty; give a path")
        return os.path.expanduser(argument)

    def flag_type(self) -> str:
        return "path"


def _expand_config(argument: str) -> str:
    """Expands `~` in --config=~/file.py."""
    return re.sub(
        r"^(--?config=)(~[^/]*)",
        lambda found: found[1] + os.path.expanduser(found[2]),
        argument,
    )


def _split_none(argv: list[str]) -> tuple[list[str], list[str]]:
    """Takes `--config.field=None`, or `None` after it, out.

    No type of absl's flags has None. Of a field that is given twice the last counts.
    """
    kept: list[str] = []
    removed: list[str] = []
    for before, argument in zip(["", *argv], argv, strict=False):
        match = re.fullmatch(r"--?config\.([\w.]+)(=.*)?", argument, re.DOTALL)
        if argument == "None" and re.fullmatch(r"--?config\.[\w.]+", before):
            removed.append(kept.pop().lstrip("-").removeprefix("config."))
        elif match and match[2] == "=None":
            removed.append(match[1])
        else:
            kept.append(argument)
            if match:
                removed = [name for name in removed if name != match[1]]
    return kept, removed


def _asked() -> Any:
    """The config that --config names beside --help; None without it."""
    paths = [a.partition("=")[2] for a in sys.argv if re.match("--?config=", a)]
    return flags.FLAGS["config"].parser.parse(paths[-1]) if paths else None


def _split_names(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.method.name=NAME` and the network's out: others follow them."""
    kept: list[str] = []
    names: dict[str, str] = {}
    waiting = None
    for argument in argv:
        match = re.fullmatch(r"--?config\.(method|model)\.name(?:=(.*))?", argument)
        if waiting is not None:
            names[waiting], waiting = argument, None
        elif match and match[2] is None:
            waiting = match[1]
        elif match:
            names[match[1]] = match[2]
        else:
            kept.append(argument)
    return kept, names


def _given_fields(argv: list[str] | None = None) -> list[str]:
    """Fields of --config.field flags, by default of this command line's."""
    argv = sys.argv[1:] if argv is None else argv
    found = [re.match(r"--?(?:no)?config\.([\w.]+)", text) for text in argv]
    return [match.group(1) for match in found if match]


def _check_config(removed: list[str]) -> None:
    """Sets fields to None; refuses what no run could take, before JAX is asked."""
    from hyperjax.launch import fields

    if "config" not in flags.FLAGS or flags.FLAGS["config"].value is None:
        return
    if any(re.match(r"--?config=.*:$", argument) for argument in sys.argv):
        raise ValueError("--config has nothing after the colon")
    config = flags.FLAGS["config"].value
    getattr(config, "rounds", None)  # raises what kept the file from being read
    for field in removed:
        if field not in common.flat(config):
            raise fields.unknown(field, list(common.flat(config)))
        config.update_from_flattened_dict({field: None})
    fields.check(config)
    parser: Any = flags.FLAGS["config"].parser
    chosen = [f"{group}.name" for group in parser.chosen]
    fields.check_used(config, _given_fields() + removed + chosen)


def config_arguments(argv: list[str]) -> list[str]:
    """Returns what of a command line is --config.field=value, in either form."""
    found: list[str] = []
    waiting = False
    for argument in argv:
        field = re.match(r"--?(no)?config\.", argument)
        if field or (waiting and not argument.startswith("--")):
            found.append(argument)
        waiting = bool(field) and "=" not in argument
    return found


def read_config(path: str, arguments: list[str]) -> ml_collections.ConfigDict:
    """Returns the config that `--config=path` and so many arguments give.

    Args:
      path: an experiment or a file, as after --config.
      arguments: each --config.field=value.

    Raises:
      ValueError and others: as `run` explains them.
    """
    from hyperjax.launch import fields

    kept, removed = _split_none(arguments)
    kept, chosen = _split_names(kept)
    parser = ConfigParser("config")
    parser.chosen = chosen
    config = parser.parse(path)
    known = list(common.flat(config))
    given = [*_given_fields(kept), *removed]
    for field in given:
        if field not in known:
            raise fields.unknown(field, known)
    values = flags.FlagValues()
    argv = ["", *kept]
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=argv, lock_config=True
    )
    values(argv)
    config.update_from_flattened_dict(dict.fromkeys(removed))
    fields.check(config)
    fields.check_used(config, [*given, *(f"{group}.name" for group in chosen)])
    return config


def doing(command: str, what: str) -> Progress:
    """Returns a context that says on a terminal what a short command does meanwhile.

    What it prints comes after it. Elsewhere nothing is said.
    """
    shown = Progress(command, 0) if sys.stderr.isatty() else Silent()
    shown.stage(what)
    return shown


# What Python's parsers and absl's say of a flag's value, and what that means.
_PARSED = {
    r"invalid literal for int\(\) with base 10: .*": "must be a whole number",
    r"could not convert string to float: .*": "must be a number",
    r"\('Non-boolean argument to boolean flag', .*\)": "must be True or False",
}


def complain(message: str) -> int:
    """Prints an error; returns the exit code."""
    for words, meaning in _PARSED.items():
        message = re.sub(
            rf"\bflag (--\S+?)=(.*): {words}", rf"\1=\2 {meaning}", message
        )
    print(f"error: {message}\n(--debug shows where)", file=sys.stderr)
    return 2


def explain(error: Exception) -> str:
    """Returns a parser's message; for an unknown config field with the nearest one."""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:  # of a config file that failed
        text = text.splitlines()[-1].removeprefix("ValueError: ")
    if isinstance(error, flags.UnrecognizedFlagError):
        text += _meant(error.flagname)
    return _unknown_field() or _several(text) or text


def _meant(flag: str) -> str:
    """Points to the flag or field that may be meant by an unknown flag."""
    known = [name for name in flags.FLAGS if len(name) > 1]
    if "config" in known:
        if flag == "data":
            return "; data of your own are --config.data.name=mine.npz, folder/, ..."
        ours = [f for f in common.FIELDS if flag in (f, f.rpartition(".")[2])]
        if ours:
            return f"; did you mean {' or '.join(f'--config.{f}' for f in ours[:3])}?"
    near = difflib.get_close_matches(flag, known, n=1)
    return f"; did you mean --{near[0]}?" if near else "; see --help"


def _several(text: str) -> str | None:
    """Points somebody who gives a number's field a list to sweeps."""
    from hyperjax.launch import fields

    match = re.match(r"flag --config\.([\w.]+)=(\S*,\S*): ", text)
    number = match and fields.NUMBERS.get(match[1])
    if not match or (number and number.several):
        return None
    return (
        f"--config.{match[1]}={match[2]}: {match[1]} takes one value; for several see "
        "`hyperjax sweep --help`"
    )


def _unknown_field() -> str | None:
    """Finds the first --config.field that the config file does not have."""
    from hyperjax.launch import fields

    given = _given_fields()
    paths = [a.partition("=")[2] for a in sys.argv if a.startswith("--config=")]
    if not paths or not given:
        return None
    try:
        known: Any = flags.FLAGS["config"].parser.parse(paths[-1])
        groups = {k.rpartition(".")[0] for k in common.flat(known)}
        known = [*common.flat(known), *groups]
    except Exception:  # the file itself is at fault: the parser's words must do
        return None
    unknown = [field for field in given if field not in known]
    return str(fields.unknown(unknown[0], known)) if unknown else None


def use_cores(devices: int) -> None:
    """Makes each CPU core a device, so that clients spread over them.

    Two single-threaded devices beat one device with two threads on the small products
    of client training (`benchmarks/round_time.py`). Each holds a copy of the data, so
    by default there are at most 8. Accelerators are untouched. Must run before JAX
    looks for devices. Of several processes each has its part of `devices`.
    """
    count = hosts.share(devices) or min(num_cores(), 8)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # a config file has computed with JAX: begin anew
        clear_backends()
        jax.config.update("jax_num_cpu_devices", count)


def num_cores() -> int:
    """Returns the number of cores this process may use, or else of all there are."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Compiled programs ------------------------------------------------------------------

_CACHE_BYTES = 4 * 2**30  # above which the oldest programs go


def keep_programs() -> None:
    """Keeps compiled programs in a folder of the user's that all launchers share.

    It is $XDG_CACHE_HOME/hyperjax, by default ~/.cache/hyperjax. JAX's own settings go
    before: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. Where no folder can be written to
    programs are compiled anew.
    """
    asked = setting("jax_enable_compilation_cache")
    if not asked or setting("jax_compilation_cache_dir"):
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base).expanduser().absolute() / "hyperjax" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return
        _drop_oldest(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _processor() -> str:
    """Returns a folder name for this kind of processor.

    Programs for the CPU use all that it can do, and a home folder may be shared by
    machines of several kinds.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        kinds = {
            line
            for line in lines.splitlines()
            if line.startswith(("model name", "flags", "Features", "CPU part"))
        }
    except OSError:
        kinds = {platform.processor()}
    digest = hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()
    return f"{platform.machine() or 'unknown'}-{digest[:12]}"


def _drop_oldest(folder: Path, most: int = _CACHE_BYTES) -> None:
    """Removes the oldest files of a folder while it holds more than so many bytes."""
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # another process was faster
            if entry.is_file():
                status = entry.stat()
                files.append((status.st_mtime, status.st_size, entry.path))
    files.sort()
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= most:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size
