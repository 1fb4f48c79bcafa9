"""Every method's programs lower for accelerators that are not here."""

import functools

import jax
import jax.numpy as jnp
import pytest
from federated import BESIDE, NUM_CLASSES, NUM_CLIENTS, STACKS, method
from jax import export

from hyperjax import federate, load
from hyperjax.engine.compiled import Compiled
from hyperjax.runs.experiment import Settings, experiment

PLATFORMS = ("cuda", "tpu")
PROGRAMS = {"init", "rounds", "evaluate", "tune"}
# A mean and a hypernetwork on clients whose network has convolutions and norms.
QUICK = ("hyperfednet",)


@functools.cache
def federation(partition="iid", **options):
    source = load("synthetic", num_samples=96, num_classes=NUM_CLASSES, shape=(4, 4, 1))
    who = dict(num_clients=NUM_CLIENTS, num_novel=2, partition=partition, seed=0)
    return federate(source, **who, **options)


def test_clients_of_uneven_sizes_are_planned_in_blocks(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    uneven = federation("dirichlet", alpha=0.5, min_size=2)
    run = experiment(uneven, method("fedavg"), Settings(), block_size=3)
    assert run.plan["mapper"] == 3
    # What was compiled for it serves another partition.
    other = experiment(federation(), method("fedavg"), Settings(), like=run)
    assert other.plan["mapper"] == 3


@pytest.mark.parametrize(
    "stack",
    [
        pytest.param(stack, marks=() if stack in QUICK else pytest.mark.slow)
        for stack in STACKS
        if not stack.endswith(BESIDE)  # with its method
    ],
)
def test_programs_lower_and_leave_nothing_to_the_host(stack, monkeypatch):
    modules = {}

    def exported(self, name, fn, args, *_, **__):
        lowered = export.export(jax.jit(fn), platforms=PLATFORMS)(*args)
        modules[name] = lowered.mlir_module()
        return jax.tree.unflatten(lowered.out_tree, map(zeros, lowered.out_avals))

    def zeros(spec):
        if jax.dtypes.issubdtype(spec.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), spec.shape)
        return jnp.zeros(spec.shape, spec.dtype)

    monkeypatch.setattr(Compiled, "__call__", exported)
    # Rules of convolutions and mappers are chosen by it while programs are traced.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run = experiment(federation(), method(stack), Settings(), devices=1)
    assert run.plan["mapper"] == "vmap"
    carry = run.simulator.init(0)
    carry, _ = run.simulator.run(0, carry, 0, 2)
    run.evaluator.evaluate(0, carry, 2)
    run.evaluator.tune(0, carry, 2, 1)
    assert modules.keys() >= PROGRAMS
    for name, text in modules.items():
        for absent in ("custom_call", "callback", "f64"):
            assert absent not in text, f"{stack}, {name}: {absent}"
