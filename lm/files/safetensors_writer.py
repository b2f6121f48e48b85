"""Writing safetensors: one tensor in memory at a time, one file or shards with their index.

Not with the package's `serialize_file`, which wants all tensors in memory at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from lm.files.base import Path, replacing
from lm.files.safetensors import CODES, DTYPES, INDEX, SINGLE

NOTHING: Mapping[str, str] = MappingProxyType({})
_RANKS = {code: rank for rank, code in enumerate(DTYPES)}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor to write.

    Attributes:
      dtype: a dtype of NumPy or ml_dtypes.
      shape: row-major.
      read: returns the array; called once, on writing.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, np.ndarray | LazyTensor]


def write_safetensors(
    path: Path, tensors: Tensors, *, metadata: Mapping[str, str] = NOTHING
) -> None:
    """Write a safetensors file atomically.

    Wide dtypes come first, so that every tensor is aligned, then names in order. The same tensors
    give the same bytes, equal to those of the reference implementation.

    Args:
      path: the file.
      tensors: tensors by name.
      metadata: strings by name.

    Raises:
      ValueError: a dtype the format lacks, or a `LazyTensor` whose array is not as announced.
    """
    codes = {name: _code(name, tensor) for name, tensor in tensors.items()}
    ordered = sorted(tensors.items(), key=lambda item: (_RANKS[codes[item[0]]], item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": codes[name],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            data = tensor.read() if isinstance(tensor, LazyTensor) else tensor
            if data.shape != tensor.shape or data.dtype != tensor.dtype:
                raise ValueError(
                    f"tensor {name!r} is {data.dtype} {list(data.shape)}, announced as "
                    f"{tensor.dtype} {list(tensor.shape)}"
                )
            data = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
            file.write(data.reshape(-1).view(np.uint8).data)


def write_sharded(
    directory: Path,
    tensors: Tensors,
    *,
    max_shard_size: int = 5_000_000_000,
    metadata: Mapping[str, str] = NOTHING,
) -> list[str]:
    """Write `model.safetensors`, or shards of it and their index, into a directory.

    Args:
      directory: an existing directory.
      tensors: tensors by name; shards take them in this order.
      max_shard_size: bytes of tensors per file; a larger tensor gets a file of its own.
      metadata: strings by name, written to every file.

    Returns:
      The names of the files that hold tensors.

    Raises:
      ValueError: see `write_safetensors`.
    """
    shards: list[dict[str, np.ndarray | LazyTensor]] = [{}]
    room = max_shard_size
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = max_shard_size
        shards[-1][name] = tensor
        room -= tensor.nbytes
    place = pathlib.Path(directory)
    if len(shards) == 1:
        write_safetensors(place / SINGLE, shards[0], metadata=metadata)
        return [SINGLE]
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(place / file, shard, metadata=metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with replacing(place / INDEX) as out:
        out.write((json.dumps(index, indent=2) + "\n").encode())
    return files


def _code(name: str, tensor: np.ndarray | LazyTensor) -> str:
    little = tensor.dtype.newbyteorder("<")
    if little not in CODES:
        raise ValueError(
            f"tensor {name!r} is {tensor.dtype}; the format has {', '.join(CODES.values())}"
        )
    return CODES[little]
