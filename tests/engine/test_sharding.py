"""Devices for cohorts of every size, and one result from every mapper."""

import chex
import jax
import jax.numpy as jnp
import pytest

from hyperjax.engine import sharding


@pytest.mark.parametrize(
    ("cohort_size", "max_devices", "used"),
    [
        (8, 0, 4),
        (4, 0, 4),
        (5, 0, 3),  # two clients on each of three devices, one place empty
        (6, 0, 3),
        (9, 0, 3),
        (3, 0, 3),
        (2, 0, 2),
        (1, 0, None),
        (8, 1, None),
        (8, 3, 3),
        (100, 2, 2),
        (8, 100, 4),
    ],
)
def test_the_fewest_devices_that_are_as_fast(cohort_size, max_devices, used):
    assert len(jax.local_devices()) == 4
    mesh = sharding.client_mesh(cohort_size, max_devices)
    assert (None if mesh is None else mesh.size) == used
    if mesh is not None:
        assert mesh.axis_names == (sharding.CLIENTS,)


@pytest.mark.parametrize(
    ("cohort_size", "padded"), [(1, 1), (4, 4), (5, 6), (7, 8), (9, 9)]
)
def test_cohorts_are_padded_to_whole_rows(cohort_size, padded):
    mesh = sharding.client_mesh(cohort_size)
    assert sharding.padded_size(cohort_size, mesh) == padded
    assert sharding.padded_size(cohort_size, None) == cohort_size


@pytest.mark.parametrize(
    ("mapper", "backend", "found"),
    [
        ("auto", "cpu", "map"),
        ("auto", "gpu", "vmap"),
        ("auto", "tpu", "vmap"),
        ("map", "gpu", "map"),
        ("vmap", "cpu", "vmap"),
        ("block", "cpu", 3),
    ],
)
def test_mappers_by_name(mapper, backend, found):
    assert sharding.resolve_mapper(mapper, 3, backend) == found


def test_ragged_clients_come_in_blocks_on_accelerators():
    for sizes, found in (([8, 8, 9], "vmap"), ([1, 2, 9], 3)):
        assert sharding.resolve_mapper("auto", 3, "gpu", sizes) == found
        assert sharding.resolve_mapper("auto", 3, "cpu", sizes) == "map"


def test_neighbours_are_of_about_a_size():
    size = jnp.array([3, 0, 7, 5, 7, 0])
    assert sharding.by_size(size).tolist() == [2, 4, 3, 0, 1, 5]
    # Each of two devices has half of the largest.
    assert sharding.by_size(size, 2).tolist() == [2, 3, 1, 4, 0, 5]


def test_unknown_mappers_and_empty_blocks_are_refused():
    with pytest.raises(ValueError, match="did you mean 'vmap'"):
        sharding.resolve_mapper("vmapp", 3, "cpu")
    with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
        sharding.resolve_mapper("block", 0, "cpu")


@pytest.mark.parametrize("mapper", ["vmap", 1, 2, 5])
@pytest.mark.parametrize("devices", [1, 4])
def test_every_way_to_map_gives_the_same(mapper, devices):
    mesh = sharding.client_mesh(8, devices)
    mapped = {"x": jnp.arange(24.0).reshape(8, 3), "n": jnp.arange(8)}

    def fn(client, shared):
        return {"y": jnp.sum(client["x"] * shared), "n": client["n"] + 1}

    expected = {
        "y": jnp.array([3.0, 12.0, 21.0, 30.0, 39.0, 48.0, 57.0, 66.0]) * 2.0,
        "n": jnp.arange(1, 9),
    }
    run = jax.jit(sharding.map_clients(fn, mapper, mesh))
    chex.assert_trees_all_equal(run(mapped, jnp.full(3, 2.0)), expected)


def test_copies_go_to_every_device():
    mesh = sharding.client_mesh(8)
    copy = sharding.replicate({"x": jnp.ones(3)}, mesh)
    assert copy["x"].sharding.is_fully_replicated
    assert len(copy["x"].sharding.device_set) == 4
    same = {"x": 1}
    assert sharding.replicate(same, None) is same


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 0), "cohort_size=0 must be at least 1"),
        ((2.5, 0), r"cohort_size=2\.5 must be a whole number"),
        ((4, -1), "max_devices=-1 must be at least 0"),
    ],
)
def test_devices_are_for_whole_numbers_of_clients(arguments, match):
    with pytest.raises(ValueError, match=match):
        sharding.client_mesh(*arguments)
