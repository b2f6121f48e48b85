"""Writing GGUF: version 3, little-endian, one tensor in memory at a time.

Not with `gguf.GGUFWriter`: it refuses empty arrays and NumPy's, so a file's own metadata could not
be written back, and opens its target itself, where a file here appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from lm.files import ggml
from lm.files.base import Path, replacing
from lm.files.gguf_values import ARRAY, SCALARS, STRING, Arrays, Strings

# Longer names cannot be loaded by ggml (GGML_MAX_NAME with its final zero).
MAX_NAME = 63
MAX_DIMS = 4
NOTHING: Mapping[str, str] = MappingProxyType({})

_CODES = {scalar.name: code for code, scalar in SCALARS.items()} | {"str": STRING, "array": ARRAY}
_BY_DTYPE = {scalar.dtype: scalar.name for scalar in SCALARS.values()}
_FORMATS = {scalar.name: scalar.format for scalar in SCALARS.values()}
_PLAIN = {dtype: name for name, dtype in ggml.PLAIN.items()}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor to write.

    Attributes:
      type: ggml's type, as `Q8_0`.
      shape: row-major.
      read: returns its bytes as a contiguous array of any dtype; called once, on writing.
    """

    type: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | GGUFTensor],
    *,
    types: Mapping[str, str] = NOTHING,
) -> None:
    """Write a GGUF file atomically.

    The same input gives the same bytes. `write_gguf(path, g.metadata, tensors, types=g.types)`
    writes a file's metadata back as it was read.

    Args:
      path: the file.
      metadata: values by key: str, bool, int, float, NumPy scalars and arrays of one dimension,
        and sequences of these, all of one type. `general.alignment` is obeyed.
      tensors: by name, an array, written in the type of its dtype, or a `GGUFTensor`.
      types: types of numbers by key, as `u8` (`GGUF.types`). By default an int is the first of u32,
        i32, u64 and i64 that holds it, and a float is f32.

    Raises:
      ValueError: a value or tensor the format cannot hold.
    """
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}; use a power of two")
    sources = {name: _source(name, value) for name, value in tensors.items()}
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(sources), len(metadata)))
    for key, value in metadata.items():
        _put_string(head, key)
        _put_value(head, key, value, types.get(key))
    sizes = []
    offset = 0
    for name, source in sources.items():
        size, entry = _entry(name, source, offset)
        head += entry
        sizes.append(size)
        offset += -(-size // alignment) * alignment
    with replacing(path) as file:
        _put_padded(file, head, alignment)
        for (name, source), size in zip(sources.items(), sizes, strict=True):
            data = np.ascontiguousarray(source.read())
            if data.nbytes != size:
                raise ValueError(
                    f"tensor {name!r} has {data.nbytes} bytes; {source.type} of shape "
                    f"{list(source.shape)} has {size}"
                )
            _put_padded(file, data.reshape(-1).view(np.uint8).data, alignment)


def _put_padded(file: BinaryIO, data: Any, alignment: int) -> None:
    file.write(data)
    file.write(bytes(-len(data) % alignment))


def _source(name: str, value: np.ndarray | GGUFTensor) -> GGUFTensor:
    if isinstance(value, GGUFTensor):
        return value
    little = value.astype(value.dtype.newbyteorder("<"), copy=False)
    if little.dtype not in _PLAIN:
        raise ValueError(
            f"tensor {name!r} is {value.dtype}; GGUF holds {', '.join(map(str, _PLAIN))}, or give "
            "a GGUFTensor with a block type"
        )
    return GGUFTensor(_PLAIN[little.dtype], value.shape, lambda: little)


def _entry(name: str, source: GGUFTensor, offset: int) -> tuple[int, bytes]:
    """The size of a tensor in bytes, and its entry in the table."""
    kind = ggml.block_type(source.type)
    shape = source.shape
    if len(name.encode()) > MAX_NAME:
        raise ValueError(f"tensor name {name!r} has more than {MAX_NAME} bytes; shorten it")
    if len(shape) > MAX_DIMS or 0 in shape:
        raise ValueError(
            f"tensor {name!r} has shape {list(shape)}; GGUF holds up to {MAX_DIMS} dimensions, "
            "none of them 0"
        )
    try:
        size = kind.row_bytes(shape[-1] if shape else 1) * math.prod(shape[:-1])
    except ValueError as error:
        raise ValueError(f"tensor {name!r} of shape {list(shape)}: {error}") from None
    entry = bytearray()
    _put_string(entry, name)
    entry += struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.code, offset)
    return size, bytes(entry)


def _put_string(out: bytearray, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    out += struct.pack("<Q", len(data)) + data


def _put_value(out: bytearray, key: str, value: Any, kind: str | None) -> None:
    """A value's type and the value."""
    kind = kind or _type_of(key, value)
    if kind not in _CODES:
        raise ValueError(f"metadata {key!r} has type {kind!r}; use one of {', '.join(_CODES)}")
    out += struct.pack("<I", _CODES[kind])
    if kind == "str":
        _put_string(out, value)
    elif kind == "array":
        _put_array(out, key, value)
    else:
        _put_number(out, key, value, kind)


def _put_number(out: bytearray, key: str, value: Any, kind: str) -> None:
    try:
        out += struct.pack(_FORMATS[kind], value)
    except (struct.error, OverflowError) as error:
        raise ValueError(
            f"metadata {key!r} is {value!r}, which is not a valid {kind}: {error}"
        ) from None


def _put_array(out: bytearray, key: str, value: Any) -> None:
    """An array: the type of its elements, their number, and the elements."""
    if isinstance(value, np.ndarray):
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        kind = _BY_DTYPE.get(little.dtype)
        if kind is None or value.ndim != 1:
            raise ValueError(
                f"metadata {key!r} is an array of {value.dtype} and {value.ndim} dimensions; "
                f"GGUF holds one dimension of {', '.join(map(str, _BY_DTYPE))}"
            )
        out += struct.pack("<IQ", _CODES[kind], len(value)) + little.tobytes()
        return
    kind = _element_type(key, value)
    out += struct.pack("<IQ", _CODES[kind], len(value))
    for i in range(len(value)):
        if kind == "str":
            _put_string(out, value.raw(i) if isinstance(value, Strings) else value[i])
        elif kind == "array":
            _put_array(out, key, value[i])
        else:
            _put_number(out, key, value[i], kind)


def _element_type(key: str, value: Any) -> str:
    if isinstance(value, Strings | Arrays):
        return "str" if isinstance(value, Strings) else "array"
    kinds = {_type_of(key, element) for element in value}
    if kinds and kinds <= {"u32", "i32"} and max(value) < 1 << 31:
        return "i32"  # as ggml's readers expect integers
    if len(kinds) != 1:
        raise ValueError(
            f"metadata {key!r} has elements of types {sorted(kinds)}; an array has one type "
            "(give a numpy array for an empty one)"
        )
    return kinds.pop()


def _type_of(key: str, value: Any) -> str:
    if isinstance(value, str | bytes):
        return "str"
    if isinstance(value, bool | np.bool_):
        return "bool"
    if isinstance(value, np.generic) and value.dtype.newbyteorder("<") in _BY_DTYPE:
        return _BY_DTYPE[value.dtype.newbyteorder("<")]
    if isinstance(value, float):
        return "f32"
    if isinstance(value, int):
        if value < 0:
            return "i32" if value >= -(1 << 31) else "i64"
        return "u32" if value < 1 << 32 else "u64"
    if isinstance(value, Sequence | np.ndarray):
        return "array"
    raise ValueError(
        f"metadata {key!r} is a {type(value).__name__}; use str, bool, int, float or an array"
    )
