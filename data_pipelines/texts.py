"""Stages from files to clean documents: find, read, filter, deduplicate, cut, mix.

Each stage is a small generator; what it drops it counts by reason.
"""

import ast
import dataclasses
import email
import hashlib
import os
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lm.data.corpus import CorpusError
from lm.data.files import decode, find_files, lines


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A file that may hold text. `kind` is user, docs, metadata, docstrings or source."""

    path: Path
    name: str
    kind: str
    size: int


@dataclasses.dataclass(frozen=True)
class Text:
    """A document. `group` is the content hash of the file it came from."""

    name: str
    text: str
    kind: str
    group: str = ""

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


PROSE_KINDS = ("docs", "metadata", "docstrings")
SECTION_BYTES = 65_536
_MAX_SYSTEM_FILE = 262_144
_DOC_SUFFIXES = (".rst", ".md", ".txt")
_NOT_PROSE = re.compile(
    r"(top_level|entry_points|SOURCES|CMakeLists|requirements.*|constraints.*)\.txt$"
)
_LICENCE_NAME = re.compile(r"licen[sc]e|copying|notice", re.IGNORECASE)
_LICENCE_TEXT = re.compile(r"licen[sc]e|copyright", re.IGNORECASE)
_CODE_SUFFIXES = (".js", ".mjs", ".css", ".svg", ".html", ".json")
# Of user files only code can be "minified": a line of prose may be a whole chapter.
_MAX_LINE, _MAX_MEAN_LINE = 2000, 200


def content_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def uniform(seed: int, name: str) -> float:
    """A number in [0, 1) keyed by (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def printable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 as `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find_user_files(patterns: Sequence[str]) -> list[Candidate]:
    """Files that match the glob patterns (`**` crosses directories), sorted by name.

    Names are relative to the directory that holds all of them, so that a corpus does not depend
    on where its files are.

    Raises:
      CorpusError: as `find_files`.
    """
    found = {os.path.realpath(path): Path(path) for path in find_files(patterns)}
    root = os.path.commonpath([os.path.dirname(real) for real in found])
    candidates = [
        Candidate(path, printable(os.path.relpath(real, root)), "user", path.stat().st_size)
        for real, path in found.items()
    ]
    return sorted(candidates, key=lambda c: c.name)


def find_system_files(seed: int) -> list[Candidate]:
    """Documentation and source of Python's library and the installed packages.

    A `.py` file serves either as docstrings or as source, by a hash of its name, so that no text
    comes twice. The order is by name and so the same for the same installation.
    """
    paths = sysconfig.get_paths()
    roots = {"stdlib": paths["stdlib"], "site-packages": paths["purelib"]}
    if paths["platlib"] != paths["purelib"]:
        roots["site-packages-platform"] = paths["platlib"]
    found = []
    for label, root in roots.items():
        for directory, subdirectories, files in os.walk(root):
            others = {"__pycache__", "site-packages", "dist-packages"}
            subdirectories[:] = [d for d in subdirectories if d not in others]
            folder = Path(label, Path(directory).relative_to(root)).as_posix()
            for file in files:
                kind = _system_kind(name := f"{folder}/{file}", seed)
                if kind and not (path := Path(directory, file)).is_symlink():
                    found.append(Candidate(path, name, kind, path.stat().st_size))
    return sorted(found, key=lambda c: c.name)


def _system_kind(name: str, seed: int) -> str | None:
    directory, _, file = name.rpartition("/")
    if file.endswith(".py"):
        return "docstrings" if uniform(seed, "use:" + name) < 0.5 else "source"
    if file == "METADATA" and directory.endswith(".dist-info"):
        return "metadata"
    prose = file.endswith(_DOC_SUFFIXES) or _LICENCE_NAME.match(file)
    return "docs" if prose and not _NOT_PROSE.search(file) else None


def shuffled(candidates: Iterable[Candidate], seed: int) -> list[Candidate]:
    """In an order keyed by (seed, name)."""
    return sorted(candidates, key=lambda c: (uniform(seed, "order:" + c.name), c.name))


def read(candidates: Iterable[Candidate], dropped: Counter[str]) -> Iterator[Text]:
    """Unpacks `.gz` and `.zst`, decodes UTF-8 and takes the prose or the source out of each file.

    Raises:
      CorpusError: a user file cannot be read or is not UTF-8. Such system files are dropped.
    """
    for candidate in candidates:
        if candidate.kind != "user" and candidate.size > _MAX_SYSTEM_FILE:
            dropped["too large"] += 1
            continue
        try:
            text = decode(b"".join(lines(candidate.path)), candidate.path)
        except CorpusError as error:
            if candidate.kind == "user":
                raise
            encoded = isinstance(error.__cause__, UnicodeDecodeError)
            dropped["not UTF-8" if encoded else "unreadable"] += 1
            continue
        text = text.replace("\r\n", "\n")
        group = content_hash(text)
        if candidate.kind == "docstrings":
            text = docstrings(text, Path(candidate.name).stem)
        elif candidate.kind == "source":
            text = _without_licence_header(text)
        elif candidate.kind == "metadata":
            text = str(email.message_from_string(text).get_payload())
        yield Text(candidate.name, text, candidate.kind, group)


def docstrings(source: str, module: str) -> str:
    """The docstrings of a module, each below the name it documents; '' if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    parts: list[str] = []

    def visit(node, name: str) -> None:
        if doc := ast.get_docstring(node):
            parts.append(f"{name}\n\n{doc}\n")
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return "\n\n".join(parts)


def _without_licence_header(source: str) -> str:
    header = re.match(r"(?:#[^\n]*\n)+", source)
    if header and _LICENCE_TEXT.search(header[0]):
        return source[header.end() :].lstrip("\n")
    return source


def keep(texts: Iterable[Text], dropped: Counter[str]) -> Iterator[Text]:
    """Drops what is not text to learn from."""
    for text in texts:
        if reason := _fault(text):
            dropped[reason] += 1
        else:
            yield text


def _fault(text: Text) -> str | None:
    body = text.text
    if not body.strip():
        return "empty"
    control = sum(body.count(c) for c in map(chr, (*range(9), *range(14, 27), 127)))
    if "\0" in body or control > len(body) // 100:
        return "binary"
    system = text.kind != "user"
    if system or text.name.endswith(_CODE_SUFFIXES):
        lines = body.splitlines()
        if len(body) > _MAX_MEAN_LINE * len(lines) or max(map(len, lines)) > _MAX_LINE:
            return "long lines or minified"
    if system:
        if len(body) < 64:
            return "too short"
        sample = body[:SECTION_BYTES]
        if sum(map(str.isalpha, sample)) < 0.4 * len("".join(sample.split())):
            return "mostly numbers or symbols"
        raw = sample.encode()
        if len(raw) > 2048 and len(zlib.compress(raw, 1)) < 0.08 * len(raw):
            return "repetitive"
    return None


def deduplicate(texts: Iterable[Text], dropped: Counter[str], seen: set[str]) -> Iterator[Text]:
    """Drops exact copies, and licences that differ in copyright lines, case or spacing only.

    `seen` holds the texts of other sources, and takes up those of this one.
    """
    for text in texts:
        key = content_hash(text.text)
        if text.kind == "docs" and _LICENCE_NAME.search(text.name):
            lines = [n for n in text.text.lower().splitlines() if "copyright" not in n]
            key = content_hash(re.sub(r"[^a-z]+", " ", " ".join(lines)))
        if key in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(key)
        yield text


def cut(texts: Iterable[Text], section_bytes: int = SECTION_BYTES) -> Iterator[Text]:
    """Cuts texts longer than `section_bytes` characters at paragraphs, else lines, else spaces."""
    for text in texts:
        body, number = text.text, 0
        while len(body) > section_bytes:
            number += 1
            end = next(
                (
                    at + len(mark)
                    for mark in ("\n\n", "\n", " ")
                    if (at := body.rfind(mark, section_bytes // 2, section_bytes)) >= 0
                ),
                section_bytes,
            )
            section, body = body[:end], body[end:]
            if section.strip():
                yield dataclasses.replace(text, name=f"{text.name}#{number}", text=section)
        if body.strip():
            name = f"{text.name}#{number + 1}" if number else text.name
            yield dataclasses.replace(text, name=name, text=body)


def mix(streams: Sequence[tuple[Iterator[Text], float]]) -> Iterator[Text]:
    """Draws from the stream that is behind its share of the bytes; the others when one ends.

    Args:
      streams: texts and their share; a stream of share 0 is left out.
    """
    left = [(texts, share) for texts, share in streams if share > 0]
    taken = [0.0] * len(left)
    while left:
        i = min(range(len(left)), key=lambda i: taken[i])
        text = next(left[i][0], None)
        if text is None:
            del left[i], taken[i]
            continue
        taken[i] += text.num_bytes / left[i][1]
        yield text


def take(texts: Iterable[Text], max_bytes: int | None) -> Iterator[Text]:
    """The leading texts, until they hold `max_bytes`."""
    total = 0
    for text in texts:
        yield text
        total += text.num_bytes
        if max_bytes is not None and total >= max_bytes:
            return
