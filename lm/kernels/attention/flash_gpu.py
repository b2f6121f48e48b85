"""Flash attention (arXiv:2205.14135) on Hopper GPUs: one device's arrays, forward and backward.

Compiled for H200; never run on a GPU: no figure of its speed exists. Its values and gradients were
those of the reference, to bfloat16's rounding, in the GPU interpreter of jax 0.11.2, in which the
products whose left side is in registers had to be replaced by plain ones.

See `flash_gpu_kernels` for the kernels and `sharded` for arrays that are split over a mesh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.attention import flash_gpu_kernels as kernels
from lm.kernels.attention.common import (
    NONE_SEEN,
    attend,
    gradients,
    kernel_flops,
    mask_rows,
    num_scores,
    padded,
    padded_view,
)
from lm.kernels.attention.flash_gpu_kernels import Ranges, Tile
from lm.kernels.attention.reference import View
from lm.kernels.attention.schedule import pairs
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


def flash_attention_gpu(
    q, k, v, view: View, scores: Scores, *, sinks=None, return_lse: bool = False,
    tiles: Tiles | None = None,
) -> Any:  # fmt: skip
    """See `lm.kernels.attention.attention`; the arrays are whole, or one device's in a shard_map.

    Compiled for H200; never run. tanh, exp2 and log are the hardware's approximations.

    Args:
      q, k, v: bfloat16 or float16, one head size: 64, 128 or 256. Lengths are padded to tiles.
      tiles: instead of the table's.

    Raises:
      ValueError: another dtype or head size, or the tiles need more shared memory than there is.
    """
    return attend(_kernel(q, k, v, scores, tiles), q, k, v, view, sinks, return_lse)


def flash_attention_gpu_backward(
    q, k, v, view: View, scores: Scores, out, lse, dout, *, dlse=None, tiles: Tiles | None = None
) -> tuple[jax.Array, ...]:
    """See `lm.kernels.attention.attention_backward` and, for the rest, `flash_attention_gpu`.

    The gradients are of the arrays' precision, held as float32.
    """
    kernel = _kernel(q, k, v, scores, tiles)
    results = gradients(kernel, q, k, v, view, out, lse, dout, dlse, q.dtype)
    return tuple(x.astype(jnp.float32) for x in results)


def _kernel(q, k, v, scores: Scores, tiles: Tiles | None) -> FlashGpu:
    tiles = tiles or _tiles(q.shape[3])
    _check(q, k, v, tiles)
    return FlashGpu(scores, tiles)


def shared_memory(kernel: str, tile: Tile, head_dim: int) -> int:
    """Bytes of shared memory per program of a kernel of `Tiles`, without its barriers."""
    own, block = (tile.key, tile.query) if kernel == "dkv" else (tile.query, tile.key)
    held = 1 if kernel == "forward" else 2
    vectors = {"forward": own, "dq": 0, "dkv": 2 * tile.stages * block}[kernel]
    return 2 * head_dim * (held * own + 2 * tile.stages * block) + 4 * vectors


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
    for name in ("forward", "dq", "dkv"):
        tile = getattr(tiles, name)
        rows, other = ("key", "query") if name == "dkv" else ("query", "key")
        given = getattr(tile, rows)
        if given != kernels.ROWS * tile.warpgroups or getattr(tile, other) % kernels.ROWS:
            raise ValueError(
                f"{name} tile {tile}: {rows} must be {kernels.ROWS} for each warpgroup, {other} a "
                f"multiple of {kernels.ROWS}"
            )
        bytes_needed = shared_memory(name, tile, q.shape[3])
        if bytes_needed > SHARED_MEMORY:
            raise ValueError(
                f"{name} tile {tile} of head size {q.shape[3]} needs {bytes_needed:,} bytes of "
                f"shared memory, a program has {SHARED_MEMORY:,}; use fewer stages or smaller "
                "blocks"
            )


class FlashGpu(NamedTuple):
    """The `Kernel` of Hopper GPUs."""

    scores: Scores
    tiles: Tiles

    def forward(self, q_BTHh, k_BSKh, v_BSKh, view: View) -> tuple[jax.Array, jax.Array]:
        T = q_BTHh.shape[1]
        call, rows = self._call(q_BTHh, k_BSKh, view, "forward")
        out, lse = kernels.forward(call, rows, *_tiled(q_BTHh, k_BSKh, v_BSKh, call.tile))
        return out[:, :T], jnp.moveaxis(lse[:, :, :T], 1, 2)

    def gradients(self, q, k, v, view: View, lse2, delta, dout, dtype: Any):
        T, S = q.shape[1], k.shape[1]
        delta, lse2 = (jnp.moveaxis(x, 1, 2) for x in (delta, lse2))  # [B, H, T]

        def given(tile: Tile) -> list[jax.Array]:
            return [
                *_tiled(q, k, v, tile),
                padded(dout, 1, tile.query),
                padded(lse2, 2, tile.query, constant_values=-NONE_SEEN),
                padded(delta, 2, tile.query),
            ]

        call, rows = self._call(q, k, view, "dq")
        dq = kernels.backward_queries(call, rows, *given(call.tile))[:, :T]
        found = []
        for wanted in (("dk", "dv"),) if self.tiles.together else (("dk",), ("dv",)):
            call, rows = self._call(q, k, view, "dkv" if self.tiles.together else wanted[0])
            found += kernels.backward_keys(call, rows, *given(call.tile), wanted=wanted)
        dk, dv = found
        return dq.astype(dtype), dk[:, :S], dv[:, :S]

    def _call(self, q, k, view: View, kernel: str) -> tuple[kernels.Call, tuple[jax.Array, ...]]:
        """The call of a kernel of `common.PRODUCTS`, and the rows its mask reads."""
        (B, T, H, h), S = q.shape, k.shape[1]
        of_keys = kernel.startswith(("dk", "dv"))
        tile = self.tiles.dkv if of_keys else getattr(self.tiles, kernel)
        view = padded_view(view, tile.query, tile.key, self.scores.causal)
        possible, whole = pairs(view, tile.query, tile.key, self.scores)
        if of_keys:
            possible, whole = possible.swapaxes(1, 2), whole.swapaxes(1, 2)
        segments, by_index = view.query_segments is not None, view.in_order
        flops = kernel_flops(kernel, B * H * num_scores(T, S, self.scores), h, h)
        visited = ranges(possible, whole)
        call = kernels.Call(self.scores, segments, by_index, tile, visited, flops)
        return call, mask_rows(view, positions=not by_index)


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


def _tiled(q: jax.Array, k: jax.Array, v: jax.Array, tile: Tile) -> tuple[jax.Array, ...]:
    return padded(q, 1, tile.query), padded(k, 1, tile.key), padded(v, 1, tile.key)
