"""What the process asks of its host."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def keep_freed_memory() -> None:
    """Keep the memory a step frees for the next one, instead of giving it back to the system.

    On CPU a step's temporary arrays are gigabytes; mapped anew, page by page, they cost a fifth of
    the step. Call it before JAX's first use. Where the C library is not glibc, nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(m_mmap_max, 0)
        library.mallopt(m_trim_threshold, -1)
        library.mallopt(m_arena_max, 1)
