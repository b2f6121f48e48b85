"""GGUF metadata values: numbers, strings, and arrays decoded on access."""

from __future__ import annotations

import dataclasses
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from lm.files.base import FileFormatError, Path

MAX_DEPTH = 8
STRING, ARRAY = 8, 9
# Bytes of an array's header: the type of its elements and their number.
_HEAD = 12
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A numeric type: its name in `GGUF.types` and its format in files, `struct`'s and NumPy's."""

    name: str
    format: str

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.format)


SCALARS: Mapping[int, Scalar] = {
    0: Scalar("u8", "<B"),
    1: Scalar("i8", "<b"),
    2: Scalar("u16", "<H"),
    3: Scalar("i16", "<h"),
    4: Scalar("u32", "<I"),
    5: Scalar("i32", "<i"),
    6: Scalar("f32", "<f"),
    7: Scalar("bool", "<?"),
    10: Scalar("u64", "<Q"),
    11: Scalar("i64", "<q"),
    12: Scalar("f64", "<d"),
}
_TYPES = "expected a type from 0 to 12"


class Cursor:
    """A position in a mapped file that never leaves it.

    Attributes:
      path: the file, for messages.
      buffer: its bytes.
      end: their number.
      at: position of the next byte.
    """

    def __init__(self, path: Path, buffer: mmap.mmap, at: int = 0) -> None:
        self.path, self.buffer, self.end, self.at = path, buffer, len(buffer), at

    def error(self, field: str, value: Any, expected: str) -> FileFormatError:
        return FileFormatError(self.path, field, value, expected)

    def skip(self, nbytes: int, field: str) -> int:
        """Position of the next `nbytes` bytes; the cursor moves past them."""
        at = self.at
        if nbytes > self.end - at:
            raise self.error(
                f"{field} length", nbytes, f"expected {self.end - at} at most, the bytes left"
            )
        self.at = at + nbytes
        return at

    def take(self, nbytes: int, field: str) -> bytes:
        at = self.skip(nbytes, field)
        return self.buffer[at : at + nbytes]

    def u32(self, field: str) -> int:
        return _U32.unpack_from(self.buffer, self.skip(4, field))[0]

    def u64(self, field: str) -> int:
        return _U64.unpack_from(self.buffer, self.skip(8, field))[0]

    def string(self, field: str) -> str:
        data = self.take(self.u64(f"{field} length"), field)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.error(field, data, "expected UTF-8") from None

    def check_count(self, field: str, count: int, nbytes: int) -> None:
        """Checks that `count` items of at least `nbytes` bytes fit into the rest of the file."""
        if count * nbytes > self.end - self.at:
            raise self.error(
                field,
                count,
                f"expected {(self.end - self.at) // nbytes} at most in the "
                f"{self.end - self.at} bytes left",
            )


class _Lazy(Sequence[Any]):
    """A sequence whose elements are decoded from the file on access."""

    def __init__(self, path: Path, buffer: mmap.mmap, field: str, starts: np.ndarray) -> None:
        self._path, self._buffer, self._field = path, buffer, field
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._get(i) for i in range(*index.indices(len(self)))]
        return self._get(range(len(self))[index])

    def _get(self, index: int) -> Any:
        raise NotImplementedError

    def __repr__(self) -> str:
        dots = ", ..." if len(self) > 3 else ""
        return f"<{len(self)} of {self._field}: {', '.join(map(repr, self[:3]))}{dots}>"


class Strings(_Lazy):
    """An array of strings.

    Reading an element that is not UTF-8 raises FileFormatError; `raw` returns its bytes.
    """

    def __init__(
        self, path: Path, buffer: mmap.mmap, field: str, starts: np.ndarray, end: int
    ) -> None:
        super().__init__(path, buffer, field, starts)
        self._end = end

    def raw(self, index: int) -> bytes:
        """The bytes of an element."""
        start = int(self._starts[index])
        (length,) = _U64.unpack_from(self._buffer, start)
        return self._buffer[start + 8 : start + 8 + length]

    def _get(self, index: int) -> str:
        return self._decode(self.raw(index), index)

    def __iter__(self) -> Iterator[str]:
        if not len(self):
            return
        starts = (self._starts - self._starts[0]).tolist()
        data = self._buffer[int(self._starts[0]) : self._end]
        ends = [*starts[1:], len(data)]
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            yield self._decode(data[start + 8 : end], index)

    def _decode(self, data: bytes, index: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise FileFormatError(
                self._path,
                f"{self._field}[{index}]",
                data,
                "expected UTF-8 (raw() gives the bytes)",
            ) from None


class Arrays(_Lazy):
    """An array of arrays; an element is a NumPy array, `Strings` or `Arrays`."""

    def _get(self, index: int) -> Any:
        cursor = Cursor(self._path, self._buffer, int(self._starts[index]))
        return read_value(cursor, ARRAY, f"{self._field}[{index}]")


def read_value(cursor: Cursor, code: int, field: str) -> Any:
    """The value of a type at the cursor, which moves past it."""
    if code == STRING:
        return cursor.string(field)
    if code == ARRAY:
        return _read_array(cursor, field)
    if code not in SCALARS:
        raise cursor.error(f"{field} type", code, _TYPES)
    return _numbers(cursor, code, 1, field)[0].item()


def _read_array(cursor: Cursor, field: str) -> Any:
    code, count = _head(cursor, field)
    if code == STRING:
        starts = _string_starts(cursor, count, field)
        return Strings(cursor.path, cursor.buffer, field, starts, cursor.at)
    if code == ARRAY:
        starts = np.empty(count, np.int64)
        for i in range(count):
            starts[i] = cursor.at
            _skip_array(cursor, field, 2)
        return Arrays(cursor.path, cursor.buffer, field, starts)
    return _numbers(cursor, code, count, field)


def _head(cursor: Cursor, field: str) -> tuple[int, int]:
    """The type and number of an array's elements, checked against the bytes left."""
    code = cursor.u32(f"{field} element type")
    count = cursor.u64(f"{field} count")
    if code not in SCALARS and code not in (STRING, ARRAY):
        raise cursor.error(f"{field} element type", code, _TYPES)
    least = {STRING: 8, ARRAY: _HEAD}.get(code) or SCALARS[code].dtype.itemsize
    cursor.check_count(f"{field} count", count, least)
    return code, count


def _skip_array(cursor: Cursor, field: str, depth: int) -> None:
    """Move past an array, checking it."""
    if depth > MAX_DEPTH:
        raise cursor.error(f"{field} depth", depth, f"expected {MAX_DEPTH} at most")
    code, count = _head(cursor, field)
    if code == ARRAY:
        for _ in range(count):
            _skip_array(cursor, field, depth + 1)
    elif code == STRING:
        _string_starts(cursor, count, field)
    else:
        _numbers(cursor, code, count, field)


def _numbers(cursor: Cursor, code: int, count: int, field: str) -> np.ndarray:
    dtype = SCALARS[code].dtype
    at = cursor.skip(count * dtype.itemsize, field)
    if SCALARS[code].name == "bool":
        data = np.frombuffer(cursor.buffer, np.uint8, count, at)
        if count and data.max() > 1:
            raise cursor.error(field, int(data.max()), "expected 0 or 1, a bool")
    return np.frombuffer(cursor.buffer, dtype, count, at)


# Shorter strings are found many at a time: their length is one byte and seven zeros. (With a higher
# limit, the byte before a short length would look like the start of a long one.)
_SHORT = 256
_WINDOW = 1 << 18


def _string_starts(cursor: Cursor, count: int, field: str) -> np.ndarray:
    """Positions of `count` strings; the cursor moves past the last.

    A string is a length and that many bytes, so each has to be read to find the next, which is
    slow for a vocabulary of 262,144. But nearly every position whose eight bytes are a small
    number holds a length: those are found at once, and a run in which each points to the next is
    taken whole. Strings that break a run are read one by one.
    """
    starts = np.empty(count, np.int64)
    if count < 64:
        _walk(cursor, starts, 0, field)
        return starts
    done = 0
    while done < count:
        done = _walk_window(cursor, starts, done, field)
    return starts


def _walk_window(cursor: Cursor, starts: np.ndarray, done: int, field: str) -> int:
    """`_string_starts` for the next `_WINDOW` bytes; returns the number of strings done."""
    base, count = cursor.at, len(starts)
    places = min(_WINDOW, cursor.end - base - 7)
    if places < 1:
        _walk(cursor, starts[done:], done, field)
        return count
    words = np.ndarray((places,), "<u8", cursor.buffer, base, (1,))
    candidates = np.flatnonzero(words < _SHORT)
    after = candidates + 8 + words[candidates].astype(np.int64)
    # The last candidate points out of the window: it ends a run too.
    ends = np.append(np.flatnonzero(candidates[1:] != after[:-1]), len(candidates) - 1)
    step = 1
    while done < count and cursor.at - base < places:
        i = int(np.searchsorted(candidates, cursor.at - base))
        found = 0
        if i < len(candidates) and candidates[i] == cursor.at - base:
            found = min(int(ends[np.searchsorted(ends, i)]) - i, count - done)
            starts[done : done + found] = candidates[i : i + found] + base
            done += found
            cursor.at = base + int(candidates[i + found])
        # Where runs stay short, walk further each time.
        step = min(2 * step, 4096) if found < 16 else 1
        _walk(cursor, starts[done : done + step], done, field)
        done = min(done + step, count)
    return done


def _walk(cursor: Cursor, starts: np.ndarray, first: int, field: str) -> None:
    """Fill `starts` with the positions of the next strings, from number `first` on."""
    at, end, buffer = cursor.at, cursor.end, cursor.buffer
    found = []
    for i in range(first, first + len(starts)):
        found.append(at)
        length = _U64.unpack_from(buffer, at)[0] if end - at >= 8 else end
        if length > end - at - 8:
            cursor.at = at
            cursor.skip(cursor.u64(f"{field}[{i}] length"), f"{field}[{i}]")
        at += 8 + length
    starts[:] = found
    cursor.at = at
