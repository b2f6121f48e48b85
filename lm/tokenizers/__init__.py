"""Text to token ids and back, and messages to text. Without JAX."""

from lm.tokenizers.base import TextStream, Tokenizer
from lm.tokenizers.chat import ChatTemplate
from lm.tokenizers.fast import FastTokenizer
from lm.tokenizers.gguf import from_gguf
from lm.tokenizers.open import open_tokenizer
from lm.tokenizers.sandbox import TemplateError
from lm.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

__all__ = [
    "ChatTemplate",
    "FastTokenizer",
    "SentencePieceTokenizer",
    "TemplateError",
    "TextStream",
    "Tokenizer",
    "from_gguf",
    "open_tokenizer",
    "train_sentencepiece",
]
