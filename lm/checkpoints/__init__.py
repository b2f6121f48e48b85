"""Weights on disk: training checkpoints, and the formats of others."""

from lm.checkpoints.huggingface import (
    from_tensors,
    load,
    read_config,
    save,
    to_tensors,
)
from lm.checkpoints.huggingface_config import from_huggingface, to_huggingface
from lm.checkpoints.store import CheckpointError, Checkpoints, from_names, to_names

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "from_huggingface",
    "from_names",
    "from_tensors",
    "load",
    "read_config",
    "save",
    "to_huggingface",
    "to_names",
    "to_tensors",
]
