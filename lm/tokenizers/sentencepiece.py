"""SentencePiece (Kudo & Richardson, 2018, arXiv:1808.06226) made lossless.

The model is byte-pair encoding with byte fallback, identity normalization, no dummy prefix and
digits split, so `decode(encode(text)) == text` for every text that UTF-8 can encode.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

# SentencePiece writes a space as U+2581 inside pieces and so cannot tell the two apart.
_SPACE_SYMBOL = "\u2581"
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
_NUM_SPECIAL = 4
_NUM_BYTES = 256
_CHUNK_CHARS = 2048


class SentencePieceTokenizer:
    """A trained SentencePiece model.

    Args:
      path: a `.model` file.

    Raises:
      FileNotFoundError: there is no file at `path`.
      ValueError: the file is no SentencePiece model.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no tokenizer model at '{path}'; train one with train_sentencepiece or check "
                "the path"
            )
        proto = self.path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise ValueError(
                f"'{path}' is not a SentencePiece model ({error}); pass the .model file"
            ) from error
        self.fingerprint = hashlib.sha256(proto).hexdigest()[:32]
        self._space_symbol_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()
        ]
        self._has_bytes = all(self._processor.is_byte(i) for i in self._space_symbol_ids)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        return self._processor.pad_id()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`.

        Raises:
          ValueError: `text` holds a lone surrogate, which UTF-8 cannot encode.
        """
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, eos: bool = False, num_threads: int = -1
    ) -> list[list[int]]:
        """`encode` of each text on `num_threads` threads (-1: one a core)."""
        for text in texts:
            _check_encodable(text)
        if not texts:
            return []
        if self._has_bytes and any(_SPACE_SYMBOL in text for text in texts):
            bodies = [self._encode_with_space_symbol(text) for text in texts]
        else:
            threads = 1 if len(texts) == 1 else num_threads
            bodies = self._processor.encode(list(texts), num_threads=threads)
        front, back = [self.bos_id] * bos, [self.eos_id] * eos
        return [front + body + back for body in bodies]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD.

        Raises:
          ValueError: an id outside [0, vocab_size).
        """
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(
                f"token id {wrong} is outside the vocabulary [0, {self.vocab_size}) of "
                f"'{self.path}'; mask padded vocabulary rows before sampling"
            )
        return self._processor.decode(ids)

    def _encode_with_space_symbol(self, text: str) -> list[int]:
        parts = self._processor.encode(text.split(_SPACE_SYMBOL))
        ids = list(parts[0])
        for part in parts[1:]:
            ids += self._space_symbol_ids + part
        return ids


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike[str],
    vocab_size: int,
    *,
    max_bytes: int = 20_000_000,
    character_coverage: float = 0.9999,
    num_threads: int = 2,
) -> SentencePieceTokenizer:
    """Trains a byte-pair model on the leading `max_bytes` of `texts` and writes it to `path`.

    The result depends on the texts, their order and the arguments alone. Ids 0 to 3 are padding,
    BOS, EOS and unknown; the 256 bytes follow.

    Args:
      texts: documents; put them in random order if they exceed `max_bytes`.
      path: where the `.model` file goes; an existing one is replaced.
      vocab_size: number of tokens, special ones and bytes included.
      character_coverage: share of the characters seen that get a piece; the rest become bytes.

    Raises:
      ValueError: no text, or `vocab_size` does not fit the text.
    """
    least = _NUM_SPECIAL + _NUM_BYTES + 1
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} is below {least}: 256 bytes, 4 special tokens and at least "
            "one piece; use 1024 or more"
        )
    model = io.BytesIO()
    lines = _training_lines(texts, max_bytes)
    first = next(lines, None)
    if first is None:
        raise ValueError("no text to train a tokenizer on: every document is empty")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_surface="\ufffd",
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            character_coverage=character_coverage,
            num_threads=num_threads,
            max_sentence_length=8 * _CHUNK_CHARS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_vocabulary_message(vocab_size, str(error))) from error
    _write_atomically(Path(path), model.getvalue())
    return SentencePieceTokenizer(path)


def _vocabulary_message(vocab_size: int, error: str) -> str:
    most = re.search(r"too high.*<= (\d+)", error)
    if most:
        return (
            f"vocab_size={vocab_size} is too large for this corpus, which supports at most "
            f"{most[1]}; lower vocab_size to {most[1]} or add text"
        )
    required = re.search(r"smaller than required_chars\D*(\d+)\D+(\d+)", error)
    if required:
        return (
            f"vocab_size={vocab_size} has no room for the corpus's {required[2]} characters and "
            f"special tokens; raise vocab_size above {required[2]} or lower character_coverage"
        )
    return f"SentencePiece could not train with vocab_size={vocab_size}: {error}"


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _training_lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines with their line ends, in pieces short enough that SentencePiece drops none."""
    seen = 0
    for text in texts:
        _check_encodable(text)
        # The trainer skips any sentence with these characters; at encoding they become bytes.
        for line in re.sub(f"[{_SPACE_SYMBOL}\0]", "\n", text).splitlines(keepends=True):
            for start in range(0, len(line), _CHUNK_CHARS):
                chunk = line[start : start + _CHUNK_CHARS]
                seen += len(chunk.encode())
                yield chunk
        if seen >= max_bytes:
            return


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate {text[error.start]!r} at character {error.start}, which "
            "UTF-8 cannot encode; decode the source with errors='replace'"
        ) from error


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
