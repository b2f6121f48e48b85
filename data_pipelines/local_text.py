"""Local text to a tokenizer and tokenized datasets, with no download.

    python -m data_pipelines.local_text --output=DIR [--files='dir/**/*.txt'] [--vocab_size=4096]

Without --files the corpus is what every machine with Python has: documentation, docstrings and
source of the standard library and of the installed packages. With --kind=jsonl the files hold a
JSON object per line, with --kind=array_record they are TFDS datasets. Several named sources and
validation sets that share one tokenizer are given in Python. DIR receives

    corpus.json            counts, bytes, what was dropped and why, parameters, fingerprints
    tokenizer.model        SentencePiece
    <source>/1.0.0/        TFDS datasets in array_record files, splits `train` and `validation`
    token_cache/, plans/   memory-mapped copies and pack plans, made when first used

The same command finds DIR complete and changes nothing. A build is made in `.DIR.partial` beside
it and renamed when complete; one that was cut short starts again.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from tqdm import tqdm

from data_pipelines import texts as stages
from data_pipelines.documents import DataSource, SystemText, ValidationSet
from data_pipelines.spool import BYTES, Spool, tokenize
from data_pipelines.texts import Candidate
from lm.config import program
from lm.config.command_line import ConfigError, input_errors
from lm.config.fields import BelowOne, Count, Fraction, Positive, Seed
from lm.config.program import Number
from lm.data.corpus import Corpus, CorpusError, open_corpus
from lm.data.sources import ArraySource, write_dataset
from lm.tokenizers import SentencePieceTokenizer, train_sentencepiece

_VERSION = 2
_SYSTEM_BYTES = 30_000_000
_TOKENIZER_BYTES = 20_000_000
_LOCK = ".lock"
DEFAULT_SOURCE = "local_text"
Part = DataSource | ValidationSet | SystemText


def build(
    output: str | os.PathLike[str],
    files: str | Sequence[str] | None = None,
    *,
    sources: Sequence[DataSource] = (),
    validation: Sequence[ValidationSet] = (),
    tokenizer: str | os.PathLike[str] | None = None,
    vocab_size: int = 4096,
    max_bytes: int | None = None,
    held_out: float = 0.05,
    prose_fraction: float = 0.3,
    seed: int = 0,
    progress: bool = True,
    begun: bool = False,
    process_index: int = 0,
    wait: Callable[[str], object] | None = None,
) -> Corpus:
    """Builds the corpus in `output`, or opens it if it is there with the same parameters.

    Weights and caps of sources may differ from those it was built with: they decide the text that
    trains the tokenizer, and no document. So may where the text is and its times: the content
    counts. Text that has gone is not missed.

    Args:
      output: directory of the result.
      files: glob patterns of the user's own text, a source named "local_text"; None for
        `sources`, or without those for the system's documentation and source.
      sources: to train on; in the order given, the first keeps what several have.
      validation: text to evaluate on, beside the held-out parts of the sources.
      tokenizer: a SentencePiece model to use; None to train one on a sample of the sources by
        their weights.
      vocab_size: of the tokenizer to train.
      max_bytes: text of `files` or the system to take, about; None for all of `files`, or 30 MB of
        the system's.
      held_out: share of the documents of `files` or the system that go to `validation`, chosen by
        content hash; 0 for none.
      prose_fraction: share of the system corpus's bytes that is prose, while prose lasts.
      seed: of the order, the choice of files and the split.
      begun: a run has begun with what is in `output`, which therefore stays what it is: text or a
        tokenizer that has changed since is reported and not read.
      process_index: of this host.
      wait: barrier over all hosts, called once by each: process 0 builds, the others open what it
        built, in a directory they share.

    Raises:
      CorpusError: no files, a user file that cannot be read or is not UTF-8, no text left, too
        little text for the vocabulary or for a held-out split, or `output` holds something else;
        on another host, no corpus in `output`.
    """
    output = Path(output)
    if process_index and wait:
        wait("corpus")
        return _open_built(output, process_index)
    try:
        parts = _parts(files, sources, validation, max_bytes, held_out, prose_fraction)
        parameters = _parameters(parts, tokenizer, vocab_size, seed, begun)
        if existing := _existing(output, parameters, parts, begun):
            return existing
        candidates = {part.name: part.find() for part in parts}
        for part in parts:
            parameters |= _text_described(part, candidates[part.name])
        with _working_directory(output) as partial:
            # By the build that was waited for.
            if existing := _existing(output, parameters, parts, begun):
                return existing
            summary = {"parameters": parameters}
            summary |= _write_corpus(
                partial, parts, candidates, tokenizer, vocab_size, seed, progress
            )
            (partial / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
            if output.is_dir():
                output.rmdir()
            partial.rename(output)
            (output / _LOCK).unlink()
        return _reported(Corpus(output, summary))
    finally:
        if wait:
            wait("corpus")


def _parts(
    files: str | Sequence[str] | None,
    sources: Sequence[DataSource],
    validation: Sequence[ValidationSet],
    max_bytes: int | None,
    held_out: float,
    prose_fraction: float,
) -> list[Part]:
    """What to read: validation sets first, so that their documents are kept out of the sources."""
    if max_bytes is not None and max_bytes < 1:
        raise CorpusError(f"max_bytes={max_bytes} must be at least 1")
    if not 0 <= held_out < 1:
        raise CorpusError(f"held_out={held_out} must be in [0, 1), such as 0.05, or 0 for none")
    if not 0 <= prose_fraction <= 1:
        raise CorpusError(f"prose_fraction={prose_fraction} must be in [0, 1]")
    if files and sources:
        raise CorpusError(f"files={files!r} and sources both say what to read; give one of them")
    parts: list[Part] = [*validation, *sources]
    if files:
        patterns = (files,) if isinstance(files, str) else tuple(files)
        megabytes = (max_bytes or 0) / 1e6
        parts.append(
            DataSource(DEFAULT_SOURCE, patterns, max_megabytes=megabytes, held_out=held_out)
        )
    elif not sources:
        max_bytes = max_bytes or _SYSTEM_BYTES
        parts.append(SystemText(DEFAULT_SOURCE, max_bytes, prose_fraction, held_out))
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise CorpusError(f"sources and validation sets {names} must have distinct names")
    return parts


def _parameters(
    parts: Sequence[Part],
    tokenizer: str | os.PathLike[str] | None,
    vocab_size: int,
    seed: int,
    begun: bool,
) -> dict[str, Any]:
    """All that decides the tokens, but for the text; a run that has begun has its tokenizer."""
    given = tokenizer if tokenizer and (os.path.exists(tokenizer) or not begun) else None
    found: dict[str, Any] = {
        "version": _VERSION,
        "sources": [p.name for p in parts if not isinstance(p, ValidationSet)],
        "validation": [p.name for p in parts if isinstance(p, ValidationSet)],
        "tokenizer": SentencePieceTokenizer(given).fingerprint if given else None,
        "vocab_size": None if tokenizer else vocab_size,
        "seed": seed,
    }
    for part in parts:
        about = dataclasses.asdict(part)
        for name in ("name", "weight", "max_epochs", "max_tokens", "files"):
            about.pop(name, None)
        found |= {f"{part.name}.{name}": value for name, value in about.items()}
    return found


def _text_described(part: Part, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The patterns of a part's files; their names, sizes and times; and their content."""
    if isinstance(part, SystemText):
        return {}
    about = {
        "files": list(part.files),
        "listing": _listing(candidates),
        "content": _content(candidates),
    }
    return {f"{part.name}.{name}": value for name, value in about.items()}


@contextlib.contextmanager
def _working_directory(output: Path) -> Iterator[Path]:
    """`.<output>.partial`, empty but for a lock that a process which dies lets go of.

    A second build of the same output waits here until the first is done.
    """
    partial = output.with_name(f".{output.name}.partial")
    lock = _lock(partial)
    try:
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()
        yield partial
    finally:
        if _lies_in(lock, partial):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _lock(partial: Path) -> int:
    """A handle that holds the lock in a directory, which is made."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # the directory was renamed or removed since
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning("another process builds in '%s'; waiting for it", partial)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _lies_in(lock, partial):
            return lock
        os.close(lock)


def _lies_in(lock: int, partial: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(partial / _LOCK))
    except FileNotFoundError:
        return False


def _write_corpus(
    directory: Path,
    parts: Sequence[Part],
    candidates: Mapping[str, Sequence[Candidate]],
    tokenizer_path: str | os.PathLike[str] | None,
    vocab_size: int,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Collects the documents of every part, trains the tokenizer and writes the datasets."""
    spools: dict[str, Spool] = {}
    splits: dict[str, dict[str, set[int]]] = {}
    about: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for part in parts:
        name, dropped = part.name, Counter[str]()
        texts = part.documents(candidates[name], seed, dropped, seen)
        total = part.max_bytes or sum(c.size for c in candidates[name])
        spool = spools[name] = Spool.write(directory / f"{name}.jsonl", texts, total, progress)
        if not spool.groups:
            reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common())
            raise CorpusError(
                f"'{name}' is empty: every document was dropped ({reasons or 'no documents'}); add "
                "text"
            )
        if isinstance(part, ValidationSet):
            splits[name] = {"validation": spool.all()}
        else:
            splits[name] = spool.split(part.held_out, seed)
        about[name] = {
            "dropped": dict(sorted(dropped.items())),
            "bytes_by_kind": dict(sorted(spool.bytes_by_kind.items())),
        }

    sources = [part for part in parts if not isinstance(part, ValidationSet)]
    path = directory / "tokenizer.model"
    if tokenizer_path:
        shutil.copyfile(tokenizer_path, path)
        tokenizer = SentencePieceTokenizer(path)
    else:
        sample = _sample(
            [(spools[p.name], splits[p.name]["train"], p.weight) for p in sources], seed
        )
        try:
            tokenizer = train_sentencepiece(sample, path, vocab_size, max_bytes=_TOKENIZER_BYTES)
        except ValueError as error:
            raise CorpusError(str(error)) from error

    work = Corpus(directory, {"sources": {p.name: {} for p in sources}, "validation": about})
    num_bytes = sum(spool.num_bytes for spool in spools.values())
    with tqdm(total=num_bytes, desc="tokenize", disable=not progress, **BYTES) as bar:
        for name, spool in spools.items():
            lost = Counter(unknown_tokens=0, documents_changed=0)
            tokens = {
                s: tokenize(spool.read(i), tokenizer, bar, lost) for s, i in splits[name].items()
            }
            write_dataset(directory / name / "1.0.0", tokens, name=name)
            spool.path.unlink()
            about[name] |= lost
            found = {split: _split_summary(work.source(split, name)) for split in tokens}
            about[name] = {"splits": found} | about[name]
    names = {part.name for part in sources}
    return {
        "sources": {n: a for n, a in about.items() if n in names},
        "validation": {n: a for n, a in about.items() if n not in names},
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
    }


def _sample(parts: Sequence[tuple[Spool, set[int], float]], seed: int) -> Iterator[str]:
    """Text to train the tokenizer on: the sources by their weights, as far as each has text."""
    total = sum(weight for _, _, weight in parts) or 1.0
    streams = []
    for spool, numbers, weight in parts:
        # Some more than its share, for a draw is not exact and another source may be short.
        wanted = 1.5 * _TOKENIZER_BYTES * weight / total
        streams.append((spool.read(spool.sample(numbers, wanted, seed)), weight))
    return (text.text for text in stages.mix(streams))


def _open_built(directory: Path, process_index: int) -> Corpus:
    try:
        return open_corpus(directory)
    except CorpusError as error:
        raise CorpusError(
            f"host {process_index} finds no corpus at '{directory}' after host 0 was to build it; "
            "if host 0 reports no error of its own, give a directory that all hosts share, or copy "
            "host 0's there on each"
        ) from error


def _existing(
    output: Path, parameters: dict[str, Any], parts: Sequence[Part], begun: bool
) -> Corpus | None:
    """The corpus in `output`, if it was built as `parameters` say."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / "corpus.json").is_file():
        raise CorpusError(
            f"'{output}' exists and is not a corpus (corpus.json is missing); choose another output"
        )
    corpus = open_corpus(output)
    before = corpus.summary["parameters"]
    text = [f"{part.name}.{name}" for part in parts for name in ("files", "listing", "content")]
    changed = [k for k in parameters if k not in text and before.get(k) != parameters[k]]
    if begun and not {*changed} - {"tokenizer", "vocab_size"}:
        for key in changed:
            logging.warning(
                f"'%s' has a {key} of its own ({before.get(key)}), which is used", output
            )
    elif changed:
        differences = ", ".join(
            f"{k}={parameters[k]!r} (there: {before.get(k)!r})" for k in changed
        )
        raise CorpusError(
            f"'{output}' holds a corpus with other parameters: {differences}; choose another "
            "output, delete it, or pass the same parameters"
        )
    for part in parts:
        if not isinstance(part, SystemText):
            _compare_text(output, part, before, begun)
    return _reported(corpus)


def _compare_text(
    output: Path, part: DataSource | ValidationSet, before: dict[str, Any], begun: bool
) -> None:
    """Looks for the text that a corpus was built from; the same content will do, wherever it is.

    Raises:
      CorpusError: there is other text, and no run has `begun` with the corpus.
    """
    name, said = part.name, "is not read again: the tokens in '%s' are used"
    try:
        candidates = part.find()
        if before.get(f"{name}.listing") == _listing(candidates):
            return
        if before.get(f"{name}.content") == _content(candidates):
            return
    except (CorpusError, OSError) as error:
        if not begun and _words(before.get(f"{name}.files", [])) != _words(part.files):
            raise
        logging.warning(f"the text of '%s' {said} (%s)", name, output, error)
        return
    if not begun:
        raise CorpusError(
            f"the files of {list(part.files)} changed since '{output}' was built; delete it or "
            "choose another output"
        )
    logging.warning(f"the text of '%s' has changed and {said}", name, output)


def _words(patterns: Iterable[str]) -> list[str]:
    """Patterns that are the same however they are divided."""
    return " ".join(patterns).replace(",", " ").split()


def _reported(corpus: Corpus) -> Corpus:
    """The corpus, after what its tokens lack has been said."""
    for line in corpus.losses():
        logging.warning("%s", line)
    return corpus


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


def _content(candidates: Iterable[Candidate]) -> str:
    digest = hashlib.sha256()
    for c in candidates:
        with open(c.path, "rb") as file:
            digest.update(f"{c.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def _define_flags() -> None:
    flags.DEFINE_string("output", None, "directory of the result", required=True)
    flags.DEFINE_multi_string("files", [], "glob pattern of your own text; may be repeated")
    flags.DEFINE_enum("kind", "text", ["text", "jsonl", "array_record"], "of --files")
    flags.DEFINE_string("field", "text", "that holds the text, of kind jsonl or array_record")
    flags.DEFINE_string("tokenizer", None, "SentencePiece model to use; trained without")
    flags.DEFINE(Number(Count), "vocab_size", 4096, "tokens of the vocabulary")
    flags.DEFINE(
        Number(Positive), "max_megabytes", None, "text to take; all of --files, 30 without"
    )
    flags.DEFINE(Number(BelowOne), "held_out", 0.05, "share of documents held out; 0: none")
    flags.DEFINE(Number(Fraction), "prose_fraction", 0.3, "share of prose in the system's text")
    flags.DEFINE(Number(Seed), "seed", 0, "of the order, the choice and the split")


def _build_by_flags(values: Any) -> Corpus:
    megabytes = values.max_megabytes
    common = {"tokenizer": values.tokenizer, "vocab_size": values.vocab_size, "seed": values.seed}
    if values.kind == "text":
        return build(
            values.output,
            values.files or None,
            max_bytes=None if megabytes is None else int(megabytes * 1e6),
            held_out=values.held_out,
            prose_fraction=values.prose_fraction,
            **common,
        )
    source = DataSource(
        DEFAULT_SOURCE, tuple(values.files), values.kind, values.field,
        max_megabytes=megabytes or 0.0, held_out=values.held_out,
    )  # fmt: skip
    return build(values.output, sources=[source], **common)


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise ConfigError(f"unexpected argument {arguments[0]!r}; quote the --files pattern")
    with input_errors():
        corpus = _build_by_flags(flags.FLAGS)
    print(json.dumps(corpus.summary, indent=2))
    print(f"corpus: {corpus.directory / 'corpus.json'}")
    print(f"tokenizer: {corpus.tokenizer_path}")
    for name in corpus.summary["sources"]:
        print(f"dataset: {corpus.directory / name / '1.0.0'}")


if __name__ == "__main__":
    _define_flags()
    program.run(main, positional=True)
