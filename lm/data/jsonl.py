"""Files with one JSON object per line, plain or packed, with errors that name file and line."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lm.data.corpus import CorpusError


def read_jsonl(path: Path, field: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line number from 1, place for messages, object) of each line that is not blank.

    Args:
      path: plain, or packed where its name ends in `.gz` or `.zst`.
      field: that the objects are read for, for messages.

    Raises:
      CorpusError: the file cannot be read or is damaged, or a line is not an object in UTF-8.
    """
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"'{path}', line {number}"
            yield number, where, _parse(line, field, where)


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, unpacked by its suffix."""
    try:
        if path.suffix == ".zst":
            yield from _split(_zstandard(path))
        else:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"'{path}' is damaged: {error}; make or copy it again") from error
    except OSError as error:
        raise CorpusError(f"cannot read '{path}': {error.strerror or error}") from error


def _zstandard(path: Path) -> Iterator[bytes]:
    """Unpacked parts of a file of one or more frames.

    Raises:
      EOFError: it is damaged or cut short, which the package's own reader would not report.
    """
    try:
        import zstandard  # type: ignore[import-not-found]
    except ImportError as error:
        raise CorpusError(
            f"'{path}' needs the package zstandard; pip install zstandard, or unpack the file"
        ) from error
    frame = None
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            while part:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(part)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                part = frame.unused_data
                if frame.eof:
                    frame = None
    if frame:
        raise EOFError("the file ends within a frame")


def _split(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of the bytes in `parts`."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _parse(line: bytes, field: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: not UTF-8, byte 0x{error.object[error.start]:02x} at byte {error.start + 1};"
            " convert the file (iconv -f latin1 -t utf-8 OLD > NEW, with its real encoding)"
        ) from error
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON: {error.msg} (character {error.pos + 1})") from error
    except RecursionError as error:
        raise CorpusError(f"{where}: nested too deeply") from error
    if not isinstance(value, dict):
        raise CorpusError(f"{where}: a JSON {type(value).__name__}, not an object with '{field}'")
    return value
