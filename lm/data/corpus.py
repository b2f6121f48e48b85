"""A tokenized corpus on disk: its tokenizer, its sources, their pack plans.

`corpus.json` in its directory names the sources and validation sets, their counts and
fingerprints; whatever writes that file and the datasets beside it makes a corpus
(`data_pipelines.local_text` does).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.data.packed import PackedSource, pack_source
from lm.data.sources import ArraySource, CorpusError, open_source
from lm.tokenizers import SentencePieceTokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A complete corpus on disk; `summary` is the content of its corpus.json.

    Where a method takes the name of a source or validation set, None is the only source.
    """

    directory: Path
    summary: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The sources to train on."""
        return tuple(self.summary["sources"])

    @property
    def validation_names(self) -> tuple[str, ...]:
        """What has a split `validation`: sources by their held-out part, then validation sets."""
        held = [
            n for n, about in self.summary["sources"].items() if "validation" in about["splits"]
        ]
        return (*held, *self.summary["validation"])

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / "tokenizer.model"

    @property
    def dataset_path(self) -> Path:
        """The dataset of the first source."""
        return self.directory / self.names[0] / "1.0.0"

    def tokenizer(self) -> SentencePieceTokenizer:
        return SentencePieceTokenizer(self.tokenizer_path)

    def source(self, split: str, name: str | None = None) -> ArraySource:
        """The tokenized documents of a split.

        Raises:
          CorpusError: no such source; or several and no name.
        """
        known = (*self.names, *self.summary["validation"])
        if name is None and len(self.names) == 1:
            name = self.names[0]
        if name not in known:
            raise CorpusError(f"corpus '{self.directory}' has no {name!r}; name one of {known}")
        dataset = self.directory / str(name) / "1.0.0"
        about = (self.summary["sources"] | self.summary["validation"]).get(name, {})
        fingerprint = about.get("splits", {}).get(split, {}).get("fingerprint")
        return open_source(dataset, split, self.directory / "token_cache", fingerprint)

    def packed(self, split: str, seq_len: int, name: str | None = None) -> PackedSource:
        """The packed rows of a split, under the name of their source.

        Plans are made the first time; their hash covers text and tokenizer.
        """
        source, fingerprint = self.source(split, name), self.summary["tokenizer"]["fingerprint"]
        plans = self.directory / "plans"
        return pack_source(source, seq_len, plans, fingerprint, name=name or self.names[0])

    def texts(self, split: str, name: str | None = None) -> Iterator[str]:
        """The documents of a split as text, decoded from their tokens; None is all sources.

        Without a BOS token they begin at their second token, the first that a model predicts.
        """
        tokenizer = self.tokenizer()
        start = int(tokenizer.bos_id < 0)
        for each in self.names if name is None else (name,):
            if name is None and split not in self.summary["sources"][each]["splits"]:
                continue
            source = self.source(split, each)
            for d in range(len(source)):
                yield tokenizer.decode(source.read(d, start), continuation=start > 0)

    def losses(self) -> list[str]:
        """What the tokens lack of the text, a line for each fault."""
        found = []
        for name, about in (self.summary["sources"] | self.summary["validation"]).items():
            unknown, changed = (about.get(k, 0) for k in ("unknown_tokens", "documents_changed"))
            if unknown or changed:
                total = sum(split["documents"] for split in about["splits"].values())
                found.append(
                    f"the tokenizer loses text of '{name}': {unknown:,} unknown tokens, and "
                    f"{changed:,} of {total:,} documents do not come back byte for byte; bits per "
                    "byte are of the text that the tokens hold"
                )
        if self.tokenizer().bos_id < 0:
            found.append(
                "the tokenizer has no BOS token: the first token of a document is not predicted, "
                "and its bytes do not count"
            )
        return found


def open_corpus(directory: str | os.PathLike[str]) -> Corpus:
    """Opens what `build` made.

    Raises:
      CorpusError: no complete corpus at `directory`.
    """
    path = Path(directory) / "corpus.json"
    if not path.is_file():
        raise CorpusError(
            f"no corpus at '{directory}' (corpus.json is missing); make one with "
            f"python -m data_pipelines.local_text --output={directory}"
        )
    try:
        return Corpus(Path(directory), json.loads(path.read_text()))
    except ValueError as error:
        raise CorpusError(
            f"'{path}' is damaged: {error}; copy it again, or delete the folder to build it anew"
        ) from error
