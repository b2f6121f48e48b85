"""Kernels called with the fields of `Scores` and `PageBatch` as keywords, for tables of cases."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm.kernels import attention as kernels
from lm.kernels import paged_attention as paged
from lm.kernels.attention import Scores
from lm.kernels.paged_attention import PageBatch


def scores_of(options: dict[str, Any]) -> tuple[Scores, dict[str, Any]]:
    """The Scores among some options, and the others."""
    names = {field.name for field in dataclasses.fields(Scores)}
    given = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return Scores(**{"scale": 1.0} | given), rest


def attention(q, k, v, view, **options) -> Any:
    scores, rest = scores_of(options)
    return kernels.attention(q, k, v, view, scores, **rest)


def attention_backward(q, k, v, view, *results, **options) -> Any:
    scores, rest = scores_of(options)
    return kernels.attention_backward(q, k, v, view, scores, *results, **rest)


def batch_of(options: dict[str, Any], *tables) -> PageBatch:
    """The PageBatch of tables, and what is taken out of some options."""
    return PageBatch(*tables, options.pop("q_lens", None), options.pop("max_q_len", None))


def paged_attention(q, pages, page_table, kv_lens, cu_q_lens, **options) -> Any:
    batch = batch_of(options, page_table, kv_lens, cu_q_lens)
    scores, rest = scores_of(options)
    return paged.paged_attention(q, pages, batch, scores, **rest)


def write_pages(pages, keys, values, page_table, kv_lens, cu_q_lens, **options) -> Any:
    batch = batch_of(options, page_table, kv_lens, cu_q_lens)
    return paged.write_pages(pages, keys, values, batch, **options)
