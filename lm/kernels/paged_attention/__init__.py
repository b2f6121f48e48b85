"""Ragged paged attention: mixed prefill and decoding over pages of keys and values."""

from lm.kernels.paged_attention.choose import (
    IMPLEMENTATIONS,
    paged_attention,
    write_pages,
)
from lm.kernels.paged_attention.pages import (
    QUANTIZED,
    PageBatch,
    Pages,
    check_tables,
    make_pages,
    quantize,
)

__all__ = [
    "IMPLEMENTATIONS",
    "QUANTIZED",
    "PageBatch",
    "Pages",
    "check_tables",
    "make_pages",
    "paged_attention",
    "quantize",
    "write_pages",
]
