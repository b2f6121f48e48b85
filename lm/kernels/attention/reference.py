"""Attention in plain JAX, the reference for every other implementation.

Shape suffixes: B batch, T queries, S keys, K key/value heads, G query heads per key/value head,
H = K x G query heads, h head size.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.attention.scores import Scores

NEGATIVE = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: merging two of it gives no NaN


@flax.struct.dataclass
class View:
    """Where queries and keys stand; packing, windows, caches and rings differ only in this.

    Attributes:
      query_positions: int32 [B, T].
      key_positions: int32 [B, S].
      query_segments: int32 [B, T] or None; a query sees keys of its own segment only.
      key_segments: int32 [B, S] or None; 0 marks padding.
      in_order: queries and keys are the same tokens, a segment's in order and without gaps, so
        that a causal kernel need not look at later keys, nor a windowed one at far ones.
    """

    query_positions: Any
    key_positions: Any
    query_segments: Any = None
    key_segments: Any = None
    in_order: bool = flax.struct.field(pytree_node=False, default=False)


def mask(view: View, scores: Scores) -> jax.Array:
    """bool [B, T, S]: which keys a query sees.

    A window w lets a query at position p see positions p - w + 1 .. p (and, where not causal, as
    many ahead).
    """
    distance = view.query_positions[:, :, None] - view.key_positions[:, None, :]
    seen = distance >= 0 if scores.causal else jnp.ones(distance.shape, bool)
    if scores.window is not None:
        seen &= jnp.abs(distance) < scores.window
    if view.query_segments is not None:
        seen &= view.query_segments[:, :, None] == view.key_segments[:, None, :]
    return seen


def reference_attention(
    q_BTHh: jax.Array,
    k_BSKh: jax.Array,
    v_BSKh: jax.Array,
    view: View,
    scores: Scores,
    *,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention with the scores held whole. See `lm.kernels.attention.attention`."""
    B, T, H, h = q_BTHh.shape
    K = k_BSKh.shape[2]
    q_BTKGh = q_BTHh.reshape(B, T, K, H // K, h)
    x = jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k_BSKh, preferred_element_type=jnp.float32)
    weights, lse = softmax(scores.of(x), mask(view, scores), sinks)
    probabilities = weights.astype(v_BSKh.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", probabilities, v_BSKh)
    out = out.reshape(B, T, H, v_BSKh.shape[-1])
    if not return_lse:
        return out
    return out, jnp.moveaxis(lse, -1, 1).reshape(B, T, H)


def softmax(
    x_BKGTS: jax.Array, seen_BTS: jax.Array, sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Probabilities [B, K, G, T, S] of scores that are seen, and their log-sum-exp [B, K, G, T].

    See `lm.kernels.attention.attention` for sinks and queries that see nothing.
    """
    x = jnp.where(seen_BTS[:, None, None], x_BKGTS, NEGATIVE)
    top = jnp.max(x, axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, *x.shape[1:3], 1, 1)
        top = jnp.maximum(top, sink)
    # So that the weights of a query without keys are exp(NEGATIVE / 2) = 0, not exp(0).
    top = jnp.maximum(jax.lax.stop_gradient(top), NEGATIVE / 2)
    weights = jnp.exp(x - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sink - top)
    blind = total == 0
    total = jnp.where(blind, 1, total)
    return weights / total, jnp.where(blind, NEGATIVE, jnp.log(total) + top)[..., 0]


def reference_attention_backward(
    q_BTHh: jax.Array,
    k_BSKh: jax.Array,
    v_BSKh: jax.Array,
    view: View,
    scores: Scores,
    out_BTHh: jax.Array,
    lse_BTH: jax.Array,
    dout_BTHh: jax.Array,
    *,
    dlse: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients with the scores held whole. See `lm.kernels.attention.attention_backward`."""
    B, T, H, h = q_BTHh.shape
    K = k_BSKh.shape[2]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(B, T, K, H // K, *x.shape[3:])

    def rows(x_BTH: jax.Array) -> jax.Array:
        return jnp.moveaxis(grouped(x_BTH), 1, 3)[..., None]

    q, dout = grouped(q_BTHh), grouped(dout_BTHh)
    delta = jnp.sum(dout_BTHh.astype(jnp.float32) * out_BTHh.astype(jnp.float32), axis=-1)
    if dlse is not None:
        delta -= dlse
    x = dot("btkgh,bskh->bkgts", q, k_BSKh) * scores.scale
    slope = jnp.float32(1)
    if scores.softcap is not None:
        capped = jnp.tanh(x / scores.softcap)
        x, slope = scores.softcap * capped, 1 - jnp.square(capped)
    seen = mask(view, scores)[:, None, None]
    weights = jnp.exp(jnp.where(seen, x - rows(lse_BTH.astype(jnp.float32)), NEGATIVE))
    dweights = dot("btkgh,bskh->bkgts", dout, v_BSKh)
    dscores = (weights * (dweights - rows(delta)) * slope * scores.scale).astype(q.dtype)
    dq = dot("bkgts,bskh->btkgh", dscores, k_BSKh).reshape(B, T, H, h)
    dk = dot("bkgts,btkgh->bskh", dscores, q)
    dv = dot("bkgts,btkgh->bskh", weights.astype(v_BSKh.dtype), dout)
    return dq, dk, dv
