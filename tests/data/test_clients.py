"""Tables, moments and batches against plain NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.data import clients
from hyperjax.types import Batch, ClientData

PARTS = [np.array([5, 2, 9]), np.array([], int), np.array([1])]


def images(num=40, shape=(3, 2, 2), seed=0):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 256, (num, *shape), np.uint8)
    x[..., 1] //= 3  # channels differ
    return x, generator.integers(0, 4, num).astype(np.int32)


@pytest.fixture(scope="module")
def pool():
    return clients.make_pool(*images(), np.arange(40))


def test_tables_pad_with_row_zero():
    found = clients.table(PARTS)
    np.testing.assert_array_equal(found.rows, [[5, 2, 9], [0, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(found.size, [3, 0, 1])
    assert found.rows.dtype == found.size.dtype == np.int32


@pytest.mark.parametrize("parts", [[np.array([], int)] * 2, []])
def test_tables_of_nothing_still_have_a_column(parts):
    assert clients.table(parts).rows.shape == (len(parts), 1)


def test_moments_are_those_of_the_training_rows():
    x, y = images(9000)  # more than one block of the histogram
    rows = np.arange(0, 9000, 2)
    found = clients.make_pool(x, y, rows)
    pixels = x[rows].astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.std, pixels.std((0, 1, 2)), rtol=1e-6)
    assert found.x.dtype == jnp.uint8 and found.y.dtype == jnp.int32


def test_other_rows_do_not_move_the_moments():
    x, y = images()
    before = clients.make_pool(x, y, np.arange(20))
    x[20:] = 255
    after = clients.make_pool(x, y, np.arange(20))
    chex.assert_trees_all_equal((before.mean, before.std), (after.mean, after.std))


def test_a_constant_channel_does_not_divide_by_zero():
    x = np.full((5, 2, 2, 1), 7, np.uint8)
    found = clients.make_pool(x, np.zeros(5, np.int32), np.arange(5))
    assert found.std[0] == np.float32(1e-3)
    batch = clients.gather(found, jnp.arange(5), jnp.ones(5))
    np.testing.assert_allclose(batch.x, 0.0, atol=1e-3)


def test_gathered_batches_are_normalised(pool):
    x, y = images()
    rows = np.array([3, 30, 3])
    batch = clients.gather(pool, jnp.asarray(rows), jnp.array([1.0, 1.0, 0.0]))
    expected = (x[rows] / 255 - np.asarray(pool.mean)) / np.asarray(pool.std)
    np.testing.assert_allclose(batch.x, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch.y, y[rows])
    assert batch.x.dtype == jnp.float32


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8])
def test_number_of_batches(size):
    assert clients.num_batches(size, 4) == -(-size // 4)
    assert int(clients.num_batches(jnp.int32(size), 4)) == -(-size // 4)


def client(pool, size: int, n_max: int = 9) -> ClientData:
    rows = np.arange(20, 20 + n_max, dtype=np.int32)
    return ClientData(jnp.asarray(rows), jnp.int32(size), pool)


def test_batches_follow_the_order_and_mask_the_rest(pool):
    data = client(pool, 6)
    order = jnp.array([5, 3, 1, 0, 2, 4, 6, 7, 8])
    batches = [clients.take(data, order, step, 4) for step in range(3)]
    _, y = images()
    for step, places in enumerate(([5, 3, 1, 0], [2, 4])):
        np.testing.assert_array_equal(
            batches[step].y[: len(places)], y[20 + np.array(places)]
        )
        np.testing.assert_array_equal(batches[step].mask, np.arange(4) < len(places))
    np.testing.assert_array_equal(batches[2].mask, 0)
    assert all(batch.x.shape == (4, 3, 2, 2) for batch in batches)


@pytest.mark.parametrize("size", [0, 1, 4, 6, 9])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_fold_sees_every_sample_once_in_order(pool, size, batch_size):
    def step(carry, batch: Batch):
        count, ordered, total = carry
        real = batch.mask > 0
        weight = count + jnp.cumsum(batch.mask)
        y = batch.y.astype(jnp.float32) + 1
        return (
            count + jnp.sum(batch.mask),
            ordered + jnp.sum(jnp.where(real, y * weight, 0)),
            total + jnp.sum(jnp.where(real, batch.x.sum((1, 2, 3)), 0)),
        )

    zero = jnp.float32(0)
    found = clients.fold(step, (zero,) * 3, client(pool, size), batch_size)
    x, y = images()
    rows = np.arange(20, 20 + size)
    normal = (x[rows] / 255 - np.asarray(pool.mean)) / np.asarray(pool.std)
    ordered = np.sum((y[rows] + 1) * (np.arange(size) + 1))
    np.testing.assert_allclose(
        found, (size, ordered, normal.sum()), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("size", [0, 1, 6, 9])
def test_shuffles_are_permutations_with_the_padding_last(pool, size):
    orders = {
        tuple(np.asarray(clients.shuffled(jax.random.key(seed), client(pool, size))))
        for seed in range(20)
    }
    for order in orders:
        assert sorted(order[:size]) == list(range(size))
        assert list(order[size:]) == list(range(size, 9))
    assert len(orders) >= min(size, 15)


def test_shuffles_do_not_depend_on_padding(pool):
    key = jax.random.key(3)
    narrow = clients.shuffled(key, client(pool, 6, 6))
    wide = clients.shuffled(key, client(pool, 6, 19))
    np.testing.assert_array_equal(narrow, wide[:6])


def test_every_place_is_equally_likely(pool):
    data = client(pool, 4)
    keys = jax.random.split(jax.random.key(0), 4000)
    orders = np.asarray(jax.vmap(lambda key: clients.shuffled(key, data))(keys))[:, :4]
    share = [(orders == sample).mean(0) for sample in range(4)]
    # Standard deviation sqrt(1/4 3/4 / 4000) = 0.007.
    np.testing.assert_allclose(share, 0.25, atol=0.03)


def test_labels_can_be_withheld(pool):
    data = clients.withhold_labels(client(pool, 6))
    assert np.all(data.pool.y == -1) and data.pool.x is pool.x


def test_some_of_a_pool_are_the_same_samples():
    x = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)
    owners = [np.array([0, 1, 2]), np.array([3])]
    pool = clients.make_pool(
        x, np.arange(10), np.arange(4), standardise="client", owners=owners, on="host"
    )
    assert clients.is_on_host(pool) and np.shares_memory(pool.x, x)
    tables = clients.table([[7, 2, 2], [9]]), clients.table([[3], [7]])
    for room, width in ((0, 8), (5, 5), (6, 6)):
        part, found = clients.some(pool, *tables, room=room)
        assert len(part.x) == len(part.y) == len(part.owner) == width
        for old, new in zip(tables, found, strict=True):
            assert new.rows.dtype == np.int32 and new.rows.shape == old.rows.shape
            for name in ("x", "y", "owner"):
                one, other = getattr(pool, name), getattr(part, name)
                np.testing.assert_array_equal(other[new.rows], one[old.rows])
    with pytest.raises(ValueError, match="pool on='disk' is unknown"):
        clients.make_pool(x, np.arange(10), np.arange(4), on="disk")
