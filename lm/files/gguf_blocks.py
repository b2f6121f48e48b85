"""Numbers from ggml's blocks, for every type, and blocks from numbers for the simple ones.

The `gguf` package (ggml-org) computes both, bit for bit as ggml's reference code; here are the
checks, bounded memory, and the four types that the package does not decode. The layouts of blocks
are `ggml.TYPES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lm.files.ggml import BlockType, block_type

# Numbers decoded at a time: temporaries stay in the processor's cache.
CHUNK = 1 << 17
QUANTIZERS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q8_0", "TQ1_0", "TQ2_0", "MXFP4"),
)
_F32 = np.float32


def dequantize(raw: np.ndarray, kind: str, shape: Sequence[int]) -> np.ndarray:
    """The numbers of a tensor.

    Args:
      raw: its bytes, uint8, contiguous.
      kind: its type, as `Q4_K`.
      shape: its shape, row-major; the last dimension is the one cut into blocks.

    Returns:
      float32 of `shape`, new memory. I64 and F64 are rounded to it.

    Raises:
      ValueError: there is no such type, the last dimension is not a multiple of the block size, or
        `raw` has another length than `shape` needs.
    """
    layout = block_type(kind)
    nbytes = layout.row_bytes(shape[-1] if shape else 1) * math.prod(shape[:-1])
    if raw.dtype != np.uint8 or raw.size != nbytes:
        raise ValueError(
            f"{raw.size} numbers of {raw.dtype} given as {kind} of shape {list(shape)}, "
            f"which is {nbytes} of uint8"
        )
    blocks = raw.reshape(-1, layout.nbytes)
    out = np.empty((len(blocks), layout.block), _F32)
    step = max(1, CHUNK // layout.block)
    # Any bits may stand in a scale: infinities and NaN travel on, as in ggml.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            part = out[start : start + step]
            part[...] = _decode(blocks[start : start + step], layout).reshape(part.shape)
    return out.reshape(shape)


def quantize(array: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of an array in a type, as ggml's reference quantizer writes them.

    Where a compiler fuses multiplication and addition, ggml itself may round a quant otherwise.

    Args:
      array: numbers, [..., multiple of the type's block].
      kind: one of `QUANTIZERS`.

    Returns:
      uint8 [..., bytes per row].

    Raises:
      ValueError: there is no quantizer, the last dimension is not a multiple of the block size, or
        the array holds infinities or NaN, which block types cannot hold.
    """
    import gguf  # 0.1 s, which readers of other files need not wait for

    layout = block_type(kind)
    if kind not in QUANTIZERS:
        raise ValueError(f"no quantizer for {kind!r} here; use one of {', '.join(QUANTIZERS)}")
    row_bytes = layout.row_bytes(array.shape[-1] if array.ndim else 1)
    x = np.ascontiguousarray(array, _F32).reshape(-1, layout.block)
    blocks = np.empty((len(x), layout.nbytes), np.uint8)
    step = max(1, CHUNK // layout.block)
    with np.errstate(all="ignore"):
        for start in range(0, len(x), step):
            part = x[start : start + step].reshape(1, -1)
            if not layout.plain and not np.isfinite(part).all():
                raise ValueError(f"infinities or NaN cannot be written as {kind}; use F16 or F32")
            data = gguf.quants.quantize(part, gguf.GGMLQuantizationType[kind])
            blocks[start : start + step] = data.view(np.uint8).reshape(-1, layout.nbytes)
    return blocks.reshape(*array.shape[:-1], row_bytes)


def _decode(raw: np.ndarray, kind: BlockType) -> np.ndarray:
    """float32 of blocks, uint8 [blocks, bytes]."""
    b = raw.view(kind.dtype)[:, 0]
    if kind.plain and kind.name != "BF16":
        return b["x"].astype(_F32)
    if kind.name in ("Q8_1", "Q8_K"):
        return b["d"].astype(_F32) * b["qs"].astype(_F32)
    if kind.name == "Q1_0":  # a bit is -d or d
        bits = np.unpackbits(b["qs"], axis=1, bitorder="little")
        return b["d"].astype(_F32) * (bits.astype(_F32) * _F32(2) - _F32(1))
    if kind.name == "Q2_0":
        quants = b["qs"][..., None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
        return b["d"].astype(_F32) * (quants.reshape(len(b), -1).astype(_F32) - _F32(1))
    import gguf  # see above

    # As one row: the package computes 16 rows at a time.
    return gguf.quants.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType[kind.name])
