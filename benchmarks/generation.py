r"""Memory of generating a large network, against the chunks generated at a time.

python -m benchmarks.generation --parameters=100_000_000 --chunk_batches=0,1,64,1024

A chunked MLP (chunks of 576 numbers, hidden layers 300, 300, embeddings of 16) emits
an MLP of six square layers and their biases. A plan is the number of chunks that go
through the hypernetwork at a time: 0 is all in one product ("vmap"), 1 one after the
other ("map"), the rest are blocks. Two programs are measured:

- forward: the target, from the hypernetwork's parameters and the condition;
- gradient: with respect to both, from a cotangent as large as the target (it is the
  target, as for half its sum of squares).

Columns, in MB of 2^20 bytes: the hypernetwork's parameters, among them the embeddings;
the *floor*, which is the target or its cotangent; *compiled*, what the compiler
allocates for results and temporary arrays, with the cotangent; *measured*, by how much
the first call, and the cotangent, raise the process's peak memory. *Extra* is the
larger of both over the floor. GB/s are bytes of the target over the shortest of a few
calls. *Difference* is the largest between a plan's numbers and those of the first plan,
array by array relative to the largest number in it. Rounding can put a ReLU's argument
on the other side of zero, which moves the gradient of that one chunk's embedding.

Every plan is measured in a process of its own, and compared in another.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import round_time
from hyperjax import tree
from hyperjax.errors import check_at_least, check_choice
from hyperjax.hypernets import mlp
from hyperjax.launch import cli, origin
from hyperjax.launch.pages import text_table

LAYERS = 6
CONDITION_SIZE = 16
PROGRAMS = ("forward", "gradient")
COLUMNS = (
    ("program", "program"),
    ("chunk_batch", "chunks at a time"),
    ("phi_mb", "hypernetwork"),
    ("floor_mb", "floor"),
    ("compiled_mb", "compiled"),
    ("measured_mb", "measured"),
    ("extra_mb", "extra"),
    ("seconds", "s"),
    ("gb_per_second", "GB/s"),
    ("difference", "difference"),
)


def template(parameters: int) -> dict[str, Any]:
    """Returns the smallest stack of square layers with at least that many numbers."""
    width = 1
    while LAYERS * width * (width + 1) < parameters:
        width += 1
    shapes = {"kernel": (width, width), "bias": (width,)}
    layer = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return {f"layer_{i}": layer for i in range(LAYERS)}


def compiled(kind: str, parameters: int, chunk_batch: int) -> tuple[Any, Any]:
    """Returns a compiled program and the hypernetwork's parameters and condition."""
    target = template(parameters)
    net = mlp.chunked_mlp(
        target, condition_size=CONDITION_SIZE, chunk_batch_size=chunk_batch
    )

    def pull_back(phi, condition, cotangent):
        return jax.vjp(net.generate, phi, condition)[1](cotangent)

    phi = jax.jit(net.init)(jax.random.key(0))
    given = phi, jnp.full(CONDITION_SIZE, 1 / CONDITION_SIZE)
    if kind == "forward":
        return jax.jit(net.generate).lower(*given).compile(), given
    return jax.jit(pull_back).lower(*given, target).compile(), given


def cotangents(kind: str, parameters: int) -> Callable:
    """Returns `() -> the program's further arguments`, made in little memory."""
    if kind == "forward":
        return lambda: ()
    generate, given = compiled("forward", parameters, 1024)
    return lambda: (generate(*given),)


def measure(kind: str, parameters: int, chunk_batch: int, calls: int) -> dict[str, Any]:
    """Counts memory and times calls of one plan; for a process of its own."""
    cli.use_cores(1)
    fn, given = compiled(kind, parameters, chunk_batch)
    make = cotangents(kind, parameters)
    before = round_time.peak_mb()
    cotangent = jax.block_until_ready(make())

    def call():
        jax.block_until_ready(fn(*given, *cotangent))

    times = [round_time.seconds(call)[0]]
    grown = round_time.peak_mb() - before
    times += [round_time.seconds(call)[0] for _ in range(calls - 1)]
    target, memory = template(parameters), fn.memory_analysis()
    floor, phi, embeddings, among = (
        tree.num_bytes(x) / 2**20
        for x in (target, given[0], given[0]["chunks"], cotangent)
    )
    temporary = memory.temp_size_in_bytes / 2**20
    results = memory.output_size_in_bytes / 2**20
    allocated = temporary + results + among
    return {
        "program": kind,
        "parameters": tree.count(target),
        "chunk_batch": chunk_batch,
        "phi_mb": phi,
        "embeddings_mb": embeddings,
        "floor_mb": floor,
        "temporary_mb": temporary,
        "results_mb": results,
        "compiled_mb": allocated,
        "measured_mb": grown,
        "extra_mb": max(allocated, grown) - floor,
        "seconds": min(times),
        "gb_per_second": tree.num_bytes(target) / min(times) / 1e9,
        "commit": origin.commit(),
        **round_time.about(),
    }


def compare(kind: str, parameters: int, plans: list[int]) -> list[float]:
    """Returns how far each plan's numbers are from the first one's."""
    cli.use_cores(1)
    cotangent = cotangents(kind, parameters)()

    def results(plan):
        fn, given = compiled(kind, parameters, plan)
        return fn(*given, *cotangent)

    @jax.jit
    def far(own, others):
        return jnp.max(jnp.abs(own - others)) / jnp.max(jnp.abs(others))

    first = results(plans[0])
    each = (jax.tree.map(far, results(plan), first) for plan in plans[1:])
    return [0.0] + [float(max(jax.tree.leaves(found))) for found in each]


def define_flags() -> None:
    """Defines the command line."""
    flags.DEFINE_integer("parameters", 100_000_000, "Numbers of the target, at least.")
    flags.DEFINE_list(
        "chunk_batches", ["0", "1", "64", "1024", "16384"], "Chunks at a time; 0: all."
    )
    flags.DEFINE_list("programs", list(PROGRAMS), "Programs to measure.")
    flags.DEFINE_integer("calls", 3, "Calls, of which the fastest counts.")
    cli.define_path("json", None, "File for the records.")


def main() -> int:
    f = flags.FLAGS
    check_at_least(1, parameters=f.parameters, calls=f.calls)
    try:
        plans = [int(plan) for plan in f.chunk_batches]
    except ValueError:
        plans = []
    if not plans:
        given = ",".join(f.chunk_batches)
        raise ValueError(f"chunk_batches={given!r} must be integers such as 0,64,1024")
    check_at_least(0, chunk_batches=min(plans))
    for kind in f.programs:
        check_choice("programs", kind, PROGRAMS)
    records: list[dict[str, Any]] = []
    for kind in f.programs:
        differences = round_time.fresh(compare, kind, f.parameters, plans)
        for plan, difference in zip(plans, differences, strict=True):
            record = round_time.fresh(measure, kind, f.parameters, plan, f.calls)
            records.append(record | {"difference": difference})
            round_time.write(f.json, records)  # stays if a later plan fails
            print(f"{kind}, {plan} at a time", file=sys.stderr, flush=True)
    lines = [r | {"difference": f"{r['difference']:.0e}"} for r in records]
    print(f"{records[0]['parameters']:,} numbers\n\n{text_table(lines, COLUMNS)}")
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, needs=())
