"""From per-client values to the numbers a run reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hyperjax.data.federation import Federation
from hyperjax.engine.evaluate import summarise
from hyperjax.runs import likeness

NOT_FINITE = "_not_finite"  # how many clients have no accuracy; missing if none
VARIANTS = ("em", "oracle", "swapped")
PREFIXES = ("pacc", "vacc", "zacc", "gacc")
SHOWN = {"gacc": "gACC", "pacc": "pACC", "zacc": "zACC"}  # while a run goes on

Values = Mapping[str, np.ndarray]


def record(values: Mapping[str, Values]) -> dict[str, float]:
    """Returns the metrics of one evaluation.

    Args:
      values: per-client values by metric ("pacc": participants, "vacc": their
        validation samples, "zacc": novel clients, "gacc": the global test set), from
        `Evaluator.evaluate`; what a federation does not have is missing.

    Returns:
      Percentages: "<metric>", with "_mean", "_std", "_p10" over clients, and
      "_em", "_oracle", "_swapped" for the controls; "<metric>_distance"; the
      collapse metric of embeddings, in nats; and how well unseen clients are told from
      participants, see `likeness.scores`. NaN where the outputs for a client are
      not finite, with the number of such clients as "<metric>_not_finite".
    """
    found: dict[str, float] = {}
    for metric, clients in values.items():
        size = clients["size"]
        found |= scores(metric, clients)
        for variant in VARIANTS:
            # One client has no neighbour to swap with.
            if f"accuracy_{variant}" in clients and not (
                variant == "swapped" and len(size) == 1
            ):
                share = summarise(clients[f"accuracy_{variant}"], size)[""]
                found[f"{metric}_{variant}"] = share
        if "distance_swapped" in clients and len(size) > 1:
            found[f"{metric}_distance"] = float(clients["distance_swapped"].mean())
    for metric, name in (("pacc", "participating"), ("zacc", "novel")):
        if "embedding" in values.get(metric, {}):
            found[f"collapse_{name}"] = collapse(values[metric])
    return found | likeness.scores(values)


def scores(metric: str, clients: Values) -> dict[str, float]:
    """Returns a population's accuracy with its spread, and who has none, by name."""
    share = summarise(clients["accuracy"], clients["size"])
    found = {metric + suffix: value for suffix, value in share.items()}
    if bad := int(np.isnan(clients["accuracy"]).sum()):
        found[metric + NOT_FINITE] = bad
    return found


def fine_tuned(tuned: Mapping[str, Values], suffix: str) -> dict[str, float]:
    """Returns the accuracies of `Evaluator.tune`, by samples and as means."""
    found: dict[str, float] = {}
    for metric, clients in tuned.items():
        all_scores = scores(metric + suffix, clients)
        kept = (metric + suffix + k for k in ("", "_mean", NOT_FINITE))
        found |= {name: all_scores[name] for name in kept if name in all_scores}
    return found


def best_by_validation(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns accuracies of the round whose validation accuracy was highest, the first.

    None if no round has one; `records` are those of metrics.jsonl.
    """
    known = [record for record in records if record.get("vacc") is not None]
    if not known:
        return None
    best = max(known, key=lambda record: record["vacc"])
    found = {k: v for k, v in best.items() if k.partition("_")[0] in PREFIXES}
    return dict(round=best["round"], **found)


def not_finite(values: Mapping[str, Values], suffix: str = "") -> str | None:
    """Says which accuracies there are not, and of how many clients; None if none."""
    said = []
    for metric, clients in values.items():
        if bad := int(np.isnan(clients["accuracy"]).sum()):
            num = len(clients["accuracy"])
            said.append(f"{metric}{suffix} (outputs for {bad} of {num} clients)")
    return f"not finite, so without a value: {', '.join(said)}" if said else None


def collapse(clients: Values) -> float:
    """Returns I = H(mean e) - mean H(e) in nats, over all inputs of some clients.

    0 means that the embedding says nothing about the input; the maximum is ln P.
    """
    weight = clients["size"] / clients["size"].sum()
    mean = weight @ np.asarray(clients["embedding"], np.float64)
    of_mean = -np.sum(mean * np.log(mean + 1e-12))
    use = float(of_mean - weight @ clients["embedding_entropy"])
    # Entropies are float32, so equal ones may differ by rounding; I is never negative.
    return max(use, 0.0)  # in this order, which keeps NaN


def per_client(
    values: Mapping[str, Values],
    federation: Federation,
    whom: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Returns one record per participating and per novel client, if evaluated.

    Args:
      values: of the last evaluation.
      federation: whose clients they are.
      whom: {metric: places among its clients} of those that were evaluated; None: all.
    """
    rows = []
    for metric, participating in (("pacc", True), ("zacc", False)):
        clients = values.get(metric, {})
        for i, size in enumerate(clients.get("size", ())):
            place = i if whom is None else int(whom[metric][i])
            row: dict[str, Any] = dict(
                client=place if participating else federation.num_clients + place,
                participating=participating,
                train_samples=int(federation.train.size[place]) if participating else 0,
                eval_samples=int(size),
            )
            for name, column in clients.items():
                if name.startswith("accuracy"):
                    row[name] = 100.0 * float(column[i])
                elif name != "size":
                    row[name] = column[i]
            rows.append(row)
    return rows
