"""Derives the random keys of a run: named streams, and one key per client.

Keys follow from (root, purpose, exchange index, client id), so a resumed run needs no
saved key, and a client draws the same numbers wherever it sits in the cohort.
"""

import operator
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from hyperjax.errors import first_line
from hyperjax.types import Array, Key


def root_key(root: Any) -> Key:
    """Returns the root key of a run, from a key or a seed.

    Args:
      root: a typed key (`jax.random.key(seed)`), a raw one of JAX's default generator
        (`jax.random.PRNGKey(seed)`), or an integer seed from 0 to 2**32 - 1.

    Raises:
      ValueError: none of these.
    """
    accepted = (
        "accepted: jax.random.key(seed), jax.random.PRNGKey(seed), or a seed from 0 to "
        "2**32 - 1"
    )
    if isinstance(root, jax.Array) and jnp.issubdtype(root.dtype, jax.dtypes.prng_key):
        if root.shape:
            raise ValueError(f"root holds keys of shape {root.shape}; {accepted}")
        return root
    dtype, shape = getattr(root, "dtype", None), getattr(root, "shape", ())
    if dtype == "uint32" and len(shape) == 1:
        try:
            return jax.random.wrap_key_data(jnp.asarray(root))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"root has the shape {shape}, that of no raw key: {first_line(error)}; "
                f"{accepted}"
            ) from error
    try:
        seed = -1 if isinstance(root, bool) or dtype == "bool" else operator.index(root)
    except TypeError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise ValueError(f"root={root!r} is no key; {accepted}")
    return jax.random.key(seed)


def stream(key: Key, name: str) -> Key:
    """Returns the key of a named purpose, the same on every machine."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def client_keys(key: Key, ids: Array) -> Key:
    """Returns one key per client id: [C] int32 -> [C] keys."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
