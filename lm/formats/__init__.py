"""Weights in the formats of others: Hugging Face, GGUF, quantized directories, PEFT."""

from lm.formats.gguf.io import load_gguf, read_gguf_config
from lm.formats.huggingface.config import from_huggingface, to_huggingface
from lm.formats.huggingface.io import (
    from_tensors,
    load_huggingface,
    read_config,
    save_huggingface,
    to_tensors,
)
from lm.formats.open import Pretrained, load_pretrained
from lm.formats.peft.io import load_peft, save_peft
from lm.formats.quantized.io import load_quantized

__all__ = [
    "Pretrained",
    "from_huggingface",
    "from_tensors",
    "load_gguf",
    "load_huggingface",
    "load_peft",
    "load_pretrained",
    "load_quantized",
    "read_config",
    "read_gguf_config",
    "save_huggingface",
    "save_peft",
    "to_huggingface",
    "to_tensors",
]
