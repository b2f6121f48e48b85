"""Reading GGUF: metadata, tensors and their bytes, from one file or the parts of a split model.

Versions 2 and 3, little-endian. Opening reads the header only: tensors are views of the mapped
file, and arrays of strings are decoded on access. Every count and length is checked against the
bytes left in the file before it is used. Source: docs/gguf.md of ggml.

Shapes: a file lists the dimensions innermost first (ggml's `ne`, where `ne[0]` is contiguous). Here
a shape is numpy's, row-major, outermost first: a linear layer's weight, `ne` = {in, out} in the
file, has shape (out, in), and `shape[-1]` is the dimension divided into blocks.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.files import ggml
from lm.files.base import (
    FileFormatError,
    MappedTensors,
    Path,
    TensorInfo,
    join_tensors,
    map_file,
    short,
)
from lm.files.gguf_blocks import dequantize
from lm.files.gguf_values import SCALARS, Cursor, read_value

MAX_DIMS = 4
MAGIC = b"GGUF"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)


class GGUF(MappedTensors):
    """A GGUF model, open for reading; types of tensors are those of `lm.files.ggml`.

    Attributes:
      paths: the file, or the parts of a split model in order.
      version: the format's version, 2 or 3.
      alignment: tensors' offsets are multiples of this, in bytes.
      metadata: values by key, in the file's order. Numbers are int and float; arrays of numbers
        are read-only NumPy arrays, arrays of strings are `Strings` and arrays of arrays `Arrays`:
        sequences that decode an element on access. A split model has that of its first part.
      types: types of the values of `metadata`: `u8`, `i8`, `u16`, `i16`, `u32`, `i32`, `f32`,
        `bool`, `str`, `array`, `u64`, `i64` or `f64`.
      tensors: tensors by name, in file order.
    """

    def __init__(
        self,
        paths: tuple[Path, ...],
        version: int,
        alignment: int,
        metadata: Mapping[str, Any],
        types: Mapping[str, str],
        tensors: Mapping[str, TensorInfo],
        mappings: tuple[mmap.mmap, ...],
    ) -> None:
        super().__init__(paths, tensors, mappings)
        self.version, self.alignment = version, alignment
        self.metadata, self.types = metadata, types

    def array(self, name: str) -> np.ndarray:
        """A tensor of a plain type in its own dtype, a view of the file.

        Raises:
          ValueError: it is stored in blocks; use `dequantize` or `raw`.
        """
        info = self.tensors[name]
        if info.type not in ggml.PLAIN:
            raise ValueError(
                f"tensor {name!r} is stored in {info.type} blocks; use dequantize() or raw()"
            )
        return self.raw(name).view(ggml.PLAIN[info.type]).reshape(info.shape)

    def dequantize(self, name: str) -> np.ndarray:
        """A tensor of any type as float32 of its shape, new memory."""
        info = self.tensors[name]
        return dequantize(self.raw(name), info.type, info.shape)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name.

    Raises:
      OSError: it cannot be opened.
    """
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def first_part(path: pathlib.Path) -> pathlib.Path:
    """By its name, the first file of the split model that a file is a part of, or the file."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return path
    return path.with_name(f"{match[1]}-00001-of-{match[3]}{match[4]}")


def read_gguf(path: Path) -> GGUF:
    """Open a GGUF file; for one part of a split model (`-00001-of-00003.gguf`), all of them.

    Raises:
      FileFormatError: the file does not follow the format, is of version 1 or big-endian, has a
        tensor type that ggml lacks or has removed, or a part is missing.
      OSError: the file cannot be opened.
    """
    first = _read_file(path, 0)
    count = first.metadata.get("split.count", 1)
    if count == 1:
        return first
    paths = _parts(path, count)
    parts = [_read_file(part, number) for number, part in enumerate(paths)]
    for number, part in enumerate(parts):
        split = part.metadata.get("split.no"), part.metadata.get("split.count")
        if split != (number, count):
            raise FileFormatError(
                paths[number], "split.no, split.count", split, f"expected {(number, count)}"
            )
    head, tensors = parts[0], join_tensors(paths, (part.tensors.values() for part in parts))
    expected = head.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise FileFormatError(
            paths[0], "split.tensors.count", expected, f"expected {len(tensors)}, as in the parts"
        )
    mappings = tuple(part._mappings[0] for part in parts)
    return GGUF(paths, head.version, head.alignment, head.metadata, head.types, tensors, mappings)


def _parts(path: Path, count: Any) -> tuple[str, ...]:
    """The files of the split model that `path` is a part of."""
    match = _PART.fullmatch(os.fspath(path))
    if match is None or not isinstance(count, int) or int(match[3]) != count or count < 1:
        raise FileFormatError(
            path,
            "split.count",
            count,
            "expected the number at the end of the name, as -00001-of-00003.gguf",
        )
    paths = tuple(f"{match[1]}-{i:05d}-of-{count:05d}{match[4]}" for i in range(1, count + 1))
    for part in paths:
        if not pathlib.Path(part).is_file():
            raise FileFormatError(path, "split.count", count, f"expected {part}, which is missing")
    return paths


def _read_file(path: Path, part: int) -> GGUF:
    mapping = map_file(path)
    cursor = Cursor(path, mapping)
    version = _read_version(cursor)
    num_tensors = cursor.u64("tensor count")
    num_values = cursor.u64("metadata count")
    # A value takes 13 bytes at least (a key's length, a type, a byte), a tensor 24.
    cursor.check_count("tensor count", num_tensors, 24)
    cursor.check_count("metadata count", num_values, 13)
    metadata, types = _read_metadata(cursor, num_values)
    alignment = _alignment(cursor, metadata, types)
    found = [_read_tensor(cursor, i) for i in range(num_tensors)]
    data = -(-cursor.at // alignment) * alignment
    tensors = _place(cursor, found, data, alignment, part)
    return GGUF((path,), version, alignment, metadata, types, tensors, (mapping,))


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        raise cursor.error("magic", magic, f"expected {MAGIC!r}: it is not a GGUF file")
    version = cursor.u32("version")
    if version & 0xFFFF == 0 and version:
        raise cursor.error("version", version, "expected little-endian; this file is big-endian")
    if version not in (2, 3):
        raise cursor.error("version", version, "expected 2 or 3; convert the model again")
    return version


def _read_metadata(cursor: Cursor, count: int) -> tuple[dict[str, Any], dict[str, str]]:
    metadata: dict[str, Any] = {}
    types: dict[str, str] = {}
    for i in range(count):
        key = cursor.string(f"metadata key {i}")
        if key in metadata:
            raise cursor.error(f"metadata key {i}", key, "expected a name not used before")
        code = cursor.u32(f"metadata {short(key)} type")
        metadata[key] = read_value(cursor, code, f"metadata {short(key)}")
        types[key] = SCALARS[code].name if code in SCALARS else {8: "str", 9: "array"}[code]
    return metadata, types


def _alignment(cursor: Cursor, metadata: Mapping[str, Any], types: Mapping[str, str]) -> int:
    alignment = metadata.get("general.alignment", 32)
    kind = types.get("general.alignment", "u32")
    if kind != "u32" or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(
            f"general.alignment ({kind})", alignment, "expected a power of two, as u32"
        )
    return alignment


def _read_tensor(cursor: Cursor, i: int) -> TensorInfo:
    """One entry of the table; its offset is still relative to the data section."""
    name = cursor.string(f"tensor {i} name")
    field = f"tensor {short(name)}"
    num_dims = cursor.u32(f"{field} dimensions")
    if num_dims > MAX_DIMS:
        raise cursor.error(f"{field} dimensions", num_dims, f"expected {MAX_DIMS} at most")
    ne = [cursor.u64(f"{field} dimension {j}") for j in range(num_dims)]
    code = cursor.u32(f"{field} type")
    offset = cursor.u64(f"{field} offset")
    kind = ggml.BY_CODE.get(code)
    if kind is None:
        removed = ggml.REMOVED.get(code)
        reason = f"that is {removed}" if removed else "expected one of ggml's types"
        raise cursor.error(f"{field} type", code, reason)
    shape = tuple(reversed(ne))
    if 0 in shape or math.prod(shape) >= 1 << 63:
        raise cursor.error(f"{field} shape", shape, "expected 1 to 2**63 - 1 numbers")
    inner = shape[-1] if shape else 1
    if inner % kind.block:
        raise cursor.error(
            f"{field} shape", shape, f"expected rows of a multiple of {kind.block} for {kind.name}"
        )
    nbytes = kind.row_bytes(inner) * math.prod(shape[:-1])
    return TensorInfo(name, kind.name, shape, offset, nbytes)


def _place(
    cursor: Cursor, found: list[TensorInfo], data: int, alignment: int, part: int
) -> dict[str, TensorInfo]:
    """Tensors by name, with offsets in the file; refuses those that overlap or leave it."""
    tensors: dict[str, TensorInfo] = {}
    for info in found:
        field = f"tensor {short(info.name)}"
        if info.name in tensors:
            raise cursor.error("tensor name", info.name, "expected a name not used before")
        if info.offset % alignment:
            raise cursor.error(
                f"{field} offset", info.offset, f"expected a multiple of {alignment}"
            )
        if data + info.offset + info.nbytes > cursor.end:
            raise cursor.error(
                f"{field} end",
                data + info.offset + info.nbytes,
                f"expected {cursor.end} at most, the file's size (is it whole?)",
            )
        tensors[info.name] = dataclasses.replace(info, offset=data + info.offset, file=part)
    last: TensorInfo | None = None
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if last is not None and last.offset + last.nbytes > info.offset:
            raise cursor.error(
                f"tensor {short(info.name)} offset",
                info.offset,
                f"expected {last.offset + last.nbytes} or more, the end of {short(last.name)}",
            )
        last = info
    return tensors
