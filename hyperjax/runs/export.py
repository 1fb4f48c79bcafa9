"""A client's network as a file, for programs that know nothing of hyperjax.

| format | file holds | read by |
|---|---|---|
| flax | variables and header, as msgpack | `flax.serialization.msgpack_restore` |
| npz | variables by path, `header` (JSON) | `numpy.load` |
| safetensors | variables by path, the header as its metadata | `safetensors` |
| stablehlo | the whole prediction: images to probabilities | jax.export, flatbuffers |

The header says whose network it is, what its inputs are, the names of the classes, and
what is done to inputs before the network sees them; in stablehlo that is inside.
Classes are those that the run predicts. Probabilities of a file have the same bits in
every process of one machine and JAX, for the same inputs together; the run's own are of
another program, its evaluation, and may differ by rounding.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import tree
from hyperjax.errors import check_choice, first_line
from hyperjax.types import Array, Model, PyTree

ENDINGS = {
    "flax": ".msgpack",
    "npz": ".npz",
    "safetensors": ".safetensors",
    "stablehlo": ".stablehlo",
}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Network(NamedTuple):
    """What runs on a client."""

    variables: PyTree  # {"params": ..., "batch_stats": ...}, as `module.apply` has them
    predict: Callable[[Array], Array]  # normalised inputs [B, ...] -> logits [B, K]
    mean: np.ndarray  # of inputs, after the division by `scale`
    std: np.ndarray
    shape: tuple[int, ...]  # of an input
    dtype: np.dtype  # of inputs as they are given
    header: dict[str, Any]

    @property
    def scale(self) -> float:
        """What inputs are divided by first."""
        return 255.0 if self.dtype == np.uint8 else 1.0

    def probabilities(self, x: Array) -> Array:
        """Returns the class probabilities [B, K] of inputs as they are given."""
        scaled = x.astype(jnp.float32)
        scaled = scaled / self.scale if self.dtype == np.uint8 else scaled
        return jax.nn.softmax(self.predict((scaled - self.mean) / self.std))


def plain(
    candidate: Model | None, variables: PyTree, x: Array, logits: Array
) -> Callable[[Array], Array] | None:
    """Returns the prediction of a plain network if it says what the method's does.

    Methods may predict otherwise than their network alone: by prototypes, or by several
    networks.

    Args:
      candidate: the network.
      variables: what the method would have it run with.
      x: [n, ...] normalised inputs.
      logits: [n, K], what the method says of them.
    """
    if candidate is None:
        return None
    given = {k: variables.get(k, {}) for k in ("params", "stats")}
    there = jax.eval_shape(candidate.init, jax.random.key(0))

    def forms(tree_: PyTree) -> dict[str, Any]:
        return {k: (v.shape, v.dtype) for k, v in tree.by_path(tree_).items()}

    if forms(given) != forms({k: there.get(k, {}) for k in given}):
        return None
    found = np.asarray(candidate.predict(given, x))
    if not np.allclose(found, logits, rtol=1e-3, atol=1e-3):
        return None
    return lambda x: candidate.predict(given, x)


def write(network: Network, path: str | os.PathLike, format: str) -> Path:
    """Writes a network to a file; returns its path, with the format's ending.

    Raises:
      ValueError: an unknown format.
      ImportError: a package is missing.
    """
    check_choice("format", format, ENDINGS)
    found = Path(path).expanduser()
    if found.suffix != ENDINGS[format]:
        found = found.with_name(found.name + ENDINGS[format])
    content = _WRITERS[format](network)
    found.parent.mkdir(parents=True, exist_ok=True)
    part = found.with_name(f".part-{found.name}")
    part.write_bytes(content)
    os.replace(part, found)
    return found


def _arrays(network: Network) -> dict[str, np.ndarray]:
    arrays = tree.by_path(network.variables)
    return {path: np.asarray(array) for path, array in arrays.items()}


def _npz(network: Network) -> bytes:
    import io

    buffer = io.BytesIO()
    arrays: dict[str, Any] = _arrays(network)
    np.savez(buffer, header=json.dumps(network.header), **arrays)
    return buffer.getvalue()


def _flax(network: Network) -> bytes:
    from flax import serialization

    variables = jax.tree.map(np.asarray, network.variables)
    content = {"variables": variables, "header": json.dumps(network.header)}
    return serialization.msgpack_serialize(content)


_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}


def _safetensors(network: Network) -> bytes:
    """The format of huggingface/safetensors: length, JSON, then the bytes."""
    about: dict[str, Any] = {
        "__metadata__": {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in network.header.items()
        }
    }
    at, parts = 0, []
    for path, array in _arrays(network).items():
        content = np.ascontiguousarray(array).tobytes()
        about[path] = dict(
            dtype=_DTYPES[array.dtype.name],
            shape=list(array.shape),
            data_offsets=[at, at + len(content)],
        )
        at += len(content)
        parts.append(content)
    head = json.dumps(about).encode()
    head += b" " * (-len(head) % 8)  # so that what follows is aligned
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def _stablehlo(network: Network) -> bytes:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("format='stablehlo' needs flatbuffers: pip install it")
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, *network.shape), network.dtype)
    function = jax.jit(network.probabilities)
    try:
        found = export.export(function, platforms=PLATFORMS)(x)
    except Exception as error:  # what cannot do with a size that is not known
        raise ValueError(
            "format='stablehlo': this prediction goes by the number of inputs and "
            "cannot be written for any number of them; a network asks x.shape[0] for "
            f"it, not len(x) ({first_line(error)})"
        ) from error
    return bytes(found.serialize())


_WRITERS = {
    "flax": _flax,
    "npz": _npz,
    "safetensors": _safetensors,
    "stablehlo": _stablehlo,
}
