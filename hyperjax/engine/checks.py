"""What a simulator refuses, before anything is compiled."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from hyperjax.data.clients import Table, is_on_host
from hyperjax.data.ragged import Rows
from hyperjax.engine import families
from hyperjax.types import Algorithm, Array, Pool


def check_streaming(alg: Algorithm, sequential: bool, mapper: str | int) -> None:
    """Refuses to sum up uplinks where the sum is not all that is asked for.

    Raises:
      ValueError: it is not, or there would be no sum.
    """
    if not alg.server.mean_only and alg.server.sums is None:
        raise ValueError(
            "streaming=True sums clients' answers up as they come, and the server of "
            "this method needs each of them; accepted: False, or a method whose server "
            "needs means or sums of them alone, such as fedavg without an uplink"
        )
    if sequential:
        raise ValueError(
            "streaming=True would change nothing: with sequential=True clients come "
            "one by one"
        )
    if mapper == "vmap":
        raise ValueError(
            "streaming=True would change nothing: with mapper='vmap' all clients "
            "finish together; accepted: map, block"
        )


def check_images(alg: Algorithm, pool: Pool) -> None:
    """Refuses samples that a network does not take.

    Raises:
      ValueError: naming their shape, the network's and its family.
    """
    for name, client in families.clients(alg).items():
        if pool.x.shape[1:] != tuple(client.model.sample_shape):
            of = f" of the family {name!r}" if name else ""
            raise ValueError(
                f"pool has samples of shape {pool.x.shape[1:]}; the network{of} takes "
                f"{tuple(client.model.sample_shape)}"
            )


def check_data(alg: Algorithm, table: Table, pool: Pool) -> None:
    """Refuses samples that a network does not take, and rows that a pool lacks."""
    check_images(alg, pool)
    rows, size = table.rows, np.asarray(table.size)
    rows = rows if isinstance(rows, Rows) else np.asarray(rows)
    if rows.ndim != 2 or size.shape != rows.shape[:1]:
        raise ValueError(
            f"table has rows of shape {rows.shape} and sizes of shape {size.shape}; "
            "accepted: [N, n_max] and [N]"
        )
    if size.min() < 0 or size.max() > rows.shape[1]:
        raise ValueError(
            f"table has clients of {size.min()} to {size.max()} samples; its rows have "
            f"room for 0 to {rows.shape[1]}"
        )
    given = rows.parts.flat if isinstance(rows, Rows) else rows
    if given.min(initial=0) < 0 or given.max(initial=0) >= len(pool.x):
        raise ValueError(
            f"table names rows {given.min()} to {given.max()} of a pool of "
            f"{len(pool.x)} samples"
        )


def most_samples(pool: Pool, table: Table, clients: int) -> int:
    """Returns how many samples of a pool so many clients have at most."""
    return min(len(pool.x), clients * table.rows.shape[1])


def check_store(pool: Pool, store: str) -> None:
    """Refuses samples on the host where nothing fetches them from there."""
    if is_on_host(pool) and store != "host":
        raise ValueError(
            "the pool's samples are on the host, where a cohort's are taken from; "
            f"accepted: store='host' with it, not {store!r}"
        )


def check_room(pool: Pool, num: int, limit_mb: int, what: str, instead: str) -> None:
    """Refuses so many samples on the device.

    Raises:
      ValueError: they take more than the limit, if there is one, in MB of 2^20 bytes.
    """
    needed = num * (pool.x.nbytes // max(1, len(pool.x))) / 2**20
    if limit_mb and needed > limit_mb:
        raise ValueError(
            f"pool_mb={limit_mb} is too little for {what}, {needed:.1f} MB; accepted: "
            f"a higher limit, 0 for none, or {instead}"
        )


def checked_weight(weight: Any, num_clients: int) -> Array:
    """Returns aggregation weights, [N] float32."""
    given = np.asarray(weight)
    if given.shape != (num_clients,) or given.dtype.kind not in "iuf":
        raise ValueError(
            f"weight is {given.dtype} of shape {given.shape}; accepted: a number for "
            f"each of the {num_clients} clients"
        )
    bad = np.flatnonzero(~(np.isfinite(given) & (given >= 0)))
    if len(bad):
        raise ValueError(
            f"weight of client {bad[0]} is {given[bad[0]]}; weights must be finite and "
            "not negative"
        )
    if not given.any():
        raise ValueError("weight is zero for all clients; one at least must count")
    return jnp.asarray(given, jnp.float32)
