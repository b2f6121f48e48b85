"""The Pallas Mosaic GPU kernels of flash attention for Hopper (arXiv:2205.14135, 2407.08608).

A program is a tile of queries (forward, gradient of the queries) or of keys (their gradients). Its
last warpgroup copies the other side's blocks into a ring of shared memory buffers; each of the
others multiplies 64 rows of the tile with them. A block's buffer is `ready` when it has come, and
`free` when every computing warpgroup is done with it.

Which blocks a tile meets is a range (`Ranges`), known before; in its middle no score is masked.

Shape suffixes: B batch, H query heads, K key/value heads, T queries, S keys, h head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lm.kernels.attention.common import LOG2_E, MASK, NONE_SEEN, declared
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


def _vector(ref: Any, axis: int) -> jax.Array:
    """A vector in memory, held along an axis of a product."""
    return plgpu.load(ref, (), layout=_along(axis), optimized=False)


class _Mask:
    """Masks the products of a warpgroup's rows of a tile with blocks of the other side.

    Rows are axis 0 of a product, the block's tokens axis 1. `refs` are int32 [B, n, tokens] of
    queries and of keys: positions, segments, both, or no refs for neither.
    """

    def __init__(self, call: Call, refs: Any, batch: Any, start: Any, *, of_keys: bool) -> None:
        self.call, self.refs, self.batch, self.start = call, refs, batch, start
        self.query_axis = int(of_keys)
        self.size = call.tile.query if of_keys else call.tile.key
        self.own = self._load(self.query_axis, start, ROWS, 0)

    def _load(self, side: int, start: Any, size: int, axis: int) -> list[jax.Array]:
        if not self.refs:
            return []
        ref = self.refs[side]
        return [
            _vector(ref.at[self.batch, i, pl.ds(start, size)], axis) for i in range(ref.shape[1])
        ]

    def others(self, block: Any) -> list[jax.Array]:
        """What is read of a block's tokens."""
        return self._load(1 - self.query_axis, block * self.size, self.size, 1)

    def hide(self, x: jax.Array, block: Any, others: list[jax.Array] | None) -> jax.Array:
        """x where a query sees a key, `MASK` elsewhere; x itself where `others` is None."""
        if others is None:
            return x
        scores, axis, shape = self.call.scores, self.query_axis, x.shape
        order = slice(None, None, -1 if axis else 1)
        query_start, key_start = (self.start, block * self.size)[order]
        queries, keys = (self.own, others)[order]
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


class _Place(NamedTuple):
    """A warpgroup's rows of a tile: where they start, and the `count` blocks they meet."""

    batch: Any
    head: Any
    wg: Any
    limits: list[Any]
    count: Any
    start: Any = None

    @property
    def rows(self) -> tuple[Any, ...]:
        return self.batch, pl.ds(self.start, ROWS), self.head


def _program(
    call: Call, table: Any, num_rows: int, compute: Any, source: Any, rings: Any, heads: int = 0
) -> None:
    """A program: the computing warpgroups compute, the last one copies the blocks they meet.

    Args:
      call, table: the call, and its ranges in global memory.
      num_rows: queries or keys that tiles are made of.
      compute: of a `_Place`: a warpgroup's work.
      source, rings: as `_ring`, of a `_Place` and a step.
      heads: query heads whose blocks a tile of keys meets; 0 for a tile of queries.
    """
    tile, size = call.tile, ROWS * call.tile.warpgroups
    head, batch, wg = (lax.axis_index(name) for name in ("heads", "batch", "wg"))
    index = lax.axis_index("tiles")
    if not heads:
        index = num_rows // size - 1 - index  # the longest first
    limits = _range(call, table, batch, index)
    place = _Place(batch, head, wg, limits, limits[END] - limits[FIRST])
    shared = tile.warpgroups > 1  # two groups alone have as many registers as a thread can address

    @pl.when(wg < tile.warpgroups)
    def _():
        if shared:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute(place._replace(start=index * size + wg * ROWS))

    @pl.when(wg == tile.warpgroups)
    def _():
        if shared:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        num_steps = heads * place.count if heads else place.count
        _ring(num_steps, tile.stages, rings, functools.partial(source, place))


def _keys_and_values(size: int, group: int, k_ref: Any, v_ref: Any, place: _Place, i: Any):
    """The blocks of a step of a tile of queries, whose heads share keys in groups."""
    tokens = pl.ds((place.limits[FIRST] + i) * size, size)
    at = (place.batch, tokens, lax.div(place.head, jnp.int32(group)))
    return k_ref.at[at], v_ref.at[at]


def _write(value: jax.Array, buffer: Any, target: Any) -> None:
    """Starts copying a value to global memory, by way of shared memory."""
    buffer[...] = value.astype(buffer.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)


def _scratch(tile: Tile, block: int, h: int, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """Buffers of warpgroups' rows and of a ring of blocks; barriers: rows ready, ring free."""
    return (
        _buffer((tile.warpgroups, ROWS, h), dtype),
        _buffer((tile.stages, block, h), dtype),
        plgpu.Barrier(num_barriers=tile.warpgroups),
        plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
    )


def _ready(tile: Tile, copies: int = 1) -> Any:
    """Barriers of a ring whose buffers that many copies fill."""
    return plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages)


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
      rows: what the mask reads, see `common.mask_rows`; positions are there unless `by_index`.
      q: [B, T, H, h]; the tile divides T.
      k, v: [B, S, K, h]; the block divides S.
    """
    (B, T, H, h), tile = q.shape, call.tile

    def flash_attention_forward(table, q_ref, k_ref, v_ref, *refs):
        *rows, out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem, q_ready = refs[:-5]
        k_ready, v_ready, k_free, v_free, turns = refs[-5:]

        def take_turns() -> None:
            if tile.warpgroups == 2:
                plgpu.barrier_arrive(turns)
                plgpu.barrier_wait(turns)

        def compute(place: _Place) -> None:
            wg = place.wg
            plgpu.copy_gmem_to_smem(q_ref.at[place.rows], q_smem.at[wg], q_ready.at[wg])
            mask = _Mask(call, rows, place.batch, place.start, of_keys=False)
            plgpu.barrier_wait(q_ready.at[wg])

            def step(block: Any, carry: Any, masked: bool) -> Any:
                sums, top, total = carry
                slot = lax.rem(block - place.limits[FIRST], jnp.int32(tile.stages))
                others = mask.others(block) if masked else None
                plgpu.barrier_wait(k_ready.at[slot])
                keys = _transposed(k_smem.at[slot])
                x = _product(q_smem.at[wg], keys, (ROWS, tile.key), take_turns)
                plgpu.barrier_arrive(k_free.at[slot])
                x = mask.hide(call.scores.capped(x), block, others)
                state = _softmax(call, x, sums, top, total, v_ref.dtype)
                sums, total, new, weights = lax.optimization_barrier(state)
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
            sums, top, total = _phases(call, place.limits, step, carry)
            pl.when(wg == 0)(take_turns)
            blind = total == 0
            safe = jnp.where(blind, 1.0, total)
            out = sums * _spread(1.0 / safe, (ROWS, h), 0)
            q_smem.at[wg][...] = out.astype(q_ref.dtype)
            lse = top * call.scores.unit + jnp.log(safe)
            lse_smem.at[wg][...] = jnp.where(blind, NEGATIVE, lse)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg], out_ref.at[place.rows])
            lse_rows = lse_ref.at[place.batch, place.head, pl.ds(place.start, ROWS)]
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_rows)
            plgpu.wait_smem_to_gmem(0)

        rings = (k_smem, k_ready, k_free), (v_smem, v_ready, v_free)
        source = functools.partial(_keys_and_values, tile.key, H // k.shape[2], k_ref, v_ref)
        _program(call, table, T, compute, source, rings)

    mine, ring, here, free = _scratch(tile, tile.key, h, q.dtype)
    lse_buffer = plgpu.SMEM((tile.warpgroups, ROWS), jnp.float32)
    turns = plgpu.Barrier(num_arrivals=tile.warpgroups)
    one = _ready(tile)
    scratch = [mine, ring, ring, lse_buffer, here, one, one, free, free, turns]
    out = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)]
    run = _launch(call, flash_attention_forward, (H, T // tile.query, B), out, scratch)
    return tuple(run(call.ranges.table, q, k, v, *rows))


def _softmax(call: Call, x: jax.Array, sums, top, total, dtype: Any) -> tuple[jax.Array, ...]:
    """(sums and total of the weights before, decayed; new maximum; weights of x, in `dtype`)."""
    new = jnp.maximum(top, jnp.max(x, axis=1))
    decay = jnp.exp2((top - new) * call.slope)
    weights = jnp.exp2(x * call.slope - _spread(new * call.slope, x.shape, 0))
    total = total * decay + jnp.sum(weights, axis=1)
    sums = sums * _spread(decay, sums.shape, 0)
    return sums, total, new, weights.astype(dtype)


def _weights(call: Call, x: jax.Array, hide: Callable[[jax.Array], jax.Array], lse2: jax.Array):
    """(weights, d(score held)/d(product)) from products; lse2 spread, in powers of two."""
    capped = call.scores.capped(x)
    weights = jnp.exp2(hide(capped) * call.slope - lse2)
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
    (B, T, H, h), tile = q.shape, call.tile
    shape = (ROWS, tile.key)

    def flash_attention_backward_queries(table, q_ref, k_ref, v_ref, dout_ref, *refs):
        lse_ref, delta_ref, *rows, dq_ref, q_smem, dout_smem, k_smem, v_smem = refs[:-6]
        q_ready, dout_ready, k_ready, v_ready, k_free, v_free = refs[-6:]

        def compute(place: _Place) -> None:
            wg = place.wg
            plgpu.copy_gmem_to_smem(q_ref.at[place.rows], q_smem.at[wg], q_ready.at[wg])
            plgpu.copy_gmem_to_smem(dout_ref.at[place.rows], dout_smem.at[wg], dout_ready.at[wg])
            mask = _Mask(call, rows, place.batch, place.start, of_keys=False)
            lse2, delta = (
                _vector(ref.at[place.batch, place.head, pl.ds(place.start, ROWS)], 0)
                for ref in (lse_ref, delta_ref)
            )
            plgpu.barrier_wait(q_ready.at[wg])
            plgpu.barrier_wait(dout_ready.at[wg])

            def step(block: Any, carry: Any, masked: bool) -> Any:
                dq, lse2, delta = carry
                slot = lax.rem(block - place.limits[FIRST], jnp.int32(tile.stages))
                others = mask.others(block) if masked else None
                plgpu.barrier_wait(k_ready.at[slot])
                x = _product(q_smem.at[wg], _transposed(k_smem.at[slot]), shape)
                hide = functools.partial(mask.hide, block=block, others=others)
                weights, bend = _weights(call, x, hide, _spread(lse2, shape, 0))
                plgpu.barrier_wait(v_ready.at[slot])
                dweights = _product(dout_smem.at[wg], _transposed(v_smem.at[slot]), shape)
                plgpu.barrier_arrive(v_free.at[slot])
                dx = _dproducts(weights, dweights, _spread(delta, shape, 0), bend)
                dq = _added(dq, dx.astype(q_ref.dtype), k_smem.at[slot])
                plgpu.barrier_arrive(k_free.at[slot])
                return dq, lse2, delta

            carry = (_filled((ROWS, h), 0.0, plgpu.Layout.WGMMA), lse2, delta)
            dq, _, _ = _phases(call, place.limits, step, carry)
            _write(dq * call.scores.scale, q_smem.at[wg], dq_ref.at[place.rows])
            plgpu.wait_smem_to_gmem(0)

        rings = (k_smem, k_ready, k_free), (v_smem, v_ready, v_free)
        source = functools.partial(_keys_and_values, tile.key, H // k.shape[2], k_ref, v_ref)
        _program(call, table, T, compute, source, rings)

    mine, ring, here, free = _scratch(tile, tile.key, h, q.dtype)
    one = _ready(tile)
    scratch = [mine, mine, ring, ring, here, here, one, one, free, free]
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    run = _launch(call, flash_attention_backward_queries, (H, T // tile.query, B), out, scratch)
    return run(call.ranges.table, q, k, v, dout, lse2, delta, *rows)


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
    shape, group = (ROWS, tile.query), H // K

    def flash_attention_backward_keys(table, q_ref, k_ref, v_ref, dout_ref, *refs):
        lse_ref, delta_ref, *refs, k_ready, v_ready, q_ready, dout_ready, q_free, dout_free = refs
        *refs, k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem = refs
        rows, out_refs = refs[: -len(wanted)], refs[-len(wanted) :]
        own = [(k_ref, k_smem, k_ready), (v_ref, v_smem, v_ready)][: 1 + ("dk" in wanted)]

        def compute(place: _Place) -> None:
            wg, limits = place.wg, place.limits
            for ref, buffer, ready in own:
                plgpu.copy_gmem_to_smem(ref.at[place.rows], buffer.at[wg], ready.at[wg])
            mask = _Mask(call, rows, place.batch, place.start, of_keys=True)
            for _, _, ready in own:
                plgpu.barrier_wait(ready.at[wg])

            def step(head: Any, block: Any, sums: dict[str, Any], masked: bool) -> dict[str, Any]:
                slot = lax.rem(head * place.count + block - limits[FIRST], jnp.int32(tile.stages))
                others = mask.others(block) if masked else None
                plgpu.barrier_wait(q_ready.at[slot])
                x = _product(k_smem.at[wg], _transposed(q_smem.at[slot]), shape)
                lse2 = _vector(lse_smem.at[slot], 1)
                hide = functools.partial(mask.hide, block=block, others=others)
                weights, bend = _weights(call, x, hide, _spread(lse2, shape, 1))
                plgpu.barrier_wait(dout_ready.at[slot])
                dout, sums, dx = dout_smem.at[slot], dict(sums), None
                if "dv" in wanted:
                    sums["dv"] = _added(sums["dv"], weights.astype(dout_ref.dtype), dout)
                if "dk" in wanted:
                    dweights = _product(v_smem.at[wg], _transposed(dout), shape)
                    delta = _vector(delta_smem.at[slot], 1)
                    dx = _dproducts(weights, dweights, _spread(delta, shape, 1), bend)
                plgpu.barrier_arrive(dout_free.at[slot])
                if dx is not None:
                    sums["dk"] = _added(sums["dk"], dx.astype(q_ref.dtype), q_smem.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                return sums

            zeros = {name: _filled((ROWS, h), 0.0, plgpu.Layout.WGMMA) for name in wanted}
            meet = functools.partial(_phases, call, limits)
            sums = lax.fori_loop(
                0, group, lambda head, sums: meet(functools.partial(step, head), sums), zeros
            )
            for name, out_ref in zip(wanted, out_refs, strict=True):
                buffer, scale = {"dk": (k_smem, call.scores.scale), "dv": (v_smem, 1.0)}[name]
                _write(sums[name] * scale, buffer.at[wg], out_ref.at[place.rows])
            plgpu.wait_smem_to_gmem(0)

        def source(place: _Place, i: Any) -> tuple[Any, ...]:
            head = place.head * group + lax.div(i, place.count)
            start = (place.limits[FIRST] + lax.rem(i, place.count)) * tile.query
            at = (place.batch, pl.ds(start, tile.query), head)
            vector = (place.batch, head, pl.ds(start, tile.query))
            return q_ref.at[at], lse_ref.at[vector], dout_ref.at[at], delta_ref.at[vector]

        rings = (
            (q_smem, q_ready, q_free), (lse_smem, q_ready, None),
            (dout_smem, dout_ready, dout_free), (delta_smem, dout_ready, None),
        )  # fmt: skip
        _program(call, table, S, compute, source, rings, heads=group)

    mine, ring, here, free = _scratch(tile, tile.query, h, q.dtype)
    vectors, two = plgpu.SMEM((tile.stages, tile.query), jnp.float32), _ready(tile, copies=2)
    scratch = [mine, mine, ring, ring, vectors, vectors, here, here, two, two, free, free]
    out = [jax.ShapeDtypeStruct(k.shape, k.dtype) for _ in wanted]
    run = _launch(call, flash_attention_backward_keys, (K, S // tile.key, B), out, scratch)
    return tuple(run(call.ranges.table, q, k, v, dout, lse2, delta, *rows))
