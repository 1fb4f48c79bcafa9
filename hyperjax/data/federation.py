"""One federation: a data set dealt out to participating and unseen clients.

Of the source, a random `test_fraction` is the global test set; the rest is partitioned
once over N + M clients, so the last M, which never train, follow the same law as the
others but other draws of it. Inside each of the first N, `eval_fraction` is held out;
the last M keep all their samples for evaluation (arXiv:2508.12673, splits after the
authors' earlier harness).
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyperjax.data import clients, partition
from hyperjax.data.clients import Table
from hyperjax.data.sources import Source
from hyperjax.errors import check_at_least
from hyperjax.types import Pool


class Federation(NamedTuple):
    """The samples, and which of them is whose: ids 0..N-1 train, N..N+M-1 never do."""

    pool: Pool
    train: Table  # [N, ...]
    held_out: Table  # [N, ...], the participants' own evaluation split
    novel: Table  # [M, ...]
    test: Table  # [1, ...]
    counts: np.ndarray  # [N + M, K] samples per client and class
    label_names: tuple[str, ...]

    @property
    def num_clients(self) -> int:
        """N."""
        return len(self.train.size)

    @property
    def num_novel(self) -> int:
        """M."""
        return len(self.novel.size)

    @property
    def source_prior(self) -> np.ndarray:
        """Class shares over all participants' training samples, [K]."""
        rows = np.concatenate(_parts(self.train))
        labels = np.asarray(self.pool.y)[rows]
        counts = np.bincount(labels, minlength=len(self.label_names))
        return counts / counts.sum()


def federate(
    source: Source,
    *,
    num_clients: int,
    num_novel: int,
    partition_name: str,
    seed: int,
    test_fraction: float = 0.2,
    eval_fraction: float = 0.2,
    client_ids: np.ndarray | None = None,
    **options: Any,
) -> Federation:
    """Deals a data set out.

    Args:
      source: all samples.
      num_clients: N.
      num_novel: M.
      partition_name: a key of `partition.PARTITIONERS`.
      seed: of the splits and the partition; independent of the model's seed.
      test_fraction: share of the global test set, in (0, 1).
      eval_fraction: share each participant holds out, in (0, 1).
      client_ids: [n] given ids, for "by_client_id".
      **options: of the partitioner.

    Raises:
      ValueError: a size or fraction is out of range, there are more clients than
        samples, or a participant has fewer than two samples.
    """
    check_at_least(1, num_clients=num_clients, num_novel=num_novel)
    for name, share in (
        ("test_fraction", test_fraction),
        ("eval_fraction", eval_fraction),
    ):
        if not 0 < share < 1:
            raise ValueError(f"{name}={share} must lie between 0 and 1, exclusive")
    rng = np.random.default_rng(seed)
    total = len(source.y)
    order = rng.permutation(total)
    num_test = max(1, round(test_fraction * total))
    test, rest = order[:num_test], order[num_test:]
    if client_ids is not None:
        if len(client_ids) != total:
            raise ValueError(
                f"{len(client_ids)} client ids given for the {total} samples of "
                f"{source.name!r}"
            )
        options = {**options, "client_ids": np.asarray(client_ids)[rest]}
    everyone = num_clients + num_novel
    y = source.y[rest]
    places = partition.partition(partition_name, rng, y, everyone, **options)
    parts = [rest[place] for place in places]
    train, held_out = [], []
    for client, part in enumerate(parts[:num_clients]):
        if len(part) < 2:
            raise ValueError(
                f"client {client} has {len(part)} sample(s); a participant needs one "
                "to train and one to hold out: lower num_clients, or raise min_size"
            )
        cut = min(max(1, round(eval_fraction * len(part))), len(part) - 1)
        held_out.append(part[:cut])
        train.append(part[cut:])
    pool = clients.make_pool(source.x, source.y, np.concatenate(train))
    return Federation(
        pool,
        clients.table(train),
        clients.table(held_out),
        clients.table(parts[num_clients:]),
        clients.table([test]),
        partition.class_counts(source.y, parts, source.num_classes),
        source.label_names,
    )


def save_tables(federation: Federation, path: str | Path) -> None:
    """Writes index tables, class counts and pixel moments to a whole .npz file."""
    tables: dict[str, Any] = {}
    for name in ("train", "held_out", "novel", "test"):
        rows, size = getattr(federation, name)
        tables |= {f"{name}_rows": rows, f"{name}_size": size}
    participating = np.arange(len(federation.counts)) < federation.num_clients
    part = Path(path).with_name(f".part-{Path(path).name}")
    np.savez_compressed(
        str(part),
        counts=federation.counts,
        participating=participating,
        label_names=np.array(federation.label_names),
        sample_shape=np.array(federation.pool.x.shape[1:]),
        mean=np.asarray(federation.pool.mean),
        std=np.asarray(federation.pool.std),
        source_prior=federation.source_prior,
        **tables,
    )
    os.replace(part, path)


def _parts(table: Table) -> list[np.ndarray]:
    return [row[:n] for row, n in zip(table.rows, table.size, strict=True)]
