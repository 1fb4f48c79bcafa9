"""Derives the random keys of a run: named streams, and one key per client.

Keys follow from (root, purpose, exchange index, client id), so a resumed run needs no
saved key, and a client draws the same numbers wherever it sits in the cohort.
"""

import zlib

import jax

from hyperjax.types import Array, Key


def stream(key: Key, name: str) -> Key:
    """Returns the key of a named purpose, the same on every machine."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def client_keys(key: Key, ids: Array) -> Key:
    """Returns one key per client id: [C] int32 -> [C] keys."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
