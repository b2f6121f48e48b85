"""A byte n-gram model: the baseline a language model's bits per byte must beat.

Interpolated Kneser-Ney smoothing (Kneser & Ney, 1995; in the form of Chen & Goodman, 1999, with
one discount an order), with the uniform distribution over 256 bytes below the unigrams.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class _Order:
    """Statistics of n-grams of one length: a sorted table with their (continuation) counts, and
    per context its total count and the probability mass that discounting frees."""

    ngrams: np.ndarray  # [n] uint32, the bytes of an n-gram, first highest
    counts: np.ndarray  # [n]
    contexts: np.ndarray  # [c] uint32
    totals: np.ndarray  # [c]
    freed: np.ndarray  # [c] probability
    discount: float


class ByteNgram:
    """p(byte | the previous `order` bytes); a document starts after `order` newlines."""

    def __init__(self, orders: list[_Order]):
        self._orders = orders
        self.order = len(orders) - 1

    @classmethod
    def fit(cls, documents: Iterable[bytes], order: int = 3) -> "ByteNgram":
        """Counts the n-grams of `documents`; `order` is the number of bytes conditioned on.

        Raises:
          ValueError: an order outside 0..3, or documents without a byte.
        """
        if not 0 <= order <= 3:
            raise ValueError(f"order={order} must be 0, 1, 2 or 3 previous bytes")
        codes = _codes(documents, order)
        if not codes.size:
            raise ValueError("no bytes to fit an n-gram model to: every document is empty")
        ngrams, counts = np.unique(codes, return_counts=True)
        orders = []
        for n in range(order, -1, -1):
            orders.append(_fit_order(ngrams, counts))
            if n:
                # Below the highest order an n-gram counts once for each byte seen before it.
                shorter = ngrams & np.uint32((1 << 8 * n) - 1)
                ngrams, counts = np.unique(shorter, return_counts=True)
        return cls(orders[::-1])

    def log2_probs(self, documents: Iterable[bytes]) -> np.ndarray:
        """log2 p of each byte, documents end to end: float64 [bytes]."""
        codes, inverse = np.unique(_codes(documents, self.order), return_inverse=True)
        probs = np.full(codes.shape, 1 / 256)
        for n, o in enumerate(self._orders):
            ngrams = codes & np.uint32((1 << 8 * (n + 1)) - 1)
            counts = _lookup(o.ngrams, o.counts, ngrams)
            totals = _lookup(o.contexts, o.totals, ngrams >> np.uint32(8))
            freed = _lookup(o.contexts, o.freed, ngrams >> np.uint32(8))
            seen = np.maximum(counts - o.discount, 0) / np.maximum(totals, 1)
            probs = np.where(totals > 0, seen + freed * probs, probs)
        return np.log2(probs)[inverse]

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Mean bits a byte of `documents`.

        Raises:
          ValueError: documents without a byte.
        """
        logs = self.log2_probs(documents)
        if not logs.size:
            raise ValueError("no bytes to score: every document is empty")
        return float(-logs.mean())


def _codes(documents: Iterable[bytes], order: int) -> np.ndarray:
    """Each byte with the `order` bytes before it, as one integer: uint32 [bytes]."""
    start = b"\n" * order
    joined = bytearray()
    lengths = []
    for document in documents:
        joined += start
        joined += document
        lengths.append(len(document))
    text = np.frombuffer(bytes(joined), np.uint8)
    size = max(0, len(text) - order)
    codes = np.zeros(size, np.uint32)
    for i in range(order + 1):
        codes = codes << np.uint32(8) | text[i : i + size]
    # Windows that predict a newline of a later document's start are not text.
    keep = np.ones(size, bool)
    ends = np.cumsum(np.asarray(lengths, np.int64) + order)[:-1]
    for i in range(order):
        keep[ends + i - order] = False
    return codes[keep]


def _fit_order(ngrams: np.ndarray, counts: np.ndarray) -> _Order:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    discount = once / (once + 2 * twice) if once and twice else 0.5
    contexts, first = np.unique(ngrams >> np.uint32(8), return_index=True)
    totals = np.add.reduceat(counts, first)
    kinds = np.diff(np.append(first, len(ngrams)))
    return _Order(ngrams, counts, contexts, totals, discount * kinds / totals, discount)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
