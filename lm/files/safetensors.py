"""Reading safetensors: one file, or a directory of shards with their index.

Opening reads the headers only, which the `safetensors` package checks: names are unique, tensors
are contiguous and fill the file. Tensors are views of the mapped files rather than the package's
copies, so that any dtype can be read and pages released. Source:
https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lm.files.base import (
    FileFormatError,
    MappedTensors,
    Path,
    TensorInfo,
    join_tensors,
    map_file,
    short,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# As the package allows a header.
MAX_INDEX = 100_000_000
# As in numpy.
MAX_DIMS = 64

# In the order in which the reference implementation writes tensors: wide types first, so that every
# tensor is aligned.
DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "U64": np.dtype("<u8"),
        "I64": np.dtype("<i8"),
        "F64": np.dtype("<f8"),
        "C64": np.dtype("<c8"),
        "F32": np.dtype("<f4"),
        "U32": np.dtype("<u4"),
        "I32": np.dtype("<i4"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F16": np.dtype("<f2"),
        "U16": np.dtype("<u2"),
        "I16": np.dtype("<i2"),
        "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "I8": np.dtype("i1"),
        "U8": np.dtype("u1"),
        "BOOL": np.dtype("?"),
    }
)
# Types that pack several numbers into a byte, which NumPy has no arrays of.
PACKED = ("F4", "F6_E2M3", "F6_E3M2")
CODES: Mapping[np.dtype, str] = MappingProxyType({dtype: code for code, dtype in DTYPES.items()})


class Safetensors(MappedTensors):
    """A safetensors model, open for reading.

    Attributes:
      paths: the files.
      metadata: the metadata of each file.
      tensors: tensors by name, file by file in the order of their bytes.
    """

    def __init__(
        self,
        paths: tuple[Path, ...],
        tensors: Mapping[str, TensorInfo],
        mappings: tuple[mmap.mmap, ...],
        metadata: tuple[Mapping[str, str], ...],
    ) -> None:
        super().__init__(paths, tensors, mappings)
        self.metadata = metadata

    def array(self, name: str) -> np.ndarray:
        """A tensor, a view of the file; bfloat16 and float8 in the dtypes of ml_dtypes."""
        info = self.tensors[name]
        return self.raw(name).view(DTYPES[info.type]).reshape(info.shape)

    def stream(self) -> Iterator[tuple[str, np.ndarray]]:
        """Names and tensors in the order of the files, each released when the next is asked for."""
        for name in self.tensors:
            yield name, self.array(name)
            self.release(name)


def open_safetensors(path: Path) -> Safetensors:
    """Open a file, or a directory with `model.safetensors` or its shards and their index.

    Where there are both, it is the single file, as in transformers: an index stays behind where a
    smaller model was saved.

    Raises:
      FileFormatError: a file does not follow the format or packs several numbers into a byte (F4,
        F6), or the index names a file outside the directory, a tensor its file does not hold, or
        one that two files hold.
      OSError: a file cannot be opened.
    """
    place = pathlib.Path(path)
    if not place.is_dir():
        return _join((path,), None)
    if (place / SINGLE).exists():
        return _join((place / SINGLE,), None)
    index = place / INDEX
    if not index.exists():
        raise FileNotFoundError(
            f"{place} has no {SINGLE}; a model's directory holds it, or {INDEX} and the files "
            f"it names{other_weights(place)}"
        )
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    files = tuple(_inside(index, name) for name in names)
    return _join(files, {name: names.index(file) for name, file in weight_map.items()}, index)


def other_weights(place: pathlib.Path) -> str:
    """What to do with the weights that a directory has instead of those looked for, or ""."""
    names = sorted(entry.name for entry in place.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    safe = [name for name in names if name.endswith(".safetensors")]
    if pickled:
        return (
            f". It has {pickled[0]}: PyTorch's pickled weights are not read; save them as "
            "safetensors, in Python with save_pretrained(DIR, safe_serialization=True)"
        )
    if any(re.search(r"-\d{5}-of-\d{5}\.", name) for name in safe):
        return f". It has {safe[0]} without the index; fetch {INDEX} as well"
    return f". It has {safe[0]}, which is named otherwise" if safe else ""


def _join(
    paths: tuple[Path, ...], placed: Mapping[str, int] | None, index: Path = ""
) -> Safetensors:
    """The tensors of some files; `placed` is the index of the file each should be in."""
    mappings = tuple(map(map_file, paths))
    headers = [_read_header(*each, i) for i, each in enumerate(zip(paths, mappings, strict=True))]
    tensors = join_tensors(paths, (found for found, _ in headers))
    for name, number in (placed or {}).items():
        if name not in tensors or tensors[name].file != number:
            raise FileFormatError(
                index,
                f"weight_map file of {short(name)}",
                os.fspath(paths[number]),
                "expected a file that holds that tensor",
            )
    return Safetensors(paths, tensors, mappings, tuple(metadata for _, metadata in headers))


def _read_index(path: pathlib.Path) -> dict[str, str]:
    data = path.read_bytes()
    if len(data) > MAX_INDEX:
        raise FileFormatError(path, "size", len(data), f"expected {MAX_INDEX} at most")

    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise FileFormatError(path, "index key", twice, "expected it once")
        return dict(items)

    try:
        content = json.loads(data, object_pairs_hook=once)
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            path, "index", data[:40], f"expected JSON in UTF-8: {error}"
        ) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise FileFormatError(
            path, "weight_map", weight_map, "expected an object of file names by tensor"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise FileFormatError(
                path, f"weight_map file of {short(name)}", file, "expected a string"
            )
    return weight_map


def _inside(index: pathlib.Path, name: str) -> pathlib.Path:
    """The file that an index names, inside the index's directory.

    A link may point to another file of the directory or, in a snapshot of a Hugging Face cache, to
    its `blobs`.
    """
    directory = index.parent.resolve()
    field, file = "weight_map file", index.parent / name
    if not name or name in (".", "..") or "\0" in name or "/" in name or os.sep in name:
        raise FileFormatError(index, field, name, "expected a file's name, without a directory")
    allowed = [directory]
    if directory.parent.name == "snapshots":
        allowed.append(directory.parent.parent / "blobs")
    if file.resolve().parent not in allowed:
        raise FileFormatError(
            index, field, name, f"expected no link out of {directory} (to {file.resolve()})"
        )
    if not file.is_file():
        raise FileFormatError(index, field, name, "expected a file that exists")
    return file


def _read_header(
    path: Path, mapping: mmap.mmap, number: int
) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and its metadata."""
    try:
        with safe_open(path, framework="np"):  # reads and checks the header, nothing else
            pass
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise FileFormatError(
            path, "header", mapping[8:48], f"{reason:.300} (fetch or convert the file again)"
        ) from None
    start = 8 + int.from_bytes(mapping[:8], "little")
    header = json.loads(mapping[8:start])
    metadata = header.pop("__metadata__", {}) or {}
    found = []
    for name, entry in header.items():
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        field = f"tensor {short(name)}"
        if dtype not in DTYPES:
            packed = "it packs several numbers into a byte; " if dtype in PACKED else ""
            raise FileFormatError(
                path, f"{field} dtype", dtype, f"{packed}expected one of {', '.join(DTYPES)}"
            )
        # NumPy multiplies the other dimensions even where one is 0.
        nbytes = math.prod(d or 1 for d in shape) * DTYPES[dtype].itemsize
        if len(shape) > MAX_DIMS or nbytes >= 1 << 63:
            raise FileFormatError(
                path,
                f"{field} shape",
                shape,
                f"expected {MAX_DIMS} dimensions at most and less than 2**63 bytes",
            )
        found.append(TensorInfo(name, dtype, tuple(shape), start + first, last - first, number))
    return sorted(found, key=lambda info: (info.offset, info.nbytes)), metadata
