"""Weights on disk: training checkpoints, and the formats of others."""

from lm.checkpoints.checksums import CheckpointError, DamagedError
from lm.checkpoints.gguf import load_gguf, read_gguf_config
from lm.checkpoints.huggingface import (
    from_tensors,
    load,
    read_config,
    save,
    to_tensors,
)
from lm.checkpoints.huggingface_config import from_huggingface, to_huggingface
from lm.checkpoints.model_json import register
from lm.checkpoints.models import Opened, open_any
from lm.checkpoints.opening import open_model, read_weights, weight_names
from lm.checkpoints.peft import load_peft, save_peft
from lm.checkpoints.quantized import load_quantized
from lm.checkpoints.reference import Reference
from lm.checkpoints.store import Checkpoints, Failure, Restored, SaveInterval

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DamagedError",
    "Failure",
    "Opened",
    "Reference",
    "Restored",
    "SaveInterval",
    "from_huggingface",
    "from_tensors",
    "load",
    "load_gguf",
    "load_peft",
    "load_quantized",
    "open_any",
    "open_model",
    "read_config",
    "read_gguf_config",
    "read_weights",
    "register",
    "save",
    "save_peft",
    "to_huggingface",
    "to_tensors",
    "weight_names",
]
