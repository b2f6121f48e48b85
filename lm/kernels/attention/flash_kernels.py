"""The two Pallas TPU kernels of flash attention (arXiv:2205.14135, 2307.08691).

Scores are held transposed, [keys, queries]: what belongs to a query (its maximum, sum, log-sum-exp,
position) is then a row that broadcasts along sublanes, reductions over keys are elementwise, and no
matrix product needs more than a small operand transposed. One visit (see `schedule`) is a block of
queries of several heads and the block of keys that they share, worked off in units of one head and
`UNIT` keys. Programs are written so that the matrix unit has the next unit's products to compute
while the vector unit is at this one's exponentials: the compiler keeps much of the written order.

Shape suffixes: B batch, K key/value heads, N groups of g query heads that share a key/value head,
T queries, S keys, t and s a block of each, h head size of queries and keys, d of values.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels.attention.common import LOG2_E, MASK, NONE_SEEN
from lm.kernels.attention.reference import NEGATIVE
from lm.kernels.attention.schedule import (
    FIRST,
    LAST,
    MASKED,
    RUN,
    Schedule,
    key_block,
    query_block,
)
from lm.kernels.attention.scores import Scores

UNIT = 256
# Units written out at a time: of the forward kernel's unmasked blocks (its two products leave the
# compiler the most to overlap), and of all else.
FORWARD_UNROLLED, UNROLLED = 8, 4


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dims, precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip


def _each_part(key: int, num_heads: int, unrolled: int, work: Any) -> None:
    """Calls `work(units)` in a loop over a block of keys; a unit is (keys of the block, head).

    A few units are written out at a time, to overlap; more would only take longer to compile.
    """
    parts = max(1, unrolled // num_heads)
    size = math.gcd(key, UNIT)
    parts = max(n for n in range(1, parts + 1) if key // size % n == 0)

    def step(i: Any, carry: Any) -> Any:
        start = i * (parts * size)
        keys = [pl.ds(pl.multiple_of(start + n * size, size), size) for n in range(parts)]
        work([(part, head) for part in keys for head in range(num_heads)])
        return carry

    jax.lax.fori_loop(0, key // (parts * size), step, 0)


def _seen(query_rows: Any, key_rows: Any, keys: Any, scores: Scores):
    """bool [s, t] from int32 refs [1, n, t] and [1, n, s], for some of the keys; n is 1 or 2."""

    def column(i: int) -> jax.Array:
        row = key_rows[0, i : i + 1, keys]
        return jnp.broadcast_to(row, (128, row.shape[1])).T[:, :1]

    distance = query_rows[0, 0:1, :] - column(0)
    seen = None
    if scores.causal:
        seen = distance >= 0
    if scores.window is not None:
        near = distance < scores.window
        seen = near if seen is None else seen & near
        if not scores.causal:
            seen &= distance > -scores.window
    if key_rows.shape[1] == 2:
        same = query_rows[0, 1:2, :] == column(1)
        seen = same if seen is None else seen & same
    return jnp.ones(distance.shape, bool) if seen is None else seen


def _forward_kernel(
    visits, query_rows, key_rows, q_ref, k_ref, v_ref, out_ref, lse_ref, top, total, sums,
    *, scores: Scores, visit_of,
):  # fmt: skip
    """top, total: f32 [g, 1, t]; sums: f32 [g, d, t]."""
    visit = visit_of(visits)
    num_heads = q_ref.shape[3]
    slope = scores.unit * LOG2_E

    @pl.when(visit & FIRST != 0)
    def _():
        top[...] = jnp.full(top.shape, NONE_SEEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def products(keys: Any, head: int) -> jax.Array:
        return _dot(k_ref[0, 0, keys], q_ref[0, 0, 0, head], (1, 1))

    def add(keys: Any, head: int, decay: jax.Array, weights: jax.Array) -> None:
        sums[head] = sums[head] * decay + _dot(v_ref[0, 0, keys], weights, (0, 0))

    def part(masked: bool, units: list[tuple[Any, int]]) -> None:
        following, behind = products(*units[0]), None
        for i, (keys, head) in enumerate(units):
            x = scores.capped(following)
            if i + 1 < len(units):
                following = products(*units[i + 1])
            if masked:
                x = jnp.where(_seen(query_rows, key_rows, keys, scores), x, MASK)
            old = top[head]
            new = jnp.maximum(old, jnp.max(x, axis=0, keepdims=True))
            weights = jnp.exp2(x * slope - new * slope)
            decay = jnp.exp2((old - new) * slope)
            top[head] = new
            total[head] = total[head] * decay + jnp.sum(weights, axis=0, keepdims=True)
            if behind is not None:
                add(*behind)
            behind = keys, head, decay, weights.astype(v_ref.dtype)
        if behind is not None:
            add(*behind)

    _when_run(visit, k_ref.shape[2], num_heads, FORWARD_UNROLLED, part)

    @pl.when(visit & LAST != 0)
    def _():
        for head in range(num_heads):
            blind = total[head] == 0
            safe = jnp.where(blind, 1.0, total[head])
            out = sums[head] * (1.0 / safe)
            out_ref[0, 0, 0, head] = out.T.astype(out_ref.dtype)
            lse = jnp.where(blind, NEGATIVE, top[head] * scores.unit + jnp.log(safe))
            lse_ref[0, 0, 0, head : head + 1, :] = lse


def _when_run(visit: Any, key: int, num_heads: int, unrolled: int, part: Any) -> None:
    """Works off a visit's units by `part(masked, units)`, if it has any that are seen."""
    for masked, flags, many in ((False, RUN, unrolled), (True, RUN | MASKED, UNROLLED)):
        run = functools.partial(_each_part, key, num_heads, many, functools.partial(part, masked))
        pl.when(visit & (RUN | MASKED) == flags)(run)


def _backward_kernel(
    visits, query_rows, key_rows, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs,
    scores: Scores, visit_of, key: int,
):  # fmt: skip
    """refs: perhaps what dq is added to, dq, dk, dv, and a sum f32 [g, h, t].

    dk [1, 1, S, h] and dv [1, 1, S, d] stay in VMEM for all visits of a key/value head. lse_ref is
    in powers of two, and large where there is no weight.
    """
    before, dq_ref, dk_ref, dv_ref, dq_sums = refs if len(refs) == 5 else (None, *refs)
    visit = visit_of(visits)
    num_heads = q_ref.shape[3]
    slope = scores.unit * LOG2_E

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        def clear(i, carry):
            rows = pl.ds(pl.multiple_of(i * key, key), key)
            dk_ref[0, 0, rows, :] = jnp.zeros((key, dk_ref.shape[3]), jnp.float32)
            dv_ref[0, 0, rows, :] = jnp.zeros((key, dv_ref.shape[3]), jnp.float32)
            return carry

        jax.lax.fori_loop(0, dk_ref.shape[2] // key, clear, 0)

    @pl.when(visit & FIRST != 0)
    def _():
        dq_sums[...] = jnp.zeros(dq_sums.shape, jnp.float32)

    start = pl.multiple_of(key_block(visit) * key, key)

    def products(keys: Any, head: int) -> tuple[jax.Array, jax.Array]:
        q, dout = q_ref[0, 0, 0, head], dout_ref[0, 0, 0, head]
        return _dot(k_ref[0, 0, keys], q, (1, 1)), _dot(v_ref[0, 0, keys], dout, (1, 1))

    def part(masked: bool, units: list[tuple[Any, int]]) -> None:
        following = products(*units[0])
        for i, (keys, head) in enumerate(units):
            x, dweights = following
            if i + 1 < len(units):
                following = products(*units[i + 1])
            x = capped = scores.capped(x)
            if masked:
                x = jnp.where(_seen(query_rows, key_rows, keys, scores), x, MASK)
            weights = jnp.exp2(x * slope - lse_ref[0, 0, 0, head : head + 1, :])
            dx = weights * (dweights - delta_ref[0, 0, 0, head : head + 1, :])
            if scores.softcap is not None:
                dx *= 1.0 - capped * capped
            q, dout = q_ref[0, 0, 0, head], dout_ref[0, 0, 0, head]
            weights, dx = weights.astype(dout.dtype), dx.astype(q.dtype)
            rows = pl.ds(pl.multiple_of(start + keys.start, keys.size), keys.size)
            dv_ref[0, 0, rows, :] += _dot(weights, dout, (1, 0))
            dk_ref[0, 0, rows, :] += _dot(dx, q, (1, 0))
            dq_sums[head] += _dot(k_ref[0, 0, keys], dx, (0, 0))

    _when_run(visit, key, num_heads, UNROLLED, part)

    @pl.when(visit & LAST != 0)
    def _():
        for head in range(num_heads):
            dq = (dq_sums[head] * scores.scale).T
            if before is not None:
                dq += before[0, 0, 0, head]
            dq_ref[0, 0, 0, head] = dq.astype(dq_ref.dtype)


class Call(NamedTuple):
    """One call of either kernel, but for its arrays."""

    scores: Scores
    query: int  # tokens of a block
    key: int
    vmem: int  # bytes the kernel may use
    interpret: bool | None  # None: on CPUs
    cost: pl.CostEstimate


def _specs(call: Call, visits: Any, num_rows: int):
    """(visit_of, block specs by kind) for lists of shape [B or 1, P]."""
    shared, P = visits.shape[0] == 1, visits.shape[1]

    def at(b, p, flat):
        return flat[p] if shared else flat[b * P + p]

    def visit_of(flat):
        return at(pl.program_id(0), pl.program_id(3), flat)

    def of_queries(*block):
        """BlockSpec of an array [B, K, N, g, T, ...]."""
        tail = (0,) * (len(block) - 2)
        return pl.BlockSpec(
            (1, 1, 1, *block),
            lambda b, k, n, p, flat: (b, k, n, 0, query_block(at(b, p, flat)), *tail),
        )

    def of_keys(size: int):
        """BlockSpec of an array [B, K, S, size]."""
        return pl.BlockSpec(
            (1, 1, call.key, size), lambda b, k, n, p, flat: (b, k, key_block(at(b, p, flat)), 0)
        )

    query_rows = pl.BlockSpec(
        (1, num_rows, call.query), lambda b, k, n, p, flat: (b, 0, query_block(at(b, p, flat)))
    )
    key_rows = pl.BlockSpec(
        (1, num_rows, call.key), lambda b, k, n, p, flat: (b, 0, key_block(at(b, p, flat)))
    )
    return visit_of, of_queries, of_keys, [query_rows, key_rows]


def forward(call: Call, plan: Schedule, rows, q, k, v) -> tuple[jax.Array, jax.Array]:
    """(out [B, K, N, g, T, d] of q's dtype, lse float32 [B, K, N, g, T]).

    Args:
      call: sizes and mask.
      plan: the visits.
      rows: positions and segments, see `common.mask_rows`.
      q: [B, K, N, g, T, h]; T a multiple of the block.
      k, v: [B, K, S, h] and [B, K, S, d].
    """
    g, h, d = q.shape[3], q.shape[5], v.shape[3]
    visit_of, of_queries, of_keys, row_specs = _specs(call, plan.visits, rows[0].shape[1])
    return _launch(
        call, plan, "flash_attention_forward",
        functools.partial(_forward_kernel, scores=call.scores, visit_of=visit_of),
        (*rows, q, k, v),
        [*row_specs, of_queries(g, call.query, h), of_keys(h), of_keys(d)],
        [of_queries(g, call.query, d), of_queries(g, call.query)],
        [((*q.shape[:5], d), q.dtype), (q.shape[:5], jnp.float32)],
        [(g, 1, call.query), (g, 1, call.query), (g, d, call.query)],
        groups="parallel",
    )  # fmt: skip


def backward(
    call: Call, plan: Schedule, rows, q, k, v, dout, lse2, delta, dq_dtype, before=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq [B, K, N, g, T, h], dk [B, K, S, h] / scale, dv [B, K, S, d]); the latter two float32.

    Args:
      call, plan, rows, q, k, v: as `forward`.
      dout: [B, K, N, g, T, d].
      lse2, delta: float32 [B, K, N, g, T], see `common.Kernel`.
      dq_dtype: of dq.
      before: what dq is added to, in its place; None for zeros.
    """
    g, h = q.shape[3], q.shape[5]
    S, d = v.shape[2:]
    visit_of, of_queries, of_keys, row_specs = _specs(call, plan.visits, rows[0].shape[1])
    of_q, of_row = of_queries(g, call.query, h), of_queries(g, call.query)

    def resident(size: int):
        return pl.BlockSpec((1, 1, S, size), lambda b, k, n, p, flat: (b, k, 0, 0))

    arrays = (*rows, q, k, v, dout, lse2, delta)
    specs = [*row_specs, of_q, of_keys(h), of_keys(d), of_queries(g, call.query, d), of_row, of_row]
    more = () if before is None else (before,)
    return _launch(
        call, plan, "flash_attention_backward",
        functools.partial(
            _backward_kernel, scores=call.scores, visit_of=visit_of, key=call.key
        ),
        (*arrays, *more),
        [*specs, *[of_q] * len(more)],
        [of_q, resident(h), resident(d)],
        [(q.shape, dq_dtype), (k.shape, jnp.float32), (v.shape, jnp.float32)],
        [(g, h, call.query)],
        groups="arbitrary",
        input_output_aliases={1 + len(arrays) + i: i for i in range(len(more))},
    )  # fmt: skip


def _launch(
    call: Call, plan: Schedule, name: str, kernel: Any, arrays: Any, in_specs: Any, out_specs: Any,
    out: Any, scratch: Any, *, groups: Any, **options: Any,
) -> Any:  # fmt: skip
    """The results of a kernel over all visits.

    Args:
      out: (shape, dtype) of each result.
      scratch: shapes of its float32 scratch.
      groups: "parallel" or "arbitrary": whether groups of heads may run apart.
      options: of `pl.pallas_call`.
    """
    B, K, N = arrays[2].shape[:3]
    call_on = functools.partial(
        pl.pallas_call,
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, N, plan.count),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(*one) for one in out],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", groups, "arbitrary"),
            vmem_limit_bytes=call.vmem,
        ),
        cost_estimate=call.cost,
        name=name,
        **options,
    )
    arrays = (jnp.asarray(plan.visits).reshape(-1), *arrays)
    if call.interpret is not None:
        return call_on(interpret=call.interpret)(*arrays)
    return jax.lax.platform_dependent(
        *arrays, tpu=call_on(interpret=False), cpu=call_on(interpret=True)
    )
