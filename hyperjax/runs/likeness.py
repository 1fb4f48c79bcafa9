"""Whether a client is unlike the participants, as its inputs alone tell.

Three signs, of a client's unlabelled inputs: how far its embedding is from those of the
participants, how unsure the outputs are (Hendrycks, Gimpel 2017, arXiv:1610.02136), and
their energy (Liu et al. 2020, arXiv:2010.03759). Each is as good as the area under its
curve: the share of pairs of an unseen client and a participant in which the unseen one
is the stranger. Where unseen clients have shifts like everybody's it is near a half.
"""

from collections.abc import Mapping

import numpy as np

EMBEDDINGS = ("shift_embedding", "embedding")  # what methods report of a client
_FLOOR = 1e-6  # of a deviation


def scores(values: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Returns {"auroc_<sign>": percent} for the signs that there are.

    Args:
      values: per-client values by metric, as in `results.record`.
    """
    if not {"pacc", "zacc"} <= set(values):
        return {}
    ours, theirs = values["pacc"], values["zacc"]
    found = {}
    for name in ("confidence", "energy"):
        if name in ours:
            found[name] = auroc(-ours[name], -theirs[name])
    for name in EMBEDDINGS:
        if name in ours and len(ours[name]) > 2:
            found["embedding"] = auroc(*distances(ours[name], theirs[name]))
    return {f"auroc_{name}": 100.0 * value for name, value in found.items()}


def auroc(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the share of pairs in which theirs [m] is above ours [n], ties half.

    NaN if any is NaN.
    """
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    if np.isnan(ours).any() or np.isnan(theirs).any():
        return float("nan")
    above = theirs[:, None] > ours[None, :]
    equal = theirs[:, None] == ours[None, :]
    return float(np.mean(above + 0.5 * equal))


def distances(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far participants [n] and others [m] are from the participants.

    Euclidean, every coordinate of an embedding [., E] by its deviation over
    participants. A participant is held against the other ones: among themselves all
    are nearer than anybody else can be.
    """
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))

    def away(x: np.ndarray, among: np.ndarray) -> np.ndarray:
        deviation = np.maximum(among.std(0, ddof=1), _FLOOR)
        return np.linalg.norm((x - among.mean(0)) / deviation, axis=-1)

    among = [away(x, np.delete(ours, i, 0)) for i, x in enumerate(ours)]
    return np.array(among), away(theirs, ours)
