"""Files of text as users name them: found, unpacked and decoded, with errors that name the file."""

import fnmatch
import glob
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from absl import logging

from lm.data.sources import CorpusError

Name = str | os.PathLike[str]
# How files begin that are something other than UTF-8, and what to do with them.
_SIGNS = {
    b"\xff\xfe": "it looks like UTF-16: iconv -f utf-16 -t utf-8 OLD > NEW",
    b"\xfe\xff": "it looks like UTF-16: iconv -f utf-16 -t utf-8 OLD > NEW",
    b"\x1f\x8b": "it is packed by gzip: give it a name that ends in .gz, or unpack it",
    b"\x28\xb5\x2f\xfd": "it is packed by zstd: give it a name that ends in .zst, or unpack it",
    b"BZh": "it is packed by bzip2: unpack it",
    b"\xfd7zXZ": "it is packed by xz: unpack it",
    b"PK\x03\x04": "it is a ZIP archive or an office document: export its text",
    b"%PDF": "it is a PDF: export its text",
    b"PAR1": "it is Parquet: export it as JSONL",
}
_ENCODING = "convert it (iconv -f latin1 -t utf-8 OLD > NEW, with its real encoding)"


def split_patterns(text: str) -> list[str]:
    """The names and patterns in a setting: a JSON list, or separated by commas or blanks.

    A name that is there and a pattern that finds something may hold commas and blanks themselves.
    """
    if os.path.lexists(os.path.expanduser(text)):
        return [text]
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except ValueError:  # a pattern that begins with a set of characters
            items = None
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return items
    words, found, at = list(re.finditer(r"[^\s,]+", text)), [], 0
    while at < len(words):
        for end in range(len(words), at, -1):
            span = text[words[at].start() : words[end - 1].end()]
            if end == at + 1 or next(matches(span), None) is not None:
                found.append(span)
                at = end
                break
    return found


def find_files(patterns: Iterable[str]) -> list[str]:
    """The files of names and patterns, those of each pattern sorted.

    Raises:
      CorpusError: a pattern that matches no file, or a name of something else than a file.
    """
    found = []
    for pattern in patterns:
        name = os.path.expanduser(pattern)
        if os.path.lexists(name):
            _check_file(name)
            found.append(name)
            continue
        paths = list(matches(pattern))
        files = sorted(path for path in paths if os.path.isfile(path))
        if gone := [path for path in paths if not os.path.exists(path)]:
            logging.warning(
                "%d links to files that are not there are left out, such as '%s'",
                len(gone), gone[0],
            )  # fmt: skip
        if not files:
            other = f", only {len(paths)} folders or others" if paths else ""
            raise CorpusError(
                f"no files match '{pattern}' (from '{os.getcwd()}'){other}; quote the pattern so "
                "that the shell leaves it alone, and use '**' to cross directories"
            )
        found += files
    return found


def matches(pattern: str) -> Iterator[str]:
    """Paths that a pattern matches, sorted: `*`, `?`, `[...]`, and `**` across directories.

    What is there under the very name that a part of the pattern gives is that part. Names that
    begin with a dot are matched by such patterns alone.
    """
    path = os.path.expanduser(pattern)
    parts = [part for part in path.split(os.sep) if part not in ("", ".")]
    return _below(os.sep if path.startswith(os.sep) else "", parts)


def _below(folder: str, parts: Sequence[str]) -> Iterator[str]:
    if not parts:
        yield folder
        return
    head, *rest = parts
    if os.path.lexists(os.path.join(folder, head)):
        yield from _below(os.path.join(folder, head), rest)
    elif head == "**":
        for each in _folders(folder, set()):
            yield from _below(each, rest or ["*"])
    elif glob.escape(head) != head:
        for name in fnmatch.filter(_names(folder), head):
            if head.startswith(".") or not name.startswith("."):
                yield from _below(os.path.join(folder, name), rest)


def _folders(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """A folder and those below it, each once, however often links lead to it."""
    status = os.stat(folder or ".")
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    yield folder
    for name in _names(folder):
        path = os.path.join(folder, name)
        if not name.startswith(".") and os.path.isdir(path):
            yield from _folders(path, seen)


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or "."))
    except NotADirectoryError:
        return []
    except OSError as error:
        raise CorpusError(f"cannot read the folder '{folder}': {error.strerror}") from error


def _check_file(name: Name, pipes: bool = False) -> None:
    """Raises CorpusError for what is not a file; where `pipes`, those that a shell gives are."""
    try:
        mode = os.stat(name).st_mode
    except OSError as error:
        if os.path.islink(name):
            target = os.readlink(name)
            raise CorpusError(f"'{name}' is a link to '{target}', which is not there") from error
        raise CorpusError(f"cannot read '{name}': {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise CorpusError(
            f"'{name}' is a folder; give a file, or files by a pattern where several can be given, "
            f"such as '{os.path.join(name, '**', '*.txt')}'"
        )
    # A pipe that has a name would be waited for until somebody writes into it.
    of_shell = stat.S_ISFIFO(mode) and not os.path.exists(os.path.realpath(name))
    if not (stat.S_ISREG(mode) or (pipes and of_shell)):
        raise CorpusError(f"'{name}' is a pipe, a socket or a device; give a file")


def read_text(path: Name) -> str:
    """The text of a file, unpacked by its suffix (`.gz`, `.zst`), line ends as "\\n".

    Raises:
      CorpusError: it cannot be read, is not UTF-8, or has NUL bytes.
    """
    data = b"".join(lines(path))
    check_no_nul(data, path)
    return decode(data, path).replace("\r\n", "\n").replace("\r", "\n")


def check_no_nul(data: bytes, path: Name, line: int = 1) -> None:
    """Raises CorpusError for a NUL byte; arguments as `decode`."""
    if (at := data.find(b"\0")) >= 0:
        remedy = "it was cut short, or is UTF-16 or no text; convert it or make it again"
        raise CorpusError(
            f"{_place(data, at, path, line)}: a NUL byte; {_remedy(data, line, remedy)}"
        )


def decode(data: bytes, path: Name, line: int = 1) -> str:
    """UTF-8 as text, without a byte order mark.

    Args:
      data: of a file, from the beginning of its line `line` on.
      path: of the file, for errors.

    Raises:
      CorpusError: it is not UTF-8; the message has line, byte and remedy.
    """
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        at, start = error.start, data.rfind(b"\n", 0, error.start)
        raise CorpusError(
            f"{_place(data, at, path, line)}: not UTF-8, byte 0x{data[at]:02x} at byte "
            f"{at - start}; {_remedy(data, line, _ENCODING)}"
        ) from error


def _remedy(data: bytes, line: int, default: str) -> str:
    signs = (each for sign, each in _SIGNS.items() if line == 1 and data.startswith(sign))
    return next(signs, default)


def _place(data: bytes, at: int, path: Name, line: int) -> str:
    number = line + data.count(b"\n", 0, at)
    return f"'{path}', line {number}"


def lines(path: Name) -> Iterator[bytes]:
    """Lines of a file with their ends, unpacked by its suffix, `.gz` or `.zst`.

    Raises:
      CorpusError: it cannot be read, or is damaged.
    """
    path = Path(os.path.expanduser(path))
    _check_file(path, pipes=True)
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
    """Lines of the bytes in `parts`, with their ends."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        yield from (line + b"\n" for line in whole)
    if rest:
        yield rest
