"""What a corpus is made of: named sources and validation sets, and the readers of their files."""

import dataclasses
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from data_pipelines import texts as stages
from data_pipelines.texts import Candidate, Text, content_hash
from lm.config.fields import BelowOne, Checked, NonNegative, Positive, within
from lm.data.corpus import CorpusError
from lm.data.files import matches
from lm.data.jsonl import read_jsonl
from lm.data.mixtures import Share
from lm.data.sources import read_examples

Kind = Literal["text", "jsonl", "array_record"]
_RESERVED = ("token_cache", "plans")


@dataclasses.dataclass(frozen=True)
class Files(Checked):
    """Documents in files.

    Attributes:
      name: lower-case letters, digits and underscores.
      files: glob patterns (`**` crosses directories); of kind array_record, of directories.
      kind: "text", UTF-8, one document per file; "jsonl", one object per line, plain, `.gz` or
        `.zst`; or "array_record", TFDS datasets in array_record files.
      field: that holds the text, of an object or an example.
      split: of the TFDS datasets.
      max_megabytes: of text to take, about; 0 for all.

    Raises:
      CorpusError: a bad name, or no files.
    """

    name: str
    files: tuple[str, ...]
    kind: Kind = "text"
    field: str = "text"
    split: str = "train"
    max_megabytes: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or self.name in _RESERVED:
            raise CorpusError(
                f"data source name {self.name!r} must be lower-case letters, digits and "
                f"underscores, a letter first, and not one of {', '.join(_RESERVED)}"
            )
        if isinstance(self.files, str) or not self.files:
            raise CorpusError(
                f"files={self.files!r} of '{self.name}' must be a tuple of at least one glob "
                "pattern, such as ('books/**/*.txt',)"
            )

    @property
    def max_bytes(self) -> int | None:
        return math.ceil(self.max_megabytes * 1e6) or None

    def find(self) -> list[Candidate]:
        """The files, sorted by name.

        Raises:
          CorpusError: a pattern that matches nothing, or a directory that is not a TFDS dataset.
        """
        if self.kind != "array_record":
            return stages.find_user_files(self.files)
        found = []
        for directory in self._directories():
            for path in sorted(directory.iterdir()):
                name = stages.printable(f"{directory.name}/{path.name}")
                found.append(Candidate(path, name, "user", path.stat().st_size))
        return found

    def documents(
        self, candidates: Sequence[Candidate], seed: int, dropped: Counter[str], seen: set[str]
    ) -> Iterator[Text]:
        """The documents in the files found, filtered, those in `seen` left out, cut to sections.

        Raises:
          CorpusError: what cannot be read; it names the file, and the line or example.
        """
        section = stages.SECTION_BYTES
        if self.kind == "text":
            texts = stages.read(stages.shuffled(candidates, seed), dropped)
            # Short enough that a single file still splits into training and held-out sections.
            section = min(section, max(4096, sum(c.size for c in candidates) // 200))
        elif self.kind == "jsonl":
            texts = _read_jsonl(stages.shuffled(candidates, seed), self.field)
        else:
            texts = _read_examples(self._directories(), self.split, self.field)
        clean = stages.deduplicate(stages.keep(texts, dropped), dropped, seen)
        return stages.take(stages.cut(clean, section), self.max_bytes)

    def _directories(self) -> list[Path]:
        found: dict[str, Path] = {}
        for pattern in self.files:
            folders = [
                path
                for path in matches(pattern)
                if os.path.isfile(os.path.join(path, "dataset_info.json"))
            ]
            if not folders:
                raise CorpusError(
                    f"no TFDS dataset at '{pattern}' (from '{os.getcwd()}'); give a directory with "
                    "a dataset_info.json, that of a version, such as 'wiki/1.0.0'"
                )
            found |= {os.path.realpath(path): Path(path) for path in folders}
        return [found[real] for real in sorted(found)]


@dataclasses.dataclass(frozen=True)
class DataSource(Files):
    """Documents to train on, and their part in the mixture.

    Attributes:
      weight: share of the rows, relative to the other sources' weights.
      max_epochs: times its rows may be read; none for no limit.
      max_tokens: that may be read; none for no limit.
      held_out: share of its documents kept for its own validation set; 0 for none.
    """

    weight: NonNegative = 1.0
    max_epochs: Positive | None = None
    max_tokens: Annotated[int, within(1, 2**63 - 1)] | None = None
    held_out: BelowOne = 0.05

    @property
    def share(self) -> Share:
        """Its part in a mixture of `lm.data.Batches`."""
        return Share(self.name, self.weight, self.max_epochs, max_tokens=self.max_tokens)


@dataclasses.dataclass(frozen=True)
class ValidationSet(Files):
    """Documents to evaluate on. Those that are also in a source are taken out of the source."""


@dataclasses.dataclass(frozen=True)
class SystemText:
    """Documentation, docstrings and source of Python's library and the installed packages.

    Attributes:
      max_bytes: of text to take, about.
      prose_fraction: share of the bytes that is prose, while prose lasts.
      held_out, weight: as of `DataSource`.
    """

    name: str
    max_bytes: int
    prose_fraction: float
    held_out: float
    weight: float = 1.0

    def find(self) -> list[Candidate]:
        """Nothing to compare later: what is installed may change, and what was built stays."""
        return []

    def documents(
        self, candidates: Sequence[Candidate], seed: int, dropped: Counter[str], seen: set[str]
    ) -> Iterator[Text]:
        """As of `Files`."""

        def clean(files: Iterable[Candidate]) -> Iterator[Text]:
            texts = stages.read(stages.shuffled(files, seed), dropped)
            return stages.cut(stages.deduplicate(stages.keep(texts, dropped), dropped, seen))

        system = stages.find_system_files(seed)
        prose = clean(c for c in system if c.kind in stages.PROSE_KINDS)
        source = clean(c for c in system if c.kind == "source")
        mixed = stages.mix([(prose, self.prose_fraction), (source, 1 - self.prose_fraction)])
        return stages.take(mixed, self.max_bytes)


def _read_jsonl(candidates: Iterable[Candidate], field: str) -> Iterator[Text]:
    for candidate in candidates:
        for number, where, value in read_jsonl(candidate.path, field):
            if field not in value:
                names = ", ".join(map(repr, itertools.islice(value, 8))) or "none"
                more = ", ..." if len(value) > 8 else ""
                raise CorpusError(f"{where}: no field '{field}', only {names}{more}; set field")
            text = _text(value[field], field, where)
            yield Text(f"{candidate.name}:{number}", text, "user", content_hash(text))


def _text(text: Any, field: str, where: str) -> str:
    if not isinstance(text, str):
        raise CorpusError(f"{where}: field '{field}' is a {type(text).__name__}, not a string")
    return text.replace("\r\n", "\n")


def _read_examples(directories: Sequence[Path], split: str, field: str) -> Iterator[Text]:
    for directory in directories:
        for i, example in enumerate(read_examples(directory, split, (field,), "set field")):
            where, value = f"'{directory}', {split} example {i}", example[field]
            if isinstance(value, bytes):
                try:
                    value = value.decode()
                except UnicodeDecodeError as error:
                    raise CorpusError(f"{where}: feature '{field}' is not UTF-8") from error
            text = _text(value, field, where)
            yield Text(f"{directory.name}/{split}:{i}", text, "user", content_hash(text))
