"""Vocabularies run by the `tokenizers` library: byte-level BPE, and BPE with byte fallback."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from lm.tokenizers.base import SPACE_SYMBOL, Tokenizer
from lm.tokenizers.declared import flatten


class FastTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` whose decoder is byte-level or byte-fallback.

    The library's post-processor is dropped: BOS and EOS, which are those that it added until
    `set_rules` says otherwise, are added by `encode` and `encode_prompt`.

    Args:
      tokenizer: modified in place.
      name: its origin, for errors.
      special: names of special tokens; by default those marked in the vocabulary.

    `serialized` is the tokenizer.json without a post-processor.

    Raises:
      ValueError: the decoder or post-processor is of another kind.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        name: str,
        special: Iterable[str] | None = None,
    ):
        self._tokenizer = tokenizer
        front, back = _added_by_post_processor(tokenizer, name)
        tokenizer.post_processor = tokenizers.processors.Sequence([])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.serialized = serialized = tokenizer.to_str()
        self.fingerprint = hashlib.sha256(serialized.encode()).hexdigest()[:32]
        layout = json.loads(serialized)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        added = {token["content"]: token for token in layout["added_tokens"]}
        self.strips_space, self.token_bytes = _bytes_of(layout, vocabulary, added, name)
        if special is None:
            special = [content for content, token in added.items() if token["special"]]
        self.special_tokens = {content: vocabulary[content] for content in special}
        self.set_rules({"bos": front, "eos": back, "pad": -1}, (), front >= 0, back >= 0, {}, {})
        model = layout["model"]
        unknown = vocabulary.get(model.get("unk_token"), model.get("unk_id"))
        self.unk_id = -1 if unknown is None else unknown
        # Whether the library parses special tokens is a flag of the whole object.
        self._plain = tokenizers.Tokenizer.from_str(serialized)
        self._plain.encode_special_tokens = True

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _encode_texts(
        self, texts: Sequence[str], parse_special: bool, num_threads: int
    ) -> list[list[int]]:
        tokenizer = self._tokenizer if parse_special else self._plain
        if len(texts) == 1:
            return [tokenizer.encode(texts[0], add_special_tokens=False).ids]
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def byte_alphabet() -> dict[str, int]:
    """The bytes of the characters that byte-level BPE (GPT-2) writes them as.

    Printable Latin-1 characters stand for themselves, the other bytes are U+0100 and on, in order.
    """
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in kept)
    return {chr(b): b for b in kept} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _added_by_post_processor(tokenizer: tokenizers.Tokenizer, name: str) -> tuple[int, int]:
    """Ids of the tokens put before and after a text; -1 for none."""
    text = "a"
    bare = tokenizer.encode(text, add_special_tokens=False).ids
    full = tokenizer.encode(text).ids
    for front in (0, 1):
        back = len(full) - len(bare) - front
        if full[front : front + len(bare)] == bare and back in (0, 1):
            return (full[0] if front else -1), (full[-1] if back else -1)
    raise ValueError(
        f"'{name}' puts more around a text than one BOS and one EOS token ({bare} becomes {full}); "
        "such tokenizers are not supported"
    )


def _bytes_of(
    layout: Mapping[str, Any], vocabulary: Mapping[str, int], added: Iterable[str], name: str
) -> tuple[bool, list[bytes]]:
    """Whether decoding removes a leading space, and the bytes of every id."""
    steps = flatten(layout["decoder"])
    kinds = [step["type"] for step in steps]
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    if kinds == ["ByteLevel"]:
        alphabet = byte_alphabet()
        for token, i in vocabulary.items():
            if token in added or not all(char in alphabet for char in token):
                table[i] = token.encode()
            else:
                table[i] = bytes(alphabet[char] for char in token)
        return False, table
    space = any(
        step["type"] == "Metaspace"
        or (step["type"] == "Replace" and step["pattern"] == {"String": SPACE_SYMBOL})
        for step in steps
    )
    if not space or not set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        raise ValueError(
            f"'{name}' decodes with {' + '.join(kinds) or 'nothing'}, which has no bytes for each "
            "token; byte-level BPE and SentencePiece-style vocabularies are supported"
        )
    strips = any(
        (step["type"] == "Strip" and step["start"] > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    fallback = {f"<0x{b:02X}>": bytes([b]) for b in range(256)} if "ByteFallback" in kinds else {}
    for token, i in vocabulary.items():
        table[i] = fallback.get(token) or token.replace(SPACE_SYMBOL, " ").encode()
    return strips, table
