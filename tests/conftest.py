"""Shared settings: four CPU devices, a compilation cache, one small federation."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib
import pytest

# Before anything looks for devices: the laws compare one device with four.
jax.config.update("jax_num_cpu_devices", 4)
_CACHE = Path(__file__).parents[1] / ".cache" / "jax"
# The suite is compile-bound, and its programs run for milliseconds.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# These emitters make programs that run faster and compile twice as long; cutting a
# program up to compile its parts at once costs a fifth, and each worker has a core.
_FLAGS = {
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}
# Tracing makes many objects that live on; going through them all again finds little.
gc.set_threshold(50_000, 20, 50)


def takes_flag(flag: str) -> bool:
    """Whether the compiler knows a flag, which others end the process for.

    Its name occurs in the library also where the flag is gone, so a process of its own
    tries it, once for every version.
    """
    answer = _CACHE.parent / "flags" / f"{flag}-{jaxlib.__version__}"
    if not answer.exists():
        trial = "import jax; jax.devices()"
        given = {"XLA_FLAGS": f"--{flag}={_FLAGS[flag]}", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", trial], env=os.environ | given, capture_output=True
        )
        answer.parent.mkdir(parents=True, exist_ok=True)
        part = answer.with_name(f"{answer.name}.{os.getpid()}")
        part.write_text("no" if done.returncode else "yes", encoding="utf-8")
        part.replace(answer)
    return answer.read_text(encoding="utf-8") == "yes"


for _flag, _value in _FLAGS.items():
    _flags = os.environ.get("XLA_FLAGS", "")
    if _flag not in _flags and takes_flag(_flag):
        os.environ["XLA_FLAGS"] = f"{_flags} --{_flag}={_value}".strip()
# Programs started by tests do the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Gives each file's tests to one worker, which makes what they share once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).parents[1]


# A process may have 65,530 memory maps, and every compiled program takes a few: the
# suite's thousands end in a segmentation fault of the compiler.
MANY_MAPS, MAPS = 45_000, Path("/proc/self/maps")
_finished = [0]


@pytest.fixture(autouse=True)
def few_programs():
    """Drops compiled programs now and then; they come back from the cache."""
    yield
    _finished[0] += 1
    if _finished[0] % 25 == 0 and MAPS.exists():
        with MAPS.open("rb") as file:
            if sum(1 for _ in file) > MANY_MAPS:
                jax.clear_caches()
                gc.collect()
