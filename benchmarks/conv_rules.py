"""Milliseconds per gradient step of one convolution inside a loop, rule by rule.

python -m benchmarks.conv_rules

Local training is a loop of gradient steps, and on the CPU XLA's own derivative of a
convolution is slow there; `models.convolutions` picks its rule from this table.
"""

import time

import jax
import jax.numpy as jnp
from absl import app

from hyperjax.launch.pages import text_table
from hyperjax.models.convolutions import RULES, convolve

# batch, height, channels, features, kernel, stride, padding, first layer?
SHAPES = (
    (32, 28, 1, 6, 5, 1, "VALID", True),
    (32, 12, 6, 16, 5, 1, "VALID", False),
    (32, 12, 20, 50, 5, 1, "VALID", False),
    (128, 28, 1, 8, 3, 2, "SAME", True),
    (128, 14, 8, 16, 3, 2, "SAME", False),
    (32, 32, 16, 16, 3, 1, "SAME", False),
    (32, 16, 32, 32, 3, 1, "SAME", False),
    (32, 8, 64, 64, 3, 1, "SAME", False),
)
STEPS, REPEATS = 10, 5


def milliseconds(shape, rule: str) -> float:
    """Returns the best time of a step with the rule."""
    batch, height, channels, features, size, stride, padding, first = shape
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (batch, height, height, channels))
    kernel = 0.1 * jax.random.normal(keys[1], (size, size, channels, features))

    def loss(x, kernel):
        return jnp.sum(jnp.square(convolve(x, kernel, stride, padding, rule)))

    def step(_, state):
        x, kernel = state
        if first:  # nothing below it needs a gradient
            return x, kernel - 1e-6 * jax.grad(loss, 1)(x, kernel)
        to_x, to_kernel = jax.grad(loss, (0, 1))(x, kernel)
        return x - 1e-6 * to_x, kernel - 1e-6 * to_kernel

    run = jax.jit(lambda state: jax.lax.fori_loop(0, STEPS, step, state))
    jax.block_until_ready(run((x, kernel)))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(run((x, kernel)))
        times.append(time.perf_counter() - began)
    return 1000 * min(times) / STEPS


def main(argv: list[str]) -> None:
    del argv
    rules = [rule for rule in RULES if rule != "auto"]
    rows = []
    for shape in SHAPES:
        batch, height, channels, features, size, stride, *_ = shape
        name = f"{batch}x{height}x{height}x{channels} -> {features}, {size}x{size}"
        row = {"shape": f"{name}/{stride}"}
        rows.append(row | {rule: milliseconds(shape, rule) for rule in rules})
    columns = [("shape", "input -> features, kernel/stride")]
    print(text_table(rows, columns + [(r, f"{r}, ms") for r in rules]))


if __name__ == "__main__":
    app.run(main)
