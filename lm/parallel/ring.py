"""Ring attention (arXiv:2310.01889): keys and values travel around the ring, queries stay.

A device's chunk of the row is cut into two parts, those of the zigzag order, or into more where
there is no kernel; pairs of parts in which no query sees a key, by positions and segments, are
skipped. Shape suffixes: P parts, B batch, t queries and s keys of a part, H query and K key/value
heads, h head size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lm.kernels.attention import Scores, View, attention, attention_backward
from lm.kernels.attention.reference import NEGATIVE
from lm.parallel.context import Context, current_context
from lm.sharding import map_devices

KERNELS = ("flash", "mosaic_gpu")
LONGEST_PLAIN = 1024  # tokens of a part where plain JAX holds the scores of a pair of them
PADDING = np.iinfo(np.int32).max


class Static(NamedTuple):
    """Known at trace time; `steps` chunks are visited, of `parts` parts each."""

    context: Context
    steps: int
    parts: int
    scores: Scores
    implementation: str | None


class Ranges(NamedTuple):
    """First and last (segment, position) of each part and row, int32 [P, B], in that order."""

    first_segment: jax.Array
    first_position: jax.Array
    last_segment: jax.Array
    last_position: jax.Array


class Keys(NamedTuple):
    """What travels around the ring."""

    k_PBsKh: jax.Array
    v_PBsKh: jax.Array
    positions_PBs: jax.Array
    segments_PBs: jax.Array | None


class Queries(NamedTuple):
    """What stays on its device."""

    q_PBtHh: jax.Array
    positions_PBt: jax.Array
    segments_PBt: jax.Array | None


def ring_attention(
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

    Tokens may be in any order the view describes; `lm.parallel.Zigzag` gives the balanced one.
    Each device works on one chunk of keys while the next arrives from its neighbour, and merges
    results by their log-sum-exp; in the backward pass the keys' gradients travel with them, and
    home at the end. A device holds its own chunk, the one it works on and the one that arrives.
    Causal attention with a window over tokens in order (`view.in_order`) stops after the chunks
    that the window reaches.

    Args:
      q: [B, T, H, h].
      k, v: [B, T, K, h], of the same tokens.
      view, scores: as `attention`.
      sinks: None; a ring does not merge them.
      implementation: of the attention of one part of a chunk to another.

    Raises:
      ValueError: the mesh does not divide batch, sequence or heads, or the implementation cannot.
    """
    context = current_context()
    if context is None:
        return attention(q, k, v, view, scores, sinks=sinks, implementation=implementation)
    if sinks is not None:
        raise ValueError("ring attention has no sinks; use context='ulysses'")
    if implementation not in (None, "reference", *KERNELS):
        raise ValueError(
            f"implementation={implementation!r} does not give the log-sum-exp by which a ring "
            "merges parts; use flash on TPUs, mosaic_gpu on Hopper GPUs, reference, or none; or "
            "ulysses, which takes any"
        )
    context.spec(q.shape, "batch", "sequence", "heads", None)  # refuses what does not divide
    chunk = q.shape[1] // context.size
    steps = context.size
    if scores.causal and scores.window is not None and view.in_order:
        steps = min(steps, 1 + -(-(scores.window - 1) // chunk))
    platform = context.mesh.devices.flat[0].platform
    kernel = implementation in KERNELS or (implementation is None and platform == "tpu")
    parts = _parts(chunk, 2 if kernel else max(2, chunk // LONGEST_PLAIN))
    static = Static(context, steps, parts, scores, implementation)
    return _ring(q, k, v, view, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q, k, v, view: View, static: Static) -> jax.Array:
    return _ring_forward(q, k, v, view, static)[0]


def _ring_forward(q, k, v, view, static):
    heads, _, _, lses = _specs(static, q, k)
    out, lse = _over_mesh(_forward, static, q, k, (heads, lses))(q, k, v, *_fields(view))
    # Named so that keeping "attention" keeps both, and the first ring is not run again.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, view, out, lse)


def _ring_backward(static, saved, dout):
    q, k, v, view, out, lse = saved
    heads, keys, _, lses = _specs(static, q, k)
    backward = _over_mesh(_backward, static, q, k, (heads, keys, keys), (heads, lses, heads))
    dq, dk, dv = backward(q, k, v, *_fields(view), out, lse, dout)
    return dq, dk, dv, jax.tree.map(lambda _: None, view)


_ring.defvjp(_ring_forward, _ring_backward)


def _fields(view: View) -> tuple[Any, ...]:
    return view.query_positions, view.key_positions, view.query_segments, view.key_segments


def _specs(static: Static, q: jax.Array, k: jax.Array) -> tuple[Any, ...]:
    """PartitionSpecs of queries, of keys, of positions and segments, and of a log-sum-exp."""
    spec = static.context.spec
    return (
        spec(q.shape, "batch", "sequence", "heads", None),
        spec(k.shape, "batch", "sequence", "kv_heads", None),
        spec(q.shape[:2], "batch", "sequence"),
        spec(q.shape[:3], "batch", "sequence", "heads"),
    )


def _over_mesh(local, static: Static, q, k, out_specs, more_specs=()):
    heads, keys, tokens, _ = _specs(static, q, k)
    specs = (heads, keys, keys, *(tokens,) * 4, *more_specs)
    return map_devices(functools.partial(local, static), specs, out_specs, static.context.mesh)


def _forward(static: Static, q, k, v, q_positions, k_positions, q_segments, k_segments):
    """The first ring, on one device: its own result [B, T, H, h] and log-sum-exp [B, T, H]."""
    queries = _cut(static, Queries(q, q_positions, q_segments))
    keys = _cut(static, Keys(k, v, k_positions, k_segments))
    shape = queries.q_PBtHh.shape
    out = jnp.zeros((*shape[:-1], v.shape[-1]), jnp.float32)
    lse = jnp.full(shape[:-1], NEGATIVE, jnp.float32)

    def visit(total, keys: Keys):
        def pair(total, i, j):
            part = attention(
                *_pair(static, queries, keys, i, j), return_lse=True,
                implementation=static.implementation,
            )  # fmt: skip
            merged = merge(tuple(x[i] for x in total), part)
            return tuple(x.at[i].set(y) for x, y in zip(total, merged, strict=True))

        return _each_pair(static, queries, keys, pair, total)

    def step(carry, _):
        keys, total = carry
        arriving = _send(static, keys)
        return (arriving, visit(total, keys)), None

    (keys, total), _ = jax.lax.scan(step, (keys, (out, lse)), length=static.steps - 1)
    out, lse = visit(total, keys)
    return _whole(out.astype(q.dtype)), _whole(lse)


def _backward(
    static: Static, q, k, v, q_positions, k_positions, q_segments, k_segments, out, lse, dout
):
    """The second ring, on one device: dq, and dk and dv of its own keys."""
    queries = _cut(static, Queries(q, q_positions, q_segments))
    keys = _cut(static, Keys(k, v, k_positions, k_segments))
    results = _cut(static, (out, lse, dout))

    def visit(dq, keys: Keys):
        """dq with this chunk's part, and the gradients of its keys and values."""

        def pair(total, i, j):
            parts = attention_backward(
                *_pair(static, queries, keys, i, j),
                *(x[i] for x in results),
                implementation=static.implementation,
            )
            return tuple(x.at[at].add(y) for x, y, at in zip(total, parts, (i, j, j), strict=True))

        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])
        dq, dk, dv = _each_pair(static, queries, keys, pair, (dq, *zeros))
        return dq, (dk, dv)

    def step(carry, _):
        keys, dq, behind = carry
        arriving, arrived = _send(static, keys), _send(static, behind)
        dq, gradients = visit(dq, keys)
        return (arriving, dq, jax.tree.map(jnp.add, arrived, gradients)), None

    dq = jnp.zeros(queries.q_PBtHh.shape, jnp.float32)
    if static.steps == 1:
        dq, gradients = visit(dq, keys)
    else:
        arriving = _send(static, keys)
        dq, gradients = visit(dq, keys)
        (keys, dq, gradients), _ = jax.lax.scan(
            step, (arriving, dq, gradients), length=static.steps - 2
        )
        arrived = _send(static, gradients)
        dq, gradients = visit(dq, keys)
        gradients = jax.tree.map(jnp.add, arrived, gradients)
        gradients = _send(static, gradients, 1 - static.steps)
    dk, dv = (_whole(x).astype(y.dtype) for x, y in zip(gradients, (k, v), strict=True))
    return _whole(dq).astype(q.dtype), dk, dv


def merge(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(result, log-sum-exp) of attention over two sets of keys, float32."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (jnp.exp(x - lse)[..., None] for x in (lse_a, lse_b))
    return out_a * weight_a + out_b.astype(jnp.float32) * weight_b, lse


def _parts(chunk: int, least: int) -> int:
    """Number of parts of a chunk: `least`, or the next even number that divides the chunk."""
    if chunk % 2:
        return 1
    return next(n for n in range(least, chunk + 1) if n % 2 == 0 and chunk % n == 0)


def _cut(static: Static, tree: Any) -> Any:
    """[B, T, ...] -> [P, B, T / P, ...]."""

    def cut(x: jax.Array) -> jax.Array:
        B, T, *rest = x.shape
        return jnp.moveaxis(x.reshape(B, static.parts, T // static.parts, *rest), 1, 0)

    return jax.tree.map(cut, tree)


def _whole(x: jax.Array) -> jax.Array:
    P, B, t, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(B, P * t, *rest)


def _send(static: Static, tree: Any, distance: int = 1) -> Any:
    """The tree of the device `distance` before this one on the ring."""
    axes, n = static.context.axes, static.context.size
    route = [(i, (i + distance) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, route), tree)


def _pair(
    static: Static, queries: Queries, keys: Keys, i: jax.Array, j: jax.Array
) -> tuple[Any, ...]:
    """The arguments of attention: part i of the queries, part j of the keys."""
    view = View(
        queries.positions_PBt[i],
        keys.positions_PBs[j],
        None if queries.segments_PBt is None else queries.segments_PBt[i],
        None if keys.segments_PBs is None else keys.segments_PBs[j],
    )
    return queries.q_PBtHh[i], keys.k_PBsKh[j], keys.v_PBsKh[j], view, static.scores


def _each_pair(static: Static, queries: Queries, keys: Keys, pair: Any, total: Any) -> Any:
    """`total` after `pair(total, i, j)` for all parts where a query may see a key."""
    visible = may_see(
        ranges(queries.positions_PBt, queries.segments_PBt),
        ranges(keys.positions_PBs, keys.segments_PBs),
        static.scores,
    )

    def one(total, index):
        i, j = index
        computed = functools.partial(pair, i=i, j=j)
        return jax.lax.cond(visible[i, j], computed, lambda total: total, total), None

    indices = np.divmod(np.arange(static.parts**2, dtype=np.int32), static.parts)
    return jax.lax.scan(one, total, indices)[0]


def ranges(positions: jax.Array, segments: jax.Array | None) -> Ranges:
    """Ranges of positions and segments [P, B, t]; padding, segment 0, counts as the last."""
    if segments is None:
        zeros = jnp.zeros(positions.shape[:-1], jnp.int32)
        return Ranges(zeros, jnp.min(positions, -1), zeros, jnp.max(positions, -1))
    order = jnp.where(segments == 0, PADDING, segments)
    first, last = jnp.min(order, -1), jnp.max(order, -1)
    at_first, at_last = (order == edge[..., None] for edge in (first, last))
    return Ranges(
        first,
        jnp.min(jnp.where(at_first, positions, PADDING), -1),
        last,
        jnp.max(jnp.where(at_last, positions, -1), -1),
    )


def may_see(queries: Ranges, keys: Ranges, scores: Scores) -> jax.Array:
    """bool [P of queries, P of keys]: whether in some row some query may see some key.

    Never false where one does, whatever the order of the tokens: a query sees keys of its own
    segment alone, so none that is later by (segment, position), and a window cannot reach back
    where all that a query and a key may share is one segment and it is too far away.
    """
    q = Ranges(*(x[:, None] for x in queries))
    k = Ranges(*(x[None] for x in keys))
    seen = (q.last_segment >= k.first_segment) & (q.first_segment <= k.last_segment)
    if scores.causal:
        later = q.last_segment > k.first_segment
        seen &= later | (q.last_position >= k.first_position)
    window = scores.window
    if window is not None:
        seen &= (q.first_segment < k.last_segment) | (q.first_position - k.last_position < window)
        if not scores.causal:
            seen &= (q.last_segment > k.first_segment) | (
                k.first_position - q.last_position < window
            )
    return jnp.any(seen, axis=-1)
