"""Embedding rows, and their gradient summed where it is stored."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.kernels.cross_entropy.fused import Placement, make_placement
from lm.sharding import constrain, gather_weight, map_devices


@jax.custom_vjp
def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table.

    The gradient is summed in float32 on each device, and sent in the table's dtype straight to the
    `gradients` table of the layout, over one mesh axis at a time.

    Args:
      table: [V, D] with logical axes (vocab, embed), as it rests.
      ids: int32 [B, T]; those outside the table read its first or last row.

    Returns:
      [B, T, D].
    """
    whole = constrain(gather_weight(table, "vocab", "embed"), "vocab", None)
    return jnp.take(whole, ids, axis=0, mode="clip")


def _forward(table: jax.Array, ids: jax.Array):
    return lookup(table, ids), (table, ids)


def _backward(saved, dx: jax.Array):
    table, ids = saved
    at = make_placement(dx.shape, table.shape, transposed=True)
    local = functools.partial(_local_gradient, at, table.shape[0], table.dtype)
    specs = (at.tokens, PartitionSpec(*at.tokens, None))
    return map_devices(local, specs, at.gradient, at.mesh)(ids, dx), None


lookup.defvjp(_forward, _backward)


def _local_gradient(at: Placement, num_rows: int, dtype, ids: jax.Array, dx: jax.Array):
    """This device's part of the table's gradient."""
    size = num_rows // at.size(at.vocab)
    rows = jnp.clip(ids, 0, num_rows - 1)
    if at.vocab:
        rows -= size * jax.lax.axis_index(at.vocab)
        rows = jnp.where((rows >= 0) & (rows < size), rows, size)  # others' are dropped
    zeros = jnp.zeros((size, dx.shape[-1]), jnp.float32)
    gradient = zeros.at[rows].add(dx.astype(jnp.float32), mode="drop").astype(dtype)
    for axis in at.scatter:
        gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=1, tiled=True)
    return jax.lax.psum(gradient, at.reduce) if at.reduce else gradient
