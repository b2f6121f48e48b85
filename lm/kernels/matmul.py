"""The matrix product of activations and weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
    x: jax.Array, y: jax.Array, transpose_x: bool = False, transpose_y: bool = False
) -> jax.Array:
    """x y; x y^T over their last dimensions; or x^T y, summed over all leading ones.

    XLA's CPU backend multiplies bfloat16 at full speed only where float32 results are asked for,
    and not from a transposed left side; there, and only there, it is asked that way.
    """
    leading = tuple(range(x.ndim - 1))
    if transpose_x:
        dims = ((leading, leading), ((), ()))
    else:
        dims = (((x.ndim - 1,), (1 if transpose_y else 0,)), ((), ()))

    def plain(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, y, dims)

    def cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        if transpose_x:
            x = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
            out = jnp.matmul(x, y.reshape(-1, y.shape[-1]), preferred_element_type=jnp.float32)
        else:
            out = jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
        return out.astype(y.dtype)

    if x.dtype != jnp.bfloat16:
        return plain(x, y)
    return jax.lax.platform_dependent(x, y, cpu=cpu, default=plain)
