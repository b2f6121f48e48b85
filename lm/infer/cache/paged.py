"""Keys and values in pages, and which sequences hold which page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.infer.cache.contiguous import attend_themselves
from lm.kernels.attention import Scores
from lm.kernels.paged_attention import PageBatch, Pages, paged_attention, write_pages
from lm.model import Tokens
from lm.sharding import constrain


@flax.struct.dataclass
class PagedCache:
    """Keys and values, or latents, of one layer, position p of a row in its page p // page_size.

    Padding, positions beyond the table and table entries below zero are written nowhere.

    Latents are attended in the absorbed form, long prompts too: 2 (576 + 512) = 2176 operations a
    query, key and head at DeepSeek's sizes, 3.4 times the 2 (192 + 128) = 640 of the expanded form,
    which `LatentCache` takes for these.

    Attributes:
      pages: the pool. `Tokens.pages` says which of them are whose.
      implementation: of attention; None for the default.
    """

    pages: Pages
    implementation: str | None = flax.struct.field(pytree_node=False, default=None)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        tokens: Tokens,
        scores: Scores,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, PagedCache]:
        """See `lm.model.LayerCache`.

        Raises:
          ValueError: the tokens have no pages.
        """
        if tokens.pages is None:
            raise ValueError("a paged cache needs Tokens.pages; make them with in_pages")
        B, T, H, _ = q.shape
        flat = [x.reshape(B * T, *x.shape[2:]) for x in (q, k, v)]
        values = None if self.pages.latent else flat[2]
        how: dict[str, Any] = {"implementation": self.implementation}
        pages = write_pages(self.pages, flat[1], values, tokens.pages, **how)
        pages = dataclasses.replace(pages, data=_constrained(pages.data))
        written = dataclasses.replace(self, pages=pages)
        if tokens.in_order and not self.pages.latent and self.implementation is None:
            return attend_themselves(q, k, v, tokens, scores, None, sinks), written
        out = paged_attention(flat[0], pages, tokens.pages, scores, sinks=sinks, **how)
        return out.reshape(B, T, H, -1), written


def in_pages(tokens: Tokens, page_table: jax.Array) -> Tokens:
    """Rows [B, T] of one document each, at the pages int32 [B, M] of a table.

    A row's new tokens stand together, at positions in order and without gaps; padding (segment 0)
    may be around them.
    """
    B, T = tokens.positions.shape
    live = jnp.ones((B, T), bool)
    if tokens.segment_ids is not None:
        live = tokens.segment_ids != 0
    lens = jnp.sum(live, axis=1, dtype=jnp.int32)
    ends = jnp.max(jnp.where(live, tokens.positions + 1, 0), axis=1).astype(jnp.int32)
    rows = jnp.arange(B + 1, dtype=jnp.int32) * T
    starts = rows.at[:-1].add(jnp.argmax(live, axis=1).astype(jnp.int32))
    return dataclasses.replace(tokens, pages=PageBatch(page_table, ends, starts, lens, T))


def own_page_table(cache: Sequence[Any], batch: int) -> jax.Array | None:
    """int32 [batch, M]: pools shared out evenly, as `make_cache` sizes them; None without pages."""
    pools = [layer.pages for layer in cache if isinstance(layer, PagedCache)]
    if not pools:
        return None
    return jnp.arange(pools[0].data.shape[0], dtype=jnp.int32).reshape(batch, -1)


def _constrained(data: jax.Array) -> jax.Array:
    return constrain(data, None, "kv_heads" if data.shape[1] > 1 else None, None, None)


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Allocates the pages of a pool. A page is free again once every holder has freed it.

    Attributes:
      num_pages, page_size: of the pool.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Raises ValueError for sizes below one."""
        for name, size in (("num_pages", num_pages), ("page_size", page_size)):
            if size < 1:
                raise ValueError(f"{name}={size}; use 1 or more")
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def holders(self, page: int) -> int:
        """Number of holders of a page."""
        return self._holders[self._known(page)]

    def pages_for(self, num_tokens: int) -> int:
        """Number of pages that hold `num_tokens`."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num: int) -> list[int]:
        """`num` free pages.

        Raises:
          OutOfPages: fewer are free; none is allocated.
          ValueError: `num` is negative.
        """
        if num < 0:
            raise ValueError(f"num={num} pages; use 0 or more")
        if num > len(self._free):
            raise OutOfPages(
                f"{num} pages of {self.page_size} tokens wanted, {len(self._free)} of "
                f"{self.num_pages} are free; free some, or make a larger pool"
            )
        pages = [self._free.pop() for _ in range(num)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Frees pages.

        Raises:
          ValueError: a page is not allocated, or does not exist; nothing is freed.
        """
        pages = list(pages)
        for page in pages:
            if self._holders[self._known(page)] < pages.count(page):
                raise ValueError(f"page {page} is freed more often than it was allocated")
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def fork(
        self, pages: Sequence[int], num_tokens: int
    ) -> tuple[list[int], tuple[int, int] | None]:
        """The pages of a second sequence that begins with the first `num_tokens` of one.

        Full pages are shared. The one that both would write to is not: it must be copied
        (`copy_pages`).

        Returns:
          The pages, and (from, to) of the copy, if any.

        Raises:
          OutOfPages: no page is left to copy to; nothing is shared.
          ValueError: the pages hold fewer tokens, or one of them is not allocated.
        """
        if not 0 <= num_tokens <= len(pages) * self.page_size:
            raise ValueError(
                f"num_tokens={num_tokens} of {len(pages)} pages of {self.page_size} tokens"
            )
        shared = list(pages[: num_tokens // self.page_size])
        for page in pages[: self.pages_for(num_tokens)]:
            if not self._holders[self._known(page)]:
                raise ValueError(f"page {page} is free; it has nothing to share")
        copied = None
        if num_tokens % self.page_size:
            copied = pages[len(shared)], self.allocate(1)[0]
        for page in shared:
            self._holders[page] += 1
        return shared + ([copied[1]] if copied else []), copied

    def _known(self, page: int) -> int:
        if not 0 <= page < self.num_pages:
            raise ValueError(f"page {page} does not exist; there are 0..{self.num_pages - 1}")
        return page


def make_page_table(sequences: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """int32 [B, width] of each sequence's pages in order, filled up with -1.

    Raises:
      ValueError: a sequence has more pages.
    """
    table = np.full((len(sequences), width), -1, np.int32)
    for row, pages in enumerate(sequences):
        if len(pages) > width:
            raise ValueError(f"sequence {row} has {len(pages)} pages; the table is {width} wide")
        table[row, : len(pages)] = pages
    return table


def copy_pages(pages: Pages, sources: jax.Array, targets: jax.Array) -> Pages:
    """The pool with pages `sources` int32 [n] copied to `targets`."""
    return jax.tree.map(lambda x: x.at[targets].set(x[sources]), pages)
