"""Feature shift: what is drawn for clients, and what becomes of their pixels."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_federation import deal, source

from hyperjax.data import clients, federation, shift
from hyperjax.data.sources import load
from hyperjax.types import ClientData

NAMES = list(shift.PARAMETERS)


def column(found, name):
    return found[:, NAMES.index(name)]


def own(**values):
    """Parameters of one client, [1, S]."""
    found = shift.IDENTITY[None].copy()
    for name, value in values.items():
        column(found, name)[:] = value
    return found


def images(num=3, size=8, channels=1):
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (num, size, size, channels), np.uint8)


def seen(x, **values):
    return shift.apply(x, [np.arange(len(x))], own(**values), seed=0)


# Who has what -----------------------------------------------------------------------


def test_the_seed_decides_and_participants_do_not_depend_on_the_unseen():
    rotation = shift.shift("rotation")
    first, again, other = (rotation.draw(seed, 40, 20) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    for changed in (rotation, shift.shift("rotation", novel="outside")):
        np.testing.assert_array_equal(changed.draw(0, 40, 3)[:40], first[:40])
    assert list(shift.varying(first)) == ["angle"]


@pytest.mark.parametrize(
    ("novel", "low", "high"),
    [("inside", 0, 180), ("edge", 162, 180), ("outside", 180, 270)],
)
def test_unseen_clients_are_where_they_are_asked_to_be(novel, low, high):
    drawn = column(shift.shift("rotation", novel=novel).draw(0, 200, 200), "angle")
    ours, theirs = drawn[:200], drawn[200:]
    assert 0 <= ours.min() < 10 and 170 < ours.max() <= 180
    assert low <= theirs.min() < low + (high - low) / 10
    assert high - (high - low) / 10 < theirs.max() <= high


def test_groups_of_clients_have_an_angle_each():
    for k in shift.TURNS:
        drawn = column(shift.shift(f"turns{k}").draw(0, 200, 200), "angle")
        np.testing.assert_allclose(np.unique(drawn), 360 / k * np.arange(k), rtol=1e-6)
    image = jnp.asarray(images(num=1)[0], jnp.float32)
    quarter = shift.turned(image, jnp.float32(90))
    np.testing.assert_allclose(quarter, np.rot90(image), atol=1e-2)


def test_strength_is_a_share_of_the_way_from_the_identity():
    whole = shift.shift("everything").draw(3, 50, 0)
    half = shift.shift("everything", strength=0.5).draw(3, 50, 0)
    np.testing.assert_allclose(
        half - shift.IDENTITY, (whole - shift.IDENTITY) / 2, atol=1e-5
    )
    none = shift.shift("everything", strength=0).draw(3, 50, 0)
    np.testing.assert_array_equal(none, np.tile(shift.IDENTITY, (50, 1)))
    contrast = column(whole, "contrast")
    assert np.abs(contrast).min() >= 0.3 and (contrast < 0).any()


@pytest.mark.parametrize("kind", ["class_rotation", "label_swap"])
def test_a_share_of_the_classes_is_everybodys(kind):
    name = "classes" if kind == "class_rotation" else "swapped"
    given = shift.shift(kind, classes=0.4, strength=0.5).draw(1, 9, 3)
    np.testing.assert_array_equal(column(given, name), np.float32(0.4))
    drawn = shift.shift(kind).draw(1, 9, 3)
    assert len(np.unique(column(drawn, name))) > 1
    # Which classes they are, and how far they go, stays as it was.
    np.testing.assert_array_equal(column(given, "order"), column(drawn, "order"))
    y = np.arange(40, dtype=np.int32) % 10
    parts = np.split(np.arange(40), 4)
    called = shift.relabelled(y, parts, given[:4], 1, 10)
    moved = [len(set(y[part][called[part] != y[part]])) for part in parts]
    assert moved == [4 if kind == "label_swap" else 0] * 4


@pytest.mark.parametrize("kind", shift.KINDS)
def test_every_kind_keeps_bytes_bytes_and_nothing_else(kind):
    x = images(num=4, channels=3)
    parts = [np.array([2, 0]), np.array([1])]
    drawn = shift.shift(kind).draw(1, 2, 0)
    found = shift.apply(x, parts, drawn, 1, np.zeros(4, np.int32), 1)
    assert found.dtype == np.uint8 and found.shape == x.shape
    np.testing.assert_array_equal(found[3], x[3])  # nobody's
    if kind != "class_rotation":  # whose client may have no image of its classes
        moved = set(shift.varying(drawn)) - set(shift.BY_CLASS)
        assert np.array_equal(found, x) == (not moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="rotaton"), "shift='rotaton' is unknown; did you mean 'rotation'"),
        (dict(kind="blur", novel="far"), "shift_novel='far' is unknown"),
        (dict(kind="blur", strength=-1), "shift_strength=-1 must be .*at least 0"),
        (dict(kind="label_swap", classes=1.5), "shift_classes=1.5 must be .*at most 1"),
        (dict(kind="blur", classes=0.3), "shift_classes=0.3 has no meaning for .*blur"),
        (
            dict(kind="rotation360", novel="outside"),
            "no meaning for shift='rotation360'",
        ),
    ],
)
def test_what_is_no_shift_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        shift.shift(**options)


def test_a_client_has_one_corruption_and_outside_is_another():
    seen, unseen = {"noise", "blur", "contrast", "brightness"}, {"angle", "tint_0"}
    for novel in ("inside", "outside"):
        drawn = shift.shift("corruptions", novel=novel).draw(0, 60, 60)
        names = [
            {
                n
                for n, x, same in zip(NAMES, row, shift.IDENTITY, strict=True)
                if x != same
            }
            - {"tint_1", "tint_2"}
            for row in drawn
        ]
        assert {len(found) for found in names} == {1}
        assert set.union(*names[:60]) == seen
        assert set.union(*names[60:]) == (seen if novel == "inside" else unseen)


def test_runs_from_before_a_parameter_can_be_read():
    rows = own(angle=90)[:, :8]
    assert list(shift.varying(rows)) == ["angle"]


# Classes -----------------------------------------------------------------------------


def test_images_of_a_clients_own_classes_are_turned_alone():
    x, y = images(num=40), np.arange(40, dtype=np.int32) % 10
    parts = [np.arange(20), np.arange(20, 40)]
    rows = np.concatenate([own(angle=90, classes=0.3, order=n) for n in (5, 6)])
    found = shift.apply(x, parts, rows, 0, y, 10)
    for part in parts:
        changed = (found[part] != x[part]).any(axis=(1, 2, 3))
        assert len(set(y[part][changed])) == 3
        assert not set(y[part][changed]) & set(y[part][~changed])
    every = shift.apply(x, parts, np.concatenate([own(angle=90)] * 2), 0, y, 10)
    assert (every != x).any(axis=(1, 2, 3)).all()


def test_some_classes_of_a_client_have_each_others_label():
    y = np.arange(40, dtype=np.int32) % 10
    parts = [np.arange(10), np.arange(10, 20), np.arange(20, 30)]
    rows = np.concatenate(
        [
            own(swapped=0.4, order=1),
            own(swapped=0.0, order=2),
            own(swapped=0.4, order=3),
        ]
    )
    found = shift.relabelled(y, parts, rows, 7, 10)
    assert (found[parts[0]] != y[parts[0]]).sum() == 4
    assert sorted(found[parts[0]]) == list(range(10))  # names change places
    np.testing.assert_array_equal(found[parts[1]], y[parts[1]])
    np.testing.assert_array_equal(found[30:], y[30:])  # nobody's
    assert not np.array_equal(found[parts[0]], found[parts[2]])


def test_a_federation_of_swapped_labels_has_its_images():
    plain, swapped = (
        federation.federate(
            load("digits"), num_clients=4, num_novel=2, shift=kind, seed=1
        )
        for kind in ("none", "label_swap")
    )
    np.testing.assert_array_equal(plain.pool.x, swapped.pool.x)
    np.testing.assert_array_equal(plain.train.rows, swapped.train.rows)
    moved = np.asarray(plain.pool.y) != np.asarray(swapped.pool.y)
    assert 0.1 < moved.mean() < 0.8
    assert not moved[plain.test.rows[0][: plain.test.size[0]]].any()
    for number, table in ((0, swapped.train), (4, swapped.novel_train)):
        mine = np.asarray(swapped.pool.y)[table.rows[0][: table.size[0]]]
        assert (np.bincount(mine, minlength=10) <= swapped.counts[number]).all()


# Pixels ------------------------------------------------------------------------------


def test_the_identity_keeps_bits_whatever_else_clients_have():
    x = images(4)
    both = np.concatenate([own(), own(angle=30, blur=1, noise=0.1, contrast=0.5)])
    found = shift.apply(x, [np.array([0, 1]), np.array([2, 3])], both, 0)
    np.testing.assert_array_equal(found[:2], x[:2])
    # Also where it goes through every step: each is exact at its identity.
    names = ("angle", "blocks", "blur", "contrast", "noise", "tint_0")
    rows, tables = np.arange(4), np.arange(16)[None]
    every = np.tile(shift.IDENTITY, (4, 1))
    through = shift.transformed(
        names, shift.jax.random.key(0), x / np.float32(255), every, rows, tables
    )
    np.testing.assert_array_equal(np.rint(np.asarray(through) * 255), x)


def test_quarter_turns_are_those_of_numpy():
    x = images()
    for turns in (1, 2, 3):
        expected = np.rot90(x, turns, (1, 2))
        np.testing.assert_array_equal(seen(x, angle=90 * turns), expected)


def test_what_comes_in_from_outside_is_black():
    white = np.full((1, 8, 8, 1), 255, np.uint8)
    found = seen(white, angle=45)[0, ..., 0]
    assert found[0, 0] == 0 and found[4, 4] == 255


def test_a_blur_is_a_gaussian():
    point = np.zeros((1, 15, 15, 1), np.float32)
    point[0, 7, 7] = 1.0
    found = np.asarray(shift.blurred(jnp.asarray(point[0]), 1.5))[..., 0]
    distance = np.arange(15) - 7
    kernel = np.exp(-0.5 * (distance / 1.5) ** 2)
    kernel /= kernel.sum()
    # Rows at the edge are scaled up, so only the middle is the plain kernel.
    middle = slice(4, 11)
    expected = np.outer(kernel, kernel)[middle, middle]
    np.testing.assert_allclose(found[middle, middle], expected, rtol=5e-3)
    flat = np.full((1, 8, 8, 1), 77, np.uint8)
    np.testing.assert_array_equal(seen(flat, blur=3.0), flat)


def test_contrast_and_tint_by_hand():
    x = images(channels=3)
    np.testing.assert_array_equal(seen(x, contrast=-1), 255 - x)
    np.testing.assert_array_equal(seen(x, contrast=0), np.full_like(x, 128))
    red = seen(x, tint_1=0.5)
    np.testing.assert_array_equal(red[..., [0, 2]], x[..., [0, 2]])
    np.testing.assert_array_equal(red[..., 1], np.rint(x[..., 1] * np.float32(0.5)))


def test_blocks_change_places_whole():
    x = images()
    found = seen(x, blocks=2)
    tiles = {tile.tobytes() for tile in _tiles(x[0])}
    assert {tile.tobytes() for tile in _tiles(found[0])} == tiles
    assert not np.array_equal(found, x)
    with pytest.raises(ValueError, match="images of 6x6 pixels"):
        seen(images(size=6), blocks=2)


def _tiles(image):
    return [image[i : i + 2, j : j + 2] for i in range(0, 8, 2) for j in range(0, 8, 2)]


def test_noise_is_a_samples_own_whoever_is_beside_it():
    x = images(6)
    rows, strong = np.arange(6), own(noise=0.3)
    once = shift.apply(x, [rows], strong, 0)
    again = shift.apply(x, [rows[::-1][:4]], strong, 0)
    np.testing.assert_array_equal(once[2:], again[2:])
    assert not np.array_equal(once, shift.apply(x, [rows], strong, 1))
    gap = (once[:1].astype(float) - x[:1]) / 255
    assert gap.std() == pytest.approx(0.3, rel=0.1)


def test_pixels_on_a_scale_of_their_own_stay_on_it():
    x = (images() / np.float32(255) * 4 - 2).astype(np.float32)
    found = seen(x, contrast=-1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, x.min() + x.max() - x, atol=1e-6)


# Federations -------------------------------------------------------------------------


def test_a_shifted_federation_has_the_same_partition_and_other_pixels(tmp_path):
    plain, turned = deal(), deal(shift="rotation")
    for name in ("train", "held_out", "novel", "test"):
        np.testing.assert_array_equal(
            getattr(plain, name).rows, getattr(turned, name).rows
        )
    assert plain.shift is None and plain.pool.owner == plain.pool.shift == ()
    assert turned.shift.shape == (9, len(NAMES))
    np.testing.assert_array_equal(turned.of_novel().shift, turned.shift[6:])
    test = turned.test.rows[0, : turned.test.size[0]]
    before, after = np.asarray(plain.pool.x), np.asarray(turned.pool.x)
    np.testing.assert_array_equal(after[test], before[test])
    assert not np.array_equal(after, before)
    mine = turned.novel.rows[1, 0]
    assert int(turned.pool.owner[mine]) == 6 + 1
    np.testing.assert_array_equal(turned.pool.shift[7], turned.shift[7])
    assert int(turned.pool.owner[test[0]]) == 9  # nobody's
    np.testing.assert_array_equal(turned.pool.shift[9], shift.IDENTITY)
    federation.save_tables(turned, tmp_path / "partition.npz")
    with np.load(tmp_path / "partition.npz") as file:
        np.testing.assert_array_equal(file["shift"], turned.shift)
        assert list(file["shift_names"]) == NAMES


def test_a_shift_of_no_strength_is_bit_equal_to_none():
    plain, same = deal(), deal(shift=shift.shift("everything", strength=0))
    np.testing.assert_array_equal(same.pool.x, plain.pool.x)
    np.testing.assert_array_equal(same.pool.mean, plain.pool.mean)


def test_images_may_be_made_smaller_after_they_are_shifted():
    digits = load("synthetic", num_samples=60, num_classes=3, shape=(8, 8))

    def small(shifted):
        assert shifted.x.shape[1:] == (8, 8, 1)
        return shifted._replace(x=shifted.x[:, ::2, ::2])

    found = federation.federate(
        digits, num_clients=3, shift="rotation", after_shift=small
    )
    assert found.pool.x.shape[1:] == (4, 4, 1)


# Standardised by client --------------------------------------------------------------


def batch(found, table, client):
    rows, size = table.rows[client], table.size[client]
    data = ClientData(jnp.asarray(rows), jnp.int32(size), found.pool)
    return clients.take(data, jnp.arange(size), 0, int(size)).x


def test_a_client_is_standardised_by_all_of_its_own_pixels():
    found = deal(shift="contrast", standardise="client")
    novel = batch(found, found.novel, 2)
    np.testing.assert_allclose(novel.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(novel.std((0, 1, 2)), 1, atol=1e-3)
    both = jnp.concatenate([batch(found, t, 1) for t in (found.train, found.held_out)])
    np.testing.assert_allclose(both.mean((0, 1, 2)), 0, atol=1e-4)


@pytest.mark.parametrize("floats", [False, True])
def test_signed_moments_make_a_negative_its_positive(floats):
    x = source().x
    x = x.astype(np.float32) * 3 - 7 if floats else x
    given = source()._replace(x=x)

    def dealt(kind, standardise):
        options = dict(shift=kind, standardise=standardise, seed=1, partition="iid")
        return federation.federate(given, num_clients=6, num_novel=3, **options)

    plain, negatives = (dealt(kind, "signed") for kind in ("none", "inversion"))
    assert 0 < (column(negatives.shift, "contrast") < 0).sum() < 9
    for client in range(6):
        found = [batch(data, data.train, client) for data in (plain, negatives)]
        np.testing.assert_allclose(*found, atol=1e-4)
        whole = [batch(plain, t, client) for t in (plain.train, plain.held_out)]
        assert np.mean(np.concatenate(whole) ** 3) >= 0
    as_they_are = dealt("inversion", "client")
    assert np.any(as_they_are.pool.std != negatives.pool.std)
    np.testing.assert_array_equal(as_they_are.pool.std, np.abs(negatives.pool.std))
    assert negatives.signed and not as_they_are.signed


@pytest.mark.parametrize("standardise", ["client", "signed"])
def test_outsiders_are_standardised_by_their_own_images_too(standardise):
    found = deal(shift="contrast", standardise=standardise)
    rows = found.novel.rows[2, : found.novel.size[2]]
    pool = found.pool
    outside = clients.pool_of_one(
        np.asarray(pool.x)[rows], pool.mean, pool.std, pool.shift, signed=found.signed
    )
    alone = clients.gather(outside, jnp.arange(len(rows)), jnp.ones(len(rows)))
    np.testing.assert_allclose(alone.x, batch(found, found.novel, 2), atol=1e-5)


def test_inputs_may_stay_in_zero_to_one():
    found = deal(standardise="none")
    rows = found.train.rows[0, : found.train.size[0]]
    expected = np.asarray(source().x, np.float32)[rows] / 255
    np.testing.assert_allclose(batch(found, found.train, 0), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="standardise='batch' is unknown"):
        deal(standardise="batch")
