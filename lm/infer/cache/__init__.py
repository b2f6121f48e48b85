"""Key/value caches: one call writes the new keys and values of a layer and reads them all."""

from lm.infer.cache.contiguous import ContiguousCache, SlidingCache
from lm.infer.cache.make import Cache, CacheKind, make_cache
from lm.infer.cache.paged import (
    OutOfPages,
    PageAllocator,
    PagedCache,
    copy_pages,
    in_pages,
    make_page_table,
    own_page_table,
)

__all__ = [
    "Cache",
    "CacheKind",
    "ContiguousCache",
    "OutOfPages",
    "PageAllocator",
    "PagedCache",
    "SlidingCache",
    "copy_pages",
    "in_pages",
    "make_cache",
    "make_page_table",
    "own_page_table",
]
