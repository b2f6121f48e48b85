"""Documents between the passes over them, and their tokens."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines import texts as stages
from data_pipelines.texts import Text
from lm.data.corpus import CorpusError
from lm.data.sources import Document
from lm.tokenizers import Tokenizer

BYTES: dict[str, Any] = {"unit": "B", "unit_scale": True}
_ENCODE_BATCH = 256  # texts, none longer than a section
_FEW_FILES = 100


class Spool:
    """Clean documents of one source, on disk between the passes that need them."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        self.groups: list[str] = []
        self.hashes: list[str] = []
        self.bytes_by_kind: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        return sum(self.bytes_by_kind.values())

    @classmethod
    def write(cls, path: Path, texts: Iterable[Text], total: int, progress: bool) -> "Spool":
        spool = cls(path)
        bar = tqdm(total=total, desc=f"collect {spool.name}", disable=not progress, **BYTES)
        with bar, open(path, "w") as file:
            for text in texts:
                file.write(json.dumps(dataclasses.asdict(text)) + "\n")
                spool.groups.append(text.group)
                spool.hashes.append(stages.content_hash(text.text))
                spool.bytes_by_kind[text.kind] += text.num_bytes
                bar.update(text.num_bytes)
        return spool

    def split(self, held_out: float, seed: int) -> dict[str, set[int]]:
        """Document numbers of `train` and, unless `held_out` is 0, of `validation`.

        With many files a file's sections stay together.

        Raises:
          CorpusError: a single document, with a part to hold out.
        """
        if not held_out:
            return {"train": self.all()}
        if len(self.hashes) < 2:
            raise CorpusError(
                f"source '{self.name}' has 1 document of {self.num_bytes} bytes, too little for a "
                "held-out split; add text (about 100 kB or more)"
            )
        keys = self.groups if len(set(self.groups)) >= _FEW_FILES else self.hashes
        draws = [stages.uniform(seed, f"split:{key}") for key in keys]
        held = {i for i, draw in enumerate(draws) if draw < held_out}
        by_draw = sorted(range(len(draws)), key=draws.__getitem__)
        held = (held or {by_draw[0]}) - {by_draw[-1]}
        return {"train": set(range(len(draws))) - held, "validation": held}

    def all(self) -> set[int]:
        return set(range(len(self.hashes)))

    def sample(self, numbers: set[int], num_bytes: float, seed: int) -> set[int]:
        """Those of `numbers` that a keyed draw picks, to hold about `num_bytes`; all, if less."""
        share = num_bytes / max(1, self.num_bytes * len(numbers) / len(self.hashes))
        if share >= 1:
            return numbers
        return {i for i in numbers if stages.uniform(seed, f"sample:{self.hashes[i]}") < share}

    def read(self, numbers: set[int]) -> Iterator[Text]:
        with open(self.path) as file:
            for i, line in enumerate(file):
                if i in numbers:
                    yield Text(**json.loads(line))


def tokenize(
    texts: Iterator[Text], tokenizer: Tokenizer, bar: tqdm, lost: Counter[str]
) -> Iterator[Document]:
    """The texts, one after another, with BOS and EOS where the vocabulary has them.

    `num_bytes` counts what the tokens to predict stand for, which is the text unless the tokenizer
    loses some; without BOS nothing predicts the first token.

    Args:
      texts: documents.
      bar: advanced by their bytes.
      lost: counts `unknown_tokens`, and `documents_changed`, those that do not come back.
    """
    bos, eos = tokenizer.bos_id >= 0, tokenizer.eos_id >= 0
    while batch := list(itertools.islice(texts, _ENCODE_BATCH)):
        encoded = tokenizer.encode_batch([t.text for t in batch], bos=bos, eos=eos)
        for text, ids in zip(batch, encoded, strict=True):
            bar.update(text.num_bytes)
            held = tokenizer.decode_bytes(ids)
            lost["unknown_tokens"] += ids.count(tokenizer.unk_id)
            lost["documents_changed"] += held != text.text.encode()
            num_bytes = len(held) - (0 if bos else len(tokenizer.decode_bytes(ids[:1])))
            yield Document(np.asarray(ids, np.int32), num_bytes, text.name)
