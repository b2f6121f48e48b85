"""Small files of every feature, written byte by byte, that remember where their fields are.

They do not go through the writers of `lm.files`: a fault common to both would not show.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Name, code, numbers and bytes per block of all types in ggml.h.
_TYPES = (
    "F32 0 1 4, F16 1 1 2, Q4_0 2 32 18, Q4_1 3 32 20, Q5_0 6 32 22, Q5_1 7 32 24, "
    "Q8_0 8 32 34, Q8_1 9 32 36, Q2_K 10 256 84, Q3_K 11 256 110, Q4_K 12 256 144, "
    "Q5_K 13 256 176, Q6_K 14 256 210, Q8_K 15 256 292, IQ2_XXS 16 256 66, IQ2_XS 17 256 74, "
    "IQ3_XXS 18 256 98, IQ1_S 19 256 50, IQ4_NL 20 32 18, IQ3_S 21 256 110, IQ2_S 22 256 82, "
    "IQ4_XS 23 256 136, I8 24 1 1, I16 25 1 2, I32 26 1 4, I64 27 1 8, F64 28 1 8, "
    "IQ1_M 29 256 56, BF16 30 1 2, TQ1_0 34 256 54, TQ2_0 35 256 66, MXFP4 39 32 17, "
    "NVFP4 40 64 36, Q1_0 41 128 18, Q2_0 42 64 18"
)
GGML_TYPES = {
    name: (int(code), int(block), int(nbytes))
    for name, code, block, nbytes in (entry.split() for entry in _TYPES.split(", "))
}
VALUE_CODES = {
    "u8": (0, "<B"), "i8": (1, "<b"), "u16": (2, "<H"), "i16": (3, "<h"), "u32": (4, "<I"),
    "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<B"), "u64": (10, "<Q"), "i64": (11, "<q"),
    "f64": (12, "<d"),
}  # fmt: skip


@dataclasses.dataclass
class Builder:
    """Bytes, and the (offset, size) of each number that describes the file."""

    data: bytearray = dataclasses.field(default_factory=bytearray)
    fields: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def number(self, value: int, size: int) -> None:
        self.fields.append((len(self.data), size))
        self.data += value.to_bytes(size, "little")

    def string(self, text: str | bytes) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.number(len(raw), 8)
        self.data += raw

    def value(self, kind: str, value: Any) -> None:
        """A metadata value: `str`, a kind of `VALUE_CODES`, or these with `[]` behind."""
        if kind.endswith("[]"):
            self.number(9, 4)
            self.array(kind[:-2], value)
        elif kind == "str":
            self.number(8, 4)
            self.string(value)
        else:
            code, form = VALUE_CODES[kind]
            self.number(code, 4)
            self.data += struct.pack(form, value)

    def array(self, kind: str, values: Sequence[Any]) -> None:
        code = 9 if kind.endswith("[]") else 8 if kind == "str" else VALUE_CODES[kind][0]
        self.number(code, 4)
        self.number(len(values), 8)
        for value in values:
            if kind == "str":
                self.string(value)
            elif kind.endswith("[]"):
                self.array(kind[:-2], value)
            else:
                self.data += struct.pack(VALUE_CODES[kind][1], value)


@dataclasses.dataclass
class Entry:
    """A tensor of a GGUF file, as its table says it: dimensions innermost first."""

    name: str | bytes
    ne: tuple[int, ...]
    code: int
    data: bytes
    offset: int | None = None


def gguf_bytes(
    metadata: Sequence[tuple[str | bytes, str, Any]] = (),
    tensors: Sequence[Entry] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    num_tensors: int | None = None,
    num_values: int | None = None,
) -> Builder:
    """A GGUF file; what it says of itself may be false."""
    out = Builder(bytearray(b"GGUF"))
    out.number(version, 4)
    out.number(len(tensors) if num_tensors is None else num_tensors, 8)
    out.number(len(metadata) if num_values is None else num_values, 8)
    for key, kind, value in metadata:
        out.string(key)
        out.value(kind, value)
    body = bytearray()
    for entry in tensors:
        out.string(entry.name)
        out.number(len(entry.ne), 4)
        for n in entry.ne:
            out.number(n, 8)
        out.number(entry.code, 4)
        out.number(len(body) if entry.offset is None else entry.offset, 8)
        body += entry.data + bytes(-len(entry.data) % alignment)
    if tensors:
        out.data += bytes(-len(out.data) % alignment) + body
    return out


def random_entry(name: str, kind: str, rows: int, blocks: int, rng: np.random.Generator) -> Entry:
    code, block, nbytes = GGML_TYPES[kind]
    return Entry(name, (block * blocks, rows), code, rng.bytes(rows * blocks * nbytes))


METADATA = (
    ("general.architecture", "str", "llama"),
    ("a.u8", "u8", 255),
    ("a.i8", "i8", -128),
    ("a.u16", "u16", 65535),
    ("a.i16", "i16", -32768),
    ("a.u32", "u32", 4294967295),
    ("a.i32", "i32", -2147483648),
    ("a.f32", "f32", 0.5),
    ("a.true", "bool", 1),
    ("a.u64", "u64", 18446744073709551615),
    ("a.i64", "i64", -9223372036854775808),
    ("a.f64", "f64", 1e-300),
    ("a.u8s", "u8[]", [1, 2, 3]),
    ("a.f32s", "f32[]", [1.5, -2.5]),
    ("a.bools", "bool[]", [1, 0, 1]),
    ("a.i64s", "i64[]", []),
    ("a.words", "str[]", ["", "a", "é", "x" * 300]),
    ("a.many", "str[]", [f"w{i}" for i in range(100)] + [""] * 20),
    ("a.nested", "i32[][]", [[1, 2], [], [3]]),
    ("a.deep", "str[][][]", [[["x"], ["y", "z"]], []]),
)

_SAFE = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "BOOL": 1, "C64": 8}


def safetensors_bytes(
    header: Mapping[str, Any] | str | bytes, data: bytes = b"", length: int | None = None
) -> bytes:
    """A safetensors file; a header that is text is written as it stands."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def safetensors_header(names: Sequence[str]) -> tuple[dict[str, Any], int]:
    """A header with a tensor of each dtype, and the number of bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "é": '"\\'}}
    at = 0
    for i, (name, (dtype, size)) in enumerate(zip(names, _SAFE.items(), strict=False)):
        shape = [(2, 3), (), (0, 4), (5,)][i % 4]
        nbytes = int(np.prod(shape)) * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    return header, at


@dataclasses.dataclass
class Sample:
    """A model of one or more files, of which one is changed.

    Attributes:
      target: the name of the file that is changed.
      files: contents by name.
      fields: (offset, size) of numbers in the target.
      path: what is opened; '' for the folder.
      json_header: the target begins with the length of a JSON text, as safetensors does.
    """

    target: str
    files: dict[str, bytes]
    fields: list[tuple[int, int]]
    path: str
    json_header: bool = False

    def write(self, folder: Path, changed: bytes | None = None) -> Path:
        """All files, or the changed one alone; gives the path to open."""
        for name, data in (self.files if changed is None else {self.target: changed}).items():
            (folder / name).write_bytes(data)
        return folder / self.path


def make_samples() -> dict[str, Callable[[], Sample]]:
    return {
        "gguf values": lambda: _gguf("a.gguf", METADATA, []),
        "gguf simple": lambda: _gguf_types(list(GGML_TYPES)[:12], 32),
        "gguf blocks": lambda: _gguf_types(list(GGML_TYPES)[12:24], 32),
        "gguf other": lambda: _gguf_types(list(GGML_TYPES)[24:], 64),
        "gguf split": _gguf_split,
        "safetensors": _safetensors,
        "safetensors shards": _safetensors_shards,
    }


def _gguf(name: str, metadata: Sequence[Any], tensors: Sequence[Entry], alignment=32) -> Sample:
    built = gguf_bytes(metadata, tensors, alignment=alignment)
    return Sample(name, {name: bytes(built.data)}, built.fields, name)


def _gguf_types(kinds: Sequence[str], alignment: int) -> Sample:
    rng = np.random.default_rng(0)
    metadata = [("general.alignment", "u32", alignment), ("a", "str[]", ["b", "c"])]
    tensors = [random_entry(f"t.{kind}", kind, 2, 1, rng) for kind in kinds]
    return _gguf("a.gguf", metadata, tensors, alignment)


def _gguf_split() -> Sample:
    rng = np.random.default_rng(1)
    files, fields = {}, []
    for i in range(2):
        metadata = [
            ("split.no", "u16", i),
            ("split.count", "u16", 2),
            ("split.tensors.count", "i32", 2),
        ]
        built = gguf_bytes(metadata, [random_entry(f"t{i}", "Q4_0", 2, 1, rng)])
        files[f"m-{i + 1:05d}-of-00002.gguf"] = bytes(built.data)
        fields = built.fields
    return Sample("m-00002-of-00002.gguf", files, fields, "m-00001-of-00002.gguf")


def _safetensors() -> Sample:
    header, size = safetensors_header(["a", "b.weight", "é", "d", "e", "f", "g", "h"])
    data = safetensors_bytes(header, bytes(range(256))[:size])
    return Sample("a.safetensors", {"a.safetensors": data}, [(0, 8)], "a.safetensors", True)


def _safetensors_shards() -> Sample:
    files, placed = {}, {}
    for i in range(2):
        name = f"model-{i + 1:05d}-of-00002.safetensors"
        header, size = safetensors_header([f"{i}.a", f"{i}.b"])
        files[name] = safetensors_bytes(header, bytes(size))
        placed |= dict.fromkeys((f"{i}.a", f"{i}.b"), name)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    target = "model.safetensors.index.json"
    return Sample(target, files | {target: json.dumps(index).encode()}, [], "")
