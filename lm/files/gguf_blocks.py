"""Numbers from ggml's blocks, for every type, and blocks from numbers for the simple ones.

Results are float32, each operation rounded once and in the order of ggml's reference code, so that
they equal it bit for bit. The layouts are `ggml.TYPES`. Source: ggml-quants.c of ggml.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lm.files.codebooks import CODEBOOKS, EVEN_SIGNS, FP4_LEVELS, IQ4_LEVELS
from lm.files.ggml import BlockType, block_type, pack, unpack

Decoder = Callable[[np.ndarray, BlockType], np.ndarray]
Encoder = Callable[[np.ndarray, BlockType, np.ndarray], None]

# Numbers decoded at a time: temporaries stay in the processor's cache.
_CHUNK = 1 << 17
_F32 = np.float32
_IQ4 = np.array(IQ4_LEVELS, _F32)
_FP4 = np.array(FP4_LEVELS, _F32)


def dequantize(raw: np.ndarray, kind: str, shape: Sequence[int]) -> np.ndarray:
    """The numbers of a tensor.

    Args:
      raw: its bytes, uint8, contiguous.
      kind: its type, as `Q4_K`.
      shape: its shape, row-major; the last dimension is the one cut into blocks.

    Returns:
      float32 of `shape`, new memory. I64 and F64 are rounded to it.

    Raises:
      ValueError: no such type, the last dimension is no whole number of blocks, or `raw` has
        another length than `shape` needs.
    """
    layout = block_type(kind)
    size = math.prod(shape)
    nbytes = layout.row_bytes(shape[-1] if shape else 1) * math.prod(shape[:-1])
    if raw.dtype != np.uint8 or raw.size != nbytes:
        raise ValueError(
            f"{raw.size} numbers of {raw.dtype} given as {kind} of shape {list(shape)}, "
            f"which is {nbytes} of uint8"
        )
    blocks = raw.reshape(-1).view(layout.dtype)
    out = np.empty((len(blocks), layout.block), _F32)
    step = max(1, _CHUNK // layout.block)
    decode = _DECODERS[kind]
    # Any bits may stand in a scale: infinities and NaN travel on, as in ggml.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            out[start : start + step] = decode(part, layout).reshape(len(part), layout.block)
    return out.reshape(shape) if size else np.empty(shape, _F32)


def quantize(array: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of an array in a type, as ggml's reference quantizer writes them.

    Where a compiler fuses multiplication and addition, ggml itself may round a quant otherwise.

    Args:
      array: numbers, [..., multiple of the type's block].
      kind: one of `QUANTIZERS`.

    Returns:
      uint8 [..., bytes a row].

    Raises:
      ValueError: no quantizer, the last dimension is no whole number of blocks, or the array
        holds infinities or NaN, which block types cannot hold.
    """
    layout = block_type(kind)
    if kind not in _ENCODERS:
        raise ValueError(f"no quantizer for {kind!r} here; use one of {', '.join(QUANTIZERS)}")
    row_bytes = layout.row_bytes(array.shape[-1] if array.ndim else 1)
    x = np.ascontiguousarray(array, _F32).reshape(-1, layout.block)
    blocks = np.zeros(len(x), layout.dtype)
    step = max(1, _CHUNK // layout.block)
    with np.errstate(all="ignore"):
        for start in range(0, len(x), step):
            part = x[start : start + step]
            if not layout.plain and not np.isfinite(part).all():
                raise ValueError(f"infinities or NaN cannot be written as {kind}; use F16 or F32")
            _ENCODERS[kind](part, layout, blocks[start : start + step])
    return blocks.view(np.uint8).reshape(*array.shape[:-1], row_bytes)


# -- Decoders. `b` is [blocks] of the type's structure; scales are named as in ggml. --------------


def _f32(b: np.ndarray, name: str) -> np.ndarray:
    """A field as float32 [blocks, count]."""
    return b[name].astype(_F32)


def _quants(b: np.ndarray, kind: BlockType, sub: int, offset: int = 0) -> np.ndarray:
    """Quants less `offset`, float32 [blocks, sub-blocks, numbers each]."""
    quants = unpack(b, kind).astype(_F32)
    if offset:
        quants -= _F32(offset)
    return quants.reshape(len(b), sub, -1)


def _plain(b: np.ndarray, kind: BlockType) -> np.ndarray:
    return _f32(b, "x")


def _bf16(b: np.ndarray, kind: BlockType) -> np.ndarray:
    return (b["x"].astype(np.uint32) << 16).view(_F32)


def _symmetric(offset: int) -> Decoder:
    """d (q - offset)"""
    return lambda b, kind: _f32(b, "d")[:, None] * _quants(b, kind, 1, offset)


def _affine(b: np.ndarray, kind: BlockType) -> np.ndarray:
    return _f32(b, "d")[:, None] * _quants(b, kind, 1) + _f32(b, "m")[:, None]


def _whole(b: np.ndarray, kind: BlockType) -> np.ndarray:
    return _f32(b, "d") * _f32(b, "qs")


def _q2_k(b: np.ndarray, kind: BlockType) -> np.ndarray:
    scales = b["scales"]
    scale = _f32(b, "d") * (scales & 15).astype(_F32)
    minimum = _f32(b, "dmin") * (scales >> 4).astype(_F32)
    return scale[..., None] * _quants(b, kind, 16) - minimum[..., None]


def scales_q3_k(scales: np.ndarray) -> np.ndarray:
    """The 16 scales of 6 bits in the 12 bytes of Q3_K, less 32: uint8 [n, 12] -> int8 [n, 16].

    Four bits in the halves of bytes 0-7, two more in bytes 8-11: scale j has its two in byte
    8 + j % 4 at bit 2 (j // 4).
    """
    low = np.concatenate([scales[:, :8] & 15, scales[:, :8] >> 4], axis=1)
    high = (scales[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    return (low | high.reshape(-1, 16) << 4).astype(np.int8) - np.int8(32)


def _q3_k(b: np.ndarray, kind: BlockType) -> np.ndarray:
    scale = _f32(b, "d") * scales_q3_k(b["scales"]).astype(_F32)
    # A mask bit of 0 subtracts 4, which is a third bit of weight 4 and an offset of 4.
    return scale[..., None] * _quants(b, kind, 16, 4)


def scales_q4_k(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of 6 bits in the 12 bytes of Q4_K and Q5_K: [n, 12] -> two of [n, 8].

    The first four of each are the low six bits of bytes 0-3 and 4-7; the others have four bits in
    a half of bytes 8-11 (scales low, minima high) and two more at the top of bytes 0-3 and 4-7.
    """
    a, b, c = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    scale = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    minimum = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
    return scale, minimum


def _q4_k(b: np.ndarray, kind: BlockType) -> np.ndarray:
    scale, minimum = scales_q4_k(b["scales"])
    scale = _f32(b, "d") * scale.astype(_F32)
    minimum = _f32(b, "dmin") * minimum.astype(_F32)
    return scale[..., None] * _quants(b, kind, 8) - minimum[..., None]


def _q6_k(b: np.ndarray, kind: BlockType) -> np.ndarray:
    return (_f32(b, "d") * _f32(b, "scales"))[..., None] * _quants(b, kind, 16, 32)


def _tq1_0(b: np.ndarray, kind: BlockType) -> np.ndarray:
    """Five trits a byte, four in `qh`: a byte times 3^k, modulo 256, times 3 / 256 is trit k."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    parts = [(b["qs"][:, :32], 5), (b["qs"][:, 32:], 5), (b["qh"], 4)]
    trits = [(part[:, None] * powers[:n]).reshape(len(b), -1) for part, n in parts]
    quants = (np.concatenate(trits, axis=1).astype(np.uint16) * np.uint16(3)) >> 8
    return _f32(b, "d") * (quants.astype(_F32) - _F32(1))


def _halves(packed: np.ndarray) -> np.ndarray:
    """Low and high nibble of each byte in turn: [n, k] -> [n, 2 k]."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _iq4_nl(b: np.ndarray, kind: BlockType) -> np.ndarray:
    return _f32(b, "d") * _IQ4[unpack(b, kind)]


def _iq4_xs(b: np.ndarray, kind: BlockType) -> np.ndarray:
    high = (b["scales_h"] >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    scale = (_halves(b["scales_l"]) | high << 4).astype(_F32) - _F32(32)
    scale = _f32(b, "d") * scale
    return scale[..., None] * _IQ4[unpack(b, kind)].reshape(len(b), 8, 32)


@functools.cache
def e8m0_half() -> np.ndarray:
    """Half of 2^(e - 127) for each byte e: float32 [256]. The halves fit the doubled FP4_LEVELS."""
    return np.ldexp(_F32(1), np.arange(256) - 128).astype(_F32)


@functools.cache
def ue4m3_half() -> np.ndarray:
    """Half of the unsigned E4M3 of each byte, its top bit ignored: float32 [256]; 0x7F is 0."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    value[0x7F] = 0
    return (value / 2).astype(_F32)


def _mxfp4(b: np.ndarray, kind: BlockType) -> np.ndarray:
    return e8m0_half()[b["e"]] * _FP4[unpack(b, kind)]


def _nvfp4(b: np.ndarray, kind: BlockType) -> np.ndarray:
    return ue4m3_half()[b["d"]][..., None] * _FP4[unpack(b, kind)].reshape(len(b), 4, 16)


def _vectors(
    name: str, index: np.ndarray, scale: np.ndarray, signs: np.ndarray | None = None
) -> np.ndarray:
    """scale * codebook[index], negated where the bit of `signs` is set.

    Args:
      name: of the codebook.
      index: [n, vectors].
      scale: [n, any number that divides the vectors].
      signs: bytes [n, 32]; bit j of byte i is of number 8 i + j.
    """
    values = CODEBOOKS[name].table[index].reshape(*scale.shape, -1)
    values = scale[..., None] * values
    if signs is not None:
        bits = np.unpackbits(np.ascontiguousarray(signs), axis=1, bitorder="little")
        values *= (_F32(1) - _F32(2) * bits).reshape(values.shape)
    return values


def _even_signs(words: np.ndarray) -> np.ndarray:
    """Four sets of eight signs, seven bits each, in the low 28 bits of each word."""
    codes = words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    return EVEN_SIGNS[codes.reshape(len(words), -1)]


def _iq_scale(b: np.ndarray, scale: np.ndarray, factor: float) -> np.ndarray:
    return _f32(b, "d") * (_F32(0.5) + scale.astype(_F32)) * _F32(factor)


def _iq2_xxs(b: np.ndarray, kind: BlockType) -> np.ndarray:
    words = b["qs"].reshape(len(b), 8, 2)
    index = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    words = words[..., 1]
    return _vectors("IQ2_XXS", index, _iq_scale(b, words >> 28, 0.25), _even_signs(words))


def _iq2_xs(b: np.ndarray, kind: BlockType) -> np.ndarray:
    scale = _iq_scale(b, _halves(b["scales"]), 0.25)
    return _vectors("IQ2_XS", b["qs"] & 511, scale, EVEN_SIGNS[b["qs"] >> 9])


def _high_bits(qh: np.ndarray, bits: int) -> np.ndarray:
    """`bits` bits at a time of each byte, lowest first, as bits 8 and up: uint16."""
    part = qh[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8((1 << bits) - 1)
    return part.reshape(len(qh), -1).astype(np.uint16) << 8


def _iq2_s(b: np.ndarray, kind: BlockType) -> np.ndarray:
    scale = _iq_scale(b, _halves(b["scales"]), 0.25)
    return _vectors("IQ2_S", b["qs"] | _high_bits(b["qh"], 2), scale, b["signs"])


def _iq3_xxs(b: np.ndarray, kind: BlockType) -> np.ndarray:
    words = b["scales"]
    return _vectors("IQ3_XXS", b["qs"], _iq_scale(b, words >> 28, 0.5), _even_signs(words))


def _iq3_s(b: np.ndarray, kind: BlockType) -> np.ndarray:
    scale = _f32(b, "d") * (_halves(b["scales"]) * 2 + 1).astype(_F32)
    return _vectors("IQ3_S", b["qs"] | _high_bits(b["qh"], 1), scale, b["signs"])


def _iq1(index: np.ndarray, scale: np.ndarray, minus: np.ndarray) -> np.ndarray:
    """scale (codebook[index] ± 1/8); scale and minus are of [n, a divisor of 32]."""
    values = CODEBOOKS["IQ1"].table[index].reshape(*minus.shape, -1)
    values = values + np.where(minus, _F32(-0.125), _F32(0.125))[..., None]
    return scale[..., None] * values.reshape(*scale.shape, -1)


def _iq1_s(b: np.ndarray, kind: BlockType) -> np.ndarray:
    high = b["qh"][..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    index = b["qs"] | high.reshape(len(b), -1) << 8
    scale = _f32(b, "d") * ((b["qh"] >> 12 & 7) * 2 + 1).astype(_F32)
    return _iq1(index, scale, b["qh"] >> 15 != 0)


def _iq1_m(b: np.ndarray, kind: BlockType) -> np.ndarray:
    words = b["scales"]
    # The top four bits of the four words are the 16-bit float d, lowest first.
    d = np.bitwise_or.reduce(words >> 12 << np.arange(0, 16, 4, dtype=np.uint16), axis=1)
    d = d.astype(np.uint16).view(np.float16).astype(_F32)[:, None]
    scale = words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    scale = d * (scale.reshape(len(b), -1) * 2 + 1).astype(_F32)
    halves = _halves(b["qh"])
    index = b["qs"] | (halves & 7).astype(np.uint16) << 8
    return _iq1(index, scale, halves & 8 != 0)


_DECODERS: Mapping[str, Decoder] = {
    **dict.fromkeys(("F32", "F16", "F64", "I8", "I16", "I32", "I64"), _plain),
    "BF16": _bf16,
    "Q4_0": _symmetric(8),
    "Q4_1": _affine,
    "Q5_0": _symmetric(16),
    "Q5_1": _affine,
    "Q8_0": _whole,
    "Q8_1": _whole,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q4_k,
    "Q6_K": _q6_k,
    "Q8_K": _whole,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _symmetric(1),
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    # A bit is -d or d.
    "Q1_0": lambda b, kind: _f32(b, "d")[:, None] * (_F32(2) * _quants(b, kind, 1) - _F32(1)),
    "Q2_0": _symmetric(1),
}


# -- Encoders. `x` is float32 [blocks, kind.block]; they fill `b`. ---------------------------------


def _inverse(d: np.ndarray) -> np.ndarray:
    return np.where(d == 0, _F32(0), _F32(1) / d)


def _round(x: np.ndarray) -> np.ndarray:
    """To the nearest whole number, halves away from zero, as C's roundf."""
    whole = np.trunc(x)
    return whole + np.copysign(np.abs(x - whole) >= _F32(0.5), x).astype(_F32)


def _put_plain(x: np.ndarray, kind: BlockType, b: np.ndarray) -> None:
    b["x"] = x


def _put_bf16(x: np.ndarray, kind: BlockType, b: np.ndarray) -> None:
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    # Rounding would carry a NaN's bits away: cut it instead, and make it a quiet one.
    nan = bits & np.uint32(0x7FFFFFFF) > 0x7F800000
    b["x"] = np.where(nan, bits >> 16 | 64, rounded)


def _put_symmetric(bits: int) -> Encoder:
    """Q4_0 and Q5_0: the number of the largest magnitude becomes quant 0."""

    def put(x: np.ndarray, kind: BlockType, b: np.ndarray) -> None:
        largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
        half = 1 << (bits - 1)
        d = largest / _F32(-half)
        quants = np.trunc(x * _inverse(d) + _F32(half + 0.5))
        b["d"] = d
        pack(np.clip(quants, 0, 2 * half - 1).astype(np.uint8), kind, b)

    return put


def _put_affine(bits: int) -> Encoder:
    """Q4_1 and Q5_1."""

    def put(x: np.ndarray, kind: BlockType, b: np.ndarray) -> None:
        top = (1 << bits) - 1
        minimum = x.min(axis=1, keepdims=True)
        d = (x.max(axis=1, keepdims=True) - minimum) / _F32(top)
        quants = np.trunc((x - minimum) * _inverse(d) + _F32(0.5))
        b["d"], b["m"] = d, minimum
        pack(np.clip(quants, 0, top).astype(np.uint8), kind, b)

    return put


def _put_q8_0(x: np.ndarray, kind: BlockType, b: np.ndarray) -> None:
    d = np.abs(x).max(axis=1, keepdims=True) / _F32(127)
    b["d"] = d
    b["qs"] = np.clip(_round(x * _inverse(d)), -128, 127)


def _trits(x: np.ndarray, b: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 as 0, 1, 2; the scale is the largest magnitude."""
    b["d"] = d = np.abs(x).max(axis=1, keepdims=True)
    return (_round(x * _inverse(d)) + 1).astype(np.uint8)


def _put_tq1_0(x: np.ndarray, kind: BlockType, b: np.ndarray) -> None:
    trits = _trits(x, b).astype(np.uint16)
    powers = np.array([81, 27, 9, 3, 1], np.uint16)
    done = []
    for start, stop, width, n in ((0, 160, 32, 5), (160, 240, 16, 5), (240, 256, 4, 4)):
        digits = trits[:, start:stop].reshape(len(x), n, width)
        done.append((digits * powers[:n, None]).sum(axis=1))
    # Rounded up as a fraction of 243 in 256ths, so that a multiplication takes the digits out.
    packed = (np.concatenate(done, axis=1).astype(np.uint32) * 256 + 242) // 243
    b["qs"], b["qh"] = packed[:, :48], packed[:, 48:]


def _put_tq2_0(x: np.ndarray, kind: BlockType, b: np.ndarray) -> None:
    pack(_trits(x, b), kind, b)


def _put_mxfp4(x: np.ndarray, kind: BlockType, b: np.ndarray) -> None:
    largest = np.abs(x).max(axis=1)
    exponent = np.where(largest > 0, np.floor(np.log2(largest)) - _F32(2) + _F32(127), 0)
    b["e"] = exponent.astype(np.uint8)[:, None]
    values = e8m0_half()[b["e"]] * _FP4
    pack(np.abs(values[:, None] - x[..., None]).argmin(axis=2).astype(np.uint8), kind, b)


_ENCODERS: Mapping[str, Encoder] = {
    **dict.fromkeys(("F32", "F16"), _put_plain),
    "BF16": _put_bf16,
    "Q4_0": _put_symmetric(4),
    "Q4_1": _put_affine(4),
    "Q5_0": _put_symmetric(5),
    "Q5_1": _put_affine(5),
    "Q8_0": _put_q8_0,
    "TQ1_0": _put_tq1_0,
    "TQ2_0": _put_tq2_0,
    "MXFP4": _put_mxfp4,
}
QUANTIZERS = tuple(_ENCODERS)
