"""Few queries over a cache: keys and values as `[B, K, S, h]`, each head's slots side by side.

A product over the slots of `[B, S, K, h]` copies the whole cache into this order first, at each
layer and token; here it reads it once. Shape suffixes as in `reference`; S slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.attention.choose import FLASH_FROM, attention
from lm.kernels.attention.reference import View, mask, softmax
from lm.kernels.attention.scores import Scores


def slots_attention(
    q_BTHh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    view: View,
    scores: Scores,
    *,
    sinks: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """As `attention`, of keys and values [B, K, S, h] in the slots of a cache.

    Many queries (`FLASH_FROM`), or an implementation that is named, take `attention` itself on a
    copy in its order.
    """
    B, T, H, h = q_BTHh.shape
    K = k_BKSh.shape[1]
    if implementation is not None or T >= FLASH_FROM:
        k, v = k_BKSh.swapaxes(1, 2), v_BKSh.swapaxes(1, 2)
        return attention(q_BTHh, k, v, view, scores, sinks=sinks, implementation=implementation)
    q = q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, h)
    x = _batched(q, k_BKSh, 3, preferred_element_type=jnp.float32).reshape(B, K, H // K, T, -1)
    probabilities = softmax(scores.of(x), mask(view, scores), sinks)[0].astype(v_BKSh.dtype)
    out = _batched(probabilities.reshape(B, K, -1, v_BKSh.shape[2]), v_BKSh, 2)
    out = out.reshape(B, K, H // K, T, -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(B, T, H, -1)


def _batched(x: jax.Array, y: jax.Array, axis: int, **options: Any) -> jax.Array:
    """x [B, K, m, n] times y, summed over y's `axis`.

    Written out: XLA's CPU backend has a fast product for x on the left, and einsum may swap them.
    """
    return jax.lax.dot_general(x, y, (((3,), (axis,)), ((0, 1), (0, 1))), **options)
