"""Shared by the file formats: one error, tensors of mapped files, atomic writes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import mmap
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Self

import numpy as np

Path = str | os.PathLike[str]
LFS_POINTER = b"version https://git-lfs"


class FormatError(ValueError):
    """A path cannot be read as the format it is in; the message says why."""


class FileFormatError(FormatError):
    """A file does not follow its format.

    Attributes:
      path: the file.
      field: the part at fault, as `tensor 'output.weight' offset`.
      value: the value found there.
      expected: the values allowed there.
    """

    def __init__(self, path: Path, field: str, value: Any, expected: str) -> None:
        super().__init__(path, field, value, expected)
        self.path, self.field, self.value, self.expected = path, field, value, expected

    def __str__(self) -> str:
        return f"{os.fspath(self.path)}: {self.field} is {short(self.value)}; {self.expected}"


def short(value: Any, limit: int = 60) -> str:
    """`repr`, shortened for a message: hostile files hold long names."""
    if isinstance(value, str | bytes | list) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} long)"
    text = repr(value)
    return text if len(text) <= 2 * limit else f"{text[: 2 * limit]}..."


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading.

    The mapping lives as long as any view of it. If the file is truncated meanwhile, reading the
    lost part kills the process: replace files, do not rewrite them (`replacing` does that).

    Raises:
      FileFormatError: the file is empty, or Git LFS's pointer to a file that was not fetched.
      OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise FileFormatError(path, "size", 0, "expected a file with a header")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if mapping[: len(LFS_POINTER)] == LFS_POINTER:
        remedy = "it points to a file in Git LFS; fetch that with git lfs pull"
        raise FileFormatError(path, "beginning", LFS_POINTER, remedy)
    return mapping


def forget_pages(mapping: mmap.mmap, offset: int, nbytes: int) -> None:
    """Release the memory of a range of a mapping; its bytes are read again on use.

    Pages shared with neighbouring ranges are kept.
    """
    if not hasattr(mapping, "madvise"):  # without it, the system decides alone
        return
    start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Type and place of a tensor.

    Attributes:
      name: the tensor's name.
      type: the format's code of its type, as `Q4_K` or `BF16`.
      shape: row-major, outermost dimension first; () for a scalar.
      offset: position of its first byte in its file.
      nbytes: its size in bytes.
      file: index of its file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: int = 0


class MappedTensors:
    """Tensors of mapped files.

    Attributes:
      paths: the files.
      tensors: tensors by name, file by file.
    """

    def __init__(
        self,
        paths: tuple[Path, ...],
        tensors: Mapping[str, TensorInfo],
        mappings: tuple[mmap.mmap, ...],
    ) -> None:
        self.paths, self.tensors, self._mappings = paths, tensors, mappings

    def under(self, names: Mapping[str, str]) -> Self:
        """The same files with some of their tensors alone; `names` are new names -> old ones."""
        other = copy.copy(self)
        other.tensors = {
            new: dataclasses.replace(self.tensors[old], name=new) for new, old in names.items()
        }
        return other

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor: uint8 [nbytes], a read-only view of the file."""
        info = self.tensors[name]
        return np.frombuffer(self._mappings[info.file], np.uint8, info.nbytes, info.offset)

    def release(self, name: str) -> None:
        """Release a tensor's memory. Views stay valid and read the file again."""
        info = self.tensors[name]
        forget_pages(self._mappings[info.file], info.offset, info.nbytes)


def join_tensors(
    paths: tuple[Path, ...], parts: Iterable[Iterable[TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors of several files by name; FileFormatError where two files have one name."""
    tensors: dict[str, TensorInfo] = {}
    for path, part in zip(paths, parts, strict=True):
        for info in part:
            if info.name in tensors:
                other = paths[tensors[info.name].file]
                raise FileFormatError(
                    path, "tensor name", info.name, f"expected one that {other} does not have"
                )
            tensors[info.name] = info
    return tensors


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, renamed to `path` when the block ends without an error."""
    target = pathlib.Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
