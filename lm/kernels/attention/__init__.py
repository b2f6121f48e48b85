"""Attention: one function, several implementations."""

from lm.kernels.attention.choose import (
    IMPLEMENTATIONS,
    Implementation,
    attention,
    attention_backward,
    default_implementation,
)
from lm.kernels.attention.reference import View, mask, reference_attention
from lm.kernels.attention.scores import Scores
from lm.kernels.attention.slots import slots_attention

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "Scores",
    "View",
    "attention",
    "attention_backward",
    "default_implementation",
    "mask",
    "reference_attention",
    "slots_attention",
]
