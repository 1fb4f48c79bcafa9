"""Arithmetic, masked rows, splitting by path, and counting, for parameter trees."""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax.types import Array, PyTree

# One regular expression on paths, or several of which one must match in full; ():
# none of them.
Patterns: TypeAlias = str | Sequence[str]


# What optax has: a + b, a - b, zeros like a, and the Euclidean norm over all leaves.
add = optax.tree.add
sub = optax.tree.sub
zeros_like = optax.tree.zeros_like
norm = optax.tree.norm


def scale(a: PyTree, factor: Array | float) -> PyTree:
    """Returns factor * a, in a's dtypes (optax's makes integers floating-point)."""
    return jax.tree.map(lambda x: (x * factor).astype(x.dtype), a)


def clip(a: PyTree, most: float) -> tuple[PyTree, Array]:
    """Returns a tree scaled down to a norm of at most `most`, and its norm before."""
    before = norm(a)
    # 1e-6 as in torch.nn.utils.clip_grad_norm_, by which authors' codes clip.
    return scale(a, jnp.minimum(1.0, most / (before + 1e-6))), before


def where_rows(mask: Array, a: PyTree, b: PyTree) -> PyTree:
    """Picks rows of `a` where mask [C] is true, else rows of `b`; leaves [C, ...]."""

    def pick(x, y):
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(pick, a, b)


def finite(a: PyTree) -> bool:
    """Returns whether every floating-point entry is finite; leaves are concrete.

    Arrays of NumPy, of which there may be ever more, are looked at without compiling.
    """
    leaves = [x for x in jax.tree.leaves(a) if jnp.issubdtype(x.dtype, jnp.floating)]
    here = [x for x in leaves if isinstance(x, np.ndarray)]
    there = [x for x in leaves if not isinstance(x, np.ndarray)]
    return all(np.isfinite(x).all() for x in here) and bool(_all_finite(there))


@jax.jit
def _all_finite(leaves: list[Array]) -> Array:
    checks = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return jnp.all(jnp.stack(checks)) if checks else jnp.bool_(True)


def count(a: PyTree) -> int:
    """Returns the number of scalars; leaves may be abstract."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(a))


def num_bytes(a: PyTree) -> int:
    """Returns the number of bytes; leaves may be abstract."""
    return sum(
        math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(a)
    )


def sha256(a: PyTree) -> str:
    """Returns a digest over paths, dtypes, shapes and bits of all leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(a):
        in_pieces = hasattr(leaf, "pieces")  # see `data.ragged.Rows`
        array: Any = leaf if in_pieces else np.asarray(leaf)
        digest.update(f"{_join(path)}|{array.dtype.str}|{array.shape}|".encode())
        # In place: rows of many clients may be larger than what memory is left.
        for piece in array.pieces() if in_pieces else (array,):
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


# Paths -----------------------------------------------------------------------------


def _join(path) -> str:
    # Parts without a name, such as the family ALONE, are left out.
    parts = (jax.tree_util.keystr((part,), simple=True) for part in path)
    return "/".join(part for part in parts if part)


def paths(a: PyTree) -> list[str]:
    """Returns the /-joined path of every leaf, e.g. "params/Dense_0/kernel"."""
    return [_join(path) for path, _ in jax.tree_util.tree_leaves_with_path(a)]


def by_path(a: PyTree) -> dict[str, Any]:
    """Returns the leaves by their paths."""
    return dict(zip(paths(a), jax.tree.leaves(a), strict=True))


def parameters(theta: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides variables by path into parameters ("params/...") and all others."""
    params = {k: x for k, x in theta.items() if k.startswith("params/")}
    return params, {k: x for k, x in theta.items() if k not in params}


def as_patterns(patterns: Patterns | None) -> tuple[str, ...]:
    """Returns one pattern, several or None as a tuple.

    Raises:
      ValueError: one is no regular expression.
    """
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    for pattern in found:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"pattern {pattern!r} is no regular expression on paths: {error}"
            ) from error
    return found


def matches(patterns: Patterns | None, path: str) -> bool:
    """Returns whether a path matches one of the patterns in full."""
    return any(re.fullmatch(pattern, path) for pattern in as_patterns(patterns))


def hold(patterns: Patterns | None, before: PyTree, after: PyTree) -> PyTree:
    """Returns `after`, but `before` where a leaf's path matches one of the patterns."""
    held = (matches(patterns, name) for name in paths(before))
    leaves, structure = jax.tree.flatten(before)
    every = zip(held, leaves, jax.tree.leaves(after), strict=True)
    return jax.tree.unflatten(structure, [x if h else y for h, x, y in every])


class Splitter(NamedTuple):
    """Cuts a tree in two by path, and joins it again.

    `split(tree) -> (chosen, rest)`, two dicts from path to leaf;
    `merge(chosen, rest) -> tree`. Either part may be an abstract tree.
    """

    split: Callable
    merge: Callable


def check_kept(what: str, before: PyTree, after: PyTree) -> None:
    """Refuses a state that a function has given another form.

    Raises:
      ValueError: structure, shapes or dtypes of `after` are not those of `before`.
    """

    def form(a: PyTree) -> PyTree:
        abstract = jax.eval_shape(lambda: a)
        return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", abstract)

    old, new = form(before), form(after)
    if old != new:
        shown = (
            str(x) if len(str(x)) < 200 else f"{str(x)[:200]}..." for x in (old, new)
        )
        raise ValueError(
            f"{what} changed from {' to '.join(shown)}; accepted: what it begins with, "
            "in structure, shapes and types"
        )


def splitter(
    template: PyTree,
    patterns: Patterns | None,
    *,
    without: Patterns | None = None,
) -> Splitter:
    r"""Builds a `Splitter` that chooses leaves by full-match patterns on paths.

    Args:
      template: a tree (concrete or abstract) with the structure to be cut.
      patterns: regular expressions such as r"params/head/.*"; None chooses nothing.
      without: patterns of leaves that are not chosen even if `patterns` match.

    Raises:
      ValueError: a pattern matches no path (the message lists the first paths).
    """
    patterns, without = as_patterns(patterns), as_patterns(without)
    names = paths(template)
    structure: Any = jax.tree.structure(template)
    for pattern in (*patterns, *without):
        if names and not any(matches(pattern, name) for name in names):
            raise ValueError(
                f"pattern {pattern!r} matches no variable; paths are: "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )

    chosen_names = {
        n for n in names if matches(patterns, n) and not matches(without, n)
    }

    def split(tree):
        leaves = dict(zip(names, structure.flatten_up_to(tree), strict=True))
        chosen = {n: x for n, x in leaves.items() if n in chosen_names}
        rest = {n: x for n, x in leaves.items() if n not in chosen_names}
        return chosen, rest

    def merge(chosen, rest):
        leaves = {**chosen, **rest}
        return jax.tree.unflatten(structure, [leaves[name] for name in names])

    return Splitter(split, merge)
