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
from lm.kernels.attention.flash_gpu_kernels import Ranges, Tile
from lm.kernels.attention.flash_kernels import LOG2_E, NONE_SEEN, Mask, Scores, stack_rows
from lm.kernels.attention.reference import View
from lm.kernels.attention.schedule import PADDING_POSITION, PADDING_SEGMENT, Rows, pairs

SHARED_MEMORY = 227 * 1024  # bytes a program may use; CUDA programming guide, capability 9.0
DTYPES = ("bfloat16", "float16")


class Tiles(NamedTuple):
    """Sizes of the three kernels.

    Attributes:
      forward, dq: tiles of queries.
      dkv: tiles of keys.
      together: the gradients of keys and of values come of one kernel.
    """

    forward: Tile
    dq: Tile
    dkv: Tile
    together: bool


# By head size. As large as registers (232 a thread) and shared memory allow; not measured.
TABLE = {
    64: Tiles(Tile(128, 128, 2, 3), Tile(128, 128, 2, 2), Tile(64, 128, 2, 2), True),
    128: Tiles(Tile(128, 128, 2, 2), Tile(128, 64, 2, 2), Tile(64, 128, 2, 2), True),
    256: Tiles(Tile(128, 64, 2, 2), Tile(64, 64, 1, 2), Tile(64, 64, 1, 2), False),
}


class Static(NamedTuple):
    """What is known at trace time."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    in_order: bool
    tiles: Tiles


def flash_attention_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
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
    if tiles is None:
        tiles = _tiles(q.shape[3])
    _check(q, k, v, tiles)
    static = Static(scale, causal, window, softcap, view.in_order, tiles)
    results: Any = _attend(q, k, v, view, static)
    out, lse = results
    if sinks is not None:  # a key without a value: the rest is weighted down
        both = jnp.logaddexp(lse, sinks.astype(jnp.float32))
        out = (out * jnp.exp(lse - both)[..., None]).astype(q.dtype)
        lse = both
    return (out, lse) if return_lse else out


def forward_shared_memory(tile: Tile, head_dim: int) -> int:
    """Bytes of shared memory a program of the forward kernel holds, but for its barriers."""
    return 2 * head_dim * (tile.query + 2 * tile.stages * tile.key) + 4 * tile.query


def dq_shared_memory(tile: Tile, head_dim: int) -> int:
    """As `forward_shared_memory`, of the gradient of the queries."""
    return 2 * head_dim * (2 * tile.query + 2 * tile.stages * tile.key)


def dkv_shared_memory(tile: Tile, head_dim: int) -> int:
    """As `forward_shared_memory`, of the gradients of keys and values."""
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
    rows = _padded_rows(view, tile.query, tile.key, static)
    call = _call(static, rows, tile, of_keys=False)
    out, lse = kernels.forward(
        call, _mask_rows(call, rows), *_tiled(q_BTHh, k_BSKh, v_BSKh, tile)
    )  # fmt: skip
    out, lse = out[:, :T], jnp.moveaxis(lse[:, :, :T], 1, 2)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return (out, lse), (q_BTHh, k_BSKh, v_BSKh, view, out, lse)


def _backward(static: Static, saved, gradients):
    q, k, v, view, out, lse = saved
    dout, dlse = gradients
    T, S = q.shape[1], k.shape[1]
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse
    lse2 = jnp.where(lse < NONE_SEEN, -NONE_SEEN, lse * LOG2_E)
    delta, lse2 = (jnp.moveaxis(x, 1, 2) for x in (delta, lse2))  # [B, H, T]
    dout = dout.astype(q.dtype)

    def given(tile: Tile) -> list[jax.Array]:
        return [
            *_tiled(q, k, v, tile),
            _padded(dout, 1, tile.query),
            _padded(lse2, 2, tile.query, constant_values=-NONE_SEEN),
            _padded(delta, 2, tile.query),
        ]

    tile = static.tiles.dq
    rows = _padded_rows(view, tile.query, tile.key, static)
    call = _call(static, rows, tile, of_keys=False)
    dq = kernels.backward_queries(call, _mask_rows(call, rows), *given(tile))[:, :T]

    tile = static.tiles.dkv
    rows = _padded_rows(view, tile.query, tile.key, static)
    call = _call(static, rows, tile, of_keys=True)
    backward_keys = functools.partial(
        kernels.backward_keys, call, _mask_rows(call, rows), *given(tile)
    )
    if static.tiles.together:
        dk, dv = backward_keys(wanted=("dk", "dv"))
    else:
        (dk,), (dv,) = backward_keys(wanted=("dk",)), backward_keys(wanted=("dv",))
    return dq, dk[:, :S], dv[:, :S], jax.tree.map(lambda _: None, view)


_attend.defvjp(_forward, _backward)


def _call(static: Static, rows: Rows, tile: Tile, *, of_keys: bool) -> kernels.Call:
    possible, whole = pairs(
        rows, tile.query, tile.key, causal=static.causal, window=static.window,
        in_order=static.in_order,
    )  # fmt: skip
    if of_keys:
        possible, whole = possible.swapaxes(1, 2), whole.swapaxes(1, 2)
    mask = Mask(static.causal, static.window, rows.query_segments is not None)
    scores = Scores(static.scale, static.softcap)
    return kernels.Call(mask, scores, static.in_order, tile, ranges(possible, whole))


def ranges(possible: Any, whole: Any) -> Ranges:
    """The blocks each tile meets, as one range with one stretch that needs no mask.

    Blocks within it that nothing sees are masked.

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
    """int32 ([B, n, T], [B, n, S]) of what the mask cannot know by index; () if that is nothing."""
    if not call.by_index:
        return (
            stack_rows(rows.query_positions, rows.query_segments),
            stack_rows(rows.key_positions, rows.key_segments),
        )
    if rows.query_segments is None:
        return ()
    return rows.query_segments[:, None], rows.key_segments[:, None]


def _padded(x: jax.Array, axis: int, block: int, **how: Any) -> jax.Array:
    extra = -x.shape[axis] % block
    if not extra:
        return x
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)], **how)


def _tiled(q: jax.Array, k: jax.Array, v: jax.Array, tile: Tile) -> tuple[jax.Array, ...]:
    return _padded(q, 1, tile.query), _padded(k, 1, tile.key), _padded(v, 1, tile.key)


def _padded_rows(view: View, query: int, key: int, static: Static) -> Rows:
    """Rows of whole blocks; no query sees a key that is padding."""
    int32 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.int32))
    query_positions, key_positions = int32((view.query_positions, view.key_positions))
    query_segments, key_segments = int32((view.query_segments, view.key_segments))
    if query_segments is None and not static.causal and key_positions.shape[1] % key:
        query_segments = jnp.zeros_like(query_positions)
        key_segments = jnp.zeros_like(key_positions)
    query_positions = _padded(query_positions, 1, query, mode="edge")
    key_positions = _padded(key_positions, 1, key, constant_values=PADDING_POSITION)
    if query_segments is None:
        return Rows(query_positions, key_positions, None, None)
    return Rows(
        query_positions,
        key_positions,
        _padded(query_segments, 1, query, mode="edge"),
        _padded(key_segments, 1, key, constant_values=PADDING_SEGMENT),
    )
