"""Keys and values in slots: every position of a row, or those of a window.

Shape suffixes: B rows, T new tokens of a row, S slots, K key/value heads, h head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.attention import Scores, View, attention, slots_attention
from lm.kernels.paged_attention import QUANTIZED, quantize
from lm.model import Tokens
from lm.sharding import constrain

UNUSED_POSITION = jnp.iinfo(jnp.int32).max  # the position of a key that no query sees


def live_tokens(tokens: Tokens) -> jax.Array:
    """bool [B, T]: which tokens of rows are not padding.

    Raises:
      ValueError: the tokens stand in pages, which caches of rows do not have.
    """
    if tokens.pages is not None:
        raise ValueError("tokens with pages go into paged caches; use make_cache(kind='paged')")
    if tokens.segment_ids is None:
        return jnp.ones(tokens.positions.shape, bool)
    return tokens.segment_ids != 0


@flax.struct.dataclass
class Slots:
    """Vectors of heads in the slots of rows; int8 and float8_e4m3fn with a scale for each.

    Attributes:
      values: [B, K, S, h].
      scales: float32 [B, K, S], or None.
    """

    values: Any
    scales: Any = None

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any) -> Slots:
        quantized = jnp.dtype(dtype) in QUANTIZED
        scales = jnp.zeros(shape[:-1], jnp.float32) if quantized else None
        return cls(jnp.zeros(shape, dtype), scales)

    def write(self, new: jax.Array, slots: jax.Array) -> Slots:
        """With new [B, T, K, h] written at `slots` [B, T]; those out of range are dropped."""
        rows = jnp.arange(len(slots), dtype=slots.dtype)[:, None]
        axes = "batch", "kv_heads" if self.values.shape[1] > 1 else None, None
        scales = self.scales
        if scales is not None:
            new, new_scales = quantize(new, self.values.dtype)
            scales = constrain(scales.at[rows, :, slots].set(new_scales, mode="drop"), *axes)
        values = self.values.at[rows, :, slots].set(new.astype(self.values.dtype), mode="drop")
        return Slots(constrain(values, *axes, None), scales)

    def read(self, dtype: Any) -> jax.Array:
        """[B, K, S, h], dequantized in float32, then `dtype`."""
        if self.scales is None:
            return self.values.astype(dtype)
        return (self.values.astype(jnp.float32) * self.scales[..., None]).astype(dtype)


def own_slots(tokens: Tokens, num_slots: int) -> jax.Array:
    """int32 [B, T]: each token's slot is its position; padding has none."""
    return jnp.where(live_tokens(tokens), tokens.positions, num_slots)


def attend_slots(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens,
    scores: Scores,
    implementation: str | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """q [B, T, H, h] over k [B, K, S, h] and v of every slot, position p in slot p."""
    B, _, S, _ = k.shape
    positions = jnp.broadcast_to(jnp.arange(S, dtype=tokens.positions.dtype), (B, S))
    view = View(tokens.positions, positions)
    return slots_attention(q, k, v, view, scores, sinks=sinks, implementation=implementation)


def attend_themselves(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens,
    scores: Scores,
    implementation: str | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """q [B, T, H, h] over k [B, T, K, h] and v of the same tokens, which are whole documents."""
    where = tokens.positions, tokens.positions, tokens.segment_ids, tokens.segment_ids
    view = View(*where, in_order=True)
    return attention(q, k, v, view, scores, sinks=sinks, implementation=implementation)


@flax.struct.dataclass
class ContiguousCache:
    """Keys and values of one layer, position p of a row in its slot p.

    Rows may be of different lengths: a row's tokens are written where their positions say, padding
    (segment 0) and positions beyond the cache nowhere. A query sees slots up to its own position
    only, so that what an earlier, longer row left behind is overwritten before it can be seen.
    Layers with a sliding window keep every position too.

    Attributes:
      keys, values: in slots.
      implementation: of attention; None for the default.
    """

    keys: Slots
    values: Slots
    implementation: str | None = flax.struct.field(pytree_node=False, default=None)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        tokens: Tokens,
        scores: Scores,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, ContiguousCache]:
        """See `lm.model.LayerCache`. Each row is one document: `tokens` must not be packed."""
        slots = own_slots(tokens, self.keys.values.shape[2])
        keys, values = self.keys.write(k, slots), self.values.write(v, slots)
        how: Any = tokens, scores, self.implementation, sinks
        if tokens.in_order:
            out = attend_themselves(q, k, v, *how)
        else:
            out = attend_slots(q, keys.read(q.dtype), values.read(q.dtype), *how)
        return out, dataclasses.replace(self, keys=keys, values=values)


@flax.struct.dataclass
class SlidingCache:
    """Keys and values of one layer with a window, position p of a row in slot p mod S.

    There are as many slots as the window has positions, so that a new token takes the slot of one
    that nothing sees any more. What `ContiguousCache` says of rows and padding holds here too.

    Attributes:
      keys, values: in slots.
      positions: int32 [B, S], of what is in the slots; `UNUSED_POSITION` where there is nothing.
      implementation: of attention; None for the default.
    """

    keys: Slots
    values: Slots
    positions: Any
    implementation: str | None = flax.struct.field(pytree_node=False, default=None)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        tokens: Tokens,
        scores: Scores,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, SlidingCache]:
        """See `lm.model.LayerCache`. Each row is one document: `tokens` must not be packed.

        Raises:
          ValueError: the layer's window is not one these slots hold.
        """
        B, S = self.positions.shape
        if scores.window is None or scores.window > S:
            raise ValueError(
                f"a sliding cache of {S} positions cannot serve window={scores.window}; use a "
                "contiguous or paged one"
            )
        live = live_tokens(tokens)
        new = jnp.where(live, tokens.positions, UNUSED_POSITION)
        last = jnp.max(jnp.where(live, tokens.positions, -1), axis=1, keepdims=True)
        slots = jnp.where(live & (new > last - S), new % S, S)  # of several of a slot, the newest
        rows = jnp.arange(B, dtype=slots.dtype)[:, None]
        keys, values = self.keys.write(k, slots), self.values.write(v, slots)
        positions = self.positions.at[rows, slots].set(new, mode="drop")
        written = dataclasses.replace(self, keys=keys, values=values, positions=positions)
        if tokens.in_order:
            own = attend_themselves(q, k, v, tokens, scores, self.implementation, sinks)
            return own, written
        if q.shape[1] == 1:
            all_keys, all_values = keys.read(q.dtype), values.read(q.dtype)
            key_positions = positions
        else:
            # Later tokens of the chunk take slots that earlier ones still see. Padding may be
            # anything, and zero times NaN is NaN.
            kept = live[..., None, None]
            all_keys, all_values = (
                jnp.concatenate([x.read(q.dtype), jnp.where(kept, y, 0).swapaxes(1, 2)], axis=2)
                for x, y in ((self.keys, k.astype(q.dtype)), (self.values, v.astype(q.dtype)))
            )
            # What is not before the chunk was left behind by another document.
            first = jnp.min(new, axis=1, keepdims=True)
            old = jnp.where(self.positions < first, self.positions, UNUSED_POSITION)
            key_positions = jnp.concatenate([old, new], axis=1)
        view = View(tokens.positions, key_positions)
        how: Any = {"sinks": sinks, "implementation": self.implementation}
        return slots_attention(q, all_keys, all_values, view, scores, **how), written
