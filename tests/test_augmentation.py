"""Augmentation: what a client trains on, and what stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import build

from hyperjax import augmentation
from hyperjax.data import clients, shift
from hyperjax.types import ClientData, Pool

ROWS = [12, 3, 15, 0]  # the last is padding
KEY = jax.random.key(4)
ANGLE = list(shift.PARAMETERS).index("angle")


def data(moments=None, own=30.0):
    """Three of the second client's images; everybody's moments, or [3, 1] of each."""
    x = np.random.default_rng(0).integers(0, 256, (20, 6, 6, 1)).astype(np.uint8)
    mean, std = moments or (np.array([0.25]), np.array([0.5]))
    shifts = np.tile(shift.IDENTITY, (3, 1))
    shifts[1, ANGLE] = own
    owner = np.repeat([1, 0], [16, 4])
    y = np.arange(20, dtype=np.int32)
    pool = Pool(*map(jnp.asarray, (x, y, mean, std, owner, shifts)))
    return ClientData(jnp.asarray(ROWS), jnp.int32(3), pool)


def seen_by(text, given, key=KEY):
    """What a client's update is given."""

    def update(key, down, client, data):
        return data

    side = build("fedavg").client._replace(update=update)
    return augmentation.factory(text)(side).update(key, (), (), given)


def batch(given):
    return clients.take(given, jnp.arange(len(given.rows)), 0, len(given.rows))


def test_all_images_of_a_visit_are_turned_by_one_more_angle():
    before, found = data(), seen_by("rotation360", data())
    more = float(found.pool.shift[0, ANGLE]) - 30.0
    assert found.pool.shift.shape == (1, len(shift.PARAMETERS)) and 0 <= more < 360
    values = shift.IDENTITY.copy()
    values[ANGLE] = more
    x = np.asarray(before.pool.x)
    expected = shift.apply(x, [np.array(ROWS)], values[None], 0)[ROWS[:3]]
    turned, plain = batch(found), batch(before)
    np.testing.assert_allclose(
        turned.x[:3], (expected / 255.0 - 0.25) / 0.5, atol=0.5 / 255 / 0.5 + 1e-4
    )
    np.testing.assert_array_equal(turned.y, plain.y)
    np.testing.assert_array_equal(turned.mask, plain.mask)
    assert int(found.size) == 3
    # Another visit, another angle.
    other = seen_by("rotation360", data(), jax.random.key(5))
    assert abs(float(other.pool.shift[0, ANGLE]) - 30.0 - more) > 1


def test_every_image_may_have_an_angle_of_its_own():
    found = seen_by("rotation(each='image')", data())
    angles = np.asarray(found.pool.shift[:, ANGLE])
    assert len(np.unique(angles)) == 4 and (angles >= 30).all() and (angles < 210).all()
    np.testing.assert_array_equal(found.pool.owner, np.arange(4))


def test_a_client_is_scaled_by_moments_of_what_it_sees():
    each = np.zeros((3, 1)) + 0.5, np.array([[1.0], [-0.3], [1.0]])
    found = seen_by("blur", data(each))
    x = np.asarray(found.pool.x)[:3]
    np.testing.assert_allclose(found.pool.mean, [x.mean()], rtol=1e-5)
    np.testing.assert_allclose(found.pool.std, [-x.std()], rtol=1e-4)  # a negative


def test_nobody_is_shifted_where_the_law_has_almost_no_width():
    found = seen_by("rotation(strength=1e-7)", data())
    np.testing.assert_allclose(batch(found).x, batch(data()).x, atol=1e-4)


@pytest.mark.parametrize("kind", augmentation.KINDS)
def test_laws_are_those_of_clients(kind):
    drawn = np.asarray(shift.drawn(KEY, kind, 400))
    ranges = shift.KINDS[kind]
    for number, (name, identity) in enumerate(shift.PARAMETERS.items()):
        law, column = ranges.get(name), drawn[:, number]
        if law is None:
            assert (column == np.float32(identity)).all(), name
            continue
        other = law.draw(np.random.default_rng(0), 4000)
        assert column.min() >= law.low and column.max() <= law.high
        np.testing.assert_allclose(column.mean(), other.mean(), atol=0.1 * law.high)
        if law.step:
            assert set(np.unique(column)) == set(np.unique(other).astype(np.float32))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rotation36", "local.augment='rotation36' is unknown; did you mean"),
        ("contrast", "local.augment='contrast' is unknown.*rotation360"),
        ("rotation(each='pixel')", "each='pixel'.*'visit', 'image'"),
        ("rotation(strength=0)", "strength"),
        ("rotation(angle=3)", "angle"),
    ],
)
def test_what_cannot_be_is_refused(text, match):
    with pytest.raises((ValueError, TypeError), match=match):
        augmentation.factory(text)


def test_only_images_of_bytes_are_shifted():
    augmentation.check_images(np.zeros((2, 4, 4, 3), np.uint8))
    for x in (
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 9)),
        np.zeros((2, 4, 5, 3)),
    ):
        with pytest.raises(ValueError, match=r"local.augment shifts images.*uint8"):
            augmentation.check_images(x)
