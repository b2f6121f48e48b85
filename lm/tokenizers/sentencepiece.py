"""SentencePiece (Kudo & Richardson, 2018, arXiv:1808.06226), trained here or elsewhere.

Models of `train_sentencepiece` are lossless: byte-pair encoding with byte fallback, identity
normalization, no dummy prefix and digits split, so `decode(encode(text)) == text` for every text
that UTF-8 can encode.
"""

import hashlib
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece

from lm.files.base import replacing
from lm.tokenizers import sentencepiece_model
from lm.tokenizers.base import SPACE_SYMBOL, Splitter, Tokenizer, check_encodable
from lm.tokenizers.sentencepiece_model import BYTE, CONTROL, UNKNOWN

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
_NUM_SPECIAL = 4
_NUM_BYTES = 256
_CHUNK_CHARS = 2048
_LEAST_COVERAGE = 0.98  # that SentencePiece takes
# The text of the unknown token in models of `train_sentencepiece`, and only there.
_UNK_SURFACE = "\ufffd"


class SentencePieceTokenizer(Tokenizer):
    """A trained SentencePiece model.

    Text between special tokens is encoded on its own, with SentencePiece's dummy prefix if the
    model has one, as llama.cpp does.

    Args:
      path: a `.model` file, or the name of `model` in errors.
      model: pieces and settings, instead of a file.
      proto: the content of a file, changed.
      always_special: tokens found in text before SentencePiece sees it, whether or not special
        tokens are parsed.

    Raises:
      FileNotFoundError: there is no file at `path`.
      ValueError: the file is not a SentencePiece model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: sentencepiece_model.Model | None = None,
        always_special: Mapping[str, int] | None = None,
        proto: bytes | None = None,
    ):
        self.path = Path(path)
        if model is not None:
            proto = sentencepiece_model.serialize(model)
        elif proto is None:
            if not self.path.is_file():
                raise FileNotFoundError(
                    f"no tokenizer model at '{path}'; train one with train_sentencepiece or check "
                    "the path"
                )
            proto = self.path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(proto)
            self.model = model = model or sentencepiece_model.parse(proto)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"'{path}' is not a SentencePiece model ({error}); pass the .model file"
            ) from error
        self.fingerprint = hashlib.sha256(proto).hexdigest()[:32]
        self.token_bytes = [_piece_bytes(model, i) for i in range(len(model.pieces))]
        self.special_tokens = {
            piece: i
            for i, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True))
            if kind in (CONTROL, UNKNOWN)
        }
        ids = {key: getattr(self._processor, f"{key}_id")() for key in ("bos", "eos", "pad")}
        self.set_rules(ids, (), ids["bos"] >= 0, False, {}, {})
        self.unk_id = self._processor.unk_id()
        self.strips_space = model.add_dummy_prefix
        self._always = Splitter(always_special or {})
        self._specials = Splitter({**self.special_tokens, **self._always.tokens})
        self._space_symbol_ids = []  # by itself SentencePiece would take the symbol for a space
        if model.unk_surface == _UNK_SURFACE and model.byte_fallback:
            symbols = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode()]
            self._space_symbol_ids = [self._processor.piece_to_id(symbol) for symbol in symbols]

    def id_of(self, token: str) -> int | None:
        return self.model.pieces.index(token) if token in self.model.pieces else None

    def _encode_texts(
        self, texts: Sequence[str], parse_special: bool, num_threads: int
    ) -> list[list[int]]:
        splitter = self._specials if parse_special else self._always
        awkward = self._space_symbol_ids and any(SPACE_SYMBOL in text for text in texts)
        if not splitter.tokens and not awkward:
            threads = 1 if len(texts) == 1 else num_threads
            return self._processor.encode(list(texts), num_threads=threads)
        return [self._encode_parts(splitter.split(text)) for text in texts]

    def _encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._encode_text(part)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        if not self._space_symbol_ids or SPACE_SYMBOL not in text:
            return self._processor.encode(text)
        encoded = self._processor.encode(text.split(SPACE_SYMBOL))
        ids = list(encoded[0])
        for part in encoded[1:]:
            ids += self._space_symbol_ids + part
        return ids

    def _offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for part in self._specials.split(text):
            if isinstance(part, int):
                length = len(self.model.pieces[part])
                ids.append(part)
                offsets.append((start, start + length))
            else:
                length, part_ids = len(part), self._encode_text(part)
                ids += part_ids
                offsets += self._part_offsets(part, part_ids, start)
            start += length
        return ids, offsets

    def _part_offsets(self, text: str, ids: Sequence[int], start: int) -> list[tuple[int, int]]:
        """Ranges by counting bytes: the tokens' bytes are the text, unless it is normalized."""
        prefix = b" " * self.model.add_dummy_prefix
        shown = text if self._space_symbol_ids else text.replace(SPACE_SYMBOL, " ")
        if b"".join(self.token_bytes[i] for i in ids) != prefix + shown.encode():
            raise ValueError(
                f"'{self.path}' normalizes text, so its tokens do not add up to {text[:60]!r}; "
                "offsets need a model with identity normalization"
            )
        character_of_byte = [n for n, char in enumerate(shown) for _ in char.encode()]
        offsets, at = [], -len(prefix)
        for i in ids:
            end = at + len(self.token_bytes[i])
            if end > 0:
                first, last = character_of_byte[max(at, 0)], character_of_byte[end - 1]
                offsets.append((start + first, start + last + 1))
            else:
                offsets.append((start, start))
            at = end
        return offsets


def _piece_bytes(model: sentencepiece_model.Model, token_id: int) -> bytes:
    piece, kind = model.pieces[token_id], model.types[token_id]
    if kind == BYTE:
        return bytes([int(piece[3:5], 16)])
    if kind in (CONTROL, UNKNOWN):
        return piece.encode()
    return piece.replace(SPACE_SYMBOL, " ").encode()


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
      texts: documents, in random order if they exceed `max_bytes`.
      path: the `.model` file to write; an existing one is replaced.
      vocab_size: number of tokens, including special ones and bytes.
      character_coverage: fraction of the characters that get a piece; the rest become bytes. Where
        the vocabulary has no room for them it is the rarest that become bytes.

    Raises:
      ValueError: there is no text, or `vocab_size` does not fit it.
    """
    least = _NUM_SPECIAL + _NUM_BYTES + 1
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} is below {least}: 256 bytes, 4 special tokens and at least "
            "one piece; use 1024 or more"
        )
    lines = list(_training_lines(texts, max_bytes))
    if not lines:
        raise ValueError("no text to train a tokenizer on: every document is empty")
    try:
        try:
            proto = _train(lines, vocab_size, character_coverage, num_threads)
        except RuntimeError as error:
            if "required_chars" not in str(error):
                raise
            # The pieces of the least vocabulary are all characters then.
            counts = sorted(Counter(itertools.chain.from_iterable(lines)).values(), reverse=True)
            coverage = sum(counts[: vocab_size - least]) / (sum(counts) + 1)
            if coverage < _LEAST_COVERAGE:
                raise
            proto = _train(lines, vocab_size, coverage, num_threads)
    except RuntimeError as error:
        raise ValueError(_vocabulary_message(vocab_size, str(error))) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(proto)
    return SentencePieceTokenizer(path)


def _train(
    lines: Iterable[str], vocab_size: int, character_coverage: float, num_threads: int
) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        normalization_rule_name="identity",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_surface=_UNK_SURFACE,
        pad_id=PAD_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        character_coverage=character_coverage,
        num_threads=num_threads,
        max_sentence_length=8 * _CHUNK_CHARS,
        minloglevel=2,
    )
    return model.getvalue()


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
            f"special tokens; raise vocab_size, to {required[2]} for all of them"
        )
    return f"SentencePiece could not train with vocab_size={vocab_size}: {error}"


def _training_lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines with their line ends, in pieces short enough that SentencePiece drops none."""
    seen = 0
    for text in texts:
        check_encodable(text)
        # The trainer skips sentences with these characters; encoding turns them into bytes.
        for line in re.sub(f"[{SPACE_SYMBOL}\0]", "\n", text).splitlines(keepends=True):
            for start in range(0, len(line), _CHUNK_CHARS):
                chunk = line[start : start + _CHUNK_CHARS]
                seen += len(chunk.encode())
                yield chunk
        if seen >= max_bytes:
            return
