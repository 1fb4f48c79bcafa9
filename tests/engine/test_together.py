"""Runs of one program side by side are the runs that they are alone."""

import functools

import chex
import federated
import jax
import numpy as np
import pytest

from hyperjax import tree
from hyperjax.engine import schedule, sharding, together

ROUNDS = 2


@pytest.fixture(autouse=True)
def as_users_compile():
    """Without the compiler's optimizations nested loops are rounded otherwise."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def simulators(seeds=3, **options):
    """Simulators of one program that differ in weights, and their roots."""
    data, found = federated.tiny(), []
    alg = federated.method("fedper")  # whose clients keep something
    for seed in range(seeds):
        weight = np.arange(1, federated.NUM_CLIENTS + 1) ** seed
        program = found[0].program if found else None
        one = schedule.simulator(
            alg,
            data.table,
            data.pool,
            weight=weight,
            cohort_size=4,
            sampler="uniform",
            program=program,
            **options,
        )
        found.append(one)
    return found, [jax.random.key(seed) for seed in range(seeds)]


@functools.cache
def alone():
    """Three simulators, their roots, how they start and how each ends alone."""
    sims, roots = simulators()
    carries = [sim.init(root) for sim, root in zip(sims, roots, strict=True)]
    done = [
        sim.run(root, carry, 0, ROUNDS)
        for sim, root, carry in zip(sims, roots, carries, strict=True)
    ]
    return sims, roots, carries, jax.device_get(done)


def test_a_point_of_a_map_has_the_bits_it_has_alone_and_of_a_vmap_nearly():
    sims, roots, carries, expected = alone()
    assert tree.sha256(expected[0]) != tree.sha256(expected[1])
    for plan in together.PLANS:
        side = together.Together(sims, plan)
        found = jax.device_get(side.run(range(3), roots, carries, 0, ROUNDS))
        if plan == "map":
            chex.assert_trees_all_equal(found, expected)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
        # Fewer of them, in another order, by the same program: as a continued sweep.
        some = side.run([2], roots[2:], carries[2:], 0, ROUNDS)
        chex.assert_trees_all_equal(jax.device_get(some), found[2:])
        assert len(side.program._programs) == 1


@pytest.mark.slow
def test_points_over_devices_have_the_bits_they_have_on_one():
    if len(jax.local_devices()) < 2:
        pytest.skip("one device")
    sims, roots, carries, expected = alone()
    mesh = together.point_mesh(3)
    side = together.Together(sims, "map", mesh)
    assert side.size == 4 if mesh.size == 2 else 3
    found = side.run(range(3), roots, carries, 0, ROUNDS)
    chex.assert_trees_all_equal(jax.device_get(found), expected)


def test_fewer_points_are_in_a_call_where_memory_is_short():
    sims, roots, carries, expected = alone()
    side = together.Together(sims, "vmap", limit=1)
    found = side.run(range(3), roots, carries, 0, ROUNDS)
    assert side.size == side.at_once == 1
    chex.assert_trees_all_close(jax.device_get(found), expected, rtol=1e-5, atol=1e-6)


def test_refuses_what_cannot_run_side_by_side():
    sims, _ = simulators(seeds=2)
    with pytest.raises(ValueError, match="plan='zip' is unknown"):
        together.Together(sims, "zip")
    others, _ = simulators(seeds=2)
    with pytest.raises(ValueError, match="of one program"):
        together.Together([sims[0], others[0]], "map")
    hosted, _ = simulators(seeds=2, store="host")
    with pytest.raises(ValueError, match="store='device'"):
        together.Together(hosted, "map")
    meshed, _ = simulators(seeds=1, mesh=sharding.client_mesh(4))
    if len(jax.local_devices()) > 1:
        with pytest.raises(ValueError, match="on one device"):
            together.Together(meshed, "map")
