"""Ragged paged attention in plain JAX: the pages of each sequence gathered, the scores held whole.

Shape suffixes as in `pages`; H query heads, G of them a key/value head, T most new tokens of a
sequence, S = M x p key positions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.kernels.attention.reference import NEGATIVE
from lm.kernels.attention.scores import Scores
from lm.kernels.paged_attention.pages import PageBatch, Pages, new_rows


def reference_write_pages(
    pages: Pages, keys: jax.Array, values: jax.Array | None, batch: PageBatch
) -> Pages:
    """See `lm.kernels.paged_attention.write_pages`."""
    P, _, p, _ = pages.data.shape
    B, M = batch.page_table.shape
    starts, lens = batch.starts, batch.lens
    new, scales = new_rows(pages, keys, values)
    token = jnp.arange(len(new), dtype=jnp.int32)
    row = jnp.searchsorted(starts, token, side="right").astype(jnp.int32) - 1
    row = jnp.clip(row, 0, B - 1)
    offset = token - starts[row]
    position = (batch.kv_lens - lens)[row] + offset
    page = batch.page_table[row, jnp.clip(position // p, 0, M - 1)]
    known = (offset >= 0) & (offset < lens[row]) & (position >= 0) & (position < M * p)
    page, slot = jnp.where(known & (page >= 0), page, P), position % p
    data = pages.data.at[page, :, slot].set(new, mode="drop")
    if scales is not None:
        scales = pages.scales.at[page, :, :, slot].set(scales, mode="drop")
    return dataclasses.replace(pages, data=data, scales=scales)


def gather_pages(pages: Pages, page_table: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of each sequence's positions, [B, K, S, W], dequantized in float32, then `dtype`."""
    P, K, p, W = pages.data.shape
    B, M = page_table.shape
    table = jnp.clip(page_table, 0, P - 1)[:, None, :]
    heads = jnp.arange(K)[None, :, None]
    rows = pages.data[table, heads]
    if pages.scales is not None:
        scales = pages.scales[table[..., None], jnp.arange(2), heads[..., None]]  # [B, K, M, 2, p]
        first, second = (scales[:, :, :, i, :, None] for i in range(2))
        rows = rows.astype(jnp.float32) * jnp.where(jnp.arange(W) < pages.split, first, second)
    return rows.astype(dtype).reshape(B, K, M * p, W)


def reference_paged_attention(
    q: jax.Array, pages: Pages, batch: PageBatch, scores: Scores, sinks: jax.Array | None = None
) -> jax.Array:
    """See `lm.kernels.paged_attention.paged_attention`."""
    N, H, _ = q.shape
    K, T = pages.data.shape[1], N if batch.max_q_len is None else batch.max_q_len
    starts, lens, kv_lens = batch.starts, batch.lens, batch.kv_lens
    offsets = jnp.arange(T, dtype=jnp.int32)
    live = offsets < lens[:, None]
    tokens = jnp.where(live, starts[:, None] + offsets, N)
    q_BTKGh = q.at[tokens].get(mode="fill", fill_value=0).reshape(len(starts), T, K, H // K, -1)
    rows = gather_pages(pages, batch.page_table, q.dtype)
    key_positions = jnp.arange(rows.shape[2], dtype=jnp.int32)
    # Slots after a sequence's end may hold anything, and zero times NaN is NaN.
    rows = jnp.where((key_positions < kv_lens[:, None])[:, None, :, None], rows, 0)

    keys = rows[..., : pages.key_dim]
    x = jnp.einsum("btkgh,bksh->bkgts", q_BTKGh, keys, preferred_element_type=jnp.float32)
    positions = (kv_lens - lens)[:, None] + offsets
    distance = positions[:, :, None] - key_positions
    seen = distance >= 0
    if scores.window is not None:
        seen &= distance < scores.window
    x = jnp.where(seen[:, None, None], scores.of(x), NEGATIVE)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, K, H // K, 1, 1)
        x = jnp.concatenate([x, jnp.broadcast_to(sink, (*x.shape[:-1], 1))], -1)
    weights = jax.nn.softmax(x, axis=-1).astype(q.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    out = jnp.einsum("bkgts,bksv->btkgv", weights, rows[..., pages.value_lanes])
    out = out.reshape(len(starts), T, H, -1).astype(q.dtype)
    return jnp.zeros((N, H, out.shape[-1]), q.dtype).at[tokens].set(out, mode="drop")
