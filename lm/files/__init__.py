"""GGUF and safetensors files, and small models shipped in Python packages. Imports no JAX."""

from lm.files.base import FileFormatError, FormatError
from lm.files.gguf import GGUF, is_gguf, read_gguf
from lm.files.gguf_blocks import dequantize, quantize
from lm.files.gguf_writer import GGUFTensor, write_gguf
from lm.files.packaged import find_packaged
from lm.files.safetensors import Safetensors, open_safetensors
from lm.files.safetensors_writer import LazyTensor, write_safetensors, write_sharded

__all__ = [
    "GGUF",
    "FileFormatError",
    "FormatError",
    "GGUFTensor",
    "LazyTensor",
    "Safetensors",
    "dequantize",
    "find_packaged",
    "is_gguf",
    "open_safetensors",
    "quantize",
    "read_gguf",
    "write_gguf",
    "write_safetensors",
    "write_sharded",
]
