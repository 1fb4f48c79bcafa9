"""CPU milliseconds per gradient step of one convolution inside a loop, rule by rule.

python -m benchmarks.conv_rules

Local training is a loop of gradient steps, and on the CPU XLA's own derivative of a
convolution is slow there. `models.convolutions` picks its rule from this table; where
another machine's says otherwise, `--config.engine.conv_rule` names the rule. Columns
"b" are stripes of so many outputs, in brackets what "auto" takes; `onednn` is there
where it is built, see `hyperjax.native`.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app

from hyperjax import native
from hyperjax.launch.pages import text_table
from hyperjax.models import convolutions

# batch, height, channels, features, kernel, stride, padding, first layer?
SHAPES = (
    (32, 28, 1, 6, 5, 1, "VALID", True),
    (32, 28, 1, 32, 5, 1, "VALID", True),
    (32, 32, 3, 6, 5, 1, "VALID", True),
    (32, 32, 3, 16, 5, 1, "VALID", True),
    (32, 12, 6, 16, 5, 1, "VALID", False),
    (32, 12, 20, 50, 5, 1, "VALID", False),
    (64, 14, 16, 32, 5, 1, "VALID", False),
    (10, 16, 32, 64, 5, 1, "SAME", False),
    (128, 28, 1, 8, 3, 2, "SAME", True),
    (128, 14, 8, 16, 3, 2, "SAME", False),
    (128, 7, 16, 32, 3, 2, "SAME", False),
    (32, 32, 3, 16, 3, 1, "SAME", True),
    (32, 14, 8, 16, 3, 1, "SAME", False),
    (32, 32, 16, 16, 3, 1, "SAME", False),
    (32, 16, 32, 32, 3, 1, "SAME", False),
    (32, 8, 64, 64, 3, 1, "SAME", False),
)
BLOCKS = (1, 2, 4, 8)
STEPS, REPEATS = 10, 5


def milliseconds(shape: tuple, convolve: Callable) -> float:
    """Returns the best CPU time of a step with `(x, kernel) -> y`."""
    batch, height, channels, features, size, _, _, first = shape
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (batch, height, height, channels))
    kernel = 0.1 * jax.random.normal(keys[1], (size, size, channels, features))

    def loss(x, kernel):
        return jnp.sum(jnp.square(convolve(x, kernel)))

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
        began = time.process_time()
        jax.block_until_ready(run((x, kernel)))
        times.append(time.process_time() - began)
    return 1000 * min(times) / STEPS


def row(shape: tuple) -> dict[str, str]:
    """Returns the times of a shape by rule."""
    batch, height, channels, features, size, stride, padding, first = shape

    def by(convolve, **options):
        return lambda x, kernel: convolve(x, kernel, stride, padding, **options)

    rules = {
        "xla": by(convolutions.convolve, rule="xla"),
        "scan": by(convolutions.convolve, rule="scan"),
        "patches": by(convolutions.convolve, rule="patches"),
        **{f"b={b}": by(convolutions.stripes, block=b) for b in BLOCKS},
    }
    if native.version():
        rules["onednn"] = by(convolutions.convolve, rule="onednn")
    kernel = jax.ShapeDtypeStruct((size, size, channels, features), jnp.float32)
    auto = convolutions.cpu_rule(kernel.shape, bool(native.version()))
    auto = f"b={convolutions.block_of(size, features)}" if auto == "stripes" else auto
    name = f"{batch}x{height}x{height}x{channels} -> {features}, {size}x{size}/{stride}"
    found = {"shape": f"{name} {padding}{', first' if first else ''}"}
    for rule, convolve in rules.items():
        text = f"{milliseconds(shape, convolve):.2f}"
        found[rule] = f"[{text}]" if rule == auto else text
    return found


def main(argv: list[str]) -> None:
    del argv
    rows = [row(shape) for shape in SHAPES]
    columns = [(name, name) for name in rows[0] if name != "shape"]
    print(text_table(rows, [("shape", "input -> features, kernel/stride"), *columns]))


if __name__ == "__main__":
    app.run(main)
