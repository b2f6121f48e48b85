"""Empty caches for a model."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax.numpy as jnp

from lm.infer.cache.contiguous import UNUSED_POSITION, ContiguousCache, SlidingCache, Slots
from lm.infer.cache.latent import LatentCache
from lm.infer.cache.paged import PagedCache
from lm.kernels.paged_attention import QUANTIZED, make_pages
from lm.model import Attention, ModelConfig

CacheKind = Literal["contiguous", "sliding", "paged"]
Cache = ContiguousCache | SlidingCache | PagedCache | LatentCache


def make_cache(
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: Any = jnp.float32,
    *,
    kind: CacheKind = "contiguous",
    page_size: int | None = None,
    num_pages: int | None = None,
) -> tuple[Cache, ...]:
    """Empty caches, one per layer, of `length` positions for `batch` rows.

    Args:
      config: the model.
      batch, length: rows, and positions of each.
      dtype: of keys and values; int8 and float8_e4m3fn are kept with a float32 scale for each token
        and head (of latents: for the latent and for its rotary part), and multiplied by it where
        they are read.
      kind: "contiguous"; "sliding", which for layers with a window shorter than `length` keeps the
        window only; or "paged".
      page_size: tokens of a page; None for 64, or 128 for int8 and float8_e4m3fn.
      num_pages: of each layer's pool; None for enough for every row (`own_page_table`).

    Raises:
      ValueError: an unknown kind; a contiguous cache of quantized latents.
    """
    if kind not in get_args(CacheKind):
        raise ValueError(f"cache kind {kind!r} is unknown; use {', '.join(get_args(CacheKind))}")
    quantized = jnp.dtype(dtype) in QUANTIZED
    if page_size is None:
        page_size = 128 if quantized else 64
    num_pages = num_pages or batch * -(-length // page_size)

    def layer(a: Attention) -> Cache:
        latent, heads, key_dim, value_dim = a.latent, a.num_kv_heads, a.head_dim, a.head_dim
        if latent is not None:
            heads, key_dim, value_dim = 1, latent.kv_rank + latent.rope_dim, latent.kv_rank
        if kind == "paged":
            sizes = num_pages, page_size, heads, key_dim, value_dim
            return PagedCache(make_pages(*sizes, latent=latent is not None, dtype=dtype))
        window = a.window if kind == "sliding" and latent is None else None
        size = length if window is None else min(window, length)
        keys, values = (Slots.empty((batch, heads, size, key_dim), dtype) for _ in range(2))
        if latent is not None:
            if quantized:
                raise ValueError(
                    f"contiguous latents are not kept in {jnp.dtype(dtype).name}; use kind='paged'"
                )
            return LatentCache(keys)
        if size < length:
            positions = jnp.full((batch, size), UNUSED_POSITION, jnp.int32)
            return SlidingCache(keys, values, positions)
        return ContiguousCache(keys, values)

    return tuple(layer(config_layer.attention) for config_layer in config.layers)
