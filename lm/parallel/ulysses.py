"""Ulysses (arXiv:2309.14509): tokens are exchanged for heads before attention, and back after."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.kernels.attention import Scores, View, attention
from lm.parallel.context import Context, current_context
from lm.sharding import map_devices, sizes


def ulysses_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    scores: Scores,
    *,
    sinks: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`lm.kernels.attention.attention` of rows that the layout in force splits along the sequence.

    Every device exchanges its tokens of all heads for whole rows of some heads, and runs ordinary
    attention on them. Fewer key/value heads than devices are repeated.

    Args:
      q: [B, T, H, h].
      k, v: [B, T, K, h], of the same tokens.
      view, scores, sinks, implementation: as `attention`.

    Raises:
      ValueError: the mesh does not divide batch or sequence, or its heads are too few or uneven.
    """
    context = current_context()
    if context is None:
        return attention(q, k, v, view, scores, sinks=sinks, implementation=implementation)
    heads = context.spec(q.shape, "batch", "sequence", "heads", None)
    kv_heads = context.spec(k.shape, "batch", "sequence", "kv_heads", None)
    tokens = context.spec(q.shape[:2], "batch", "sequence")
    repeats = check_heads(context, q.shape[2], k.shape[2])
    axes = context.axes

    def local(q, k, v, sinks, *fields):
        def to_heads(x: jax.Array) -> jax.Array:
            return jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True)

        def to_rows(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else jax.lax.all_gather(x, axes, axis=1, tiled=True)

        k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
        rows = View(*map(to_rows, fields), in_order=view.in_order)
        if sinks is not None:
            mine = sinks.shape[0] // context.size
            sinks = jax.lax.dynamic_slice_in_dim(sinks, jax.lax.axis_index(axes) * mine, mine)
        out = attention(
            to_heads(q), to_heads(k), to_heads(v), rows, scores, sinks=sinks,
            implementation=implementation,
        )  # fmt: skip
        return jax.lax.all_to_all(out, axes, split_axis=1, concat_axis=2, tiled=True)

    of_sinks = None if sinks is None else context.spec(sinks.shape, "heads")
    specs = (heads, kv_heads, kv_heads, of_sinks, *(tokens,) * 4)
    fields = (view.query_positions, view.key_positions, view.query_segments, view.key_segments)
    return map_devices(local, specs, heads, context.mesh)(q, k, v, sinks, *fields)


def check_heads(context: Context, num_heads: int, num_kv_heads: int) -> int:
    """How many copies of each key/value head give every device one.

    Raises:
      ValueError: heads cannot be distributed.
    """
    heads = num_heads // context.layout.parts("heads")
    kv_heads = num_kv_heads // context.layout.parts("kv_heads")

    def works(n: int) -> bool:
        return heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)

    if works(context.size):
        return max(1, context.size // kv_heads)
    raise ValueError(
        f"Ulysses cannot distribute {heads} query and {kv_heads} key/value heads of a device over "
        f"{context.label}; use a context of {sizes(heads, works)}, or ring attention"
    )
