"""Ragged paged attention as a Pallas TPU kernel.

The grid goes over items: a block of one sequence's new tokens with the keys they see. Sequences of
one new token are items of one token and longer ones of `block_q`, in a pass each, so that decoding
pays for no empty queries. An item's pages come from HBM a block of pages at a time, all heads of a
page in one copy, into one of two buffers; while a block is multiplied the next one is on its way,
the following item's first included. Pages behind the end of a sequence, or before its window, are
never read. The page table and the items are in scalar memory.

Shape suffixes as in `reference`; I items, R = block_q x G rows of queries padded to a tile, C keys
of a block of pages, V lanes of a value.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels.attention.flash_blocks import vmem_limit
from lm.kernels.attention.reference import NEGATIVE
from lm.kernels.attention.scores import Scores
from lm.kernels.paged_attention.pages import LANES, PageBatch, Pages
from lm.kernels.paged_attention.tpu_blocks import (
    Shape,
    check_sizes,
    choose_blocks,
    shape_of,
)

UNROLL = 8  # heads written out; more go round a loop


class Items(NamedTuple):
    """What the grid goes over. All int32 [I]; `tokens` int32 [I, block_q].

    Attributes:
      rows: sequence.
      firsts: position of its first query.
      ends: one past the last key it sees; 0 for an item with nothing to do.
      nexts: the following item of the same core with something to do, or I. Cores take turns.
      tokens: places in the flat batch, N where there is no query.
    """

    rows: jax.Array
    firsts: jax.Array
    ends: jax.Array
    nexts: jax.Array
    tokens: jax.Array


def make_items(batch: PageBatch, num_tokens: int, block_q: int, capacity: int, cores: int) -> Items:
    """Items of sequences with one new token where `block_q` is 1, else of those with more."""
    starts, lens, kv_lens = batch.starts, batch.lens, batch.kv_lens
    B = len(lens)
    if block_q == 1:
        rows, blocks = jnp.arange(B, dtype=jnp.int32), jnp.zeros(B, jnp.int32)
        live = lens == 1
    else:
        counts = jnp.where(lens > 1, -(-lens // block_q), 0)
        stops = jnp.cumsum(counts)
        # Each of these sequences has at least two tokens, and at most one block that is not full.
        num_items = max(1, num_tokens // block_q + min(B, num_tokens // 2))
        index = jnp.arange(num_items, dtype=jnp.int32)
        rows = jnp.searchsorted(stops, index, side="right", method="compare_all")
        rows = jnp.minimum(rows, B - 1).astype(jnp.int32)
        blocks = index - (stops - counts)[rows]
        live = index < stops[-1]
    firsts = (kv_lens - lens)[rows] + blocks * block_q
    live &= firsts >= 0
    ends = jnp.minimum(jnp.minimum(firsts + block_q, kv_lens[rows]), capacity)
    ends = jnp.where(live, ends, 0)
    offsets = blocks[:, None] * block_q + jnp.arange(block_q, dtype=jnp.int32)
    used = live[:, None] & (offsets < lens[rows][:, None])
    tokens = jnp.where(used, starts[rows][:, None] + offsets, num_tokens)
    rows, firsts, ends = (jnp.pad(x, (0, -len(x) % cores)) for x in (rows, firsts, ends))
    tokens = jnp.pad(tokens, [(0, -len(tokens) % cores), (0, 0)], constant_values=num_tokens)
    num = len(rows)
    own = jnp.where(ends > 0, jnp.arange(num, dtype=jnp.int32), num).reshape(-1, cores)
    following = jnp.concatenate([own[1:], jnp.full((1, cores), num, jnp.int32)])
    nexts = jax.lax.cummin(following, axis=0, reverse=True).reshape(-1)
    return Items(rows, firsts, ends, nexts, tokens)


class Static(NamedTuple):
    """What is known at trace time.

    Attributes:
      scores, shape: see `Scores` and `Shape`.
      split, latent: see `Pages`.
      pages_per_block, table_width: page_size x pages_per_block = C, and M.
    """

    scores: Scores
    shape: Shape
    split: int
    latent: bool
    pages_per_block: int
    table_width: int


def tpu_paged_attention(
    q: jax.Array,
    pages: Pages,
    batch: PageBatch,
    scores: Scores,
    sinks: jax.Array | None = None,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    chip: str | None = None,
    cores: int = 1,
    interpret: Any = False,
) -> jax.Array:
    """See `lm.kernels.paged_attention.paged_attention`.

    `chip` is the TPU's name in `lm.hardware.chips`, for blocks that fit it; None for any. `cores`
    of one device share the items: two on TPUs v4 and v5p. `interpret` is what `pl.pallas_call`
    takes.

    Raises:
      ValueError: the page size, the table, a page or a block is one the kernel cannot hold.
    """
    page_table, max_len = batch.page_table, batch.max_q_len
    N, B = len(q), len(page_table)
    check_sizes(pages, page_table, chip)
    shape = shape_of(pages, q, sinks is not None)
    run = functools.partial(
        _run, shape, q, pages, page_table, scores=scores, sinks=sinks, chip=chip,
        cores=cores, interpret=interpret,
    )  # fmt: skip
    blocks = functools.partial(choose_blocks, shape, chip, page_table.shape[1], block_kv=block_kv)
    capacity = page_table.shape[1] * pages.page_size
    most = N if max_len is None else min(max_len, N)
    chosen = [blocks(likely=1)]
    if most > 1:
        # Whole tiles of the matrix unit, but no more than sequences are likely to fill.
        likely = most if max_len is not None else max(8, N // B)
        chosen.append(blocks(likely=likely, block_q=None if block_q is None else max(2, block_q)))
    passes = [make_items(batch, N, block_q, capacity, cores) for block_q, _ in chosen]
    rows = [run(items, num_pages) for items, (_, num_pages) in zip(passes, chosen, strict=True)]
    # Rows of the passes' results, by token of the batch.
    tokens = jnp.concatenate([items.tokens.reshape(-1) for items in passes])
    place = jnp.full(N, len(tokens), jnp.int32)
    place = place.at[tokens].set(jnp.arange(len(tokens), dtype=jnp.int32), mode="drop")
    out = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
    return out.at[place].get(mode="fill", fill_value=0)


def _run(
    shape: Shape,
    q: jax.Array,
    pages: Pages,
    page_table: jax.Array,
    items: Items,
    num_pages: int,
    *,
    scores: Scores,
    sinks: jax.Array | None,
    chip: str | None,
    cores: int,
    interpret: Any,
) -> jax.Array:
    """One pass: [I x block_q, H, V], in the order of the items' tokens."""
    _, K, p, W = pages.data.shape
    _, H, h = q.shape
    num, block_q = items.tokens.shape
    group, R = shape.group, shape.rows(block_q)
    static = Static(scores, shape, pages.split, pages.latent, num_pages, page_table.shape[1])
    V = shape.value_lanes.stop - shape.value_lanes.start
    x = q.at[items.tokens].get(mode="fill", fill_value=0)
    x = x.reshape(num, block_q, K, group, h).transpose(0, 2, 1, 3, 4)
    x = x.reshape(num, K, block_q * group, h)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, R - block_q * group), (0, shape.key_lanes - h)])

    operands = [x, pages.data]
    specs = [_item_spec(K, R, shape.key_lanes, cores), pl.BlockSpec(memory_space=pl.ANY)]
    scratch = [pltpu.VMEM((2, num_pages, K, p, W), pages.data.dtype)]
    if pages.scales is not None:
        operands.append(pages.scales)
        specs.append(pl.BlockSpec(memory_space=pl.ANY))
        scratch.append(pltpu.VMEM((2, num_pages, 2, K, p), jnp.float32))
    if sinks is not None:
        by_row = jnp.tile(sinks.astype(jnp.float32).reshape(K, group), (1, -(-R // group)))[:, :R]
        operands.append(jnp.broadcast_to(by_row[:, :, None], (K, R, LANES)))
        specs.append(pl.BlockSpec((K, R, LANES), lambda *_: (0, 0, 0)))
    scratch += [
        pltpu.VMEM((K, R, LANES), jnp.float32),  # maximum
        pltpu.VMEM((K, R, LANES), jnp.float32),  # sum
        pltpu.VMEM((K, R, V), jnp.float32),  # output
        pltpu.SMEM((2,), jnp.int32),  # the buffer in turn, and whether it was asked for
        pltpu.SemaphoreType.DMA((2, 1 + shape.quantized)),
    ]
    scalars = (page_table.reshape(-1), items.rows, items.firsts, items.ends, items.nexts)
    out = pl.pallas_call(
        functools.partial(_kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, num // cores),
            in_specs=specs,
            out_specs=_item_spec(K, R, V, cores),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((num, K, R, V), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(shape.vmem(block_q, num_pages), chip),
        ),
        cost_estimate=_cost(x, pages, page_table, V, scores.window),
        interpret=interpret,
        name="paged_attention_decode" if block_q == 1 else "paged_attention_prefill",
    )(*(s.astype(jnp.int32) for s in scalars), *operands)
    if shape.value_lanes != pages.value_lanes:
        out = out[..., pages.value_lanes]
    out = out[:, :, : block_q * group].reshape(num, K, block_q, group, -1)
    return out.transpose(0, 2, 1, 3, 4).reshape(num * block_q, H, -1)


def _item_spec(K: int, R: int, width: int, cores: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, K, R, width), lambda core, i, *_: (i * cores + core, 0, 0, 0))


def _cost(
    x: jax.Array, pages: Pages, page_table: jax.Array, V: int, window: int | None
) -> pl.CostEstimate:
    """For sequences that fill their tables; a window's where it is smaller."""
    _, K, p, W = pages.data.shape
    M = page_table.shape[1]
    keys = M * p if window is None else min(M * p, window)
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    row_bytes = W * pages.data.dtype.itemsize + (0 if pages.scales is None else 8)
    return pl.CostEstimate(
        flops=2 * rows * keys * (x.shape[-1] + V),
        transcendentals=rows * keys,
        bytes_accessed=max(x.shape[0], 1) * keys * K * row_bytes
        + x.size * x.dtype.itemsize
        + rows * V * x.dtype.itemsize,
    )


@dataclasses.dataclass(frozen=True)
class _Copies:
    """The blocks of pages of an item, and their way into a buffer."""

    static: Static
    table: Any
    rows: Any
    firsts: Any
    ends: Any
    pages: list[tuple[Any, Any]]  # (in HBM, buffers) of rows and, quantized, of scales
    semaphores: Any

    def extent(self, item: Any) -> tuple[Any, Any]:
        """(first page read, one past the last)."""
        s = self.static
        first = 0
        if s.scores.window is not None:
            first = jnp.maximum(self.firsts[item] - s.scores.window + 1, 0) // s.shape.page_size
        return first, pl.cdiv(self.ends[item], s.shape.page_size)

    def blocks(self, item: Any) -> tuple[Any, Any]:
        """(first block, one past the last)."""
        first, last = self.extent(item)
        return first // self.static.pages_per_block, pl.cdiv(last, self.static.pages_per_block)

    def start(self, item: Any, block: Any, slot: Any) -> None:
        """Ask for a block; what of it is not read is zeros."""
        s = self.static
        first, last = self.extent(item)
        base = self.rows[item] * s.table_width

        def one(j: Any, _: None) -> None:
            index = block * s.pages_per_block + j
            read = (index >= first) & (index < last)

            @pl.when(read)
            def _() -> None:
                page = jnp.clip(self.table[base + index], 0, self.pages[0][0].shape[0] - 1)
                for copy in self.copies(page, j, slot):
                    copy.start()

            @pl.when(~read)
            def _() -> None:
                for _, buffers in self.pages:
                    buffers[slot, j] = jnp.zeros(buffers.shape[2:], buffers.dtype)

        jax.lax.fori_loop(0, s.pages_per_block, one, None)

    def wait(self, item: Any, block: Any, slot: Any) -> None:
        first, last = self.extent(item)

        def one(j: Any, _: None) -> None:
            index = block * self.static.pages_per_block + j

            @pl.when((index >= first) & (index < last))
            def _() -> None:
                for copy in self.copies(0, j, slot):
                    copy.wait()

        jax.lax.fori_loop(0, self.static.pages_per_block, one, None)

    def copies(self, page: Any, j: Any, slot: Any) -> list[Any]:
        return [
            pltpu.make_async_copy(hbm.at[page], buffers.at[slot, j], self.semaphores.at[slot, i])
            for i, (hbm, buffers) in enumerate(self.pages)
        ]

    def clear_tail(self, item: Any, slot: Any) -> None:
        """Zeroes the slots after the end of the item's last page: zero times NaN is NaN."""
        s = self.static
        end = self.ends[item]

        @pl.when(end % s.shape.page_size != 0)
        def _() -> None:
            j = (end // s.shape.page_size) % s.pages_per_block
            for i, (_, buffers) in enumerate(self.pages):
                if jnp.issubdtype(buffers.dtype, jnp.integer):
                    continue
                page = buffers[slot, j].astype(jnp.float32)
                dim = page.ndim - (2 if i == 0 else 1)
                inside = (
                    jax.lax.broadcasted_iota(jnp.int32, page.shape, dim) < end % s.shape.page_size
                )
                buffers[slot, j] = jnp.where(inside, page, 0.0).astype(buffers.dtype)


def _kernel(static: Static, table, rows, firsts, ends, nexts, q_ref, *refs) -> None:
    refs = list(refs)
    num = 1 + static.shape.quantized
    hbm = [refs.pop(0) for _ in range(num)]
    sinks_ref = refs.pop(0) if static.shape.sinks else None
    out_ref = refs.pop(0)
    buffers = [refs.pop(0) for _ in range(num)]
    top_ref, total_ref, acc_ref, turn, semaphores = refs
    pairs = list(zip(hbm, buffers, strict=True))
    copies = _Copies(static, table, rows, firsts, ends, pairs, semaphores)
    cores = pl.num_programs(0)
    item = pl.program_id(1) * cores + pl.program_id(0)
    num_items = pl.num_programs(1) * cores

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        turn[0] = 0
        turn[1] = 0

    @pl.when(ends[item] > 0)
    def _() -> None:
        first, last = copies.blocks(item)

        @pl.when(turn[1] == 0)
        def _() -> None:
            copies.start(item, first, turn[0])
            turn[1] = 1

        if sinks_ref is None:
            top_ref[...] = jnp.full(top_ref.shape, NEGATIVE, jnp.float32)
            total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        else:
            top_ref[...] = sinks_ref[...]
            total_ref[...] = jnp.ones(total_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

        def step(block: Any, _: None) -> None:
            slot = turn[0]
            is_last = block + 1 == last
            following = jnp.where(is_last, nexts[item], item)

            @pl.when(following < num_items)
            def _() -> None:
                begin, _ = copies.blocks(following)
                copies.start(following, jnp.where(is_last, begin, block + 1), 1 - slot)

            copies.wait(item, block, slot)

            @pl.when(is_last)
            def _() -> None:
                copies.clear_tail(item, slot)

            _attend(static, q_ref, buffers, slot, block, firsts[item], top_ref, total_ref, acc_ref)
            turn[0] = 1 - slot

        jax.lax.fori_loop(first, last, step, None)
        total = total_ref[:, :, :1]
        out_ref[0] = (acc_ref[...] / total).astype(out_ref.dtype)


def _attend(static, q_ref, buffers, slot, block, first, top_ref, total_ref, acc_ref) -> None:
    """One block of pages into the running softmax of all heads."""
    K, R = q_ref.shape[1:3]
    C = static.pages_per_block * static.shape.page_size
    queries = first + jax.lax.broadcasted_iota(jnp.int32, (R, C), 0) // static.shape.group
    distance = queries - (block * C + jax.lax.broadcasted_iota(jnp.int32, (R, C), 1))
    seen = distance >= 0
    if static.scores.window is not None:
        seen &= distance < static.scores.window

    def one(head: Any) -> None:
        scores = _scores(static, q_ref[0, head], buffers, slot, head)
        scores = static.scores.of(scores)
        scores = jnp.where(seen, scores, NEGATIVE)
        before = top_ref[head][:, :1]
        top = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - top)
        kept = jnp.exp(before - top)
        total = kept * total_ref[head][:, :1] + jnp.sum(weights, axis=1, keepdims=True)
        top_ref[head] = jnp.broadcast_to(top, (R, LANES))
        total_ref[head] = jnp.broadcast_to(total, (R, LANES))
        if static.shape.quantized:
            weights *= _scale_row(buffers[1], slot, 0 if static.latent else 1, head)
        values = _read(buffers[0], slot, head, static.shape.value_lanes, q_ref.dtype)
        acc_ref[head] = kept * acc_ref[head] + _dot(weights.astype(q_ref.dtype), values, False)

    if K <= UNROLL:
        for head in range(K):
            one(head)
        return
    size = max(d for d in range(1, UNROLL + 1) if K % d == 0)

    def several(i: Any, _: None) -> None:
        for j in range(size):
            one(i * size + j)

    jax.lax.fori_loop(0, K // size, several, None)


def _scores(static: Static, q: jax.Array, buffers: Any, slot: Any, head: Any) -> jax.Array:
    """float32 [R, C], not yet multiplied by the scale."""
    keys = _read(buffers[0], slot, head, slice(0, static.shape.key_lanes), q.dtype)
    if not static.shape.quantized:
        return _dot(q, keys, True)
    first = _scale_row(buffers[1], slot, 0, head)
    if not static.latent:
        return _dot(q, keys, True) * first
    second = _scale_row(buffers[1], slot, 1, head)
    if static.split % LANES == 0:
        left, right = slice(0, static.split), slice(static.split, None)
        return (
            _dot(q[:, left], keys[:, left], True) * first
            + _dot(q[:, right], keys[:, right], True) * second
        )
    lane = jax.lax.broadcasted_iota(jnp.int32, q.shape, 1)
    latent, rotary = (jnp.where(side, q, 0) for side in (lane < static.split, lane >= static.split))
    return _dot(latent, keys, True) * first + _dot(rotary, keys, True) * second


def _read(buffers: Any, slot: Any, head: Any, lanes: slice, dtype: Any) -> jax.Array:
    """[C, lanes] of a head, widened to `dtype`."""
    rows = buffers[slot, :, head, :, lanes]
    rows = rows.reshape(rows.shape[0] * rows.shape[1], rows.shape[2])
    if rows.dtype == dtype:
        return rows
    # Through float32: narrow types have no conversion to bfloat16 of their own on every chip.
    return rows.astype(jnp.float32).astype(dtype)


def _scale_row(scales: Any, slot: Any, which: int, head: Any) -> jax.Array:
    """float32 [1, C]."""
    rows = [scales[slot, j, which, pl.ds(head, 1), :] for j in range(scales.shape[1])]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)


def _dot(a: jax.Array, b: jax.Array, transposed: bool) -> jax.Array:
    """a b, or a b^T, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
