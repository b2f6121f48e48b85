"""A cache of latents, for multi-head latent attention (MLA, arXiv:2405.04434)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lm.infer.cache.contiguous import live_tokens
from lm.kernels.attention import Scores, View, attention
from lm.model import Attention, Tokens
from lm.sharding import constrain


@flax.struct.dataclass
class LatentCache:
    """Latents and shared rotated keys of one layer, position p of a row in its slot p.

    What `ContiguousCache` says of rows and slots holds here too. There are no heads: a token takes
    kv_rank + rope_dim values, whatever `num_heads`, on every device of `tensor`.

    Attributes:
      latents: [B, S, kv_rank + rope_dim].
      implementation: of attention; None for "reference" in latent space, the default expanded.
    """

    latents: Any
    implementation: str | None = flax.struct.field(pytree_node=False, default=None)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        tokens: Tokens,
        scores: Scores,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, LatentCache]:
        """See `lm.model.LayerCache`: multi-query attention, whose values are a part of the keys."""
        cache = self.write(k[:, :, 0], tokens)
        keys = cache.latents[:, :, None].astype(q.dtype)
        # Few queries, and one head of keys, which no mesh can split: a case for no kernel.
        implementation = self.implementation or "reference"
        values = keys[..., : v.shape[-1]]
        return cache.read(q, keys, values, tokens, scores, implementation, sinks), cache

    def attend_expanded(
        self,
        q: jax.Array,
        latents: jax.Array,
        expand: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
        tokens: Tokens,
        scores: Scores,
    ) -> tuple[jax.Array, LatentCache]:
        """See `lm.model.decoder.LatentLayerCache`."""
        cache = self.write(latents, tokens)
        k, v = expand(cache.latents.astype(q.dtype))
        return cache.read(q, k, v, tokens, scores, self.implementation), cache

    def write(self, latents: jax.Array, tokens: Tokens) -> LatentCache:
        """The cache with latents [B, T, kv_rank + rope_dim] written to their slots."""
        B, S, _ = self.latents.shape
        slots = jnp.where(live_tokens(tokens), tokens.positions, S)
        rows = jnp.arange(B, dtype=slots.dtype)[:, None]
        kept = self.latents.at[rows, slots].set(latents.astype(self.latents.dtype), mode="drop")
        return dataclasses.replace(self, latents=constrain(kept, "batch", None, None))

    def read(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        tokens: Tokens,
        scores: Scores,
        implementation: str | None,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        """q [B, T, H, h] over every slot's k [B, S, K, h] and v."""
        B, S, _ = self.latents.shape
        positions = jnp.broadcast_to(jnp.arange(S, dtype=tokens.positions.dtype), (B, S))
        return attention(
            q, k, v, View(tokens.positions, positions), scores, sinks=sinks,
            implementation=implementation,
        )  # fmt: skip


def make_latent_cache(
    spec: Attention, batch: int, length: int, dtype: Any = jnp.float32
) -> LatentCache:
    """An empty cache of one layer."""
    assert spec.latent is not None
    size = spec.latent.kv_rank + spec.latent.rope_dim
    return LatentCache(jnp.zeros((batch, length, size), dtype))
