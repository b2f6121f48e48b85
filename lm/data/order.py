"""Data order as arithmetic: keyed permutations and exact shares, pure functions of (seed, row)."""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

_ROUNDS = 8
_MASK = (1 << 64) - 1
# Finalizer constants of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

DEFAULT_BLOCK = 1000


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers: equal parts give equal keys, different parts unrelated ones."""
    key = 0
    for part in parts:
        key = _mix((key + _GOLDEN) ^ _mix(part & _MASK))
    return key


def permute(index, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of range(size) sends each index; O(1) memory in `size`.

    A Feistel network over Z_a x Z_b with a*b just above `size`, walking its cycles until the
    value falls below `size` (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
      index: int array of any shape, values in [0, size).
      size: 1 <= size < 2**62.
      key: any integer; its low 64 bits count.

    Returns:
      int64 array of the shape of `index`.

    Raises:
      ValueError: a size or an index out of range.
    """
    if not 1 <= size < 1 << 62:
        raise ValueError(f"permutation size={size} must be in [1, 2**62)")
    index = np.asarray(index, dtype=np.int64)
    if index.size and not (index.min() >= 0 and index.max() < size):
        raise ValueError(f"index range [{index.min()}, {index.max()}] exceeds range({size})")
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    keys = [derive_key(key, i) for i in range(_ROUNDS)]
    value = _feistel(index.astype(np.uint64).ravel(), a, b, keys)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _feistel(value[outside], a, b, keys)
        outside = outside[value[outside] >= size]
    return value.astype(np.int64).reshape(index.shape)


def block_counts(weights: Sequence[float], block: int = DEFAULT_BLOCK) -> tuple[int, ...]:
    """Rows each source has in a block: largest-remainder rounding of block * weight / sum.

    Weights are taken for the decimal numbers they print as, and the rest is exact.

    Raises:
      ValueError: no weights, a negative or non-finite one, all zero, or a positive one that
        rounds to no row of a block.
    """
    values = [float(w) for w in weights]
    if not values:
        raise ValueError(f"mixture weights {weights!r} must be a non-empty list of numbers")
    if not all(math.isfinite(w) and w >= 0 for w in values) or not any(values):
        raise ValueError(f"mixture weights {values} must be finite, not negative and not all zero")
    exact = [Fraction(str(w)) for w in values]
    total = sum(exact)
    quotas = [block * w / total for w in exact]
    counts = [math.floor(q) for q in quotas]
    # Ties go to the earlier source.
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: block - sum(counts)]:
        counts[i] += 1
    for i, (w, count) in enumerate(zip(exact, counts, strict=True)):
        if w and not count:
            raise ValueError(
                f"mixture weight {values[i]} of source {i} gives no row in a block of {block}; "
                f"raise the weight or use a block of at least {math.ceil(total / w)}"
            )
    return tuple(counts)


@functools.lru_cache(maxsize=64)
def block_pattern(counts: tuple[int, ...], key: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, rank) of each row of a block that holds `counts` rows of the sources.

    Both int64 [sum(counts)], read-only; the order is keyed, and the ranks of a source are 0, 1, ...
    in the order of its rows.
    """
    block = sum(counts)
    ordered = np.repeat(np.arange(len(counts)), counts)
    sources = ordered[permute(np.arange(block), block, key)]
    by_source = np.argsort(sources, kind="stable")
    starts = np.cumsum(counts) - counts
    ranks = np.empty(block, np.int64)
    ranks[by_source] = np.arange(block) - starts[ordered]
    sources.flags.writeable = ranks.flags.writeable = False
    return sources, ranks


def epoch_row(rank, num_rows: int, seed: int, source: int = 0) -> np.ndarray:
    """Plan row behind the rank-th row drawn from a source of `num_rows` rows.

    Ranks [e * num_rows, (e + 1) * num_rows) are epoch e: each row once, in an order keyed by
    (seed, source, e). `source` is any integer that identifies the source.
    """
    rank = np.asarray(rank, dtype=np.int64)
    epoch, within = np.divmod(rank, num_rows)
    rows = np.empty_like(rank)
    for e in np.unique(epoch):
        here = epoch == e
        rows[here] = permute(within[here], num_rows, derive_key(seed, 1, source, int(e)))
    return rows


def _feistel(value: np.ndarray, a: int, b: int, keys: Sequence[int]) -> np.ndarray:
    left, right = np.divmod(value, np.uint64(b))
    for i, key in enumerate(keys):
        if i % 2 == 0:
            left = (left + _mix(right ^ key) % a) % a
        else:
            right = (right + _mix(left ^ key) % b) % b
    return left * b + right


def _mix(x: Any) -> Any:
    """Mixes an integer below 2**65 or uint64 arrays; the masks keep the former to 64 bits."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)
