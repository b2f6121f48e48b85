"""Local text to a tokenizer and a tokenized data set, with no download.

    python -m data_pipelines.local_text --output=DIR [--files='dir/**/*.txt'] [--vocab_size=4096]

Without --files the corpus is what every machine with Python has: documentation, docstrings and
source of the standard library and of the installed packages. DIR receives

    corpus.json            counts, bytes, what was dropped and why, parameters, fingerprints
    tokenizer.model        SentencePiece
    local_text/1.0.0/      TFDS data set in array_record files, splits `train` and `validation`
    token_cache/, plans/   memory-mapped copies and pack plans, made when first used

The same command finds DIR complete and changes nothing. A build is made in `.DIR.partial` beside
it and renamed when complete; one that was cut short starts again.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from data_pipelines import texts as stages
from data_pipelines.texts import Candidate, CorpusError, Text
from lm.data.packing import PackPlan, open_plan
from lm.data.sources import ArraySource, Document, open_source, write_dataset
from lm.tokenizers import SentencePieceTokenizer, train_sentencepiece

_VERSION = 1
_SYSTEM_BYTES = 30_000_000
_ENCODE_BATCH_CHARS = 2_000_000
_FEW_FILES = 100
_BYTES: dict[str, Any] = {"unit": "B", "unit_scale": True}
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class LocalText:
    """A complete corpus on disk; `summary` is the content of its corpus.json."""

    directory: Path
    summary: dict[str, Any]

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / "tokenizer.model"

    @property
    def dataset_path(self) -> Path:
        return self.directory / "local_text" / "1.0.0"

    def tokenizer(self) -> SentencePieceTokenizer:
        return SentencePieceTokenizer(self.tokenizer_path)

    def source(self, split: str) -> ArraySource:
        """The tokenized documents of a split."""
        return open_source(self.dataset_path, split, self.directory / "token_cache")

    def plan(self, split: str, seq_len: int) -> PackPlan:
        """The pack plan of a split, made the first time."""
        fingerprint = self.summary["tokenizer"]["fingerprint"]
        return open_plan(self.source(split), seq_len, self.directory / "plans", fingerprint)

    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split as text, decoded from their tokens without loss."""
        tokenizer, source = self.tokenizer(), self.source(split)
        return (tokenizer.decode(source.read(d)) for d in range(len(source)))


def build(
    output: str | os.PathLike[str],
    files: str | Sequence[str] | None = None,
    *,
    vocab_size: int = 4096,
    max_bytes: int | None = None,
    held_out: float = 0.05,
    prose_fraction: float = 0.3,
    seed: int = 0,
    progress: bool = True,
) -> LocalText:
    """Builds the corpus in `output`, or opens it if it is there with the same parameters.

    Args:
      output: directory of the result.
      files: glob patterns of the user's own text; None for the system's documentation and source.
      max_bytes: text to take, about; None for all of `files`, or 30 MB of the system's.
      held_out: share of the documents that go to `validation`, chosen by content hash.
      prose_fraction: share of the system corpus's bytes that is prose, while prose lasts.
      seed: of the order, the choice of files and the split.

    Raises:
      CorpusError: no files, a user file that is not UTF-8, no text left, too little text for the
        vocabulary or for a held-out split, or `output` holds something else.
    """
    output = Path(output)
    if max_bytes is not None and max_bytes < 1:
        raise CorpusError(f"max_bytes={max_bytes} must be at least 1")
    if not 0 < held_out < 1:
        raise CorpusError(f"held_out={held_out} must lie between 0 and 1, such as 0.05")
    if not 0 <= prose_fraction <= 1:
        raise CorpusError(f"prose_fraction={prose_fraction} must lie in [0, 1]")
    patterns = [files] if isinstance(files, str) else list(files or [])
    candidates = stages.find_user_files(patterns) if patterns else None
    if max_bytes is None and not patterns:
        max_bytes = _SYSTEM_BYTES
    parameters = {
        "version": _VERSION,
        "files": patterns or None,
        "listing": _listing(candidates) if candidates else None,
        "vocab_size": vocab_size,
        "max_bytes": max_bytes,
        "held_out": held_out,
        "prose_fraction": None if patterns else prose_fraction,
        "seed": seed,
    }
    if existing := _existing(output, parameters):
        return existing

    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dropped: Counter[str] = Counter()
        documents = _documents(candidates, max_bytes, prose_fraction, seed, dropped)
        total = max_bytes or sum(c.size for c in candidates or [])
        spool = _Spool.write(partial / "documents.jsonl", documents, total, progress)
        if not spool.groups:
            reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common())
            raise CorpusError(
                f"the corpus is empty: every document was dropped ({reasons or 'no files'}); add "
                "text"
            )
        summary = {"parameters": parameters, "dropped": dict(sorted(dropped.items()))}
        summary |= _write_corpus(
            LocalText(partial, {}), spool, vocab_size, held_out, seed, progress
        )
        (partial / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return LocalText(output, summary)


def _write_corpus(
    work: LocalText, spool: "_Spool", vocab_size: int, held_out: float, seed: int, progress: bool
) -> dict[str, Any]:
    """Splits the spooled documents, trains the tokenizer and writes the data set."""
    splits = spool.split(held_out, seed, by_file=len(set(spool.groups)) >= _FEW_FILES)
    try:
        training_text = (text.text for text in spool.read(splits["train"]))
        tokenizer = train_sentencepiece(training_text, work.tokenizer_path, vocab_size)
    except ValueError as error:
        raise CorpusError(str(error)) from error
    bar = tqdm(total=spool.num_bytes, desc="tokenize", disable=not progress, **_BYTES)
    with bar:
        tokens = {s: _tokenize(spool.read(splits[s]), tokenizer, bar) for s in SPLITS}
        write_dataset(work.dataset_path, tokens, name="local_text")
    spool.path.unlink()
    return {
        "splits": {s: _split_summary(work.source(s)) for s in SPLITS},
        "bytes_by_kind": dict(sorted(spool.bytes_by_kind.items())),
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
    }


def open_corpus(directory: str | os.PathLike[str]) -> LocalText:
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
    return LocalText(Path(directory), json.loads(path.read_text()))


def _existing(output: Path, parameters: dict[str, Any]) -> LocalText | None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / "corpus.json").is_file():
        raise CorpusError(
            f"'{output}' exists and is no corpus (corpus.json is missing); choose another output"
        )
    corpus = open_corpus(output)
    before = corpus.summary["parameters"]
    changed = [k for k in parameters if before.get(k) != parameters[k]]
    if changed == ["listing"]:
        raise CorpusError(
            f"the files of {parameters['files']} changed since '{output}' was built; delete it or "
            "choose another output"
        )
    if changed:
        differences = ", ".join(
            f"{k}={parameters[k]!r} (there: {before.get(k)!r})" for k in changed if k != "listing"
        )
        raise CorpusError(
            f"'{output}' holds a corpus with other parameters: {differences}; choose another "
            "output, delete it, or pass the same parameters"
        )
    return corpus


def _documents(
    candidates: Sequence[Candidate] | None,
    max_bytes: int | None,
    prose_fraction: float,
    seed: int,
    dropped: Counter[str],
) -> Iterator[Text]:
    def clean(files: Iterable[Candidate]) -> Iterator[Text]:
        texts = stages.read(stages.shuffled(files, seed), dropped)
        return stages.deduplicate(stages.keep(texts, dropped), dropped)

    if candidates is not None:
        # Short enough that a single file still splits into training and held-out sections.
        total = sum(c.size for c in candidates)
        section = min(stages.SECTION_BYTES, max(4096, total // 200))
        return stages.take(stages.cut(clean(candidates), section), max_bytes)
    system = stages.find_system_files(seed)
    prose = [c for c in system if c.kind in stages.PROSE_KINDS]
    source = [c for c in system if c.kind == "source"]
    mixed = stages.mix(stages.cut(clean(prose)), stages.cut(clean(source)), prose_fraction)
    return stages.take(mixed, max_bytes)


class _Spool:
    """Clean documents on disk between the passes that need them."""

    def __init__(self, path: Path):
        self.path = path
        self.groups: list[str] = []
        self.hashes: list[str] = []
        self.bytes_by_kind: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        return sum(self.bytes_by_kind.values())

    @classmethod
    def write(cls, path: Path, texts: Iterable[Text], total: int, progress: bool) -> "_Spool":
        spool = cls(path)
        bar = tqdm(total=total, desc="collect", disable=not progress, **_BYTES)
        with bar, open(path, "w") as file:
            for text in texts:
                file.write(json.dumps(dataclasses.asdict(text)) + "\n")
                spool.groups.append(text.group)
                spool.hashes.append(stages.content_hash(text.text))
                spool.bytes_by_kind[text.kind] += text.num_bytes
                bar.update(text.num_bytes)
        return spool

    def split(self, held_out: float, seed: int, by_file: bool) -> dict[str, set[int]]:
        """Document numbers of each split; with `by_file` a file's sections stay together."""
        if len(self.hashes) < 2:
            raise CorpusError(
                f"the corpus has 1 document of {self.num_bytes} bytes, too little for a held-out "
                "split; add text (about 100 kB or more)"
            )
        keys = self.groups if by_file else self.hashes
        draws = [stages.uniform(seed, f"split:{key}") for key in keys]
        held = {i for i, draw in enumerate(draws) if draw < held_out}
        by_draw = sorted(range(len(draws)), key=draws.__getitem__)
        held = (held or {by_draw[0]}) - {by_draw[-1]}
        return {"train": set(range(len(draws))) - held, "validation": held}

    def read(self, numbers: set[int]) -> Iterator[Text]:
        with open(self.path) as file:
            for i, line in enumerate(file):
                if i in numbers:
                    yield Text(**json.loads(line))


def _tokenize(
    texts: Iterable[Text], tokenizer: SentencePieceTokenizer, bar: tqdm
) -> Iterator[Document]:
    batch: list[Text] = []

    def flush() -> Iterator[Document]:
        encoded = tokenizer.encode_batch([t.text for t in batch], bos=True, eos=True)
        for text, ids in zip(batch, encoded, strict=True):
            bar.update(text.num_bytes)
            yield Document(np.asarray(ids, np.int32), text.num_bytes, text.name)
        batch.clear()

    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text.text)
        if chars >= _ENCODE_BATCH_CHARS:
            yield from flush()
            chars = 0
    yield from flush()


def _split_summary(source: ArraySource) -> dict[str, Any]:
    num_bytes, num_tokens = int(source.num_bytes.sum()), int(source.lengths.sum())
    return {
        "documents": len(source),
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": round(num_bytes / num_tokens, 4),
        "fingerprint": source.fingerprint,
    }


def _listing(candidates: Iterable[Candidate]) -> str:
    digest = hashlib.sha256()
    for c in candidates:
        digest.update(f"{c.name}\0{c.size}\0{c.path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _define_flags() -> None:
    flags.DEFINE_string("output", None, "directory of the result", required=True)
    flags.DEFINE_multi_string("files", [], "glob pattern of your own text; may be repeated")
    flags.DEFINE_integer("vocab_size", 4096, "tokens of the vocabulary")
    flags.DEFINE_float("max_megabytes", None, "text to take; all of --files, 30 without")
    flags.DEFINE_float("held_out", 0.05, "share of the documents held out")
    flags.DEFINE_float("prose_fraction", 0.3, "share of prose in the system's text")
    flags.DEFINE_integer("seed", 0, "of the order, the choice and the split")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {list(argv[1:])}; quote the --files pattern")
    values = flags.FLAGS
    megabytes = values.max_megabytes
    logging.set_verbosity(logging.WARNING)
    try:
        corpus = build(
            values.output,
            values.files or None,
            vocab_size=values.vocab_size,
            max_bytes=None if megabytes is None else int(megabytes * 1e6),
            held_out=values.held_out,
            prose_fraction=values.prose_fraction,
            seed=values.seed,
        )
    except CorpusError as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(corpus.summary, indent=2))
    print(f"corpus: {corpus.directory / 'corpus.json'}")
    print(f"tokenizer: {corpus.tokenizer_path}")
    print(f"data set: {corpus.dataset_path}")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
