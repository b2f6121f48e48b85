"""Training checkpoints: named by path, checksummed, opened by path alone."""

from lm.checkpoints.checksums import CheckpointError, DamagedError
from lm.checkpoints.model_json import register
from lm.checkpoints.opening import open_checkpoint, read_weights, weight_names
from lm.checkpoints.reference import Reference
from lm.checkpoints.store import Checkpoints, Failure, Restored, SaveInterval

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DamagedError",
    "Failure",
    "Reference",
    "Restored",
    "SaveInterval",
    "open_checkpoint",
    "read_weights",
    "register",
    "weight_names",
]
