"""Whether a client is unlike the participants, as its inputs alone tell.

Three signs, of a client's unlabelled inputs: how far its embedding is from those of the
participants, how unsure the outputs are (Hendrycks, Gimpel 2017, arXiv:1610.02136), and
their energy (Liu et al. 2020, arXiv:2010.03759). Each is as good as the area under its
curve: the share of pairs of an unseen client and a participant in which the unseen one
is the stranger. Where unseen clients have shifts like everybody's it is near a half.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

EMBEDDINGS = ("shift_embedding", "embedding")  # what methods report of a client
_SIGNS = {"confidence": -1, "energy": 1}  # which way a stranger's is
_FLOOR = 1e-6  # of a deviation


def embedding_of(values: Mapping[str, Any]) -> Any:
    """Returns a client's embedding, or those of clients, by metric; None of others."""
    found = (values.get(name) for name in EMBEDDINGS)
    return next((each for each in found if each is not None), None)


def scores(values: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Returns {"auroc_<sign>": percent} for the signs that there are.

    Args:
      values: per-client values by metric, as in `results.record`.
    """
    if not {"pacc", "zacc"} <= set(values):
        return {}
    ours, theirs = values["pacc"], values["zacc"]
    found = {}
    for name, sign in _SIGNS.items():
        if name in ours:
            found[name] = auroc(sign * ours[name], sign * theirs[name])
    known = embedding_of(ours)
    if known is not None and len(known) > 2:
        found["embedding"] = auroc(*distances(known, embedding_of(theirs)))
    return {f"auroc_{name}": 100.0 * value for name, value in found.items()}


def auroc(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the share of pairs in which theirs [m] is above ours [n], ties half.

    NaN if any is NaN.
    """
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    if np.isnan(ours).any() or np.isnan(theirs).any():
        return float("nan")
    ours = np.sort(ours)
    above = [np.searchsorted(ours, theirs, side) for side in ("left", "right")]
    return float(np.mean(above) / max(len(ours), 1))


def distances(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far participants [n] and others [m] are from the participants.

    Euclidean, every coordinate of an embedding [., E] by its deviation over
    participants. A participant is held against the other ones: among themselves all
    are nearer than anybody else can be.
    """
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))

    n, mean = len(ours), ours.mean(0)
    squares = np.sum((ours - mean) ** 2, 0)

    def away(gap: np.ndarray, squares: np.ndarray, num: int) -> np.ndarray:
        deviation = np.sqrt(np.maximum(squares, 0.0) / (num - 1))
        return np.linalg.norm(gap / np.maximum(deviation, _FLOOR), axis=-1)

    # Of the n - 1 others: a mean that is further off, and squares without its own.
    gap = (ours - mean) * n / (n - 1)
    others = squares - (ours - mean) ** 2 * n / (n - 1)
    return away(gap, others, n - 1), away(theirs - mean, squares, n)


def strangeness(ours: np.ndarray, one: np.ndarray) -> float:
    """Returns the share of participants that are nearer to the others than a client is.

    1: no participant is as far out, and the client may be of a kind that nobody was.

    Args:
      ours: embeddings of participants, [n, E], of three or more.
      one: the client's, [E].
    """
    among, away = distances(ours, np.asarray(one)[None])
    return float(np.mean(among < away))
