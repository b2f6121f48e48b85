"""What every tokenizer offers."""

from collections.abc import Iterable, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Maps text to token ids in [0, vocab_size) and back.

    `decode(encode(text)) == text` for any text that UTF-8 can encode. `fingerprint` names the
    vocabulary: two tokenizers with the same fingerprint give the same ids.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, with `bos_id` in front and `eos_id` behind if asked."""
        ...

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, in parallel where the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; BOS, EOS and padding decode to nothing."""
        ...
