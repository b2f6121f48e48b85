"""The Pallas Mosaic GPU kernels of flash attention for Hopper (arXiv:2205.14135, 2407.08608).

A program is a tile of queries (forward, gradient of the queries) or of keys (their gradients). Its
last warpgroup copies the other side's blocks into a ring of shared memory buffers; each of the
others multiplies 64 rows of the tile with them. A block's buffer is `ready` when it has come, and
`free` when every computing warpgroup is done with it.

Which blocks a tile meets is a range (`Ranges`), known before; in its middle no score is masked.

Shape suffixes: B batch, H query heads, K key/value heads, T queries, S keys, h head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lm.kernels.attention.common import declared
from lm.kernels.attention.flash_kernels import LOG2_E, MASK, NONE_SEEN
from lm.kernels.attention.reference import NEGATIVE
from lm.kernels.attention.scores import Scores

ROWS = 64  # of a tile that one warpgroup multiplies: the M of wgmma
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40  # a thread, of 65,536 for two computing groups and one
FIRST, WHOLE, PART, END = range(4)  # of a range: masked, whole, masked again


class Ranges(NamedTuple):
    """Blocks each tile meets: [FIRST, END), of which [WHOLE, PART) need no mask.

    Attributes:
      table: int32 [B or 1, tiles, 4].
      masked_before, masked_after: whether any tile has masked blocks before or behind the others.
    """

    table: Any
    masked_before: bool
    masked_after: bool


class Tile(NamedTuple):
    """Tokens of a program's tile and of a block it meets, on either side.

    Attributes:
      query, key: tokens.
      warpgroups: that compute; each has 64 tokens of the tile.
      stages: buffers of the ring.
    """

    query: int
    key: int
    warpgroups: int
    stages: int


class Call(NamedTuple):
    """One call of a kernel, but for its arrays.

    Attributes:
      scores, segments: see `flash_kernels`.
      by_index: positions are those in the arrays; else they are in the rows.
      tile: sizes.
      ranges: blocks each tile meets.
      flops: operations, declared.
    """

    scores: Scores
    segments: bool
    by_index: bool
    tile: Tile
    ranges: Ranges
    flops: int

    @property
    def slope(self) -> float:
        """Exponents of two per unit of `Scores.capped`."""
        return self.scores.unit * LOG2_E


def _along(axis: int) -> Any:
    """The register layout of a vector along an axis of a product."""
    return plgpu.Layout.WGMMA.reduce(1 - axis)


def _spread(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [axis])


def _filled(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _tokens(ref: Any, batch: Any, start: Any, size: int, axis: int) -> list[jax.Array]:
    """Rows of int32 [B, n, tokens], n vectors along an axis of a product."""
    return [
        plgpu.load(ref.at[batch, i, pl.ds(start, size)], (), layout=_along(axis), optimized=False)
        for i in range(ref.shape[1])
    ]


class _Rows:
    """What the mask reads of queries and keys: positions, segments, both or neither."""

    def __init__(self, call: Call, refs: Any, batch: Any, query_axis: int) -> None:
        self.call, self.refs, self.batch, self.query_axis = call, refs, batch, query_axis

    def queries(self, start: Any, size: int) -> list[jax.Array]:
        return _tokens(self.refs[0], self.batch, start, size, self.query_axis) if self.refs else []

    def keys(self, start: Any, size: int) -> list[jax.Array]:
        axis = 1 - self.query_axis
        return _tokens(self.refs[1], self.batch, start, size, axis) if self.refs else []

    def hide(
        self, x: jax.Array, query_start: Any, key_start: Any, queries: Any, keys: Any
    ) -> jax.Array:
        """x where a query sees a key, `MASK` elsewhere."""
        scores, axis, shape = self.call.scores, self.query_axis, x.shape
        seen = None

        def both(a: Any, b: jax.Array) -> jax.Array:
            return b if a is None else a & b

        if scores.causal or scores.window is not None:
            if self.call.by_index:
                index = [
                    plgpu.broadcasted_iota(jnp.int32, shape, i, layout=plgpu.Layout.WGMMA)
                    for i in range(2)
                ]
                distance = index[axis] - index[1 - axis] + (query_start - key_start)
            else:
                distance = _spread(queries[0], shape, axis) - _spread(keys[0], shape, 1 - axis)
            if scores.causal:
                seen = distance >= 0
            if scores.window is not None:
                seen = both(seen, distance < scores.window)
                if not scores.causal:
                    seen = both(seen, distance > -scores.window)
        if self.call.segments:
            same = _spread(queries[-1], shape, axis) == _spread(keys[-1], shape, 1 - axis)
            seen = both(seen, same)
        return x if seen is None else jnp.where(seen, x, MASK)


def _range(call: Call, table: Any, batch: Any, tile: Any) -> list[Any]:
    row = batch if call.ranges.table.shape[0] > 1 else 0
    return [table[row, tile, i] for i in range(4)]


def _phases(call: Call, limits: list[Any], step: Callable[..., Any], carry: Any) -> Any:
    """`step(block, carry, masked)` for the blocks of a range."""
    first, whole, part, end = limits

    def run(low: Any, high: Any, masked: bool, carry: Any) -> Any:
        return lax.fori_loop(low, high, lambda i, carry: step(i, carry, masked), carry)

    if call.ranges.masked_before:
        carry = run(first, whole, True, carry)
    carry = run(whole, part, False, carry)
    return run(part, end, True, carry) if call.ranges.masked_after else carry


def _product(a: Any, b: Any, shape: tuple[int, int], issued: Callable[[], None] | None = None):
    """a b, float32; `issued` is called while it is computed."""

    def compute(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a, b)
        if issued is not None:
            issued()
        return sums[...]

    return pl.run_scoped(compute, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _added(sums: jax.Array, a: Any, b: Any) -> jax.Array:
    """sums + a b."""
    run: Any = pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))
    return run(plgpu.WGMMAAccumulatorRef.init(sums))


def _transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))


def _buffer(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory that wgmma reads and TMA writes."""
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    )


def _specialized(tile: Tile, wg: Any, compute: Callable[[], None], copy: Callable[[], None]):
    """The computing warpgroups compute, the last copies, with registers as they need them."""
    shared = tile.warpgroups > 1  # two groups alone have as many as a thread can address

    @pl.when(wg < tile.warpgroups)
    def _():
        if shared:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute()

    @pl.when(wg == tile.warpgroups)
    def _():
        if shared:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy()


def _ring(num_steps: Any, stages: int, buffers: Any, source: Callable[[Any], tuple[Any, ...]]):
    """Copies each step's blocks into the ring, as soon as their buffers are free.

    Args:
      num_steps: how many.
      stages: of the ring.
      buffers: (ring of buffers, ring of ready barriers, ring of free barriers) of each block.
      source: the blocks of a step, in global memory.
    """

    def step(i: Any, carry: None) -> None:
        slot = lax.rem(i, jnp.int32(stages))
        for block, (buffer, ready, free) in zip(source(i), buffers, strict=True):
            if free is not None:
                pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(block, buffer.at[slot], ready.at[slot])

    lax.fori_loop(0, num_steps, step, None)

    def drain(slot: Any, carry: None) -> None:
        for _, _, free in buffers:
            if free is not None:
                plgpu.barrier_wait(free.at[slot])

    # No program ends with a phase of a barrier unseen.
    lax.fori_loop(0, jnp.minimum(num_steps, stages), drain, None)


def _keys_and_values(tile: Tile, limits: Any, k_ref: Any, v_ref: Any, batch: Any, kv_head: Any):
    """The `source` of a tile of queries."""

    def source(i: Any) -> tuple[Any, Any]:
        at = (batch, pl.ds((limits[FIRST] + i) * tile.key, tile.key), kv_head)
        return k_ref.at[at], v_ref.at[at]

    return source


def _rings(tile: Tile) -> tuple[Any, Any, Any]:
    """Barriers: of a ring that one copy fills, of one that two fill, and of either's freedom."""
    return (
        plgpu.Barrier(num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
    )


def _launch(call: Call, body: Callable[..., None], grid: tuple[int, int, int], out, scratch):
    launch: Any = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=grid,
        grid_names=("heads", "tiles", "batch"),
        num_threads=call.tile.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    return declared(flash_attention=call.flops)(launch)


def forward(call: Call, rows: tuple[jax.Array, ...], q, k, v) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, H, h] of q's dtype, lse float32 [B, H, T]).

    Args:
      call: sizes, mask and ranges of blocks of keys.
      rows: int32 ([B, n, T], [B, n, S]), what the mask reads: positions (unless `by_index`) and
        segments (if it has them); () for neither.
      q: [B, T, H, h]; the tile divides T.
      k, v: [B, S, K, h]; the block divides S.
    """
    (B, T, H, h), K, tile = q.shape, k.shape[2], call.tile
    shape = (ROWS, tile.key)
    num_tiles = T // tile.query

    def flash_attention_forward(table, q_ref, k_ref, v_ref, *refs):
        *rows, out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem, q_ready = refs[:-5]
        k_ready, v_ready, k_free, v_free, turns = refs[-5:]
        head, batch, wg = (lax.axis_index(name) for name in ("heads", "batch", "wg"))
        index = num_tiles - 1 - lax.axis_index("tiles")  # the longest first
        limits = _range(call, table, batch, index)

        def take_turns() -> None:
            if tile.warpgroups == 2:
                plgpu.barrier_arrive(turns)
                plgpu.barrier_wait(turns)

        def compute() -> None:
            start = index * tile.query + wg * ROWS
            mine = (batch, pl.ds(start, ROWS), head)
            plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[wg], q_ready.at[wg])
            mask = _Rows(call, rows, batch, 0)
            queries = mask.queries(start, ROWS)
            plgpu.barrier_wait(q_ready.at[wg])

            def step(block: Any, carry: Any, masked: bool) -> Any:
                sums, top, total = carry
                slot = lax.rem(block - limits[FIRST], jnp.int32(tile.stages))
                keys = mask.keys(block * tile.key, tile.key) if masked else []
                plgpu.barrier_wait(k_ready.at[slot])
                x = _product(q_smem.at[wg], _transposed(k_smem.at[slot]), shape, take_turns)
                plgpu.barrier_arrive(k_free.at[slot])
                x = call.scores.capped(x)
                if masked:
                    x = mask.hide(x, start, block * tile.key, queries, keys)
                new = jnp.maximum(top, jnp.max(x, axis=1))
                decay = jnp.exp2((top - new) * call.slope)
                weights = jnp.exp2(x * call.slope - _spread(new * call.slope, shape, 0))
                total = total * decay + jnp.sum(weights, axis=1)
                sums = sums * _spread(decay, (ROWS, h), 0)
                weights = weights.astype(v_ref.dtype)
                sums, total, new, weights = lax.optimization_barrier((sums, total, new, weights))
                plgpu.barrier_wait(v_ready.at[slot])
                take_turns()
                sums = _added(sums, weights, v_smem.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return sums, new, total

            # One group's products run while the other is at its exponentials.
            pl.when(wg == 1)(take_turns)
            carry = (
                _filled((ROWS, h), 0.0, plgpu.Layout.WGMMA),
                _filled((ROWS,), NONE_SEEN, _along(0)),
                _filled((ROWS,), 0.0, _along(0)),
            )
            sums, top, total = _phases(call, limits, step, carry)
            pl.when(wg == 0)(take_turns)
            blind = total == 0
            safe = jnp.where(blind, 1.0, total)
            out = sums * _spread(1.0 / safe, (ROWS, h), 0)
            q_smem.at[wg][...] = out.astype(q_ref.dtype)
            lse = top * call.scores.unit + jnp.log(safe)
            lse_smem.at[wg][...] = jnp.where(blind, NEGATIVE, lse)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg], out_ref.at[mine])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[batch, head, pl.ds(start, ROWS)])
            plgpu.wait_smem_to_gmem(0)

        def copy() -> None:
            kv_head = lax.div(head, jnp.int32(H // K))
            source = _keys_and_values(tile, limits, k_ref, v_ref, batch, kv_head)
            buffers = ((k_smem, k_ready, k_free), (v_smem, v_ready, v_free))
            _ring(limits[END] - limits[FIRST], tile.stages, buffers, source)

        _specialized(tile, wg, compute, copy)

    one, _, free = _rings(tile)
    ring = _buffer((tile.stages, tile.key, h), q.dtype)
    scratch = [
        _buffer((tile.warpgroups, ROWS, h), q.dtype), ring, ring,
        plgpu.SMEM((tile.warpgroups, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=tile.warpgroups), one, one, free, free,
        plgpu.Barrier(num_arrivals=tile.warpgroups),
    ]  # fmt: skip
    out = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    ]
    run = _launch(call, flash_attention_forward, (H, num_tiles, B), out, scratch)
    return tuple(run(call.ranges.table, q, k, v, *rows))


def _weights(call: Call, x: jax.Array, hide: Any, lse2: jax.Array):
    """(weights, d(score held)/d(product)) from products; lse2 spread, in powers of two."""
    x = capped = call.scores.capped(x)
    if hide is not None:
        x = hide(x)
    weights = jnp.exp2(x * call.slope - lse2)
    return weights, None if call.scores.softcap is None else 1.0 - capped * capped


def _dproducts(weights: jax.Array, dweights: jax.Array, delta: jax.Array, bend: Any) -> jax.Array:
    """The gradient of the products, but for `scale`; delta spread."""
    dx = weights * (dweights - delta)
    return dx if bend is None else dx * bend


def backward_queries(call: Call, rows, q, k, v, dout, lse2, delta) -> jax.Array:
    """dq [B, T, H, h] of q's dtype.

    Args:
      call, rows, q, k, v: as `forward`.
      dout: [B, T, H, h].
      lse2: float32 [B, H, T], log-sum-exp in powers of two; 1e30 where every weight is 0.
      delta: float32 [B, H, T], the sum of dout * out less the gradient of the log-sum-exp.
    """
    (B, T, H, h), K, tile = q.shape, k.shape[2], call.tile
    shape = (ROWS, tile.key)
    num_tiles = T // tile.query

    def flash_attention_backward_queries(table, q_ref, k_ref, v_ref, dout_ref, *refs):
        lse_ref, delta_ref, *rows, dq_ref, q_smem, dout_smem, k_smem, v_smem = refs[:-6]
        q_ready, dout_ready, k_ready, v_ready, k_free, v_free = refs[-6:]
        head, batch, wg = (lax.axis_index(name) for name in ("heads", "batch", "wg"))
        index = num_tiles - 1 - lax.axis_index("tiles")
        limits = _range(call, table, batch, index)

        def compute() -> None:
            start = index * tile.query + wg * ROWS
            mine = (batch, pl.ds(start, ROWS), head)
            plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[wg], q_ready.at[wg])
            plgpu.copy_gmem_to_smem(dout_ref.at[mine], dout_smem.at[wg], dout_ready.at[wg])
            mask = _Rows(call, rows, batch, 0)
            queries = mask.queries(start, ROWS)
            lse2, delta = (
                plgpu.load(
                    ref.at[batch, head, pl.ds(start, ROWS)], (), layout=_along(0), optimized=False
                )
                for ref in (lse_ref, delta_ref)
            )
            plgpu.barrier_wait(q_ready.at[wg])
            plgpu.barrier_wait(dout_ready.at[wg])

            def step(block: Any, carry: Any, masked: bool) -> Any:
                dq, lse2, delta = carry
                slot = lax.rem(block - limits[FIRST], jnp.int32(tile.stages))
                keys = mask.keys(block * tile.key, tile.key) if masked else []
                plgpu.barrier_wait(k_ready.at[slot])
                x = _product(q_smem.at[wg], _transposed(k_smem.at[slot]), shape)

                def hide(x: jax.Array) -> jax.Array:
                    return mask.hide(x, start, block * tile.key, queries, keys)

                weights, bend = _weights(call, x, hide if masked else None, _spread(lse2, shape, 0))
                plgpu.barrier_wait(v_ready.at[slot])
                dweights = _product(dout_smem.at[wg], _transposed(v_smem.at[slot]), shape)
                plgpu.barrier_arrive(v_free.at[slot])
                dx = _dproducts(weights, dweights, _spread(delta, shape, 0), bend)
                dq = _added(dq, dx.astype(q_ref.dtype), k_smem.at[slot])
                plgpu.barrier_arrive(k_free.at[slot])
                return dq, lse2, delta

            carry = (_filled((ROWS, h), 0.0, plgpu.Layout.WGMMA), lse2, delta)
            dq, _, _ = _phases(call, limits, step, carry)
            q_smem.at[wg][...] = (dq * call.scores.scale).astype(q_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

        def copy() -> None:
            kv_head = lax.div(head, jnp.int32(H // K))
            source = _keys_and_values(tile, limits, k_ref, v_ref, batch, kv_head)
            buffers = ((k_smem, k_ready, k_free), (v_smem, v_ready, v_free))
            _ring(limits[END] - limits[FIRST], tile.stages, buffers, source)

        _specialized(tile, wg, compute, copy)

    one, _, free = _rings(tile)
    mine = _buffer((tile.warpgroups, ROWS, h), q.dtype)
    ring = _buffer((tile.stages, tile.key, h), q.dtype)
    here = plgpu.Barrier(num_barriers=tile.warpgroups)
    scratch = [mine, mine, ring, ring, here, here, one, one, free, free]
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    run = _launch(call, flash_attention_backward_queries, (H, num_tiles, B), out, scratch)
    return run(call.ranges.table, q, k, v, dout, lse2, delta, *rows)


def _scratch_of_keys(tile: Tile, h: int, dtype: Any) -> list[Any]:
    _, two, free = _rings(tile)
    mine = _buffer((tile.warpgroups, ROWS, h), dtype)
    ring = _buffer((tile.stages, tile.query, h), dtype)
    vectors = plgpu.SMEM((tile.stages, tile.query), jnp.float32)
    here = plgpu.Barrier(num_barriers=tile.warpgroups)
    return [mine, mine, ring, ring, vectors, vectors, here, here, two, two, free, free]


def backward_keys(
    call: Call, rows, q, k, v, dout, lse2, delta, wanted: tuple[str, ...]
) -> tuple[jax.Array, ...]:
    """Those of dk and dv that are wanted, [B, S, K, h] of k's dtype.

    The sums of both take h registers a thread, of 255, those of one half as many.

    Args:
      call: the tile is of keys; ranges of blocks of queries.
      rows, q, k, v, dout, lse2, delta: as `backward_queries`.
      wanted: "dk", "dv" or both.
    """
    (B, _, H, h), (S, K), tile = q.shape, k.shape[1:3], call.tile
    shape = (ROWS, tile.query)
    num_tiles, group = S // tile.key, H // K
    need_v = "dk" in wanted

    def flash_attention_backward_keys(table, q_ref, k_ref, v_ref, dout_ref, *refs):
        lse_ref, delta_ref, *refs = refs
        *refs, k_ready, v_ready, q_ready, dout_ready, q_free, dout_free = refs
        *refs, k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem = refs
        rows, out_refs = refs[: -len(wanted)], refs[-len(wanted) :]
        kv_head, index, batch, wg = map(lax.axis_index, ("heads", "tiles", "batch", "wg"))
        limits = _range(call, table, batch, index)
        count = limits[END] - limits[FIRST]

        def compute() -> None:
            start = index * tile.key + wg * ROWS
            mine = (batch, pl.ds(start, ROWS), kv_head)
            plgpu.copy_gmem_to_smem(k_ref.at[mine], k_smem.at[wg], k_ready.at[wg])
            if need_v:
                plgpu.copy_gmem_to_smem(v_ref.at[mine], v_smem.at[wg], v_ready.at[wg])
            mask = _Rows(call, rows, batch, 1)
            keys = mask.keys(start, ROWS)
            plgpu.barrier_wait(k_ready.at[wg])
            if need_v:
                plgpu.barrier_wait(v_ready.at[wg])

            def step(head: Any, block: Any, sums: dict[str, Any], masked: bool) -> dict[str, Any]:
                slot = lax.rem(head * count + block - limits[FIRST], jnp.int32(tile.stages))
                queries = mask.queries(block * tile.query, tile.query) if masked else []
                plgpu.barrier_wait(q_ready.at[slot])
                x = _product(k_smem.at[wg], _transposed(q_smem.at[slot]), shape)
                lse2 = plgpu.load(lse_smem.at[slot], (), layout=_along(1), optimized=False)

                def hide(x: jax.Array) -> jax.Array:
                    return mask.hide(x, block * tile.query, start, queries, keys)

                weights, bend = _weights(call, x, hide if masked else None, _spread(lse2, shape, 1))
                plgpu.barrier_wait(dout_ready.at[slot])
                sums = dict(sums)
                if "dv" in wanted:
                    sums["dv"] = _added(
                        sums["dv"], weights.astype(dout_ref.dtype), dout_smem.at[slot]
                    )
                if "dk" in wanted:
                    dweights = _product(v_smem.at[wg], _transposed(dout_smem.at[slot]), shape)
                    delta = plgpu.load(delta_smem.at[slot], (), layout=_along(1), optimized=False)
                    dx = _dproducts(weights, dweights, _spread(delta, shape, 1), bend)
                    plgpu.barrier_arrive(dout_free.at[slot])
                    sums["dk"] = _added(sums["dk"], dx.astype(q_ref.dtype), q_smem.at[slot])
                else:
                    plgpu.barrier_arrive(dout_free.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                return sums

            def of_head(head: Any, sums: dict[str, Any]) -> dict[str, Any]:
                return _phases(
                    call, limits, lambda block, sums, masked: step(head, block, sums, masked), sums
                )

            zeros = {name: _filled((ROWS, h), 0.0, plgpu.Layout.WGMMA) for name in wanted}
            sums = lax.fori_loop(0, group, of_head, zeros)
            for name, out_ref in zip(wanted, out_refs, strict=True):
                buffer = {"dk": k_smem, "dv": v_smem}[name].at[wg]
                scale = call.scores.scale if name == "dk" else 1.0
                buffer[...] = (sums[name] * scale).astype(k_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(buffer, out_ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

        def copy() -> None:
            def source(i: Any) -> tuple[Any, ...]:
                head = kv_head * group + lax.div(i, count)
                tokens = pl.ds((limits[FIRST] + lax.rem(i, count)) * tile.query, tile.query)
                at, vector = (batch, tokens, head), (batch, head, tokens)
                return q_ref.at[at], lse_ref.at[vector], dout_ref.at[at], delta_ref.at[vector]

            buffers = (
                (q_smem, q_ready, q_free), (lse_smem, q_ready, None),
                (dout_smem, dout_ready, dout_free), (delta_smem, dout_ready, None),
            )  # fmt: skip
            _ring(group * count, tile.stages, buffers, source)

        _specialized(tile, wg, compute, copy)

    scratch = _scratch_of_keys(tile, h, q.dtype)
    out = [jax.ShapeDtypeStruct(k.shape, k.dtype) for _ in wanted]
    run = _launch(call, flash_attention_backward_keys, (K, num_tiles, B), out, scratch)
    return tuple(run(call.ranges.table, q, k, v, dout, lse2, delta, *rows))
