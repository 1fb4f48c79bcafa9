"""What participants of a run found out for whoever is deployed, see `types.Fit`."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.data import files
from hyperjax.engine import checkpoint
from hyperjax.launch import workdir
from hyperjax.types import Fit, PyTree


def keep(folder: Path, round: int, fitted: Mapping[str, PyTree]) -> None:
    """Writes it beside a run; nothing where nobody needs it, or networks differ."""
    leaves = jax.tree.leaves(fitted.get("", ()))
    if leaves:
        named = {str(i): np.asarray(x) for i, x in enumerate(leaves)}
        files.write_npz(folder / workdir.FITTED, round=round, **named)


def read(folder: Path, round: int, fit: Fit) -> PyTree:
    """Returns what was found out after a round.

    Raises:
      ValueError: the run has not ended or an older version made it, or the file is
        damaged.
    """
    template = jax.eval_shape(fit.start)
    leaves, structure = jax.tree.flatten(template)
    names = ["round", *map(str, range(len(leaves)))]
    again = "remove it and summary.json: the command that made the run writes both anew"
    try:
        found = checkpoint.read_npz(folder / workdir.FITTED, again, names, need=names)
    except FileNotFoundError:
        found = {"round": np.array(-1)}
    if int(found.pop("round")) != round:
        raise ValueError(
            f"clients of this method adapt by what participants find out when a run "
            f"ends, and {str(folder)!r} has none of round {round}: the command that "
            "made the run continues it, or, without summary.json, scores it anew"
        )
    arrays = [jnp.asarray(found[str(i)]) for i in range(len(leaves))]
    return jax.tree.unflatten(structure, arrays)
