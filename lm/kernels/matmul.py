"""The matrix product of activations and weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# On CPU: rows of one partial product, and how many of them are written out.
ROWS, MAX_PARTS = 1024, 16
# On CPU: XLA's backend has a slow product of its own for fewer, in bfloat16 by a factor of ten.
FEWEST_ROWS = 2


@jax.custom_vjp
def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [in, out] -> [..., out], all of one dtype."""
    return dot(x, weight)


def _matmul_forward(x, weight):
    return dot(x, weight), (x, weight)


def _matmul_backward(saved, dy):
    x, weight = saved
    return dot(dy, weight, transpose_y=True), dot(x, dy, transpose_x=True)


matmul.defvjp(_matmul_forward, _matmul_backward)


def dot(
    x: jax.Array,
    y: jax.Array,
    transpose_x: bool = False,
    transpose_y: bool = False,
    out_dtype: Any = None,
) -> jax.Array:
    """x y; x y^T over their last dimensions; or x^T y, summed over all leading ones.

    Added up in float32; `out_dtype` is of the result, y's by default. XLA's CPU backend multiplies
    bfloat16 at full speed only where float32 results are asked for, and x^T y only from a
    transposed copy, some rows at a time; there, and only there, it is asked that way.
    """
    dtype = jnp.dtype(y.dtype if out_dtype is None else out_dtype)
    leading = tuple(range(x.ndim - 1))
    if transpose_x:
        dims = ((leading, leading), ((), ()))
    else:
        dims = (((x.ndim - 1,), (1 if transpose_y else 0,)), ((), ()))

    def plain(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, y, dims, preferred_element_type=dtype)

    def cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        if transpose_x:
            return _sum_over_rows(x, y).astype(dtype)
        if 0 < x.size == x.shape[-1]:
            rows = jnp.pad(x.reshape(1, -1), ((0, FEWEST_ROWS - 1), (0, 0)))
            product = dot(rows, y, transpose_y=transpose_y, out_dtype=dtype)
            return product[:1].reshape(*x.shape[:-1], -1)
        return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32).astype(dtype)

    if x.dtype != jnp.bfloat16:
        return plain(x, y)
    return jax.lax.platform_dependent(x, y, cpu=cpu, default=plain)


def _sum_over_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """x^T y in float32, summed over all leading dimensions, a cache's worth of them at a time."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    num_rows = x.shape[0]
    size = max(ROWS, -(-num_rows // MAX_PARTS))
    transposed = jax.lax.optimization_barrier(x.T)
    parts = [
        jnp.matmul(
            transposed[:, start : start + size],
            y[start : start + size],
            preferred_element_type=jnp.float32,
        )
        for start in range(0, num_rows, size)
    ]
    return sum(parts[1:], start=parts[0])
