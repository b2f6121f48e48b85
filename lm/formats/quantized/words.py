"""Small whole numbers packed into 32-bit words, the first in the lowest bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def unpack(words: np.ndarray, bits: int, axis: int, order: Sequence[int] | None = None):
    """The numbers in int32 words, as uint8; `axis` becomes 32/bits times as long.

    Args:
      words: of any shape.
      bits: of a number, 4 or 8.
      axis: along which they are packed.
      order: of the numbers of a word; from the lowest bits, they are number order[0], order[1], ...
    """
    moved = np.ascontiguousarray(np.moveaxis(words, axis, -1), "<i4")
    data = moved.view(np.uint8)
    if bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)
    if order is not None:
        grouped = data.reshape(*data.shape[:-1], -1, len(order))
        data = grouped[..., np.argsort(order)].reshape(data.shape)
    return np.moveaxis(data, -1, axis)


def pack(values: np.ndarray, bits: int, axis: int, order: Sequence[int] | None = None):
    """The inverse of `unpack`: int32 words."""
    data = np.moveaxis(np.asarray(values, np.uint8), axis, -1)
    if order is not None:
        grouped = data.reshape(*data.shape[:-1], -1, len(order))
        data = grouped[..., list(order)].reshape(data.shape)
    if bits == 4:
        data = data[..., ::2] | data[..., 1::2] << 4
    return np.moveaxis(np.ascontiguousarray(data).view("<i4"), -1, axis)
