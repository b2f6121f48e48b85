"""Multi-head latent attention (MLA, arXiv:2405.04434, section 2.1), in its two forms.

A token's latent is normalized, and stored beside one rotated key that all heads share. Expanded,
every head's key and value are computed from the latent, and attention is the ordinary one: the form
for training and long prompts. Absorbed, the matrix that makes keys multiplies the queries instead,
and the one that makes values multiplies the result: multi-query attention over the latents
themselves, the form for decoding, whose time is that of reading the cache.

Shape suffixes: B batch, T tokens, H heads, R kv_rank, n nope_dim, r rope_dim, v value_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.model.config import Attention, Latent, Norm
from lm.model.norms import normalize
from lm.model.params import LatentAttentionWeights, NormWeights
from lm.model.rope import apply_rope
from lm.sharding import constrain
from lm.weights import StructuredWeight, linear

Table = tuple[jax.Array, jax.Array] | None


def _sizes(a: Attention) -> Latent:
    assert a.latent is not None
    return a.latent


def _normalized(x: jax.Array, scale: Any, latent: Latent) -> jax.Array:
    x = normalize(x, NormWeights(scale), Norm(eps=latent.eps))
    return constrain(x, "batch", "sequence", None)


def _rotated_tail(x: jax.Array, latent: Latent, table: Table) -> jax.Array:
    """x [..., heads, size] with its last r dimensions rotated."""
    if table is None:
        return x
    kept, rotated = jnp.split(x, [x.shape[-1] - latent.rope_dim], axis=-1)
    return jnp.concatenate([kept, apply_rope(rotated, table)], axis=-1)


def queries(x: jax.Array, w: LatentAttentionWeights, a: Attention, table: Table) -> jax.Array:
    """x [B, T, D] -> [B, T, H, n + r], rotated."""
    latent = _sizes(a)
    if w.query is not None:
        q = linear(x, w.query)
    else:
        assert w.query_down is not None and w.query_up is not None
        down = linear(x, w.query_down, w.query_down_bias)
        q = linear(_normalized(down, w.query_norm, latent), w.query_up)
    q = _rotated_tail(q.reshape(*q.shape[:2], a.num_heads, a.head_dim), latent, table)
    return constrain(q, "batch", "sequence", "heads", None)


def latents(x: jax.Array, w: LatentAttentionWeights, a: Attention, table: Table) -> jax.Array:
    """x [B, T, D] -> [B, T, R + r]: what a cache keeps, normalized and rotated."""
    latent = _sizes(a)
    down = linear(x, w.key_value_down, w.key_value_down_bias)
    kept = _normalized(down[..., : latent.kv_rank], w.key_value_norm, latent)
    key = _rotated_tail(down[..., None, latent.kv_rank :], latent, table)[..., 0, :]
    return jnp.concatenate([kept, key], axis=-1)


def expand(
    latents_BTx: jax.Array, w: LatentAttentionWeights, a: Attention
) -> tuple[jax.Array, jax.Array]:
    """Each head's keys [B, T, H, n + r] and values [B, T, H, v] from latents [B, T, R + r]."""
    latent = _sizes(a)
    B, T, _ = latents_BTx.shape
    kept, rotated = jnp.split(latents_BTx, [latent.kv_rank], axis=-1)
    up = linear(kept, w.key_value_up).reshape(B, T, a.num_heads, -1)
    k, v = jnp.split(up, [latent.nope_dim], axis=-1)
    shared = jnp.broadcast_to(rotated[:, :, None], (B, T, a.num_heads, latent.rope_dim))
    k = jnp.concatenate([k, shared], axis=-1)
    return (
        constrain(k, "batch", "sequence", "heads", None),
        constrain(v, "batch", "sequence", "heads", None),
    )


def expands(T: int, a: Attention) -> bool:
    """Whether the expanded form is fewer operations for T queries over a cache.

    Expanding a cached latent costs R (n + v) per head; each query then saves 2 R - n - v over it.
    """
    latent = _sizes(a)
    head = latent.nope_dim + latent.value_dim
    return T * (2 * latent.kv_rank - head) > latent.kv_rank * head


def absorbed(w: LatentAttentionWeights, a: Attention, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The matrices that make keys, [R, H, n], and values, [R, H, v], decoded where need be."""
    latent = _sizes(a)
    up = w.key_value_up
    up = up.dequantize(dtype) if isinstance(up, StructuredWeight) else up.astype(dtype)
    up = up.reshape(latent.kv_rank, a.num_heads, latent.nope_dim + latent.value_dim)
    return up[..., : latent.nope_dim], up[..., latent.nope_dim :]


def in_latent_space(
    q_BTHx: jax.Array, latents_BTx: jax.Array, key_up_RHn: jax.Array, a: Attention
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, R + r], keys [B, T, 1, R + r] and values [B, T, 1, R] over latents."""
    latent = _sizes(a)
    q_n, q_r = jnp.split(q_BTHx, [latent.nope_dim], axis=-1)
    q = jnp.concatenate([jnp.einsum("bthn,rhn->bthr", q_n, key_up_RHn), q_r], axis=-1)
    k = latents_BTx[:, :, None]
    return constrain(q, "batch", "sequence", "heads", None), k, k[..., : latent.kv_rank]
