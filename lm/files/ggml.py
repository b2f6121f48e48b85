"""The tensor types of ggml: codes, blocks, and the position of each number in a block, as data.

A tensor's innermost dimension is divided into blocks of `block` numbers and `nbytes` bytes: the
`fields` of a little-endian C struct without padding. Most types keep their quants as bit planes
(`planes`); what a number is, given its quant and scales, is code (the `gguf` package's for NumPy,
and the leaves' that compute on blocks). Source: ggml-common.h and ggml.h of ggml.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Field:
    """One member of a block: `count` numbers of a little-endian numpy dtype."""

    name: str
    dtype: str
    count: int = 1

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * self.count


@dataclasses.dataclass(frozen=True)
class Plane:
    """`bits` of every quant, in the bytes of one field.

    `chunk` consecutive bytes hold `chunk * 8 // bits` consecutive quants: first the lowest bits of
    each of these bytes in turn, then the next higher ones. A quant is the sum of its planes, each
    shifted left by `shift`. So nibbles with `chunk=16` put quant j < 16 into the low half of byte
    j and quant 16 + j into its high half; one bit with `chunk=1` is the little-endian bit string.
    """

    field: str
    bits: int
    chunk: int
    shift: int = 0


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A tensor type.

    Attributes:
      name: as `Q4_K`.
      code: its number in files.
      block: numbers per block.
      fields: the block's members in order.
      planes: bit planes of the quants; empty where those are integers or codebook indices.
    """

    name: str
    code: int
    block: int
    fields: tuple[Field, ...]
    planes: tuple[Plane, ...] = ()

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes per block."""
        return sum(field.nbytes for field in self.fields)

    @functools.cached_property
    def offsets(self) -> Mapping[str, int]:
        """The first byte of each field within the block."""
        ends = itertools.accumulate((field.nbytes for field in self.fields), initial=0)
        return dict(zip((field.name for field in self.fields), ends, strict=False))

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """The block as a numpy structure: `raw.view(dtype)["qs"]` is [blocks, count]."""
        return np.dtype([(field.name, field.dtype, (field.count,)) for field in self.fields])

    @property
    def plain(self) -> bool:
        """Whether a block is one number that needs no decoding."""
        return self.block == 1

    def row_bytes(self, length: int) -> int:
        """Bytes of `length` numbers. Raises ValueError where they do not fill whole blocks."""
        if length % self.block:
            raise ValueError(
                f"{length} is not a multiple of {self.name}'s block size; "
                f"use a multiple of {self.block}"
            )
        return length // self.block * self.nbytes


def _type(name: str, code: int, block: int, fields: str, planes: Sequence[Plane] = ()) -> BlockType:
    """`fields` as `"d:<f2 qs:u1*16"`."""
    parts = []
    for text in fields.split():
        field, spec = text.split(":")
        dtype, _, count = spec.partition("*")
        parts.append(Field(field, dtype, int(count or 1)))
    return BlockType(name, code, block, tuple(parts), tuple(planes))


_NIBBLES = (Plane("qs", 4, 16),)
_FIFTH = Plane("qh", 1, 1, 4)
_PAIRS = Plane("qs", 2, 32)

_TYPES = (
    _type("F32", 0, 1, "x:<f4"),
    _type("F16", 1, 1, "x:<f2"),
    _type("Q4_0", 2, 32, "d:<f2 qs:u1*16", _NIBBLES),
    _type("Q4_1", 3, 32, "d:<f2 m:<f2 qs:u1*16", _NIBBLES),
    _type("Q5_0", 6, 32, "d:<f2 qh:u1*4 qs:u1*16", [*_NIBBLES, _FIFTH]),
    _type("Q5_1", 7, 32, "d:<f2 m:<f2 qh:u1*4 qs:u1*16", [*_NIBBLES, _FIFTH]),
    _type("Q8_0", 8, 32, "d:<f2 qs:i1*32"),
    _type("Q8_1", 9, 32, "d:<f2 s:<f2 qs:i1*32"),
    _type("Q2_K", 10, 256, "scales:u1*16 qs:u1*64 d:<f2 dmin:<f2", [_PAIRS]),
    _type(
        "Q3_K",
        11,
        256,
        "hmask:u1*32 qs:u1*64 scales:u1*12 d:<f2",
        [_PAIRS, Plane("hmask", 1, 32, 2)],
    ),
    _type("Q4_K", 12, 256, "d:<f2 dmin:<f2 scales:u1*12 qs:u1*128", [Plane("qs", 4, 32)]),
    _type(
        "Q5_K",
        13,
        256,
        "d:<f2 dmin:<f2 scales:u1*12 qh:u1*32 qs:u1*128",
        [Plane("qs", 4, 32), Plane("qh", 1, 32, 4)],
    ),
    _type(
        "Q6_K",
        14,
        256,
        "ql:u1*128 qh:u1*64 scales:i1*16 d:<f2",
        [Plane("ql", 4, 64), Plane("qh", 2, 32, 4)],
    ),
    _type("Q8_K", 15, 256, "d:<f4 qs:i1*256 bsums:<i2*16"),
    # Indices into codebooks and signs.
    _type("IQ2_XXS", 16, 256, "d:<f2 qs:<u4*16"),
    _type("IQ2_XS", 17, 256, "d:<f2 qs:<u2*32 scales:u1*8"),
    _type("IQ3_XXS", 18, 256, "d:<f2 qs:u1*64 scales:<u4*8"),
    _type("IQ1_S", 19, 256, "d:<f2 qs:u1*32 qh:<u2*8"),
    _type("IQ4_NL", 20, 32, "d:<f2 qs:u1*16", _NIBBLES),
    _type("IQ3_S", 21, 256, "d:<f2 qs:u1*64 qh:u1*8 signs:u1*32 scales:u1*4"),
    _type("IQ2_S", 22, 256, "d:<f2 qs:u1*32 signs:u1*32 qh:u1*8 scales:u1*8"),
    _type("IQ4_XS", 23, 256, "d:<f2 scales_h:<u2 scales_l:u1*4 qs:u1*128", _NIBBLES),
    _type("I8", 24, 1, "x:i1"),
    _type("I16", 25, 1, "x:<i2"),
    _type("I32", 26, 1, "x:<i4"),
    _type("I64", 27, 1, "x:<i8"),
    _type("F64", 28, 1, "x:<f8"),
    _type("IQ1_M", 29, 256, "qs:u1*32 qh:u1*16 scales:<u2*4"),
    _type("BF16", 30, 1, "x:<u2"),
    _type("TQ1_0", 34, 256, "qs:u1*48 qh:u1*4 d:<f2"),
    _type("TQ2_0", 35, 256, "qs:u1*64 d:<f2", [_PAIRS]),
    _type("MXFP4", 39, 32, "e:u1 qs:u1*16", _NIBBLES),
    _type("NVFP4", 40, 64, "d:u1*4 qs:u1*32", [Plane("qs", 4, 8)]),
    _type("Q1_0", 41, 128, "d:<f2 qs:u1*16", [Plane("qs", 1, 1)]),
    _type("Q2_0", 42, 64, "d:<f2 qs:u1*16", [Plane("qs", 2, 1)]),
)

# The numbers that IQ4_NL and IQ4_XS index.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Of MXFP4 and NVFP4: twice the values of E2M1 (OCP Microscaling Formats 1.0).
FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

TYPES: Mapping[str, BlockType] = {kind.name: kind for kind in _TYPES}
# The plain types and their dtypes in memory.
PLAIN: Mapping[str, np.dtype] = {
    kind.name: np.dtype(kind.fields[0].dtype) for kind in _TYPES if kind.plain
} | {"BF16": np.dtype(ml_dtypes.bfloat16)}
BY_CODE: Mapping[int, BlockType] = {kind.code: kind for kind in _TYPES}
# Once in ggml, with what became of them.
REMOVED: Mapping[int, str] = {
    4: "Q4_2, which ggml removed; requantize from the original",
    5: "Q4_3, which ggml removed; requantize from the original",
    31: "Q4_0_4_4, which ggml removed; use Q4_0",
    32: "Q4_0_4_8, which ggml removed; use Q4_0",
    33: "Q4_0_8_8, which ggml removed; use Q4_0",
    36: "IQ4_NL_4_4, which ggml removed; use IQ4_NL",
    37: "IQ4_NL_4_8, which ggml removed; use IQ4_NL",
    38: "IQ4_NL_8_8, which ggml removed; use IQ4_NL",
}


def block_type(name: str) -> BlockType:
    """The type of a name as `Q4_K`. Raises ValueError, listing them, where there is none."""
    if name not in TYPES:
        raise ValueError(f"there is no ggml type {name!r}; use one of {', '.join(TYPES)}")
    return TYPES[name]
