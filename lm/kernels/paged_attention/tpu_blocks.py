"""Blocks of the TPU kernels of paged attention, and the VMEM they need."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from lm.kernels.attention.flash_blocks import LANES, MIB, SMALLEST, VMEM, vmem_of
from lm.kernels.paged_attention.pages import Pages

# A core has 1 MiB of scalar memory; the compiler wants some of it. Both passes hold the table.
MAX_SCALARS = 200_000
BUFFER_BYTES = 2 * MIB  # of one of the two page buffers, where a page is no larger
MAX_PAGE_BYTES = 8 * MIB
ROWS = 512  # of queries of a head and item, in prefill


class Shape(NamedTuple):
    """What the VMEM of a pass depends on besides its blocks.

    Attributes:
      heads, group: key/value heads, and query heads of each.
      key_lanes: lanes of a query and of what is read as a key.
      value_lanes: lanes of a row that are read as the value.
      page_size, width: tokens of a page, lanes of its rows.
      itemsize, q_itemsize: bytes of a page's element and of a query's.
      quantized, sinks: whether there are scales, sinks.
    """

    heads: int
    group: int
    key_lanes: int
    value_lanes: slice
    page_size: int
    width: int
    itemsize: int
    q_itemsize: int
    quantized: bool
    sinks: bool

    @property
    def tile(self) -> int:
        return 32 // self.q_itemsize

    def rows(self, block_q: int) -> int:
        """R."""
        return -(-block_q * self.group // self.tile) * self.tile

    def vmem(self, block_q: int, num_pages: int) -> int:
        """Bytes: two of each block of operands and of pages, scratch, and a head's keys and scores.

        2% to 31% more than the compiler needed for v4 (libtpu 0.0.42), by shape.
        """
        K, R, C = self.heads, self.rows(block_q), num_pages * self.page_size
        V = self.value_lanes.stop - self.value_lanes.start
        operands = K * R * ((self.key_lanes + V) * self.q_itemsize + self.sinks * LANES * 4)
        buffers = K * C * self.width * self.itemsize
        if self.quantized:
            buffers += 2 * -(-K // 8) * 8 * C * 4
        scratch = K * R * (2 * LANES + V) * 4
        copies = 4 if self.q_itemsize == 2 else 12  # float32 is multiplied in parts
        head = 2 * C * (self.key_lanes + V) * self.q_itemsize + copies * R * C * 4
        return 2 * operands + 2 * buffers + scratch + head


def shape_of(pages: Pages, q: jax.Array, sinks: bool) -> Shape:
    """The shape of a call's arrays.

    Keys and values are read as whole rows where a slice would not end at a tile: the query has
    zeros for the value's lanes, and the value's lanes are taken from the result.
    """
    _, K, p, W = pages.data.shape
    _, H, h = q.shape
    lanes = pages.value_lanes
    cut = lanes.start % LANES or lanes.stop % LANES
    return Shape(
        K, H // K, W if h % LANES else h, slice(0, W) if cut else lanes, p, W,
        pages.data.dtype.itemsize, q.dtype.itemsize, pages.scales is not None, sinks,
    )  # fmt: skip


def choose_blocks(
    shape: Shape,
    chip: str | None,
    table_width: int,
    *,
    likely: int,
    block_q: int | None = None,
    block_kv: int | None = None,
) -> tuple[int, int]:
    """(tokens of an item, pages of a block) of a pass: what keeps the matrix units busy, and fits.

    Args:
      chip: the TPU's name in `lm.hardware.chips`; None for what fits any.
      table_width: most pages of a sequence.
      likely: tokens of an item that sequences are likely to fill; 1 for decoding.
      block_q, block_kv: tokens of an item and of a block of pages, instead of those chosen here.

    Raises:
      ValueError: nothing fits.
    """
    query = block_q
    if query is None:
        query = min(max(8, ROWS // shape.group), 1 << (likely - 1).bit_length())
        query = 1 if likely == 1 else max(2, query)
    keys = block_kv
    if keys is None:
        # Fewer keys where there are many queries, whose scores grow too.
        keys = BUFFER_BYTES // (shape.heads * shape.width * shape.itemsize)
        keys = min(keys, 512 if shape.rows(query) > LANES else 1024)
    num_pages = max(1, min(keys // shape.page_size, table_width))

    budget = vmem_of(chip)
    while shape.vmem(query, num_pages) > budget:
        fewer_keys = block_kv is None and num_pages > 1
        fewer_queries = block_q is None and query > 2 and shape.rows(query) > shape.tile
        if fewer_keys and (num_pages * shape.page_size > LANES or not fewer_queries):
            num_pages //= 2
        elif fewer_queries:
            query //= 2
        else:
            raise ValueError(
                f"paged attention of {shape.heads} key/value heads with block_q={query} and "
                f"block_kv={num_pages * shape.page_size} needs "
                f"{shape.vmem(query, num_pages) / MIB:.1f} MiB of VMEM, {chip or 'any TPU'} has "
                f"{budget / MIB:.0f}: use smaller blocks or pages, or split the heads"
            )
    return query, num_pages


def check_sizes(pages: Pages, page_table: jax.Array, chip: str | None) -> None:
    """Raises ValueError for pages and tables the kernels cannot hold."""
    _, K, p, W = pages.data.shape
    itemsize = pages.data.dtype.itemsize
    multiple = 32 // itemsize if pages.scales is None else LANES
    if p % multiple:
        raise ValueError(
            f"page_size={p} of {pages.data.dtype.name} pages; the TPU kernel wants a multiple of "
            f"{multiple}"
        )
    B, M = page_table.shape
    if B * M > MAX_SCALARS:
        raise ValueError(
            f"page_table of {B} x {M} = {B * M} entries; scalar memory holds {MAX_SCALARS}: use "
            f"pages of {p * 2 ** math.ceil(math.log2(B * M / MAX_SCALARS))} tokens or more, or "
            "fewer sequences"
        )
    size, most = K * p * W * itemsize, min(MAX_PAGE_BYTES, VMEM.get(chip or "", SMALLEST) // 4)
    if size > most:
        fitting = p * most // size // multiple * multiple
        raise ValueError(
            f"a page of {p} tokens takes {size} bytes; the TPU kernel holds two of {most}: use "
            f"pages of {fitting} tokens or less"
        )
