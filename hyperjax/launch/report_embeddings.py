"""Where clients' embeddings are, how they moved, and what they are good for."""

from __future__ import annotations

import math

import numpy as np

from hyperjax.data import picture
from hyperjax.launch import charts, embedding_maps, pages
from hyperjax.launch.finished import Row, Run
from hyperjax.runs import likeness

# Embeddings that differ by less are one embedding in float32.
_SAME = 1e-6
# Below this share of its most, embedding use is called small.
_LITTLE_USE = 0.01
_MOST_PLACES = 400


def embeddings(run: Run, latest: Row) -> pages.Html:
    """A map of clients' embeddings, how they moved, and what they are good for."""
    known = [c for c in run.clients if likeness.embedding_of(c) is not None]
    moved = _embeddings_by_round(run)
    if not known:
        return pages.section("Embeddings", moved)
    values = np.array([likeness.embedding_of(client) for client in known], float)
    use = _use_table(latest, values.shape[1])
    centred = values - values.mean(0)
    if np.abs(centred).max() <= _SAME:
        note = pages.text(
            f"The embedding has collapsed: all {len(known)} clients have the same one "
            f"(to {_SAME:g}), so the deployed networks do not depend on the client "
            "through it.",
            note=True,
        )
        return pages.section("Embeddings", note, use, moved)
    reach = float(np.linalg.norm(centred, axis=1).max())
    uses = [latest.get(f"collapse_{side}") for side in ("participating", "novel")]
    there = [value for value in uses if value is not None]
    most = math.log(values.shape[1])
    if there and max(there) < _LITTLE_USE * most:
        note = pages.text(
            "The embedding has all but collapsed: its use is under "
            f"{_LITTLE_USE:.0%} of the most possible, and no client is further than "
            f"{reach:.2g} from the mean. A map would show what means nothing.",
            note=True,
        )
        return pages.section("Embeddings", note, use, moved)
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    at = np.zeros((len(known), 2))
    shares = np.zeros(2)
    rank = min(2, len(spread))
    at[:, :rank] = (left * spread)[:, :rank]
    shares[:rank] = 100 * spread[:rank] ** 2 / np.sum(spread**2)
    step = -(-len(known) // _MOST_PLACES)
    rows = [
        {
            "series": charts.kind(bool(client["participating"])),
            "x": x,
            "y": y,
            "name": f"client {client['client']}",
            "short": str(client["client"]),
        }
        for client, (x, y) in list(zip(known, at.tolist(), strict=True))[::step]
    ]
    titles = [f"component {i + 1} ({share:.0f} %)" for i, share in enumerate(shares)]
    spec = charts.places(rows, charts.GROUPS, *titles, named=len(known) <= 40)
    name = f"Embeddings of {len(known)} clients on their two main components"
    said = (
        "In brackets the share of variance. No client is further than "
        f"{reach:.2g} from the mean."
    )
    if step > 1:
        said += f" One client in {step} is drawn."
    chart = pages.grid(pages.chart(name, spec, said))
    return pages.section("Embeddings", use, chart, moved)


def _embeddings_by_round(run: Run) -> str:
    """Maps of several rounds, unless clients never had different embeddings."""
    records = run.embeddings
    if len(records) < 2 or embedding_maps.spread(records) <= _SAME:
        return ""
    said = (
        "Every client's embedding after several rounds, on the two main components of "
        "all rounds together: a colour is a client throughout, triangles are unseen "
        "ones. In brackets the share of variance. No client was ever further than "
        f"{embedding_maps.spread(records):.2g} from the mean of its round."
    )
    svg = picture.figure_svg(embedding_maps.picture(records))
    shown = pages.picture(said, svg, packed=True)
    return f"<h3>Embeddings over rounds</h3>{pages.text(said)}{shown}"


def _use_table(latest: Row, size: int) -> str:
    """How much the deployed networks depend on the client, where it was measured."""
    quantities = (
        (
            "embedding use I, nats",
            "collapse_{side}",
            "I = H(mean e) - mean H(e), with H the entropy: 0 means the embedding is "
            "the same for every input, so it is ignored; the most is "
            f"ln {size} = {math.log(size):.2f}.",
        ),
        (
            "distance of networks",
            "{acc}_distance",
            "Relative distance between the networks deployed by two clients: 0 means "
            "that all clients get one network.",
        ),
        (
            "swapped accuracy, %",
            "{acc}_swapped",
            "Every client tested with its neighbour's deployed state: no worse than "
            "with its own means that nothing is personal.",
        ),
    )
    sides = {
        "participating": {"side": "participating", "acc": "pacc"},
        "unseen": {"side": "novel", "acc": "zacc"},
    }
    sides = {name: side for name, side in sides.items() if side["acc"] in latest}
    rows: list[tuple[object, ...]] = []
    for name, pattern, meaning in quantities:
        values = [latest.get(pattern.format(**side)) for side in sides.values()]
        shown = [None if value is None else f"{value:.4g}" for value in values]
        if pattern == "{acc}_swapped":
            own = [latest.get(side["acc"]) for side in sides.values()]
            shown = [
                f"{text} (own {value:.4g})" if text and value is not None else text
                for text, value in zip(shown, own, strict=True)
            ]
        if any(shown):
            rows.append((name, *shown, meaning))
    if not rows:
        return ""
    table = pages.tabular("embeddings", ("quantity", *sides, "meaning"), rows)
    return f'<div class="words">{table}</div>'
