"""Weights in the formats of others: Hugging Face, GGUF, quantized directories, PEFT."""

from lm.formats.gguf.io import load_gguf, read_gguf_config
from lm.formats.huggingface.config import from_huggingface, to_huggingface
from lm.formats.huggingface.io import from_tensors, load, read_config, save, to_tensors
from lm.formats.open import Opened, open_any
from lm.formats.peft.io import load_peft, save_peft
from lm.formats.quantized.io import load_quantized

__all__ = [
    "Opened",
    "from_huggingface",
    "from_tensors",
    "load",
    "load_gguf",
    "load_peft",
    "load_quantized",
    "open_any",
    "read_config",
    "read_gguf_config",
    "save",
    "save_peft",
    "to_huggingface",
    "to_tensors",
]
