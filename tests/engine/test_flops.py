"""Arithmetic is counted as it is computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import native
from hyperjax.engine import flops


def work(fn, *args):
    return flops.work(jax.jit(fn).trace(*args).jaxpr.jaxpr)


A, B = jnp.ones((3, 4)), jnp.ones((4, 5))
PRODUCT = 2 * 3 * 4 * 5


def test_products_and_convolutions():
    assert work(jnp.dot, A, B) == (PRODUCT, 0, 0)
    batched = work(jax.vmap(jnp.dot), np.ones((7, 3, 4)), np.ones((7, 4, 5)))
    assert batched.outside == 7 * PRODUCT
    grads = work(jax.value_and_grad(lambda a, b: (a @ b).sum(), (0, 1)), A, B)
    assert grads.outside == 3 * PRODUCT
    x, kernel = np.ones((2, 8, 8, 3), np.float32), np.ones((3, 3, 3, 6), np.float32)

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert work(convolution, x, kernel).outside == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 3)


def test_loops_of_fixed_length_count_as_often_as_they_run():
    def looped(a, b):
        return jax.lax.scan(lambda c, _: (c, c @ b), a, length=6)[1]

    assert work(looped, A, B).outside == 6 * PRODUCT

    def either(a, b):
        return jax.lax.cond(a[0, 0] > 0, jnp.dot, lambda a, b: jnp.zeros((3, 5)), a, b)

    assert work(either, A, B).outside == PRODUCT / 2


def test_what_is_in_loops_of_unknown_length_is_counted_by_the_turn():
    def step(_, c):
        return c + A @ B

    def visit(num):
        def one_pass(_, c):
            return jax.lax.fori_loop(0, num, step, c)

        before = A @ B
        return jax.lax.fori_loop(0, num, one_pass, before)

    found = work(visit, 3)
    assert (found.outside, found.step, found.loops) == (PRODUCT, PRODUCT, 1)
    cohort = work(lambda nums: jax.lax.map(visit, nums), np.arange(5))
    assert (cohort.outside, cohort.step, cohort.loops) == (5 * PRODUCT, PRODUCT, 5)
    nothing = work(lambda num: jax.lax.fori_loop(0, num, lambda _, c: c + 1, 0), 3)
    assert nothing == (0, 0, 0) and nothing.step == 0


def test_convolutions_of_onednn_count_as_any():
    pads = ((1, 1), (1, 1))
    geometry = native.Geometry((2, 8, 8, 3), (3, 3, 3, 6), 1, pads)
    x, kernel = np.ones(geometry.x, np.float32), np.ones(geometry.kernel, np.float32)
    once = 2 * (2 * 8 * 8 * 6) * (3 * 3 * 3)

    def loss(x, kernel):
        return jnp.sum(native._forward(geometry, x, kernel))

    assert work(jax.value_and_grad(loss, (0, 1)), x, kernel).outside == 3 * once
    assert work(jax.vmap(loss), x[None], kernel[None]).outside == once
