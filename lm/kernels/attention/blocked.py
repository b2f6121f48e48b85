"""Flash attention (arXiv:2205.14135) in plain JAX: causal, a block of queries at a time.

The scores of one block are alive at a time and are computed again on the way back. Blocks of keys
that a block of queries cannot see are never multiplied: half of the work without a window, more
with one. Queries are laid out [B, K, G * block, h] and, on the way back, the scores transposed, so
that matrix products read their operands in order (a CPU multiplies twice as fast that way); the one
product that cannot, of the queries' gradient, reads a transposed copy there.

Shape suffixes as in `reference`; t is a block of queries, s the keys it may see.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.kernels.attention.reference import NEGATIVE, View
from lm.kernels.attention.scores import Scores

MAX_BLOCKS = 16


class Static(NamedTuple):
    """What is known at trace time."""

    scores: Scores
    block: int


def blocked_attention(
    q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, view: View, scores: Scores
) -> jax.Array:
    """Causal attention of tokens to themselves; `view.in_order` and `scores.causal` must hold.

    See `lm.kernels.attention.attention`.
    """
    T = q_BTHh.shape[1]
    block = max(64, -(-T // (MAX_BLOCKS * 64)) * 64)
    return _attend(q_BTHh, k_BTKh, v_BTKh, view, Static(scores, block))


def _blocks(T: int, static: Static) -> list[tuple[slice, slice]]:
    """(queries, keys they may see) of each block."""
    ranges = []
    for start in range(0, T, static.block):
        stop = min(start + static.block, T)
        first = 0 if static.scores.window is None else max(0, start - static.scores.window + 1)
        ranges.append((slice(start, stop), slice(first, stop)))
    return ranges


def _seen(view: View, queries: slice, keys: slice, window: int | None) -> jax.Array:
    """bool [B, t, s]: the mask."""
    distance = view.query_positions[:, queries, None] - view.key_positions[:, None, keys]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if view.query_segments is not None:
        seen &= view.query_segments[:, queries, None] == view.key_segments[:, None, keys]
    return seen


def _grouped(x_BTHh: jax.Array, K: int) -> jax.Array:
    """[B, T, H, h] -> [B, K, T, G, h]."""
    B, T, H, h = x_BTHh.shape
    return x_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)


def _ungrouped(x_BKGTh: jax.Array) -> jax.Array:
    B, K, G, T, h = x_BKGTh.shape
    return x_BKGTh.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, h)


def _scores(q_BKGth, k_BKsh, seen_Bts, static: Static, transposed: bool) -> jax.Array:
    """float32 [B, K, G * t, s], or [B, K, s, G * t]: soft-capped, scaled, masked."""
    B, K, G, t, h = q_BKGth.shape
    s = k_BKsh.shape[2]
    q = q_BKGth.reshape(B, K, G * t, h)
    if transposed:
        equation, operands, shape = "bksh,bkth->bkst", (k_BKsh, q), (B, K, s, G, t)
        seen = seen_Bts.swapaxes(1, 2)[:, None, :, None, :]
    else:
        equation, operands, shape = "bkth,bksh->bkts", (q, k_BKsh), (B, K, G, t, s)
        seen = seen_Bts[:, None, None]
    scores = jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
    scores = static.scores.of(scores)
    return jnp.where(seen, scores.reshape(shape), NEGATIVE).reshape(scores.shape)


def _to_queries(dscores_BKst: jax.Array, k_BKsh: jax.Array) -> jax.Array:
    """The gradient of the queries, float32 [B, K, t, h]."""

    def plain(dscores: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.einsum("bkst,bksh->bkth", dscores, k, preferred_element_type=jnp.float32)

    def cpu(dscores: jax.Array, k: jax.Array) -> jax.Array:
        copied = jax.lax.optimization_barrier(dscores.swapaxes(2, 3))
        return jnp.matmul(copied, k, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(dscores_BKst, k_BKsh, cpu=cpu, default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, view: View, static: Static) -> jax.Array:
    return _forward(q, k, v, view, static)[0]


def _forward(q_BTHh, k_BTKh, v_BTKh, view, static):
    K = k_BTKh.shape[2]
    q = _grouped(q_BTHh, K)
    k, v = k_BTKh.swapaxes(1, 2), v_BTKh.swapaxes(1, 2)
    B, _, G, T, _ = q.shape
    outs, lses = [], []
    for queries, keys in _blocks(T, static):
        q_t, k_s, v_s = q[:, :, :, queries], k[:, :, keys], v[:, :, keys]
        t = q_t.shape[3]
        scores = _scores(q_t, k_s, _seen(view, queries, keys, static.scores.window), static, False)
        top = jnp.max(scores, axis=3)
        weights = jnp.exp(scores - top[..., None])
        total = jnp.sum(weights, axis=3)
        out = jnp.einsum(
            "bkts,bksh->bkth", weights.astype(v.dtype), v_s, preferred_element_type=jnp.float32
        )
        out /= total[..., None]
        outs.append(out.astype(q.dtype).reshape(B, K, G, t, -1))
        lses.append((jnp.log(total) + top).reshape(B, K, G, t))
    out = _ungrouped(jnp.concatenate(outs, axis=3))
    return out, (q_BTHh, k_BTKh, v_BTKh, view, out, jnp.concatenate(lses, axis=3))


def _backward(static, saved, dout_BTHh):
    q_BTHh, k_BTKh, v_BTKh, view, out_BTHh, lse = saved
    K = k_BTKh.shape[2]
    q, dout = _grouped(q_BTHh, K), _grouped(dout_BTHh, K)
    k, v = k_BTKh.swapaxes(1, 2), v_BTKh.swapaxes(1, 2)
    B, _, G, T, h = q.shape
    product = dout_BTHh.astype(jnp.float32) * out_BTHh.astype(jnp.float32)
    delta = _grouped(jnp.sum(product, axis=-1, keepdims=True), K)[..., 0]
    dk = jnp.zeros(k.shape, jnp.float32)
    dv = jnp.zeros(v.shape, jnp.float32)
    dqs = []
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for queries, keys in _blocks(T, static):
        q_t, k_s, v_s = q[:, :, :, queries], k[:, :, keys], v[:, :, keys]
        t = q_t.shape[3]
        flat = (B, K, G * t)
        q_t, dout_t = q_t.reshape(*flat, h), dout[:, :, :, queries].reshape(*flat, -1)
        seen = _seen(view, queries, keys, static.scores.window)
        scores = _scores(q_t.reshape(B, K, G, t, h), k_s, seen, static, True)
        weights = jnp.exp(scores - lse[..., queries].reshape(flat)[:, :, None])
        dweights = dot("bksh,bkth->bkst", v_s, dout_t)
        dscores = weights * (dweights - delta[..., queries].reshape(flat)[:, :, None])
        if static.scores.softcap is not None:
            capped = jnp.where(weights > 0, scores, 0) / static.scores.softcap
            dscores *= 1 - jnp.square(capped)
        dscores = (dscores * static.scores.scale).astype(q.dtype)
        dv = dv.at[:, :, keys].add(dot("bkst,bkth->bksh", weights.astype(v.dtype), dout_t))
        dk = dk.at[:, :, keys].add(dot("bkst,bkth->bksh", dscores, q_t))
        dq = _to_queries(dscores, k_s)
        dqs.append(dq.astype(q.dtype).reshape(B, K, G, t, h))
    dq = _ungrouped(jnp.concatenate(dqs, axis=3))
    dk, dv = (d.swapaxes(1, 2).astype(k_BTKh.dtype) for d in (dk, dv))
    return dq, dk, dv, jax.tree.map(lambda _: None, view)


_attend.defvjp(_forward, _backward)
