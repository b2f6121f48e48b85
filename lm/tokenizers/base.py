"""The interface of tokenizers, and their shared parts: special tokens, decoding, streams.

A token stands for bytes. Text is the bytes of a sequence decoded as UTF-8, with U+FFFD for each
maximal ill-formed part as Unicode recommends, so text streamed token by token equals text decoded
at once.
"""

import abc
import codecs
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# How SentencePiece writes a space inside pieces.
SPACE_SYMBOL = "\u2581"


class Tokenizer(abc.ABC):
    """Maps text to token ids in [0, vocab_size) and back.

    Attributes:
      fingerprint: identifies the vocabulary; tokenizers with the same one give the same ids.
      token_bytes: the bytes of each id, which for special tokens are those of their name; b"" for
        an id without a token.
      special_tokens: ids by name of the tokens that control the model rather than stand for text.
      named_tokens: tokens by the names that chat templates know them by, as "eos_token".
      num_rows: of the model that the tokenizer is used with; see `use_with`.
      bos_id, eos_id, pad_id: -1 if the model has none.
      unk_id: what stands for text without a token; -1 if every text has tokens.
      eos_ids: every token that ends a generation: end of text, of turn, of message.
      add_bos, add_eos: what the model expects around a prompt.
      strips_space: encoding adds a space in front of the text, which decoding removes.
      chat_templates: Jinja sources by name; "default" is the one to use.
    """

    fingerprint: str
    token_bytes: Sequence[bytes]
    special_tokens: Mapping[str, int]
    named_tokens: Mapping[str, Any] = {}
    num_rows: int | None = None
    bos_id: int = -1
    eos_id: int = -1
    pad_id: int = -1
    unk_id: int = -1
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    add_eos: bool = False
    strips_space: bool = False
    chat_templates: Mapping[str, str] = {}

    @abc.abstractmethod
    def _encode_texts(
        self, texts: Sequence[str], parse_special: bool, num_threads: int
    ) -> list[list[int]]:
        """Ids of each text, without BOS and EOS."""

    @abc.abstractmethod
    def _offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_with_offsets`, of text that UTF-8 can encode."""

    def set_rules(
        self,
        ids: Mapping[str, int],
        ends: Iterable[int],
        add_bos: bool,
        add_eos: bool,
        chat_templates: Mapping[str, str],
        named_tokens: Mapping[str, Any],
    ) -> None:
        """Take the rules of the files that the vocabulary came with.

        Args:
          ids: of `bos`, `eos` and `pad`, or -1.
          ends: tokens besides EOS that end a generation.
          add_bos, add_eos: the attributes; of no effect where there is no such token.
          chat_templates, named_tokens: the attributes.
        """
        self.bos_id, self.eos_id, self.pad_id = (ids[key] for key in ("bos", "eos", "pad"))
        known = (i for i in (self.eos_id, *ends) if 0 <= i < self.vocab_size)
        self.eos_ids = tuple(dict.fromkeys(known))
        self.add_bos, self.add_eos = add_bos and self.bos_id >= 0, add_eos and self.eos_id >= 0
        self.chat_templates, self.named_tokens = chat_templates, named_tokens

    def use_with(self, num_rows: int) -> None:
        """Fit the tokenizer to a model of `num_rows` rows.

        Rows without a token, from padding, become tokens without a text. Text that holds a token
        without a row, as text models have none for images, is an error from here on.
        """
        self.num_rows = num_rows
        self.token_bytes = [*self.token_bytes, *[b""] * (num_rows - self.vocab_size)]
        vars(self).pop("text_bytes", None)

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @functools.cached_property
    def text_bytes(self) -> Sequence[bytes]:
        """`token_bytes`, with b"" for special tokens."""
        table = list(self.token_bytes)
        for special in self.special_ids:
            table[special] = b""
        return table

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, *, parse_special: bool = False
    ) -> list[int]:
        """Token ids of `text`, optionally with `bos_id` in front and `eos_id` at the end.

        Args:
          parse_special: turn names of special tokens in `text` into those tokens. Off, so that
            text from outside cannot forge a turn.

        Raises:
          ValueError: `text` has a lone surrogate, or the model lacks the token asked for.
        """
        return self.encode_batch([text], bos, eos, parse_special=parse_special)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        bos: bool = False,
        eos: bool = False,
        num_threads: int = -1,
        *,
        parse_special: bool = False,
    ) -> list[list[int]]:
        """`encode` of each text, on `num_threads` threads (-1: one per core) if supported."""
        for text in texts:
            check_encodable(text)
        if bos and self.bos_id < 0:
            raise ValueError("bos=True, and this vocabulary has no BOS token; leave bos off")
        if eos and self.eos_id < 0:
            raise ValueError("eos=True, and this vocabulary has no EOS token; leave eos off")
        bodies = self._encode_texts(texts, parse_special, num_threads) if texts else []
        front, back = [self.bos_id] * bos, [self.eos_id] * eos
        return [self.with_rows(front + body + back) for body in bodies]

    def encode_prompt(self, text: str, opened: bool = False) -> list[int]:
        """Ids of a prompt as the model expects it: special tokens parsed, BOS and EOS added.

        A chat template may have written the BOS token already; it is not doubled.

        Args:
          opened: the text ends within a turn, which is to go on: no EOS.
        """
        ids = self.encode(text, parse_special=True)
        if self.add_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return self.with_rows(ids + [self.eos_id] * (self.add_eos and not opened))

    def with_rows(self, ids: list[int]) -> list[int]:
        """The same ids. Raises ValueError if the model has no row for one of them."""
        if self.num_rows is not None and max(ids, default=0) >= self.num_rows:
            first = next(i for i in ids if i >= self.num_rows)
            raise ValueError(
                f"the text holds the token {self.token_bytes[first].decode('utf-8', 'replace')!r} "
                f"({first}), and the model has only {self.num_rows} rows; leave the token out, or "
                "use the model's own tokenizer"
            )
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text` with special tokens parsed, and the characters [start, end) of each.

        Tokens that share a character each get its whole range.
        """
        check_encodable(text)
        ids, offsets = self._offsets(text)
        return self.with_rows(ids), offsets

    def decode(
        self, ids: Iterable[int], skip_special: bool = True, continuation: bool = False
    ) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD.

        Args:
          skip_special: omit special tokens instead of writing their names.
          continuation: `ids` follow other tokens, so a leading space is text.

        Raises:
          ValueError: an id outside [0, vocab_size).
        """
        return self.decode_bytes(ids, skip_special, continuation).decode("utf-8", "replace")

    def decode_bytes(
        self, ids: Iterable[int], skip_special: bool = True, continuation: bool = False
    ) -> bytes:
        """The bytes that `decode` reads as UTF-8; arguments and errors are the same."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            self.check_id(next(i for i in ids if not 0 <= i < self.vocab_size))
        table = self.text_bytes if skip_special else self.token_bytes
        pieces = [table[i] for i in ids]
        if self.strips_space and not continuation:
            first = next((n for n, i in enumerate(ids) if i not in self.special_ids), None)
            if first is not None:
                pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces)

    def stream(self, skip_special: bool = True, continuation: bool = False) -> "TextStream":
        """Decodes token by token; the pieces add up to `decode` with the same arguments."""
        return TextStream(self, skip_special, continuation)

    def check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is outside the vocabulary [0, {self.vocab_size}); mask "
                "padded vocabulary rows before sampling"
            )


class TextStream:
    """Text of a growing sequence; a character is emitted once its last byte has arrived."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, continuation: bool):
        self._tokenizer = tokenizer
        self._table = tokenizer.text_bytes if skip_special else tokenizer.token_bytes
        self._at_start = tokenizer.strips_space and not continuation
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes.

        Raises:
          ValueError: an id outside [0, vocab_size).
        """
        token_id = int(token_id)
        self._tokenizer.check_id(token_id)
        content = self._table[token_id]
        if self._at_start and token_id not in self._tokenizer.special_ids:
            self._at_start = False
            content = content.removeprefix(b" ")
        return self._decoder.decode(content)

    def finish(self) -> str:
        """The rest: an unfinished character, as U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


class Splitter:
    """Finds given strings in text, the longest at each position, from left to right.

    Candidates are found by their first two characters, so thousands of strings cost no more
    than a few (Gemma has 6,400).
    """

    def __init__(self, tokens: Mapping[str, int]):
        self.tokens = dict(tokens)
        if "" in self.tokens:
            raise ValueError(f"token {self.tokens['']} is empty; a special token needs a name")
        lengths: dict[str, set[int]] = defaultdict(set)
        for token in self.tokens:
            lengths[token[:2]].add(len(token))
        for start in lengths:
            if start[0] in self.tokens:
                lengths[start].add(1)
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        starts = sorted(self._lengths, key=len, reverse=True)
        self._starts = re.compile("|".join(map(re.escape, starts))) if starts else None

    def split(self, text: str) -> list[str | int]:
        """The tokens as ids, and the non-empty text between them."""
        parts: list[str | int] = []
        done, at = 0, 0
        while self._starts and (match := self._starts.search(text, at)):
            at = match.start()
            for length in self._lengths[match[0]]:
                token = text[at : at + length]
                if token in self.tokens:
                    if done < at:
                        parts.append(text[done:at])
                    parts.append(self.tokens[token])
                    done = at = at + len(token)
                    break
            else:
                at += 1
        if done < len(text):
            parts.append(text[done:])
        return parts


def check_encodable(text: str) -> None:
    """Raises ValueError for a lone surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate {text[error.start]!r} at character {error.start}, which "
            "UTF-8 cannot encode; decode the source with errors='replace'"
        ) from error
