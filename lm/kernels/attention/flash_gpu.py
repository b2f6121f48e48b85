"""Flash attention (arXiv:2205.14135) on Hopper GPUs: one device's arrays, forward and backward.

Compiled for H200; never run on a GPU: no figure of its speed exists. Its values and gradients were
those of the reference, to bfloat16's rounding, in the GPU interpreter of jax 0.11.2, in which the
products whose left side is in registers had to be replaced by plain ones.

See `flash_gpu_kernels` for the kernels and `sharded` for arrays that are split over a mesh.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lm.kernels.attention import flash_gpu_kernels as kernels
from lm.kernels.attention.common import kernel_flops, num_scores, padded, padded_rows, with_sinks
from lm.kernels.attention.flash_gpu_kernels import Ranges, Tile
from lm.kernels.attention.flash_kernels import LOG2_E, NONE_SEEN, stack_rows
from lm.kernels.attention.reference import View
from lm.kernels.attention.schedule import Rows, pairs
from lm.kernels.attention.scores import Scores

SHARED_MEMORY = 227 * 1024  # bytes a program may use; CUDA programming guide, capability 9.0
DTYPES = ("bfloat16", "float16")


class Tiles(NamedTuple):
    """Sizes of the three kernels.

    Attributes:
      forward, dq: tiles of queries.
      dkv: tiles of keys.
      together: one kernel computes the gradients of keys and of values.
    """

    forward: Tile
    dq: Tile
    dkv: Tile
    together: bool


# By head size. As large as registers (232 per thread) and shared memory allow; not measured.
TABLE = {
    64: Tiles(Tile(128, 128, 2, 3), Tile(128, 128, 2, 2), Tile(64, 128, 2, 2), True),
    128: Tiles(Tile(128, 128, 2, 2), Tile(128, 64, 2, 2), Tile(64, 128, 2, 2), True),
    256: Tiles(Tile(128, 64, 2, 2), Tile(64, 64, 1, 2), Tile(64, 64, 1, 2), False),
}


class Static(NamedTuple):
    """What is known at trace time."""

    scores: Scores
    in_order: bool
    tiles: Tiles


def flash_attention_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    scores: Scores,
    *,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    tiles: Tiles | None = None,
) -> Any:
    """See `lm.kernels.attention.attention`; the arrays are whole, or one device's in a shard_map.

    Compiled for H200; never run. tanh, exp2 and log are the hardware's approximations.

    Args:
      q, k, v: bfloat16 or float16, one head size: 64, 128 or 256. Lengths are padded to tiles.
      tiles: instead of the table's.

    Raises:
      ValueError: another dtype or head size, or the tiles need more shared memory than there is.
    """
    static = _static(q, k, v, view, scores, tiles)
    results: Any = _attend(q, k, v, view, static)
    out, lse = results
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def flash_attention_gpu_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    scores: Scores,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    *,
    dlse: jax.Array | None = None,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `lm.kernels.attention.attention_backward` and, for the rest, `flash_attention_gpu`.

    The gradients are of the arrays' precision, held as float32.
    """
    static = _static(q, k, v, view, scores, tiles)
    dq, dk, dv = _gradients(q, k, v, view, out, lse, dout, dlse, static)
    return dq.astype(jnp.float32), dk.astype(jnp.float32), dv.astype(jnp.float32)


def _static(q, k, v, view, scores, tiles) -> Static:
    if tiles is None:
        tiles = _tiles(q.shape[3])
    _check(q, k, v, tiles)
    return Static(scores, view.in_order, tiles)


def forward_shared_memory(tile: Tile, head_dim: int) -> int:
    """Bytes of shared memory per program of the forward kernel, without its barriers."""
    return 2 * head_dim * (tile.query + 2 * tile.stages * tile.key) + 4 * tile.query


def dq_shared_memory(tile: Tile, head_dim: int) -> int:
    """As `forward_shared_memory`, for the gradient of the queries."""
    return 2 * head_dim * (2 * tile.query + 2 * tile.stages * tile.key)


def dkv_shared_memory(tile: Tile, head_dim: int) -> int:
    """As `forward_shared_memory`, for the gradients of keys and values."""
    return 2 * head_dim * (2 * tile.key + 2 * tile.stages * tile.query) + (
        2 * tile.stages * tile.query * 4
    )


def _tiles(head_dim: int) -> Tiles:
    if head_dim not in TABLE:
        sizes = ", ".join(map(str, TABLE))
        raise ValueError(
            f"mosaic_gpu attention has head sizes {sizes}, got {head_dim}; use "
            "implementation='cudnn' or 'blocked'"
        )
    return TABLE[head_dim]


def _check(q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles) -> None:
    if q.dtype.name not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"mosaic_gpu attention multiplies {' or '.join(DTYPES)}, all alike, got q {q.dtype}, "
            f"k {k.dtype}, v {v.dtype}; use implementation='blocked'"
        )
    if k.shape != v.shape:
        raise ValueError(
            f"mosaic_gpu attention has one head size, got keys {k.shape[3]} and values "
            f"{v.shape[3]}; use implementation='reference'"
        )
    for name, need, rows, other in (
        ("forward", forward_shared_memory, "query", "key"),
        ("dq", dq_shared_memory, "query", "key"),
        ("dkv", dkv_shared_memory, "key", "query"),
    ):
        tile = getattr(tiles, name)
        given = getattr(tile, rows)
        if given != kernels.ROWS * tile.warpgroups or getattr(tile, other) % kernels.ROWS:
            raise ValueError(
                f"{name} tile {tile}: {rows} must be {kernels.ROWS} for each warpgroup, {other} a "
                f"multiple of {kernels.ROWS}"
            )
        bytes_needed = need(tile, q.shape[3])
        if bytes_needed > SHARED_MEMORY:
            raise ValueError(
                f"{name} tile {tile} of head size {q.shape[3]} needs {bytes_needed:,} bytes of "
                f"shared memory, a program has {SHARED_MEMORY:,}; use fewer stages or smaller "
                "blocks"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, view: View, static: Static) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, view, static)[0]


def _forward(q_BTHh, k_BSKh, v_BSKh, view, static: Static):
    T, tile = q_BTHh.shape[1], static.tiles.forward
    call, rows = _call(static, q_BTHh, k_BSKh, view, "forward")
    out, lse = kernels.forward(call, rows, *_tiled(q_BTHh, k_BSKh, v_BSKh, tile))
    out, lse = out[:, :T], jnp.moveaxis(lse[:, :, :T], 1, 2)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return (out, lse), (q_BTHh, k_BSKh, v_BSKh, view, out, lse)


def _backward(static: Static, saved, gradients):
    q, k, v, view, out, lse = saved
    dq, dk, dv = _gradients(q, k, v, view, out, lse, *gradients, static=static)
    return dq, dk, dv, jax.tree.map(lambda _: None, view)


_attend.defvjp(_forward, _backward)


def _gradients(q, k, v, view, out, lse, dout, dlse, static: Static):
    T, S = q.shape[1], k.shape[1]
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    if dlse is not None:
        delta -= dlse
    lse2 = jnp.where(lse < NONE_SEEN, -NONE_SEEN, lse * LOG2_E)
    delta, lse2 = (jnp.moveaxis(x, 1, 2) for x in (delta, lse2))  # [B, H, T]
    dout = dout.astype(q.dtype)

    def given(tile: Tile) -> list[jax.Array]:
        return [
            *_tiled(q, k, v, tile),
            padded(dout, 1, tile.query),
            padded(lse2, 2, tile.query, constant_values=-NONE_SEEN),
            padded(delta, 2, tile.query),
        ]

    call, rows = _call(static, q, k, view, "dq")
    dq = kernels.backward_queries(call, rows, *given(call.tile))[:, :T]
    gradients = []
    for wanted in (("dk", "dv"),) if static.tiles.together else (("dk",), ("dv",)):
        call, rows = _call(static, q, k, view, "dkv" if static.tiles.together else wanted[0])
        gradients += kernels.backward_keys(call, rows, *given(call.tile), wanted=wanted)
    dk, dv = gradients
    return dq, dk[:, :S], dv[:, :S]


def _call(static: Static, q, k, view: View, kernel: str) -> tuple[kernels.Call, Any]:
    """The call of a kernel of `common.PRODUCTS`, and the rows its mask reads."""
    (B, T, H, h), S = q.shape, k.shape[1]
    of_keys = kernel.startswith(("dk", "dv"))
    tile = static.tiles.dkv if of_keys else getattr(static.tiles, kernel)
    rows = padded_rows(view, tile.query, tile.key, static.scores.causal)
    possible, whole = pairs(rows, tile.query, tile.key, static.scores, static.in_order)
    if of_keys:
        possible, whole = possible.swapaxes(1, 2), whole.swapaxes(1, 2)
    segments = rows.query_segments is not None
    flops = kernel_flops(kernel, B * H * num_scores(T, S, static.scores), h, h)
    call = kernels.Call(
        static.scores, segments, static.in_order, tile, ranges(possible, whole), flops
    )
    return call, _mask_rows(call, rows)


def ranges(possible: Any, whole: Any) -> Ranges:
    """The blocks each tile visits, as one range with one stretch that needs no mask.

    Blocks in the range that no query sees are masked.

    Args:
      possible, whole: bool [B or 1, tiles, blocks], of NumPy or JAX: see `schedule.pairs`.
    """
    xp: Any = np if isinstance(possible, np.ndarray) else jnp
    num_blocks = possible.shape[2]
    index = np.arange(num_blocks)

    def first_of(where: Any, otherwise: Any) -> Any:
        return xp.where(where.any(2), xp.argmax(where, axis=2), otherwise)

    first = first_of(possible, 0)
    end = xp.where(possible.any(2), num_blocks - xp.argmax(possible[:, :, ::-1], axis=2), 0)
    clear = possible & whole
    start = first_of(clear, end)
    stop = first_of(~clear & (index >= start[..., None]), num_blocks)
    stop = xp.where(clear.any(2), stop, end)
    table = xp.stack([first, start, stop, end], axis=2).astype(np.int32)
    if xp is np:
        return Ranges(jnp.asarray(table), bool((first < start).any()), bool((stop < end).any()))
    return Ranges(table, True, True)


def _mask_rows(call: kernels.Call, rows: Rows) -> tuple[jax.Array, ...]:
    """int32 ([B, n, T], [B, n, S]): what the mask cannot derive from indices; () if nothing."""
    if not call.by_index:
        return (
            stack_rows(rows.query_positions, rows.query_segments),
            stack_rows(rows.key_positions, rows.key_segments),
        )
    if rows.query_segments is None:
        return ()
    return rows.query_segments[:, None], rows.key_segments[:, None]


def _tiled(q: jax.Array, k: jax.Array, v: jax.Array, tile: Tile) -> tuple[jax.Array, ...]:
    return padded(q, 1, tile.query), padded(k, 1, tile.key), padded(v, 1, tile.key)
