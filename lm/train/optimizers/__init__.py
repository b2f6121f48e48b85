"""Optimizers: AdamW, Muon, Adafactor, Lion and SOAP, with rules by path.

Each is a frozen dataclass of settings in a file of its own; `make_optimizer` makes of any of them
the `init`, `update` and `specs` that training calls.
"""

from typing import Any

from lm.train.optimizers.adafactor import Adafactor
from lm.train.optimizers.adamw import AdamW
from lm.train.optimizers.base import (
    Optimizer,
    OptimizerConfig,
    OptimizerState,
    PathRule,
    clip_by_global_norm,
    with_specs,
)
from lm.train.optimizers.lion import Lion
from lm.train.optimizers.muon import NEWTON_SCHULZ, Muon, orthogonalize
from lm.train.optimizers.soap import Soap


def make_optimizer(config: OptimizerConfig, weights: Any = None) -> Optimizer:
    """The directions of a configuration's optimizer; its state is float32.

    The step multiplies them by minus the learning rate and adds them to the weights.

    Args:
      config: the optimizer's settings.
      weights: specs of the weights; None where `init_state` and `make_train_step` know them.
    """
    return Optimizer(config, weights)


__all__ = [
    "NEWTON_SCHULZ",
    "Adafactor",
    "AdamW",
    "Lion",
    "Muon",
    "Optimizer",
    "OptimizerConfig",
    "OptimizerState",
    "PathRule",
    "Soap",
    "clip_by_global_norm",
    "make_optimizer",
    "orthogonalize",
    "with_specs",
]
