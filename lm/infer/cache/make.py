"""Empty caches for a model."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax.numpy as jnp

from lm.infer.cache.contiguous import UNUSED_POSITION, ContiguousCache, SlidingCache, Slots
from lm.infer.cache.latent import LatentCache, make_latent_cache
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
    if kind == "paged":
        return _paged(config, batch, length, dtype, page_size, num_pages)

    def layer(a: Attention) -> Cache:
        if a.latent is not None:
            if jnp.dtype(dtype) in QUANTIZED:
                raise ValueError(
                    f"contiguous latents are not kept in {jnp.dtype(dtype).name}; use kind='paged'"
                )
            return make_latent_cache(a, batch, length, dtype)
        size = length if kind == "contiguous" or a.window is None else min(a.window, length)
        keys, values = (
            Slots.empty((batch, size, a.num_kv_heads, a.head_dim), dtype) for _ in range(2)
        )
        if size < length:
            positions = jnp.full((batch, size), UNUSED_POSITION, jnp.int32)
            return SlidingCache(keys.values, values.values, positions, keys.scales, values.scales)
        return ContiguousCache(keys.values, values.values, keys.scales, values.scales)

    return tuple(layer(config_layer.attention) for config_layer in config.layers)


def _paged(
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: Any,
    page_size: int | None,
    num_pages: int | None,
) -> tuple[PagedCache, ...]:
    if page_size is None:
        page_size = 128 if jnp.dtype(dtype) in QUANTIZED else 64
    num_pages = num_pages or batch * -(-length // page_size)

    def layer(a: Attention) -> PagedCache:
        if a.latent is None:
            sizes = (a.num_kv_heads, a.head_dim, a.head_dim)
        else:
            sizes = (1, a.latent.kv_rank + a.latent.rope_dim, a.latent.kv_rank)
        pages = make_pages(num_pages, page_size, *sizes, latent=a.latent is not None, dtype=dtype)
        return PagedCache(pages)

    return tuple(layer(config_layer.attention) for config_layer in config.layers)
