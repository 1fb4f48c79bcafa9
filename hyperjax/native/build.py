"""Builds the convolutions of oneDNN: `python -m hyperjax.native.build`.

It needs a C++ compiler ($CXX, c++, g++ or clang++) and the extra `[native]`: Linux on
x86-64. What is built lies beside this file; `--remove` takes it away.
"""

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax

from hyperjax import native

COMPILERS = ("c++", "g++", "clang++")
HEADERS = ("onednn-devel-cpu-gomp", "oneapi/dnnl/dnnl.hpp")
LIBRARY = ("onednn-cpu-gomp", "libdnnl.so")


def build() -> Path:
    """Compiles the library and loads it once.

    Raises:
      ValueError: there is no compiler, no oneDNN, or what they make does not work.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise ValueError(
            f"no C++ compiler: none of {', '.join(COMPILERS)} is there; install one "
            "or name it in CXX"
        )
    # The folder that has oneapi/.
    headers, libraries = _file(*HEADERS).parents[2], _file(*LIBRARY).parent
    to = native.LIBRARY
    part = to.with_name(f".part-{to.name}")
    options = ["-std=c++17", "-O2", "-fopenmp", "-shared", "-fPIC"]
    options += ["-isystem", jax.ffi.include_dir(), "-isystem", str(headers)]
    options += [str(Path(__file__).with_name("onednn.cc")), "-o", str(part)]
    options += [f"-L{libraries}", "-ldnnl", f"-Wl,-rpath,{libraries}"]
    try:
        done = subprocess.run(
            [compiler, *options], capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            raise ValueError(f"{compiler} failed: {done.stderr.strip()}")
        ctypes.CDLL(str(part))
        os.replace(part, to)
    except OSError as error:
        raise ValueError(f"{to} cannot be made: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return to


def _file(package: str, ending: str) -> Path:
    """Returns where an installed package has a file."""
    try:
        files = importlib.metadata.files(package) or []
        return Path(next(f for f in files if str(f).endswith(ending)).locate())
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise ValueError(
            f"{package} is not installed: pip install 'hyperjax[native]'"
        ) from None


def main(arguments: list[str]) -> int:
    """Returns the status to exit with."""
    if arguments == ["--remove"]:
        native.LIBRARY.unlink(missing_ok=True)
        return 0
    if arguments:
        print(f"unknown: {' '.join(arguments)} (accepted: --remove)", file=sys.stderr)
        return 2
    try:
        print(f"built {build()}: `auto` convolutions take it from now on")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
