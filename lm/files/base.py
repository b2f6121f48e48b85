"""What the containers share: one error, read-only mapping, files that appear whole or not."""

from __future__ import annotations

import contextlib
import mmap
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

Path = str | os.PathLike[str]


class FormatError(ValueError):
    """What is at a path cannot be read as the format it is in; the message says why."""


class FileFormatError(FormatError):
    """A file is not what its format says.

    Attributes:
      path: the file.
      field: the part of it, as `tensor 'output.weight' offset`.
      value: what stands there.
      expected: what may stand there.
    """

    def __init__(self, path: Path, field: str, value: Any, expected: str) -> None:
        super().__init__(path, field, value, expected)
        self.path, self.field, self.value, self.expected = path, field, value, expected

    def __str__(self) -> str:
        return f"{os.fspath(self.path)}: {self.field} is {short(self.value)}; {self.expected}"


def short(value: Any, limit: int = 60) -> str:
    """`repr` for a message: hostile files hold long names."""
    if isinstance(value, str | bytes | list) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} long)"
    text = repr(value)
    return text if len(text) <= 2 * limit else f"{text[: 2 * limit]}..."


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, mapped for reading.

    The mapping lives as long as a view of it. A file that someone shortens meanwhile ends the
    process when the lost part is read: replace files, do not rewrite them (`replacing` does).

    Raises:
      FileFormatError: the file is empty.
      OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise FileFormatError(path, "size", 0, "expected a file with a header")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def forget_pages(mapping: mmap.mmap, offset: int, nbytes: int) -> None:
    """Take a range of a mapping out of this process's memory; its bytes are read again on use.

    Pages that the range shares with its neighbours stay.
    """
    if not hasattr(mapping, "madvise"):  # where there is none, the system decides alone
        return
    start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends without an error."""
    target = pathlib.Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
