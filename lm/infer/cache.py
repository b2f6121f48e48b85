"""Key/value caches: one call writes the new keys and values of a layer and reads them all."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lm.infer.latent import LatentCache, make_latent_cache
from lm.kernels.attention import View, attention
from lm.model import Attention, ModelConfig, Tokens
from lm.model.forward import attention_scale
from lm.sharding import constrain


@flax.struct.dataclass
class ContiguousCache:
    """Keys and values of one layer, position p of a row in its slot p.

    Rows may be of different lengths: a row's tokens are written where their positions say, padding
    (segment 0) and positions beyond the cache nowhere. A query sees slots up to its own position
    only, so that what an earlier, longer row left behind is overwritten before it can be seen.
    Layers with a sliding window keep every position too.

    Attributes:
      keys, values: [B, S, K, h].
      implementation: of attention; None for the default.
    """

    keys: Any
    values: Any
    implementation: str | None = flax.struct.field(pytree_node=False, default=None)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens, spec: Attention
    ) -> tuple[jax.Array, ContiguousCache]:
        """See `lm.model.LayerCache`. Each row is one document: `tokens` must not be packed."""
        B, S, _, _ = self.keys.shape
        slots = tokens.positions
        if tokens.segment_ids is not None:
            slots = jnp.where(tokens.segment_ids == 0, S, slots)
        rows = jnp.arange(B, dtype=slots.dtype)[:, None]

        def write(cache: jax.Array, new: jax.Array) -> jax.Array:
            cache = cache.at[rows, slots].set(new.astype(cache.dtype), mode="drop")
            return constrain(cache, "batch", None, "kv_heads", None)

        keys, values = write(self.keys, k), write(self.values, v)
        key_positions = jnp.broadcast_to(jnp.arange(S, dtype=slots.dtype), (B, S))
        out = attention(
            q, keys.astype(q.dtype), values.astype(q.dtype), View(tokens.positions, key_positions),
            scale=attention_scale(spec), window=spec.window, softcap=spec.softcap,
            implementation=self.implementation,
        )  # fmt: skip
        return out, dataclasses.replace(self, keys=keys, values=values)


def make_cache(
    config: ModelConfig, batch: int, length: int, dtype: Any = jnp.float32
) -> tuple[ContiguousCache | LatentCache, ...]:
    """Empty caches, one a layer, of `length` positions for `batch` rows."""

    def layer(a: Attention) -> ContiguousCache | LatentCache:
        if a.latent is not None:
            return make_latent_cache(a, batch, length, dtype)
        shape = (batch, length, a.num_kv_heads, a.head_dim)
        return ContiguousCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return tuple(layer(config_layer.attention) for config_layer in config.layers)
