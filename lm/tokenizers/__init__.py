"""Text to token ids and back, without loss."""

from lm.tokenizers.base import Tokenizer
from lm.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

__all__ = ["SentencePieceTokenizer", "Tokenizer", "train_sentencepiece"]
