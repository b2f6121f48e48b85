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
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from lm.kernels.attention import flash_kernels as kernels
from lm.kernels.attention.common import (
    kernel_flops,
    num_scores,
    padded,
    padded_rows,
    with_sinks,
)
from lm.kernels.attention.flash_blocks import (
    LANES,
    SMALLEST,
    VMEM,
    Blocks,
    backward_vmem,
    blocks_for,
    even,
    forward_vmem,
    grown,
)
from lm.kernels.attention.flash_kernels import LOG2_E
from lm.kernels.attention.reference import View
from lm.kernels.attention.schedule import Rows, schedule
from lm.kernels.attention.scores import Scores


class Static(NamedTuple):
    """What is known at trace time."""

    scores: Scores
    in_order: bool
    blocks: Blocks
    chip: str | None
    interpret: bool | None


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    scores: Scores,
    *,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    chip: str | None = None,
    blocks: Blocks | None = None,
    interpret: bool | None = None,
) -> Any:
    """See `lm.kernels.attention.attention`; the arrays are whole, or one device's in a shard_map.

    float32 arrays are multiplied in float32, bfloat16 ones as they are, with float32 sums.

    Args:
      chip: the TPU's name in `lm.hardware.chips`, for block sizes; None for sizes that fit any.
      blocks: instead of the table's.
      interpret: run the kernel's meaning on any platform, slowly; None: on CPUs.

    Raises:
      ValueError: no block table has the head size, or the rows are too long for one device.
    """
    static = _static(q, v, view, scores, chip, blocks, interpret)
    results: Any = _attend(q, k, v, view, static)
    out, lse = results
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def flash_attention_backward(
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
    chip: str | None = None,
    blocks: Blocks | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `lm.kernels.attention.attention_backward` and, for the rest, `flash_attention`."""
    static = _static(q, v, view, scores, chip, blocks, interpret)
    return _gradients(q, k, v, view, out, lse, dout, dlse, static, jnp.float32)


def _static(q, v, view, scores, chip, blocks, interpret) -> Static:
    if blocks is None:
        blocks = blocks_for(chip, max(q.shape[3], v.shape[3]))
    return Static(scores, view.in_order, blocks, chip, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, view: View, static: Static) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, view, static)[0]


def _forward(q_BTHh, k_BSKh, v_BSKd, view, static: Static):
    (B, T, H, h), (S, K, d) = q_BTHh.shape, v_BSKd.shape[1:]
    heads = _heads(H // K, static.blocks.heads)
    query, key = _fit(static.blocks.forward, heads, T, S, static.blocks)
    rows = padded_rows(view, query, key, static.scores.causal)
    visits, count = _schedule(rows, query, key, static)
    call = _call(static, rows, query, key)._replace(
        vmem=_budget(static.chip, forward_vmem(query, key, heads, h, d, q_BTHh.dtype.itemsize)),
        cost=_cost(static, q_BTHh, v_BSKd, query, key, backward=False),
    )
    out, lse = kernels.forward(
        call, visits, count, rows,
        _of_queries(q_BTHh, K, heads, query), _of_keys(k_BSKh, key), _of_keys(v_BSKd, key),
    )  # fmt: skip
    out = jnp.moveaxis(out.reshape(B, H, -1, d)[:, :, :T], 1, 2)
    lse = jnp.moveaxis(lse.reshape(B, H, -1)[:, :, :T], 1, 2)
    # Named so that keeping "attention" keeps both, and the backward pass runs no forward kernel.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return (out, lse), (q_BTHh, k_BSKh, v_BSKd, view, out, lse)


def _backward(static: Static, saved, gradients):
    q, k, v, view, out, lse = saved
    dout, dlse = gradients
    dq, dk, dv = _gradients(q, k, v, view, out, lse, dout, dlse, static, q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), jax.tree.map(lambda _: None, view)


_attend.defvjp(_forward, _backward)


def _gradients(q_BTHh, k_BSKh, v_BSKd, view, out, lse, dout, dlse, static: Static, dq_dtype):
    (B, T, H, h), (S, K, d) = q_BTHh.shape, v_BSKd.shape[1:]
    heads = _heads(H // K, static.blocks.heads)
    query, key = _fit(static.blocks.backward, heads, T, S, static.blocks)
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    if dlse is not None:
        delta -= dlse
    lse = jnp.where(lse < kernels.NONE_SEEN, -kernels.NONE_SEEN, lse * LOG2_E)
    chunks = -(-S // static.blocks.resident)
    keys = -(-S // (chunks * key)) * key
    rows = padded_rows(view, query, chunks * keys, static.scores.causal)
    call = _call(static, rows, query, key)._replace(
        vmem=_budget(
            static.chip, backward_vmem(query, key, keys, heads, h, d, q_BTHh.dtype.itemsize)
        ),
        cost=_cost(static, q_BTHh, v_BSKd, query, key, backward=True, chunks=chunks),
    )
    of_queries = functools.partial(_of_queries, K=K, heads=heads, block=query)
    q, dout, delta = of_queries(q_BTHh), of_queries(dout.astype(q_BTHh.dtype)), of_queries(delta)
    lse = of_queries(lse, fill=-kernels.NONE_SEEN)
    k, v = _of_keys(k_BSKh, chunks * keys), _of_keys(v_BSKd, chunks * keys)
    if chunks == 1:
        visits, count = _schedule(rows, query, key, static)
        dq, dk, dv = kernels.backward(
            call, visits, count, rows, q, k, v, dout, lse, delta, dq_dtype
        )
    else:
        dq, dk, dv = _by_chunk(call, chunks, static, rows, q, k, v, dout, lse, delta)
    dq = jnp.moveaxis(dq.reshape(B, H, -1, h)[:, :, :T], 1, 2).astype(dq_dtype)
    dk, dv = (jnp.moveaxis(x[:, :, :S], 1, 2) for x in (dk * static.scores.scale, dv))
    return dq, dk, dv


def _by_chunk(call, chunks: int, static: Static, rows: Rows, q, k, v, dout, lse, delta):
    """The backward kernel once for each chunk of keys; the queries' gradients add up."""

    def cut(x: jax.Array | None, axis: int) -> jax.Array | None:
        if x is None:
            return None
        shape = (*x.shape[:axis], chunks, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def chunk(dq, part):
        k, v, key_positions, key_segments = part
        mine = rows._replace(key_positions=key_positions, key_segments=key_segments)
        visits, count = schedule(mine, call.query, call.key, static.scores, False)
        dq, dk, dv = kernels.backward(
            call, visits, count, mine, q, k, v, dout, lse, delta, jnp.float32, before=dq
        )
        return dq, (dk, dv)

    parts = (cut(k, 2), cut(v, 2), cut(rows.key_positions, 1), cut(rows.key_segments, 1))
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


def _schedule(rows: Rows, query: int, key: int, static: Static) -> Any:
    return schedule(rows, query, key, static.scores, static.in_order)


def _of_queries(x: jax.Array, K: int, heads: int, block: int, fill: float = 0.0) -> jax.Array:
    """[B, T, H, ...] -> [B, K, N, g, T padded, ...]."""
    B, _, H = x.shape[:3]
    x = jnp.moveaxis(padded(x, 1, block, constant_values=fill), 2, 1)
    return x.reshape(B, K, H // (K * heads), heads, *x.shape[2:])


def _of_keys(x_BSKh: jax.Array, block: int) -> jax.Array:
    """[B, S, K, h] -> [B, K, S padded, h]."""
    return jnp.moveaxis(padded(x_BSKh, 1, block), 2, 1)


def _budget(chip: str | None, estimate: int) -> int:
    """VMEM to ask for: half as much again as the estimate, for what the compiler spills."""
    return min(max(estimate * 3 // 2, SMALLEST), VMEM.get(chip or "", SMALLEST) * 15 // 16)


def _call(static: Static, rows: Rows, query: int, key: int) -> kernels.Call:
    segments = rows.query_segments is not None
    none = pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=0)
    return kernels.Call(static.scores, segments, query, key, 0, static.interpret, none)


def _cost(static: Static, q, v, query: int, key: int, *, backward: bool, chunks: int = 1):
    """Work of one call for the scores that count, where `chunks` calls share the keys.

    A block of keys is read again for each block of queries.
    """
    (B, T, H, h), (S, K, d) = q.shape, v.shape[1:]
    scores = num_scores(T, S, static.scores)
    size = q.dtype.itemsize
    moved = B * T * (H * (h + d) * size + (H * (4 * h + 8) if backward else 4 * H))
    groups = H // (K * _heads(H // K, static.blocks.heads))
    read = B * math.ceil(scores / (query * key)) * key * groups * K * (h + d) * size
    if backward:
        read += B * S * K * (h + d) * 4
    flops = kernel_flops("backward" if backward else "forward", B * H * scores, h, d)
    return pl.CostEstimate(
        flops=flops // chunks,
        transcendentals=B * H * scores // chunks,
        bytes_accessed=moved + read // chunks,
    )
