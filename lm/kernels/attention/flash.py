"""Flash attention (arXiv:2205.14135) on TPU: one device's arrays, forward and backward.

The mask is that of the View: its positions and segments decide which blocks are visited
(`schedule`), and within a block which scores count. See `flash_kernels` for the kernels and
`sharded` for arrays that are split over a mesh.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lm.kernels.attention import flash_kernels as kernels
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
from lm.kernels.attention.flash_blocks import (
    LANES,
    Blocks,
    backward_vmem,
    blocks_for,
    even,
    forward_vmem,
    grown,
    vmem_limit,
)
from lm.kernels.attention.reference import View
from lm.kernels.attention.schedule import schedule
from lm.kernels.attention.scores import Scores


def flash_attention(
    q, k, v, view: View, scores: Scores, *, sinks=None, return_lse: bool = False, **how: Any
) -> Any:
    """See `lm.kernels.attention.attention`; the arrays are whole, or one device's in a shard_map.

    float32 arrays are multiplied in float32, bfloat16 ones as they are, with float32 sums.

    Args:
      how: `chip`, the TPU's name in `lm.hardware.chips`, for block sizes; None, the default, for
        sizes that fit any. `blocks` instead of the table's. `interpret` runs the kernel's meaning
        on any platform, slowly; None, the default, on CPUs.

    Raises:
      ValueError: no block table has the head size, or the rows are too long for one device.
    """
    return attend(_kernel(q, v, scores, **how), q, k, v, view, sinks, return_lse)


def flash_attention_backward(
    q, k, v, view: View, scores: Scores, out, lse, dout, *, dlse=None, **how: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `lm.kernels.attention.attention_backward` and, for the rest, `flash_attention`."""
    kernel = _kernel(q, v, scores, **how)
    return gradients(kernel, q, k, v, view, out, lse, dout, dlse, jnp.float32)


def _kernel(
    q, v, scores: Scores, *, chip: str | None = None, blocks: Blocks | None = None,
    interpret: bool | None = None,
) -> Flash:  # fmt: skip
    return Flash(scores, blocks or blocks_for(chip, max(q.shape[3], v.shape[3])), chip, interpret)


class Flash(NamedTuple):
    """The `Kernel` of TPUs."""

    scores: Scores
    blocks: Blocks
    chip: str | None
    interpret: bool | None

    def forward(self, q_BTHh, k_BSKh, v_BSKd, view: View) -> tuple[jax.Array, jax.Array]:
        (B, T, H, h), (S, K, d) = q_BTHh.shape, v_BSKd.shape[1:]
        heads = _heads(H // K, self.blocks.heads)
        query, key = _fit(self.blocks.forward, heads, T, S, self.blocks)
        view = padded_view(view, query, key, self.scores.causal)
        vmem = forward_vmem(query, key, heads, h, d, q_BTHh.dtype.itemsize)
        call = self._call(query, key, vmem, _cost(self, q_BTHh, v_BSKd, query, key, backward=False))
        out, lse = kernels.forward(
            call, schedule(view, query, key, self.scores), mask_rows(view),
            _of_queries(q_BTHh, K, heads, query), _of_keys(k_BSKh, key), _of_keys(v_BSKd, key),
        )  # fmt: skip
        out = jnp.moveaxis(out.reshape(B, H, -1, d)[:, :, :T], 1, 2)
        return out, jnp.moveaxis(lse.reshape(B, H, -1)[:, :, :T], 1, 2)

    def gradients(self, q, k, v, view: View, lse2, delta, dout, dtype: Any):
        (B, T, H, h), (S, K, d) = q.shape, v.shape[1:]
        heads = _heads(H // K, self.blocks.heads)
        query, key = _fit(self.blocks.backward, heads, T, S, self.blocks)
        chunks = -(-S // self.blocks.resident)
        keys = -(-S // (chunks * key)) * key
        view = padded_view(view, query, chunks * keys, self.scores.causal)
        vmem = backward_vmem(query, key, keys, heads, h, d, q.dtype.itemsize)
        call = self._call(query, key, vmem, _cost(self, q, v, query, key, True, chunks))
        of_queries = functools.partial(_of_queries, K=K, heads=heads, block=query)
        q, dout, delta = of_queries(q), of_queries(dout), of_queries(delta)
        lse2 = of_queries(lse2, fill=-NONE_SEEN)
        k, v = _of_keys(k, chunks * keys), _of_keys(v, chunks * keys)
        if chunks == 1:
            plan = schedule(view, query, key, self.scores)
            results = kernels.backward(
                call, plan, mask_rows(view), q, k, v, dout, lse2, delta, dtype
            )
        else:
            results = _by_chunk(call, chunks, view, q, k, v, dout, lse2, delta)
        dq, dk, dv = results
        dq = jnp.moveaxis(dq.reshape(B, H, -1, h)[:, :, :T], 1, 2).astype(dtype)
        dk, dv = (jnp.moveaxis(x[:, :, :S], 1, 2) for x in (dk * self.scores.scale, dv))
        return dq, dk, dv

    def _call(self, query: int, key: int, vmem: int, cost: pl.CostEstimate) -> kernels.Call:
        vmem = vmem_limit(vmem, self.chip)
        return kernels.Call(self.scores, query, key, vmem, self.interpret, cost)


def _by_chunk(call: kernels.Call, chunks: int, view: View, q, k, v, dout, lse2, delta):
    """The backward kernel once for each chunk of keys; the queries' gradients add up."""

    def cut(x: jax.Array | None, axis: int) -> jax.Array | None:
        if x is None:
            return None
        shape = (*x.shape[:axis], chunks, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def chunk(dq, part):
        k, v, key_positions, key_segments = part
        mine = View(view.query_positions, key_positions, view.query_segments, key_segments)
        plan, rows = schedule(mine, call.query, call.key, call.scores), mask_rows(mine)
        dq, dk, dv = kernels.backward(
            call, plan, rows, q, k, v, dout, lse2, delta, jnp.float32, before=dq
        )
        return dq, (dk, dv)

    parts = (cut(k, 2), cut(v, 2), cut(view.key_positions, 1), cut(view.key_segments, 1))
    dq, (dk, dv) = jax.lax.scan(chunk, jnp.zeros(q.shape, jnp.float32), parts)
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(*k.shape[:3], -1) for x in (dk, dv))
    return dq, dk, dv


def _fit(block: tuple[int, int], heads: int, T: int, S: int, blocks: Blocks) -> tuple[int, int]:
    if min(block) % LANES:  # the interpreter takes any
        return block
    query, key = grown(block, heads, blocks)
    return even(T, query), even(S, key)


def _heads(group: int, most: int) -> int:
    """The largest divisor of `group`, the query heads of one key/value head, up to `most`."""
    return max(n for n in range(1, min(group, most) + 1) if group % n == 0)


def _of_queries(x: jax.Array, K: int, heads: int, block: int, fill: float = 0.0) -> jax.Array:
    """[B, T, H, ...] -> [B, K, N, g, T padded, ...]."""
    B, _, H = x.shape[:3]
    x = jnp.moveaxis(padded(x, 1, block, constant_values=fill), 2, 1)
    return x.reshape(B, K, H // (K * heads), heads, *x.shape[2:])


def _of_keys(x_BSKh: jax.Array, block: int) -> jax.Array:
    """[B, S, K, h] -> [B, K, S padded, h]."""
    return jnp.moveaxis(padded(x_BSKh, 1, block), 2, 1)


def _cost(kernel: Flash, q, v, query: int, key: int, backward: bool, chunks: int = 1):
    """Work of one call for the scores that count, where `chunks` calls share the keys.

    A block of keys is read again for each block of queries.
    """
    (B, T, H, h), (S, K, d) = q.shape, v.shape[1:]
    scores = num_scores(T, S, kernel.scores)
    size = q.dtype.itemsize
    moved = B * T * (H * (h + d) * size + (H * (4 * h + 8) if backward else 4 * H))
    groups = H // (K * _heads(H // K, kernel.blocks.heads))
    read = B * math.ceil(scores / (query * key)) * key * groups * K * (h + d) * size
    if backward:
        read += B * S * K * (h + d) * 4
    flops = kernel_flops("backward" if backward else "forward", B * H * scores, h, d)
    return pl.CostEstimate(
        flops=flops // chunks,
        transcendentals=B * H * scores // chunks,
        bytes_accessed=moved + read // chunks,
    )
