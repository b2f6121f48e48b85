"""A cache of latents, for multi-head latent attention (MLA, arXiv:2405.04434)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from lm.infer.cache.contiguous import Slots, attend_slots, attend_themselves, own_slots
from lm.kernels.attention import Scores, View, attention
from lm.model import Tokens


@flax.struct.dataclass
class LatentCache:
    """Latents and shared rotated keys of one layer, position p of a row in its slot p.

    What `ContiguousCache` says of rows and slots holds here too. There are no heads: a token takes
    kv_rank + rope_dim values, whatever `num_heads`, on every device of `tensor`.

    Attributes:
      latents: in slots, [B, 1, S, kv_rank + rope_dim].
      implementation: of attention; None for "reference" in latent space, the default expanded.
    """

    latents: Slots
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
        cache = self.write(k, tokens)
        if tokens.in_order:
            # Few queries, and one head of keys, which no mesh can split: a case for no kernel.
            implementation = self.implementation or "reference"
            return attend_themselves(q, k, v, tokens, scores, implementation, sinks), cache
        keys = cache.latents.read(q.dtype)
        values = keys[..., : v.shape[-1]]
        return attend_slots(q, keys, values, tokens, scores, self.implementation, sinks), cache

    def attend_expanded(
        self,
        q: jax.Array,
        latents: jax.Array,
        expand: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
        tokens: Tokens,
        scores: Scores,
    ) -> tuple[jax.Array, LatentCache]:
        """See `lm.model.decoder.LatentLayerCache`."""
        cache = self.write(latents[:, :, None], tokens)
        if tokens.in_order:
            own = attend_themselves(q, *expand(latents), tokens, scores, self.implementation)
            return own, cache
        k, v = expand(cache.latents.read(q.dtype)[:, 0])
        positions = jnp.arange(k.shape[1], dtype=tokens.positions.dtype)[None]
        view = View(tokens.positions, jnp.broadcast_to(positions, k.shape[:2]))
        return attention(q, k, v, view, scores, implementation=self.implementation), cache

    def write(self, latents: jax.Array, tokens: Tokens) -> LatentCache:
        """The cache with latents [B, T, 1, kv_rank + rope_dim] written to their slots."""
        slots = own_slots(tokens, self.latents.values.shape[2])
        return dataclasses.replace(self, latents=self.latents.write(latents, slots))
