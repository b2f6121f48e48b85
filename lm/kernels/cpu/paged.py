"""Attention to pages in C++: see `lm.kernels.paged_attention.paged_attention` and `paged.cc`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.cpu.native import available
from lm.kernels.cpu.products import LANES

if TYPE_CHECKING:
    from lm.kernels.attention.scores import Scores
    from lm.kernels.paged_attention.pages import PageBatch, Pages

MOST_QUERIES = 8  # new tokens of a sequence; more are products of matrices, which XLA is good at
DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)


def supports(pages: Pages, batch: PageBatch) -> bool:
    """Whether the kernel can be used here, and is made for such pages and so few new tokens."""
    sizes = pages.page_size, pages.key_dim, pages.value_dim
    return (
        batch.max_q_len is not None
        and batch.max_q_len <= MOST_QUERIES
        and pages.data.dtype in DTYPES
        and not (pages.latent and pages.scales is not None)
        and not any(size % LANES for size in sizes)
        and available("paged")
    )


def cpu_paged_attention(
    q: jax.Array, pages: Pages, batch: PageBatch, scores: Scores, sinks: jax.Array | None
) -> jax.Array:
    """q [N, H, h] -> [N, H, value_dim], computed in float32.

    Raises:
      ValueError: `supports` does not hold.
    """
    if not supports(pages, batch):
        raise ValueError(
            f"the CPU kernel needs a C++ compiler, at most {MOST_QUERIES} new tokens per sequence "
            f"(max_q_len), pages and heads that are multiples of {LANES}, and one of "
            f"{', '.join(d.__name__ for d in DTYPES)}; use implementation='reference'"
        )
    none = jnp.zeros(0)
    y = jax.ffi.ffi_call(
        "lm_paged", jax.ShapeDtypeStruct((*q.shape[:2], pages.value_dim), jnp.float32)
    )(
        q.astype(jnp.float32), pages.data, none if pages.scales is None else pages.scales,
        *(x.astype(jnp.int32) for x in (batch.page_table, batch.kv_lens, batch.starts, batch.lens)),
        none if sinks is None else sinks.astype(jnp.float32),
        value_start=np.int64(pages.value_lanes.start), window=np.int64(scores.window or 0),
        scale=np.float32(scores.scale), softcap=np.float32(scores.softcap or 0.0),
    )  # fmt: skip
    return y.astype(q.dtype)
