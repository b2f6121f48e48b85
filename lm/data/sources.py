"""Tokenized documents: TFDS datasets stored as array_record, read and written without TensorFlow.

A dataset holds one example per document with the features `tokens` (int32 [n], BOS and EOS
included), `num_bytes` (bytes of its text) and `name`. It opens with any TFDS reader
(`tfds.builder_from_directory(path).as_data_source(split)`).

Tokens are stored twice on purpose. The array_record files are for others: any TFDS reader opens
them. Training reads the `.npy` cache that `open_source` makes beside them, memory-mapped, two bytes
per token while ids fit: decoding one example costs about 50 us, and a packed row needs parts of
many documents.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_READ_BATCH = 1024
_WRITE_BATCH = 1024
_CACHE_VERSION = 1


class CorpusError(ValueError):
    """Text that cannot be used, or a corpus that is not there; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: its token ids, BOS and EOS included, and the size of its text in bytes."""

    tokens: np.ndarray
    num_bytes: int
    name: str = ""


class ArraySource:
    """Documents stored end to end in one array, in memory or memory-mapped.

    Args:
      tokens: unsigned or signed integers [total].
      offsets: int64 [documents + 1]; document d is tokens[offsets[d]:offsets[d + 1]].
      num_bytes: int64 [documents], bytes of text per document, BOS and EOS not counted.
      fingerprint: names the content: sources with the same tokens have the same one.
    """

    def __init__(
        self, tokens: np.ndarray, offsets: np.ndarray, num_bytes: np.ndarray, fingerprint: str
    ):
        self._tokens, self._offsets = tokens, offsets
        self.num_bytes, self.fingerprint = num_bytes, fingerprint

    @classmethod
    def from_documents(cls, documents: Iterable[Document]) -> "ArraySource":
        """Holds `documents` in memory."""
        documents = list(documents)
        tokens = np.concatenate([np.zeros(0, np.int32), *(d.tokens for d in documents)])
        offsets = np.cumsum([0] + [len(d.tokens) for d in documents], dtype=np.int64)
        num_bytes = np.asarray([d.num_bytes for d in documents], dtype=np.int64)
        digest = hashlib.sha256()
        for d in documents:
            _update(digest, d.tokens, d.num_bytes)
        return cls(tokens, offsets, num_bytes, digest.hexdigest()[:32])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents], tokens per document."""
        return np.diff(self._offsets)

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [start, start + length) of a document, int32; all from `start` by default."""
        begin, end = int(self._offsets[document]) + start, int(self._offsets[document + 1])
        if length is not None:
            end = min(end, begin + length)
        return np.asarray(self._tokens[begin:end], dtype=np.int32)

    def head(self, num_tokens: int) -> "ArraySource":
        """The leading documents that hold at least `num_tokens` tokens, or all there are."""
        documents = min(len(self), int(np.searchsorted(self._offsets, num_tokens)))
        return self._slice(0, documents, f"{documents}")

    def part(self, start: int, stop: int) -> "ArraySource":
        """Documents `start` to `stop` - 1 (or the last), numbered from 0; copies nothing."""
        return self._slice(start, stop, f"{start}-{min(stop, len(self))}")

    def _slice(self, start: int, stop: int, mark: str) -> "ArraySource":
        offsets, num_bytes = self._offsets[start : stop + 1], self.num_bytes[start:stop]
        return ArraySource(self._tokens, offsets, num_bytes, f"{self.fingerprint}:{mark}")


def write_dataset(
    directory: str | os.PathLike[str],
    splits: Mapping[str, Iterable[Document]],
    *,
    name: str = "tokens",
    max_documents_per_shard: int = 100_000,
) -> None:
    """Writes documents, in their order, as a TFDS dataset in array_record files.

    Args:
      directory: an empty or missing directory, by TFDS custom `.../<name>/<version>`.

    Raises:
      FileExistsError: `directory` holds files.
      ValueError: a split without documents.
    """
    directory = Path(directory)
    if directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(f"'{directory}' is not empty; write to a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    import tensorflow_datasets as tfds

    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=name,
            version=tfds.core.Version("1.0.0"),
            data_dir=str(directory),
            module_name=__name__,
        ),
        description="Tokenized documents, BOS and EOS included.",
        features=tfds.features.FeaturesDict(
            {
                "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                "num_bytes": np.int64,
                "name": tfds.features.Text(),
            }
        ),
    )
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=max_documents_per_shard, file_format="array_record"
    )
    writer.initialize_splits(list(splits))
    for split, documents in splits.items():
        # The writer rewrites its metadata at every call, so a call carries many documents.
        examples, written = map(dataclasses.asdict, documents), False
        while batch := list(itertools.islice(examples, _WRITE_BATCH)):
            writer.add_examples({split: batch})
            written = True
        if not written:
            raise ValueError(f"split '{split}' of '{directory}' has no documents")
    writer.close_all()


def open_source(
    directory: str | os.PathLike[str],
    split: str,
    cache: str | os.PathLike[str] | None = None,
    fingerprint: str | None = None,
) -> ArraySource:
    """Opens a split of a TFDS dataset, through a memory-mapped copy of its tokens.

    The copy is made once, atomically, in `cache` (by default `<directory>/../.token_cache`) and
    made again when the dataset's files change; with a `fingerprint`, a copy of the tokens that it
    names will do, and no others.

    Raises:
      FileNotFoundError: no TFDS dataset at `directory`.
      ValueError: no such split, or it lacks the features `tokens` or `num_bytes`.
      CorpusError: the tokens are not those of `fingerprint`.
    """
    directory = Path(directory)
    cache = Path(cache) if cache is not None else directory.parent / ".token_cache"
    if fingerprint:
        for about in sorted(cache.glob("*/about.json")):
            if (copy := _open_cache(about.parent)).fingerprint == fingerprint:
                return copy
    if not (directory / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"no TFDS dataset at '{directory}' (dataset_info.json is missing); pass the "
            "directory that write_dataset or TFDS wrote, version included"
        )
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(directory.iterdir())]
    key = json.dumps([_CACHE_VERSION, split, stats])
    path = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not path.exists():
        _write_cache(directory, split, path)
    source = _open_cache(path)
    if fingerprint and source.fingerprint != fingerprint:
        raise CorpusError(
            f"the tokens of '{directory}', split '{split}', are not those it was built with "
            f"(fingerprint {source.fingerprint}, built with {fingerprint}); copy it again"
        )
    return source


def _open_cache(path: Path) -> ArraySource:
    names = ("tokens", "offsets", "num_bytes")
    tokens, offsets, num_bytes = (np.load(path / f"{n}.npy", mmap_mode="r") for n in names)
    about = json.loads((path / "about.json").read_text())
    return ArraySource(tokens, offsets, num_bytes, about["fingerprint"])


def read_examples(
    directory: Path, split: str, features: Iterable[str], remedy: str
) -> Iterator[dict[str, Any]]:
    """The examples of a split of a TFDS dataset, in order.

    Raises:
      CorpusError: no such split; or one of `features` is missing, with what to do about it.
    """
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(directory)
    splits, known = (sorted(each or {}) for each in (builder.info.splits, builder.info.features))
    if split not in splits:
        raise CorpusError(f"dataset '{directory}' has no split '{split}', only {splits}")
    for name in features:
        if name not in known:
            raise CorpusError(
                f"dataset '{directory}' has no feature '{name}', only {known}; {remedy}"
            )
    examples = builder.as_data_source(split)
    for start in range(0, len(examples), _READ_BATCH):
        yield from examples.__getitems__(range(start, min(start + _READ_BATCH, len(examples))))


def _write_cache(directory: Path, split: str, path: Path) -> None:
    lengths, num_bytes, largest = [], [], 0
    digest = hashlib.sha256()
    needed, remedy = ("tokens", "num_bytes"), "write it with write_dataset"
    with written_once(path) as partial:
        with open(partial / "tokens.int32", "wb") as file:
            for example in read_examples(directory, split, needed, remedy):
                tokens = example["tokens"].astype("<i4")
                file.write(tokens.data)
                lengths.append(len(tokens))
                num_bytes.append(int(example["num_bytes"]))
                largest = max(largest, int(tokens.max(initial=0)))
                _update(digest, tokens, num_bytes[-1])
        total = sum(lengths)
        if not total:
            raise ValueError(f"split '{split}' of dataset '{directory}' holds no tokens")
        _narrow(partial / "tokens.int32", partial / "tokens.npy", total, largest)
        np.save(partial / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
        np.save(partial / "num_bytes.npy", np.asarray(num_bytes, dtype=np.int64))
        about = {"split": split, "fingerprint": digest.hexdigest()[:32], "num_tokens": total}
        (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n")


@contextlib.contextmanager
def written_once(path: Path) -> Iterator[Path]:
    """A new directory that becomes `path` once the block ends well; of several, the first stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        try:
            partial.rename(path)
        except OSError:
            if not path.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _narrow(raw: Path, path: Path, total: int, largest: int) -> None:
    """Moves int32 tokens to a .npy file of the least width that holds them."""
    dtype = np.dtype("<u2" if largest < 1 << 16 else "<i4")
    tokens = np.memmap(raw, "<i4", "r", shape=(total,))
    out = np.lib.format.open_memmap(path, "w+", dtype, (total,))
    step = 1 << 24
    for start in range(0, total, step):
        out[start : start + step] = tokens[start : start + step]
    out.flush()
    raw.unlink()


def _update(digest: Any, tokens: np.ndarray, num_bytes: int) -> None:
    digest.update(np.asarray([len(tokens), num_bytes], "<i8").data)
    digest.update(np.ascontiguousarray(tokens, "<i4").data)
